"""What the three attention kernels share: tile sizes, and who sees whom.

Causal order, a window, packed documents and T != S are all one thing: every query sees one interval
of keys, and every key is seen by one interval of queries. A tile of rows takes the interval of each
of its rows: blocks outside all of them are skipped, and only blocks that are not inside all of them
are masked. Each kernel is one loop with that branch in it. Separate loops for the edges and the
inside, the usual form, make copies of the body and spill registers: 470 bytes for dk and dv of bf16
heads of 128 on sm_90, where this form spills none.

defines: Tiles, tile_sizes, turns_dq, Chip, chip, heads_together, row_grid,
    group_splits, with_scratch, document_bounds, constants, extras, key_interval, query_interval,
    walk, head_and_batch, head_of, rows_of, load_tile, scores_of, slope_of, mask_scores, dot
"""

import contextvars
import functools
from dataclasses import dataclass

import torch

from stellarator_kernels import _triton, random, tuned
from stellarator_kernels._triton import tl, triton


@dataclass(frozen=True)
class Tiles:
    """One launch: rows that a program owns, rows of a step of its loop, and the launch options.

    tma: 1 if tiles are loaded by the GPU's copy engine, through descriptors (sm_90 and newer).
    specialize: 1 if some warps load and others compute. Needs tma; every block is masked then.
    """

    own: int
    step: int
    num_warps: int
    num_stages: int
    tma: int = 0
    specialize: int = 0


# (own, step, num_warps, num_stages) by padded head width. Chosen by compiling: no spills, and
# within shared memory. _HOPPER needs up to 160 KB (sm_90; sm_100 gets it too, untried). _AMPERE
# fits the 99 KB of sm_86, sm_89 and sm_120. _FP32 has no tensor cores and spills: for tests.
_HOPPER = {
    "forward": {64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 32, 8, 2)},
    "dq": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "dkdv": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    "dqdkdv": {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
}
_AMPERE = {
    "forward": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "dq": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
    "dkdv": {64: (128, 32, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    "dqdkdv": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
}
_FP32 = {"forward": (32, 32, 4, 1)} | dict.fromkeys(("dq", "dkdv", "dqdkdv"), (16, 16, 4, 1))
_INTERPRETER = (32, 16, 4, 1)  # small, so that short sequences have edges and an inside


def tile_sizes(
    phase: str,
    D: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    softcap: bool = False,
    dropout: bool = False,
    gpu: str = "",
) -> Tiles:
    """Tiles of one kernel: "forward", "dq", "dkdv", or "dqdkdv" for dkdv that adds to dq, too.

    "forward packed" is the forward of documents, raced apart: Triton does not specialise it at 128
    own rows, since it cannot share out loads of each row's bounds.

    A function of its arguments and of the files of tuned.py; capability None is the interpreter.

    The slope of a softcap, the keys of dropout and the masks of a width that is filled up take
    registers that are not there: their steps are smaller.
    """
    width = triton.next_power_of_2(D)
    plain = not softcap and not dropout and D in (64, width)
    if plain and (capability is None or dtype != torch.float32):
        entry = tuned.lookup(gpu, f"flash_attention {phase} {max(64, width)}")
        if entry is not None:
            return Tiles(**entry)
    phase = phase.removesuffix(" packed")
    if capability is None:
        return Tiles(*_INTERPRETER)
    if dtype == torch.float32:
        return Tiles(*_FP32[phase])
    table = _HOPPER if capability[0] in (9, 10, 11) else _AMPERE
    own, step, num_warps, num_stages = table[phase][max(64, width)]
    crowded = softcap or D not in (64, width) or (dropout and capability[0] >= 10)
    if phase != "forward" and crowded:
        own, step = own if phase == "dq" else min(own, 64), 32
    if phase == "forward" and (dropout or D not in (64, width)):
        step = min(step, 64)
    return Tiles(own, step, num_warps, num_stages)


def turns_dq(step: int, capability: tuple[int, int] | None) -> bool:
    """Whether the share of dq of some keys is made as its transpose.

    The matrix instruction of sm_90 makes 64 rows at least, so one of fewer query rows would fall
    back to that of sm_80. There the turned product spills.
    """
    return capability is not None and capability[0] == 9 and step < 64


@dataclass(frozen=True)
class Chip:
    """What the order and the number of programs depend on."""

    num_sms: int
    cache_bytes: int  # of the cache that all SMs share


@functools.cache
def chip(device: torch.device) -> Chip:
    """That of a device; for the interpreter one so small that short sequences fill it."""
    if device.type != "cuda":
        return Chip(num_sms=4, cache_bytes=2**14)
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.L2_cache_size)


def heads_together(G: int, group: int, S: int, D: int, itemsize: int, cache_bytes: int) -> int:
    """Query heads whose tiles of rows are started in turns: whole groups, a divisor of H.

    All rows of these heads come before the next ones, longest first. The more together, the better
    the balance at the end; but their keys and values should stay in half of the cache.
    """
    fitting = cache_bytes // 2 // (2 * S * D * itemsize)
    return group * max(n for n in range(1, G + 1) if G % n == 0 and (n == 1 or n <= fitting))


def row_grid(q: torch.Tensor, k: torch.Tensor, own: int) -> tuple[int, int, int]:
    """The grid of a kernel whose programs own rows of a query head; see `head_and_batch`."""
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    cache_bytes = chip(q.device).cache_bytes
    together = heads_together(G, H // G, S, D, q.element_size(), cache_bytes)
    return together, triton.cdiv(T, own), B * (H // together)


def group_splits(programs: int, group: int, num_sms: int) -> int:
    """Into how many parts the query heads of a group go, for dk and dv.

    One where there are two programs for each SM, enough to even out their lengths. The gradients
    of the parts are added afterwards, in fp32 and in one order.
    """
    most = -(-group // min(group, max(1, -(-2 * num_sms // programs))))
    return -(-group // most)


def with_scratch(launcher):
    """For functions that launch kernels with descriptors: these are written to scratch memory.

    Triton takes it from a setting of the context, which stays as the caller has it. The first
    argument is a tensor of the device.
    """

    @functools.wraps(launcher)
    def run(x, *args, **kwargs):
        def launch():
            triton.set_allocator(
                lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device)
            )
            return launcher(x, *args, **kwargs)

        return contextvars.copy_context().run(launch) if x.is_cuda else launcher(x, *args, **kwargs)

    return run


def document_bounds(cu_seqlens: torch.Tensor, N: int) -> torch.Tensor:
    """(2, N) int32: start and end of the document of each token. Does not wait for the device."""
    tokens = torch.arange(N, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.bucketize(tokens, cu_seqlens[1:-1], right=True, out_int32=True)
    return torch.stack((cu_seqlens[document], cu_seqlens[document + 1])).clamp_(0, N)


def constants(D: int, dtype: torch.dtype, tiles: Tiles) -> dict:
    """Compile-time arguments that every kernel takes."""
    return {
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "OWN": tiles.own,
        "STEP": tiles.step,
        "UPCAST": _triton.INTERPRETED and dtype != torch.float32,
        "TMA": bool(tiles.tma),
        "SPECIALIZE": bool(tiles.specialize),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def extras(softcap: float | None, dropout_p: float, keys: tuple | None, other) -> dict:
    """Arguments for softcap and dropout. `other`: any tensor, for pointers that are not read."""
    row_keys, column_keys = (other, other) if keys is None else keys
    return {
        "softcap": 1.0 if softcap is None else softcap,
        "row_key_ptr": row_keys,
        "column_key_ptr": column_keys,
        "least": random.threshold(dropout_p),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "SOFTCAP": softcap is not None,
        "DROPOUT": keys is not None,
    }


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
def walk(first, last, STEP: tl.constexpr):
    """begin, end, inner, inner_end: the blocks to visit, and where they need no mask.

    The blocks start at `begin`, a multiple of STEP, and reach past `end`; one in [inner, inner_end)
    is seen whole by every row of the tile.
    """
    begin = tl.min(first) // STEP * STEP
    return begin, tl.max(last), tl.max(first), tl.min(last)


@triton.jit
def head_and_batch(H):
    """Query head and batch row of a program of `row_grid`, int64."""
    together = tl.num_programs(0)
    turns = H // together
    head = tl.program_id(2) % turns * together + tl.program_id(0)
    return head.to(tl.int64), (tl.program_id(2) // turns).to(tl.int64)


@triton.jit
def head_of(x_ptr, batch, stride_batch, head, stride_head):
    """Where one head of one batch row begins; strides in UNITs of 8, batch and head int64."""
    return x_ptr + (batch * stride_batch + head * stride_head) * 8


@triton.jit
def rows_of(
    x_ptr, num_rows, num_cols, row_stride,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What `load_tile` reads a (num_rows, num_cols) matrix through: a descriptor, or its pointer.

    A descriptor is for the GPU's own copy engine (TMA, sm_90 and newer). The stride is in UNITs.
    """
    if TMA:
        return tl.make_tensor_descriptor(
            x_ptr, [num_rows, num_cols], [row_stride.to(tl.int64) * 8, 1], [ROWS, BLOCK_D]
        )
    else:
        return x_ptr


@triton.jit
def load_tile(
    source, start, column, num_rows, row_stride, cols,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK_D) of a matrix from row `start` and from `column` on; 0 past the last row.

    Columns past D are 0; for TMA, D is BLOCK_D. The stride is in UNITs of 8.
    """
    if TMA:
        return source.load([start, column])
    else:
        rows = start + tl.arange(0, ROWS)
        pointers = source + rows[:, None].to(tl.int64) * row_stride * 8 + column + cols[None, :]
        inside = (rows < num_rows)[:, None]
        if BLOCK_D != D:
            inside &= (cols < D)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def scores_of(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2 from q k^T: scaled, and capped by softcap * tanh(score / softcap).

    tanh(x) = 2 sigmoid(2x) - 1, off by at most 1e-7: the interpreter has no tanh.
    """
    if SOFTCAP:
        x = products * (2.0 * scale / softcap)
        return (2.0 * tl.sigmoid(x) - 1.0) * (softcap * 1.4426950408889634)
    else:
        return products * (scale * 1.4426950408889634)


@triton.jit
def slope_of(scores, softcap):
    """Derivative of the cap by the uncapped score, from capped scores in units of log 2."""
    ratio = scores * (0.6931471805599453 / softcap)
    return 1.0 - ratio * ratio


@triton.jit
def mask_scores(scores, first, last, others):
    """-inf where the row of a score does not see its column; `others` are its columns."""
    visible = (others[None, :] >= first[:, None]) & (others[None, :] < last[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a @ b with fp32 accumulation; fp32 operands are not cut to TF32.

    UPCAST: the interpreter multiplies bf16 operands wrongly (Triton 3.6 to 3.9).
    """
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
