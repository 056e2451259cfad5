"""Products that ranks share, whose communication travels beside the work of their backward, or
whose weight gradient is made apart from their input gradient.

defines: Again, column_product, row_product

    y = x @ weight^T + bias,  by columns: of the tokens of all tensor ranks, outputs of this one;
                              by rows: of the inputs of this rank, summed over the ranks

    by columns      forward         y; with sp behind a gather of x
                    backward        dx = dy @ weight, and its sum over the ranks begins
                                    dweight = dy^T @ x and dbias while it travels; then wait
                    backward, sp    x begins to be gathered again; dx meanwhile; then as above, but
                                    a rank keeps the sum of its own tokens only
    by rows         forward         y and its sum; with sp a rank keeps that of its own tokens
                    backward        dx, dweight
                    backward, sp    dy begins to be gathered; x is made again meanwhile; dx, dweight

The gathered x is not kept from forward to backward: for two products of every layer that would be
tp times what a rank otherwise keeps of x, and the second gather costs no time where it is shorter
than the product beside it. Nor is an x that a norm or a gelu made kept, as in
stellarator_kernels/linear.py: it is made again from what is kept anyway. Nothing is summed in
another order than by `TensorParallel.enter`, a product and `leave`, so the bits are the same.

Letters: N tokens of the micro-batch, N_sp of this rank, C width, F_tp inputs of this rank.

Source: Narayanan et al. 2021, arXiv:2104.04473, and Korthikanti et al. 2022, arXiv:2205.05198, the
second gather.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stellarator.parallel.gradients import room_of
from stellarator.parallel.journal import Tag
from stellarator.parallel.pipeline.deferred import Deferred, Rows
from stellarator.parallel.tensor import TensorParallel
from stellarator_kernels import linear
from stellarator_kernels.linear import gradient_or_add

_ops = torch.ops.stellarator


@dataclass(frozen=True)
class Again:
    """How the input of a product is made a second time: make(*tensors), the same bits."""

    make: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor, ...]


def column_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shape: torch.Size,
    tp: TensorParallel,
    deferred: Deferred | None = None,
    again: Again | None = None,
) -> torch.Tensor:
    """linear(tp.enter(x, shape), weight, bias) of the tensor ranks; of one rank nothing is sent.

    Args:
        x: (B, T, C), with sp (1, N_sp, C).
        weight, bias: (out, C) and (out,): the outputs of this rank.
        shape: (B, T) of all tokens.
        deferred: of a schedule that makes weight gradients apart.
        again: makes x; None: x is kept.
    Returns:
        (B, T, out).
    """
    make, *tensors = _parts(x, again)
    options = (tp, deferred, room_of(weight), make)
    y = _ColumnProduct.apply(x.flatten(0, 1), weight, bias, *options, *tensors)
    return y.unflatten(0, shape)


def row_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    tp: TensorParallel,
    deferred: Deferred | None = None,
    again: Again | None = None,
) -> torch.Tensor:
    """tp.leave(linear(x, weight)) of several tensor ranks.

    Args:
        x: (B, T, F_tp).
        weight: (C, F_tp): the inputs of this rank.
        deferred, again: as of `column_product`.
    Returns:
        (B, T, C), with sp (1, N_sp, C).
    """
    make, *tensors = _parts(x, again)
    arriving: list = []
    options = (tp, deferred, room_of(weight), arriving, make)
    y = _RowProduct.apply(x.flatten(0, 1), weight, *options, *tensors)
    return _Leave.apply(y, tp, arriving)[None] if tp.sp else tp.leave(y.unflatten(0, x.shape[:2]))


def _parts(x: torch.Tensor, again: Again | None) -> tuple:
    """What makes x, and the tensors it is made of, which are kept."""
    again = again or Again(lambda x: x, (x,))
    return again.make, *(t.detach() for t in again.tensors)


class _ColumnProduct(torch.autograd.Function):
    """Of tokens (N, C) or (N_sp, C); the last inputs are what is kept of them."""

    @staticmethod
    def forward(ctx, x, weight, bias, tp: TensorParallel, deferred, room, make, *tensors):
        ctx.tp, ctx.deferred, ctx.room, ctx.make = tp, deferred, room, make
        ctx.weight, ctx.layer = weight, tp.axis.layer
        ctx.save_for_backward(*tensors)
        return linear(tp.axis.gather(x, Tag("enter", ctx.layer)) if tp.sp else x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        weight, rows = _weight_and_rows(ctx, ctx.tp.sp)
        axis, sp = ctx.tp.axis, ctx.tp.sp
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        dx = None
        if sp and need_dweight and not _apart(ctx):
            rows.begin()
        if need_dx:
            dx = _ops.product(dy, weight)
            begin = axis.begin_scatter_sum_ if sp else axis.begin_sum_
            work = begin(dx.view(-1), Tag("enter, backward", ctx.layer))
        dweight = _weight_gradient(ctx, need_dweight, weight, dy, rows)
        dbias = dy.sum(0) if need_dbias else None
        if need_dx:
            work.wait()
            if sp:  # a copy, so that the others' tokens are freed
                dx = dx.unflatten(0, (axis.size, -1))[axis.rank].clone()
        return dx, dweight, dbias, *(None,) * (len(ctx.needs_input_grad) - 3)


class _RowProduct(torch.autograd.Function):
    """Of inputs (N, F_tp); the last inputs are what is kept of them.

    arriving: the work that gathers dy, once it has begun.
    """

    @staticmethod
    def forward(ctx, x, weight, tp: TensorParallel, deferred, room, arriving, make, *tensors):
        ctx.tp, ctx.deferred, ctx.room, ctx.make = tp, deferred, room, make
        ctx.arriving = arriving
        ctx.weight, ctx.layer = weight, tp.axis.layer
        ctx.save_for_backward(*tensors)
        return linear(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        weight, rows = _weight_and_rows(ctx, gathered=False)
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        if ctx.arriving:
            if need_dweight and not _apart(ctx):
                rows.begin()
            ctx.arriving.pop().wait()
        dx = _ops.product(dy, weight) if need_dx else None
        dweight = _weight_gradient(ctx, need_dweight, weight, dy, rows)
        return dx, dweight, *(None,) * (len(ctx.needs_input_grad) - 2)


class _Leave(torch.autograd.Function):
    """The sum, of which a rank keeps its tokens; the gradient has only begun to be gathered.

    Apart from the product, so that a layer that is computed again stops before its last sum.
    """

    @staticmethod
    def forward(ctx, y, tp: TensorParallel, arriving: list):
        ctx.tp, ctx.arriving, ctx.layer = tp, arriving, tp.axis.layer
        return tp.axis.scatter_sum(y, Tag("leave", ctx.layer))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        axis, tag = ctx.tp.axis, Tag("leave, backward", ctx.layer)
        whole = dy.new_empty(axis.size * len(dy), dy.shape[1])
        work = axis.begin_gather(whole, dy.contiguous(), tag)
        if torch.is_anomaly_enabled():  # autograd reads it before the product does
            work.wait()
        else:
            ctx.arriving.append(work)
        return whole, None, None


def _weight_and_rows(ctx, gathered: bool) -> tuple[torch.Tensor, Rows]:
    """The weight, and the input of the product, made again when it is asked for.

    The weight is not saved: where a layer is computed again it would come back as another tensor,
    without the buffer for its gradient.
    """
    weight, tensors, make = ctx.weight, ctx.saved_tensors, ctx.make
    axis, tag = ctx.tp.axis if gathered else None, Tag("enter, again", ctx.layer)
    return weight, Rows(lambda: make(*tensors).flatten(0, 1), axis, tag)


def _apart(ctx) -> bool:
    """Whether the weight gradient is made later."""
    return ctx.deferred is not None and ctx.deferred.key is not None


def _weight_gradient(ctx, needed: bool, weight, dy, rows: Rows) -> torch.Tensor | None:
    """dy^T @ x; None if nobody needs it now, or it was added to the buffer of all gradients."""
    if not needed:
        return None
    if _apart(ctx):
        ctx.deferred.add(weight, dy, rows)
        return None
    return gradient_or_add(dy, rows.wait(), "auto", ctx.room)
