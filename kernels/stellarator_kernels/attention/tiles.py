"""What the three attention kernels share: tile sizes, and who sees whom.

Causal order, a window, packed documents and T != S are all one thing: every query sees one interval
of keys, and every key is seen by one interval of queries. A tile of rows takes the interval of each
of its rows: blocks outside all of them are skipped, and only blocks that are not inside all of them
are masked. Each kernel is one loop with that branch in it. Separate loops for the edges and the
inside, the usual form, make copies of the body and spill registers: 470 bytes for dk and dv of bf16
heads of 128 on sm_90, where this form spills none.

defines: Tiles, tile_sizes, backward_design, document_bounds, constants, extras, key_interval,
    query_interval, walk, head_of, load_tile, scores_of, slope_of, mask_scores, dot
"""

from dataclasses import dataclass

import torch

from stellarator_kernels import _triton, random, tuned
from stellarator_kernels._triton import tl, triton


@dataclass(frozen=True)
class Tiles:
    """One launch: rows that a program owns, rows of a step of its loop, and the launch options."""

    own: int
    step: int
    num_warps: int
    num_stages: int


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
    if capability is None:
        return Tiles(*_INTERPRETER)
    if dtype == torch.float32:
        return Tiles(*_FP32[phase])
    table = _HOPPER if capability[0] in (9, 10, 11) else _AMPERE
    own, step, num_warps, num_stages = table[phase][max(64, width)]
    if phase != "forward" and (softcap or D not in (64, width)):
        own, step = own if phase == "dq" else min(own, 64), 32
    if phase == "forward" and dropout:
        step = min(step, 64)
    return Tiles(own, step, num_warps, num_stages)


def backward_design(deterministic: bool, D: int, gpu: str) -> str:
    """Which backward runs (see backward.py).

    No GPU has raced "split" and "ordered" so far: where no table knows better, the simpler one.
    """
    phase = "backward" if deterministic else "backward in any order"
    width = max(64, triton.next_power_of_2(D))
    default = {"design": "split" if deterministic else "atomic"}
    return (tuned.lookup(gpu, f"flash_attention {phase} {width}") or default)["design"]


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
def head_of(x_ptr, batch, stride_batch, head, stride_head):
    """Where one head of one batch row begins; strides in UNITs of 8, batch and head int64."""
    return x_ptr + (batch * stride_batch + head * stride_head) * 8


@triton.jit
def load_tile(
    x_ptr, rows, row_stride, num_rows, cols, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(len(rows), BLOCK_D) of a (num_rows, D) matrix; 0 outside. The stride is in UNITs of 8."""
    pointers = x_ptr + rows[:, None].to(tl.int64) * row_stride * 8 + cols[None, :]
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
