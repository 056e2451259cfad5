"""The gradient of a weight, added to where gradients are summed: total += dy^T @ x, in fp32.

Nothing is rounded between the product and the sum, and no second pass over (M, K) adds it: on a GPU
the sum is the epilogue of the product. Every element is one sum over the tokens in their order and
then one addition, by one program: no atomics, the same to the bit on every run.

`cpu` is the C++ of linear.py, for bf16 on AMX. `torch` multiplies with fp32 results, then adds.

Bytes: dy and x are read once (again from the cache), total is read and written.
"""

import torch

from stellarator_kernels import matmul, reference, tuned, widened
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.attention.tiles import chip, with_scratch
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import UNIT, aligned_rows
from stellarator_kernels.linear import add_weight_gradient
from stellarator_kernels.matmul import halves, matrix, tile_at, tile_product, where_of

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def _add(
    acc, total_ptr, row, col, M, K,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Epilogue of `_weight_gradient_kernel`, on (ROWS, COLS) accumulators."""
    if PARTS > 1:
        HALF: tl.constexpr = COLS // 2
        left, right = halves(acc, ROWS, COLS)
        _add(left, total_ptr, row, col, M, K, ROWS, HALF, PARTS // 2)
        _add(right, total_ptr, row, col + HALF, M, K, ROWS, HALF, PARTS // 2)
    else:
        offsets, inside = where_of(row, col, M, K, ROWS, COLS)
        acc += tl.load(total_ptr + offsets, mask=inside, other=0.0)
        tl.store(total_ptr + offsets, acc, mask=inside)


@triton.jit
def _weight_gradient_kernel(
    dy_ptr, x_ptr, total_ptr, dy_stride_row, x_stride_row, N, M_units, K_units,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles of total (M, K) fp32 += dy^T @ x; the inner width is N."""
    M, K = M_units * 8, K_units * 8
    dy = matrix(dy_ptr, N, M, dy_stride_row, DEPTH, ROWS, TMA)
    x = matrix(x_ptr, N, K, x_stride_row, DEPTH, COLS, TMA)
    num_tiles = tl.cdiv(M, ROWS) * tl.cdiv(K, COLS)
    for number in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, col = tile_at(number, M, K, ROWS, COLS, GROUP)
        acc = tile_product(
            dy, x, row, col, M, K, N, dy_stride_row, x_stride_row,
            True, False, EVEN_K, ROWS, COLS, DEPTH, TMA, UPCAST,
        )  # fmt: skip
        _add(acc, total_ptr, row, col, M, K, ROWS, COLS, PARTS)


@with_scratch
def _add_triton(total, dy, x):
    """Launch the kernel."""
    dy, x = aligned_rows(dy), aligned_rows(x)
    (N, M), K = dy.shape, x.shape[1]
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    tiles = matmul.tile_sizes("weight gradient", x.dtype, capability, tuned.gpu_name(x.device))
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[(matmul.num_programs(M, K, tiles, chip(x.device).num_sms),)](
            dy, x, total, dy.stride(0) // UNIT, x.stride(0) // UNIT,
            N, M // UNIT, K // UNIT, **matmul.constants(x.dtype, N, tiles), **FUSED,
        )  # fmt: skip


def _add_torch(total, dy, x):
    """The product with a result in the dtype of total, and the addition."""
    if dy.dtype == total.dtype:
        total.addmm_(dy.t(), x)
    elif dy.device.type == "cuda":
        total.add_(torch.mm(dy.t(), x, out_dtype=total.dtype))
    else:  # ATen's 16-bit products round on a CPU
        widened.add(total, dy.t(), x)


@torch.library.custom_op("stellarator::add_weight_gradient_", mutates_args=("total",))
def _add_weight_gradient(
    total: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, impl: str = "auto"
) -> None:
    """total (M, K) += dy^T @ x, (N, M) and (N, K)."""
    if not dy.numel() or not x.numel():
        return
    chosen = choose("add_weight_gradient_", impl, dy, x=x)
    if chosen == "reference":
        total.copy_(reference.add_weight_gradient_ref(total, dy, x))
    else:
        add = {"triton": _add_triton, "cpu": add_weight_gradient, "torch": _add_torch}[chosen]
        add(total, dy, x)


def add_weight_gradient_(
    total: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """total += dy^T @ x, unrounded: the gradient of the weight of y = x @ weight^T.

    Args:
        total: (M, K) fp32 (fp64 where x is), contiguous: for example a view of a flat buffer.
        dy: (..., M) bf16/fp16/fp32/fp64.
        x: (..., K), dtype of dy.
        impl: "auto", "triton" (M and K multiples of 8), "cpu" (bf16 on AMX), "torch", "reference".
    Returns:
        total, changed in place. Not differentiable.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or total is not contiguous.
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.add_weight_gradient`.
    """
    op = "add_weight_gradient_"
    if dy.dim() < 1 or x.dim() < 1 or dy.shape[:-1] != x.shape[:-1]:
        got = (tuple(dy.shape), tuple(x.shape))
        expect(False, op, "dy (..., M) and x (..., K)", got, "Pass rows of the same tokens")
    expect_dtype(op, "dy", dy, _FLOATS, "Cast it to a floating dtype")
    expect_dtype(op, "x", x, (dy.dtype,), "Cast it to the dtype of dy")
    dtype = reference.compute_dtype(dy)
    expect_dtype(op, "total", total, (dtype,), "Sum gradients in it")
    shape = (dy.shape[-1], x.shape[-1])
    expect_shape(op, "total", total, "(M, K)", shape, "Pass the gradient of this weight")
    expect(total.is_contiguous(), op, "total contiguous", total.stride(), "Pass a dense view")
    expect_same_device(op, total=total, dy=dy, x=x)
    with torch.no_grad():
        _add_weight_gradient(total, dy.reshape(-1, shape[0]), x.reshape(-1, shape[1]), impl)
    return total
