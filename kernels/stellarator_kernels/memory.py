"""Memory of large results on a CPU: used again instead of mapped anew for every tensor.

defines: empty, empty_like, aligned_bytes, arena, reset_peak, trim, ARENA_VARIABLE

The C library gives a large block back to the system as soon as it is freed, and the next one costs
a page fault for every 4 KiB. Results of a mebibyte and more therefore come from a range of
addresses that stays with the process (csrc/cpu/arena.h); torch gives them back to it when their
last view dies; `trim` gives what is free at its end back to the system. On a GPU torch's own
allocator does the same. Like other memory that torch did not allocate, it cannot grow in place:
`resize_` and `out=` beyond its size raise torch's error.

STELLARATOR_ARENA=0 turns it off: a tool that watches every allocation then sees these too.
"""

import functools
import math
import os

import torch
from torch.utils.dlpack import from_dlpack

from stellarator_kernels import extension

ARENA_VARIABLE = "STELLARATOR_ARENA"
_LEAST_BYTES = 1 << 20
_MOST_BYTES = 1 << 60  # torch has an error for sizes that are no numbers of 64 bits
# DLPack's codes of the kinds of numbers, and bits.
_CODES = {
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.uint8: (1, 8),
}


@functools.cache
def _usable() -> bool:
    return os.environ.get(ARENA_VARIABLE, "") != "0" and extension.failure() is None


def empty(shape, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """torch.empty; large results on a CPU lie in the arena.

    torch fills fresh memory with NaN where it was told to
    (`torch.utils.deterministic.fill_uninitialized_memory`), and so does this.
    """
    size = math.prod(shape) * dtype.itemsize
    on_cpu = torch.device(device).type == "cpu"
    if not _LEAST_BYTES <= size < _MOST_BYTES or not on_cpu or dtype not in _CODES or not _usable():
        return torch.empty(shape, dtype=dtype, device=device)
    capsule = extension.load().arena_empty(list(shape), *_CODES[dtype])
    if capsule is None:
        return torch.empty(shape, dtype=dtype, device=device)
    x = from_dlpack(capsule)
    if (
        torch.are_deterministic_algorithms_enabled()
        and torch.utils.deterministic.fill_uninitialized_memory
    ):
        x.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
    return x


def empty_like(x: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A dense tensor of the shape of x, or of the given one, with its device and dtype."""
    return empty(shape or x.shape, dtype or x.dtype, x.device)


def aligned_bytes(size: int) -> tuple[torch.Tensor, int]:
    """Scratch memory: a tensor that keeps it alive, and an address in it that 64 divides."""
    buffer = empty((size + 64,), torch.uint8, "cpu")
    return buffer, -(-buffer.data_ptr() // 64) * 64


def arena() -> dict[str, int]:
    """Bytes: "reserved" (addresses; 0: no arena), "used" now, "high" (what may be resident, since
    `trim`), "peak" (the most that was used since `reset_peak`)."""
    names = ("reserved", "used", "high", "peak")
    if not _usable():
        return dict.fromkeys(names, 0)
    return dict(zip(names, extension.load().arena_state(), strict=True))


def reset_peak() -> None:
    """Begin the "peak" of `arena` anew."""
    if _usable():
        extension.load().arena_reset_peak()


def trim() -> None:
    """Give the pages above the arena's last block back to the system.

    A step that needs them again pays a page fault for each: call it after the odd large one only.
    """
    if _usable():
        extension.load().arena_trim()
