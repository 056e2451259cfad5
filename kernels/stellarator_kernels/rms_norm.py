"""Normalisation by the root mean square, with dropout and the residual addition in front of it.

forward:  s = dropout(x) + residual;  y = n * weight,  n = s * rstd,  rstd = (mean(s^2) + eps)^-1/2
backward: g = dy * weight;  ds = rstd * (g - n * mean(g * n)) + dsummed  (= dresidual)
          dx = ds, masked and scaled as x was;  dweight = sum(dy * n)

The rest is as in layer_norm.py: s is rounded first, all sums are fp32, dweight is added up in a
fixed order without atomics. Saved: s (or x), weight, and rstd (N, 1) in fp32.

Bytes: forward reads x (and residual), writes y (and s); backward reads dy and s (and dsummed),
writes dx.
Source: Zhang and Sennrich 2019, arXiv:1910.07467.
"""

import torch

from stellarator_kernels import norm_kernels, reference
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.dropout import check_dropout, dropout_factors

_OP = "rms_norm"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.library.custom_op("stellarator::rms_norm_forward", mutates_args=())
def _rms_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    impl: str,
    row_keys: torch.Tensor | None = None,
    column_keys: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, summed (empty without a residual), rstd (N, 1)."""
    keys = None if row_keys is None else (row_keys, column_keys)
    if choose(_OP, impl, x) == "triton":
        y, summed, _, rstd = norm_kernels.forward(
            x, residual, weight, None, eps, centred=False, keys=keys, p=dropout_p
        )
    else:
        dropped = dropout_factors(keys, dropout_p, x)
        y, summed, rstd = reference.rms_norm_ref(x, weight, eps, residual, dropped)
    summed = x.new_empty(0) if residual is None else summed.contiguous()
    return y.contiguous(), summed, rstd


@_rms_norm_forward.register_fake
def _fake_forward(x, residual, weight, eps, impl, row_keys=None, column_keys=None, dropout_p=0.0):
    rstd = x.new_empty((x.shape[0], 1), dtype=reference.compute_dtype(x))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), rstd


@torch.library.custom_op("stellarator::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    need_weight: bool,
    impl: str,
    row_keys: torch.Tensor | None = None,
    column_keys: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dresidual; empty if not needed, dresidual also where dx is the same."""
    keys = None if row_keys is None else (row_keys, column_keys)
    if choose(_OP, impl, summed) == "triton":
        dx, dweight, _, dresidual = norm_kernels.backward(
            dy, dsummed, summed, weight, None, rstd, False, need_weight, keys=keys, p=dropout_p
        )
    else:
        dropped = dropout_factors(keys, dropout_p, summed)
        dx, dweight, dresidual = reference.rms_norm_backward_ref(
            dy, summed, weight, rstd, dsummed, dropped
        )
    none = summed.new_empty(0)
    dresidual = none if keys is None else dresidual.contiguous()
    return dx.contiguous(), dweight if need_weight else none.clone(), dresidual


@_rms_norm_backward.register_fake
def _fake_backward(
    dy, dsummed, summed, weight, rstd, need_weight, impl, row_keys=None, column_keys=None,
    dropout_p=0.0,
):  # fmt: skip
    width = summed.shape[1] if need_weight else 0
    same = summed.shape if row_keys is not None else (0,)
    return summed.new_empty(summed.shape), summed.new_empty(width), summed.new_empty(same)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, ctx.impl, row_keys, column_keys, ctx.dropout_p = inputs
    _, summed, rstd = output
    ctx.has_residual = residual is not None
    kept = summed if ctx.has_residual else x
    ctx.save_for_backward(kept, weight, rstd, row_keys, column_keys)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dsummed, _drstd):
    """Without dropout one gradient for x and the residual; dy or dsummed may be undefined."""
    summed, weight, rstd, row_keys, column_keys = ctx.saved_tensors
    dsummed = dsummed if ctx.has_residual else None
    if dy is None and (row_keys is None or dsummed is None):
        return dsummed, dsummed if ctx.has_residual else None, *(None,) * 6
    dy = torch.zeros_like(dsummed) if dy is None else dy
    need_weight = ctx.needs_input_grad[2]
    dx, dweight, dresidual = _rms_norm_backward(
        dy, dsummed, summed, weight, rstd, need_weight, ctx.impl, row_keys, column_keys,
        ctx.dropout_p,
    )  # fmt: skip
    dresidual = dx if row_keys is None else dresidual
    residual = dresidual if ctx.has_residual else None
    return dx, residual, dweight if need_weight else None, *(None,) * 5


_rms_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    dropout_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Rows of x, or of dropout(x) + residual, divided by their root mean square.

    Args:
        x: (..., C) bf16/fp16/fp32/fp64.
        weight: (C,), dtype of x, or None.
        eps: added to the mean square.
        residual: shape and dtype of x.
        dropout_p, dropout_keys: as of `layer_norm`.
        impl: "auto", "triton" (rows of at most 8192) or "reference".
    Returns:
        y like x, contiguous; with a residual (y, summed), summed = dropout(x) + residual in the
        dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or dropout without a residual or keys.
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.rms_norm`.
    """
    right = x.dim() >= 1 and x.shape[-1] >= 1
    expect(right, _OP, "x (..., C) with C >= 1", tuple(x.shape), "Pass rows to normalise")
    expect_dtype(_OP, "x", x, _FLOATS, "Cast it to a floating dtype")
    if weight is not None:
        expect_shape(_OP, "weight", weight, "(C,)", x.shape[-1:], "Pass the local model width")
        expect_dtype(_OP, "weight", weight, (x.dtype,), "Cast it to the dtype of x")
    if residual is not None:
        expect_shape(_OP, "residual", residual, "like x", x.shape, "Pass rows of the same tokens")
        expect_dtype(_OP, "residual", residual, (x.dtype,), "Cast it to the dtype of x")
    expect_same_device(_OP, x=x, weight=weight, residual=residual)
    keys = check_dropout(_OP, x, residual, dropout_p, dropout_keys)
    C = x.shape[-1]
    other = None if residual is None else residual.reshape(-1, C)
    y, summed, _ = _rms_norm_forward(
        x.reshape(-1, C), other, weight, eps, impl, *keys, float(dropout_p)
    )
    y = y.view(x.shape)
    return y if residual is None else (y, summed.view(x.shape))
