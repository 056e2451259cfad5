"""The two-matrix MLP behind its norm, in one function of autograd.

defines: layer_norm_mlp

    summed = x + residual;  out = mlp(layer_norm(summed))

The normalised rows are not kept: the backward makes them again from what the norm keeps, the same
bits, so the gradients are those of the ops one after the other. With `recompute` nothing of (N, F)
is kept either. It has no implementations of its own: `explain` answers for `layer_norm` and `mlp`.
"""

import torch

from stellarator_kernels.dropout import check_dropout
from stellarator_kernels.layer_norm import layer_norm
from stellarator_kernels.linear import Room, check_residual, check_vectors, rows_of
from stellarator_kernels.mlp import How, backward, check, forward, mlp

_ops = torch.ops.stellarator


class _LayerNormMlp(torch.autograd.Function):
    """Inputs: rows, residual rows or None, weight and bias of the norm, the four parameters."""

    @staticmethod
    def forward(
        ctx, x, residual, norm_weight, norm_bias, up, up_bias, down, down_bias, eps, how, *dropout
    ):
        y, summed, mean, rstd = _ops.layer_norm_forward(
            x, residual, norm_weight, norm_bias, eps, how.impl, *dropout
        )
        ctx.eps, ctx.has_residual = eps, residual is not None
        kept, (*keys, ctx.dropout_p) = summed if ctx.has_residual else x, dropout
        wanted = any(ctx.needs_input_grad[:7])
        out, pre = forward(ctx, y, (up, up_bias, down, down_bias), how, wanted)
        norm = (kept, norm_weight, norm_bias, mean, rstd)
        ctx.save_for_backward(*norm, *keys, up, up_bias, down, pre)
        ctx.set_materialize_grads(False)
        return out, summed

    @staticmethod
    def backward(ctx, dout, dsummed):
        summed, norm_weight, norm_bias, mean, rstd, *rest = ctx.saved_tensors
        keys, kept = rest[:-4], rest[-4:]
        dsummed = dsummed if ctx.has_residual else None
        if dout is None and (keys[0] is None or dsummed is None):
            return dsummed, dsummed if ctx.has_residual else None, *(None,) * 11
        dout = torch.zeros_like(summed) if dout is None else dout
        impl = ctx.how.impl

        def normalised():
            norm = (norm_weight, norm_bias, ctx.eps)
            return _ops.layer_norm_forward(summed, None, *norm, impl)[0]

        dy, *gradients = backward(ctx, dout, kept, normalised, 4)
        dx = dresidual = dnorm_weight = dnorm_bias = None
        need_params = any(ctx.needs_input_grad[2:4])
        if dy is not None:
            dx, dnorm_weight, dnorm_bias, dresidual = _ops.layer_norm_backward(
                dy, dsummed, summed, norm_weight, mean, rstd, norm_bias is not None,
                need_params, impl, *keys, ctx.dropout_p,
            )  # fmt: skip
            dresidual = dx if keys[0] is None else dresidual
        return (
            dx,
            dresidual if ctx.has_residual else None,
            dnorm_weight if need_params else None,
            dnorm_bias if need_params and norm_bias is not None else None,
            *(*gradients, *(None,) * 5),
        )


def layer_norm_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    approximate: str = "tanh",
    recompute: bool = False,
    dropout_p: float = 0.0,
    dropout_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    rooms: tuple[Room | None, Room | None] = (None, None),
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """mlp(layer_norm(x)), or of x + residual; the normalised rows are not kept.

    Args:
        x: (..., C) bf16/fp16/fp32/fp64.
        norm_weight, norm_bias: (C,), the latter may be None.
        up_weight, up_bias, down_weight, down_bias, approximate, recompute, rooms: as of `mlp`.
        eps, residual, dropout_p, dropout_keys: as of `layer_norm`.
        impl: of norm and MLP, as of `mlp`.
    Returns:
        y (..., C); with a residual (y, summed), summed = x + residual in the dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or an unknown form.
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.layer_norm` and `cost.mlp`, and in the backward once more the forward of the norm.
    """
    op, parameters = "layer_norm_mlp", (up_weight, up_bias, down_weight, down_bias)
    if torch.is_autocast_enabled(x.device.type):  # the products have another dtype than the norm
        options = {"dropout_p": dropout_p, "dropout_keys": dropout_keys, "impl": impl}
        y = layer_norm(x, norm_weight, norm_bias, eps, residual, **options)
        y, *summed = (y,) if residual is None else y
        y = mlp(y, *parameters, approximate=approximate, recompute=recompute, impl=impl)
        return (y, *summed) if summed else y
    names = ("up_weight", "up_bias", "down_weight", "down_bias")
    check(op, approximate, x, **dict(zip(names, parameters, strict=True)))
    check_vectors(op, x, norm_weight=norm_weight, norm_bias=norm_bias)
    check_residual(op, x, residual)
    keys = check_dropout(op, x, residual, dropout_p, dropout_keys)
    how = How(approximate, torch.is_grad_enabled() and not recompute, impl, rooms)
    y, summed = _LayerNormMlp.apply(
        rows_of(x), None if residual is None else rows_of(residual), norm_weight, norm_bias,
        *parameters, eps, how, *keys, float(dropout_p),
    )  # fmt: skip
    y = y.view(x.shape)
    return y if residual is None else (y, summed.view(x.shape))
