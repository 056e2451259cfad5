"""What the three attention kernels share: tile sizes, and who sees whom.

Causal order, a window, packed documents and T != S are all one thing: every query sees one interval
of keys, and every key is seen by one interval of queries. A tile of rows takes the interval of each
of its rows; blocks outside all of them are skipped, blocks inside all of them need no mask.

defines: Tiles, tile_sizes, shared_memory_limit, document_bounds, last_contiguous, constants,
    on_device, key_interval, query_interval, block_ranges,
    loop_bounds, edge_block, load_tile, dot
"""

import contextlib
from dataclasses import dataclass

import torch

from stellarator_kernels import _triton
from stellarator_kernels._triton import tl, triton


@dataclass(frozen=True)
class Tiles:
    """One launch: rows that a program owns, rows of a step of its loop, and the launch options."""

    own: int
    step: int
    num_warps: int
    num_stages: int


# (own, step, num_warps, num_stages) by padded head width, for 16-bit types: large shared memory
# (sm_80 163 KB, sm_90 and sm_100 227 KB), then small (sm_86, sm_89, sm_120 99 KB).
_LARGE = {
    "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 4, 2)},
    "dq": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
    "dkdv": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
}
_INTERPRETER = Tiles(32, 16, 4, 1)


def shared_memory_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may take on a GPU of this compute capability."""
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    return 227 * 1024 if capability[0] in (9, 10, 11) else 99 * 1024


def tile_sizes(
    phase: str, D: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> Tiles:
    """Tiles for one kernel ("forward", "dq", "dkdv"); capability None: Triton's interpreter. Pure."""
    if capability is None:
        return _INTERPRETER
    own, step, num_warps, num_stages = _LARGE[phase][max(64, triton.next_power_of_2(D))]
    return Tiles(own, step, num_warps, num_stages)


def document_bounds(cu_seqlens: torch.Tensor, N: int) -> torch.Tensor:
    """(2, N) int32: start and end of the document of each token. Does not wait for the device."""
    tokens = torch.arange(N, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.bucketize(tokens, cu_seqlens[1:-1], right=True, out_int32=True)
    return torch.stack((cu_seqlens[document], cu_seqlens[document + 1])).clamp_(0, N)


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def constants(D: int, dtype: torch.dtype, tiles: Tiles) -> dict:
    """Compile-time arguments that every kernel takes."""
    return {
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "OWN": tiles.own,
        "STEP": tiles.step,
        "UPCAST": _triton.INTERPRETED and dtype != torch.float32,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def on_device(x: torch.Tensor):
    """Triton launches on the current device, which need not be that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def key_interval(
    rows, T, S, window, bounds_ptr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """[first, last) of the keys that each query row sees; empty where last <= first.

    Rows past the end repeat the last one, so that they do not widen the range of their tile.
    """
    rows = tl.minimum(rows, T - 1)
    if PACKED:
        first = tl.load(bounds_ptr + rows)
        last = tl.load(bounds_ptr + T + rows)
    else:
        first = rows * 0
        last = first + S
    if CAUSAL:
        last = tl.minimum(last, tl.maximum(rows + (S - T) + 1, 0))
    if WINDOW:
        first = tl.maximum(first, rows + (S - T) + 1 - window)
    return first, last


@triton.jit
def query_interval(
    keys, T, S, window, bounds_ptr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """[first, last) of the query rows that see each key: the transpose of `key_interval`."""
    keys = tl.minimum(keys, S - 1)
    if PACKED:
        first = tl.load(bounds_ptr + keys)
        last = tl.load(bounds_ptr + T + keys)
    else:
        first = keys * 0
        last = first + T
    if CAUSAL:
        first = tl.maximum(first, keys - (S - T))
    if WINDOW:
        last = tl.minimum(last, tl.maximum(keys - (S - T) + window, 0))
    return first, last


@triton.jit
def block_ranges(first, last, STEP: tl.constexpr):
    """(begin, inner, inner_end, end): blocks in [inner, inner_end) lie inside every interval.

    [begin, inner) and [inner_end, end) are the edges: some rows see some of it, so it needs a mask.
    """
    begin = tl.min(first) // STEP * STEP
    end = tl.max(last)
    inner = tl.minimum(tl.cdiv(tl.max(first), STEP), tl.cdiv(end, STEP)) * STEP
    inner = tl.maximum(inner, begin)
    inner_end = tl.maximum(inner, tl.min(last) // STEP * STEP)
    return begin, inner, inner_end, end


@triton.jit
def loop_bounds(ranges, EDGES: tl.constexpr):
    """start, stop of one loop: over the inner blocks, or over both edges in one go.

    One loop for both edges, since a third copy of the body costs registers that are not there.
    """
    begin, inner, inner_end, end = ranges
    if EDGES:
        return begin, end - (inner_end - inner)
    return inner, inner_end


@triton.jit
def edge_block(block, ranges):
    """The block for which an index of the loop over both edges stands: it leaps over the inner ones."""
    begin, inner, inner_end, end = ranges
    return block + tl.where(block >= inner, inner_end - inner, 0)


@triton.jit
def load_tile(
    x_ptr, rows, row_stride, num_rows, cols, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """(len(rows), BLOCK_D) of a (num_rows, D) matrix; 0 outside."""
    pointers = x_ptr + rows[:, None].to(tl.int64) * row_stride + cols[None, :]
    if MASK_ROWS:
        if BLOCK_D == D:
            return tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)
        return tl.load(
            pointers, mask=(rows < num_rows)[:, None] & (cols < D)[None, :], other=0.0
        )
    if BLOCK_D == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(cols < D)[None, :], other=0.0)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a @ b with fp32 accumulation; fp32 operands are not cut to TF32.

    UPCAST: the interpreter multiplies bf16 operands wrongly (Triton 3.6 to 3.9).
    """
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
