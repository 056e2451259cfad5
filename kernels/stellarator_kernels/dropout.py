"""Dropout whose mask is a function of (seed, row, column) and is never stored.

forward:  y = x / (1 - p) where the element is kept, else 0
backward: dx = dy in the same way, the mask made again from its keys (random.py)

Which elements are kept does not depend on how the rows are cut into micro-batches or ranks, nor on
whether a forward is computed again. Saved: the keys, one number a row and one a column.

Bytes: x is read, y is written; the same in the backward.
Source: Srivastava et al. 2014, JMLR 15; keys as in random.py.
"""

import torch

from stellarator_kernels import random, reference
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import dense_rows

_OP = "dropout"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK = 1024


@triton.jit
def _dropout_kernel(
    x_ptr, x_stride_row, row_key_ptr, column_key_ptr, y_ptr, C, least, keep_scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < C
    x = tl.load(x_ptr + row * x_stride_row + cols, mask=in_row, other=0.0).to(tl.float32)
    keys = tl.load(row_key_ptr + row) ^ tl.load(column_key_ptr + cols, mask=in_row, other=0)
    y = tl.where(random.kept_elements(keys, least), x * keep_scale, 0.0)
    tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=in_row)


def _run_triton(x, row_keys, column_keys, p):
    """Allocate and launch."""
    x, (N, C) = dense_rows(x), x.shape
    y = x.new_empty(N, C)
    if x.numel():
        keys = row_keys.contiguous(), column_keys.contiguous()
        with torch.cuda.device_of(x):
            _dropout_kernel[(N, triton.cdiv(C, _BLOCK))](
                x,
                x.stride(0),
                *keys,
                y,
                C,
                random.threshold(p),
                1.0 / (1.0 - p),
                _BLOCK,
                **FUSED,
            )
    return y


def dropout_factors(keys, p: float, x: torch.Tensor) -> torch.Tensor | None:
    """Factors (N, C) in the dtype that the reference computes in; None without keys."""
    return None if keys is None else random.factors(keys, p, reference.compute_dtype(x))


@torch.library.custom_op("stellarator::dropout", mutates_args=())
def _dropout(
    x: torch.Tensor, row_keys: torch.Tensor, column_keys: torch.Tensor, p: float, impl: str
) -> torch.Tensor:
    """(N, C); its own backward."""
    if choose(_OP, impl, x) == "triton":
        return _run_triton(x, row_keys, column_keys, p)
    return reference.dropout_ref(x, dropout_factors((row_keys, column_keys), p, x)).contiguous()


@_dropout.register_fake
def _fake(x, row_keys, column_keys, p, impl):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, row_keys, column_keys, ctx.p, ctx.impl = inputs
    ctx.save_for_backward(row_keys, column_keys)


def _backward(ctx, dy):
    return _dropout(dy, *ctx.saved_tensors, ctx.p, ctx.impl), None, None, None, None


_dropout.register_autograd(_backward, setup_context=_setup_context)


def dropout(
    x: torch.Tensor,
    p: float,
    keys: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """x with each element 0 with probability p, the others divided by 1 - p.

    Args:
        x: (..., C) bf16/fp16/fp32/fp64, N rows in all.
        p: in [0, 1); 0.0 returns x itself.
        keys: `random.matrix_keys(seed, N, C, device, origin)`, the origin being the place of the
            first row and column in the whole; None with p = 0.0 only.
        impl: "auto", "triton" or "reference".
    Returns:
        like x, contiguous.
    Raises:
        ValueError: p outside [0, 1), keys of another size.
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.dropout`.
    """
    right = x.dim() >= 1
    expect(right, _OP, "x (..., C)", tuple(x.shape), "Pass rows")
    expect_dtype(_OP, "x", x, _FLOATS, "Cast it to a floating dtype")
    row_keys, column_keys = check_dropout(_OP, x, x, p, keys)
    if row_keys is None:
        return x
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return _dropout(rows, row_keys, column_keys, float(p), impl).view(x.shape)


def check_dropout(op, x, residual, p, keys) -> tuple:
    """Keys of rows and columns, both None without dropout; ValueError for wrong arguments."""
    right = isinstance(p, (int, float)) and 0.0 <= p < 1.0
    expect(right, op, "a dropout probability in [0, 1)", p, "Pass 0.0 for no dropout")
    if p == 0.0:
        return None, None
    expect(residual is not None, op, "a residual with dropout", None, "Use `dropout` without one")
    todo = "Make them with random.matrix_keys(seed, N, C, device)"
    expect(keys is not None, op, "keys with dropout", None, todo)
    for part, size in zip(keys, (x.shape[:-1].numel(), x.shape[-1]), strict=True):
        expect_shape(op, "keys of dropout", part, "(N,) and (C,)", (size,), todo)
        expect_dtype(op, "keys of dropout", part, (torch.int32,), todo)
        expect_same_device(op, x=x, keys=part)
    return tuple(keys)
