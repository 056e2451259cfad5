"""Products by columns, whose communication travels beside the products of their backward.

defines: column_product

    y = x @ weight^T + bias,  x of the tokens of all tensor ranks, weight the outputs of this one

    forward             y; with sp behind a gather of x
    backward            dx = dy @ weight, and its sum over the ranks begins
                        dweight = dy^T @ x and dbias while it travels; then wait
    backward with sp    x begins to be gathered again; dx meanwhile; then as above, but a rank keeps
                        the sum of its own tokens only

The gathered x is not kept from forward to backward: for two products of every layer that would be
tp times what a rank otherwise keeps of x, and the second gather costs no time where it is shorter
than the product beside it. Nothing is summed in another order than by `TensorParallel.enter` and a
product behind it, so the bits are the same.

Letters: N tokens of the micro-batch, N_sp of this rank, C width.

Source: Narayanan et al. 2021, arXiv:2104.04473, and Korthikanti et al. 2022, arXiv:2205.05198, the
second gather.
"""

import torch

from stellarator.parallel.pipeline.deferred import Deferred, Rows
from stellarator.parallel.tensor import TensorParallel
from stellarator_kernels import linear

_ops = torch.ops.stellarator


def column_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shape: torch.Size,
    tp: TensorParallel,
    deferred: Deferred | None = None,
) -> torch.Tensor:
    """linear(tp.enter(x, shape), weight, bias) of several tensor ranks.

    Args:
        x: (B, T, C), with sp (1, N_sp, C).
        weight, bias: (out, C) and (out,): the outputs of this rank.
        shape: (B, T) of all tokens.
        deferred: of a schedule that makes weight gradients apart.
    Returns:
        (B, T, out).
    """
    return _ColumnProduct.apply(x.flatten(0, 1), weight, bias, tp, deferred).unflatten(0, shape)


class _ColumnProduct(torch.autograd.Function):
    """Of tokens (N, C) or (N_sp, C), which are all that is kept beside the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, tp: TensorParallel, deferred: Deferred | None):
        ctx.tp, ctx.deferred = tp, deferred
        ctx.save_for_backward(x, weight)
        return linear(tp.axis.gather(x) if tp.sp else x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        axis, sp = ctx.tp.axis, ctx.tp.sp
        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        rows, dx, dweight = Rows(x, axis if sp else None), None, None
        later = ctx.deferred is not None and ctx.deferred.key is not None
        if need_dweight and not later:
            rows.begin()
        if need_dx:
            dx = _ops.product(dy, weight)
            work = (axis.begin_scatter_sum_ if sp else axis.begin_sum_)(dx.view(-1))
        if later:
            ctx.deferred.add(weight, dy, rows)
        elif need_dweight:
            dweight = _ops.weight_gradient(dy, rows.wait())
        dbias = dy.sum(0) if need_dbias else None
        if need_dx:
            work.wait()
            if sp:  # a copy, so that the others' tokens are freed
                dx = dx.unflatten(0, (axis.size, -1))[axis.rank].clone()
        return dx, dweight, dbias, None, None
