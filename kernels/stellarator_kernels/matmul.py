"""What the products in Triton share: tiles, their order, and the loop over the inner width.

out (M, N) = a (M, K) @ b (K, N), 16-bit or fp32 operands, fp32 accumulators. A program makes one
tile of out after the other; what a kernel does to the accumulators is its epilogue (mlp.py,
weight_gradient.py), so nothing is written only to be read again.

Tiles are taken in groups: GROUP rows of tiles, column by column, so that programs that run at the
same time read few rows of a and of b, and most of them from the cache. There is a program for each
tile, or, if `persistent`, one for each SM, which takes every num_programs-th tile.

An operand lies in memory as the product needs it, or turned: then its tiles are transposed after
they are loaded, which the matrix instructions of 16-bit operands do for free. Row strides and
widths are passed in UNITs of 8 elements (layout.py), so loads are whole at any multiple of 8.

An epilogue that loads as many values as there are accumulators takes the columns of a tile in
`parts`, one after the other: all at once spills 8,008 bytes (dgelu, 128 x 256, sm_90, Triton 3.9).

Source: grouped order, persistent loop and epilogue in parts, Triton's tutorials 03 and 09.

defines: Tiles, PHASES, tile_sizes, num_programs, constants, tile_at, matrix, tile_product,
    where_of, halves
"""

from dataclasses import dataclass

import torch

from stellarator_kernels import _triton, tuned
from stellarator_kernels._triton import tl, triton


@dataclass(frozen=True)
class Tiles:
    """One launch: a tile of the result, the step of the inner loop, and the launch options.

    parts: 1, 2, 4 or 8, into which the epilogue cuts the columns of a tile.
    group: rows of tiles that are walked together.
    tma: 1 if operands are loaded by the GPU's copy engine, through descriptors (sm_90 and newer).
    persistent: 1 for one program per SM.
    flatten: 1 to make its loop over tiles and the one over the inner width one loop, so that the
        loads of the next tile lie under the epilogue; for persistent programs.
    """

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int
    parts: int
    group: int = 8
    tma: int = 0
    persistent: int = 0
    flatten: int = 0


# (rows, cols, depth, num_warps, num_stages, parts) by phase. Chosen by compiling: no spills, and
# within shared memory. _AMPERE fits the 99 KB of sm_86, sm_89 and sm_120. _FP32 has no tensor
# cores: for tests.
PHASES = ("up", "down gradient", "weight gradient")
_HOPPER = dict.fromkeys(PHASES, (128, 256, 64, 8, 4, 8)) | {"up": (128, 256, 64, 8, 4, 4)}
_AMPERE = dict.fromkeys(PHASES, (128, 128, 32, 8, 4, 2))
_FP32 = (32, 64, 16, 4, 2, 1)
_INTERPRETER = (32, 16, 16, 4, 1, 2, 2)  # small, so that small matrices have edges and an inside


def tile_sizes(
    phase: str, dtype: torch.dtype, capability: tuple[int, int] | None, gpu: str = ""
) -> Tiles:
    """Tiles of one kernel, of PHASES: x @ weight^T, dy @ weight, dy^T @ x.

    A function of its arguments and of the files of tuned.py, whose entries are called "matmul up"
    and so on; capability None is the interpreter.
    """
    if capability is None or dtype != torch.float32:
        entry = tuned.lookup(gpu, f"matmul {phase}")
        if entry is not None:
            return Tiles(**entry)
    if capability is None:
        return Tiles(*_INTERPRETER)
    if dtype == torch.float32:
        return Tiles(*_FP32)
    return Tiles(*(_HOPPER if capability[0] in (9, 10, 11) else _AMPERE)[phase])


def num_programs(M: int, N: int, tiles: Tiles, num_sms: int) -> int:
    """How many programs make an (M, N) result."""
    number = -(-M // tiles.rows) * -(-N // tiles.cols)
    return min(number, num_sms) if tiles.persistent else number


def constants(dtype: torch.dtype, K: int, tiles: Tiles) -> dict:
    """Compile-time arguments that every kernel takes; K is the inner width."""
    return {
        "EVEN_K": K % tiles.depth == 0,
        "ROWS": tiles.rows,
        "COLS": tiles.cols,
        "DEPTH": tiles.depth,
        "PARTS": tiles.parts,
        "GROUP": tiles.group,
        "TMA": bool(tiles.tma),
        "FLATTEN": bool(tiles.flatten),
        "UPCAST": _triton.INTERPRETED and dtype != torch.float32,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


@triton.jit
def tile_at(number, M, N, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of a tile, of cdiv(M, ROWS) * cdiv(N, COLS)."""
    down, across = tl.cdiv(M, ROWS), tl.cdiv(N, COLS)
    first = number // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = number % (GROUP * across)
    return (first + inside % height) * ROWS, inside // height * COLS


@triton.jit
def matrix(
    x_ptr, num_rows, num_cols, stride_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What tiles of a (num_rows, num_cols) matrix are loaded through: a descriptor, or its pointer.

    The stride is in UNITs.
    """
    if TMA:
        return tl.make_tensor_descriptor(
            x_ptr, [num_rows, num_cols], [stride_row.to(tl.int64) * 8, 1], [ROWS, COLS]
        )
    else:
        return x_ptr


@triton.jit
def _load_tile(
    source, row, col, num_rows, num_cols, stride_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
    EDGE_ROWS: tl.constexpr, EDGE_COLS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLS) from (row, col) on; 0 past the matrix, at the edges that it may reach over."""
    if TMA:
        return source.load([row, col])
    else:
        rows = row + tl.arange(0, ROWS)[:, None]
        cols = col + tl.arange(0, COLS)[None, :]
        pointers = source + rows.to(tl.int64) * stride_row * 8 + cols
        if EDGE_ROWS and EDGE_COLS:
            return tl.load(pointers, mask=(rows < num_rows) & (cols < num_cols), other=0.0)
        elif EDGE_ROWS:
            return tl.load(pointers, mask=rows < num_rows, other=0.0)
        else:
            return tl.load(pointers, mask=cols < num_cols, other=0.0)


@triton.jit
def tile_product(
    a, b, row, col, M, N, K, a_stride_row, b_stride_row,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLS) fp32 of the product of two `matrix` from (row, col) on; 0 past its edges.

    Turned operands lie in memory as (K, M) and (N, K), the others as (M, K) and (K, N). UPCAST: the
    interpreter multiplies bf16 operands wrongly (Triton 3.6 to 3.9).
    """
    EDGE: tl.constexpr = not EVEN_K
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for k in tl.range(0, K, DEPTH):
        if A_TURNED:
            left = _load_tile(a, k, row, K, M, a_stride_row, DEPTH, ROWS, TMA, EDGE, True)
            left = tl.trans(left)
        else:
            left = _load_tile(a, row, k, M, K, a_stride_row, ROWS, DEPTH, TMA, True, EDGE)
        if B_TURNED:
            right = _load_tile(b, col, k, N, K, b_stride_row, COLS, DEPTH, TMA, True, EDGE)
            right = tl.trans(right)
        else:
            right = _load_tile(b, k, col, K, N, b_stride_row, DEPTH, COLS, TMA, EDGE, True)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision="ieee")  # fp32 is not cut to TF32
    return acc


@triton.jit
def where_of(row, col, M, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets of a tile's elements in a dense (M, N) matrix, int64, and which are inside of it."""
    rows = row + tl.arange(0, ROWS)[:, None]
    cols = col + tl.arange(0, COLS)[None, :]
    return rows.to(tl.int64) * N + cols, (rows < M) & (cols < N)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right columns of (ROWS, COLS)."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLS // 2)), (0, 2, 1)))
