"""Products that ranks share, whose communication travels beside the work of their backward, or
whose weight gradient is made apart from their input gradient.

defines: Again, Gelu, column_product, row_product, product_again

    y = x @ weight^T + bias,  by columns: of the tokens of all tensor ranks, outputs of this one;
                              by rows: of the inputs of this rank, summed over the ranks

    by columns      forward         y; with sp behind a gather of x
                    backward        dx = dy @ weight, and its sum over the ranks begins
                                    dweight = dy^T @ x and dbias while it travels; then wait
                    backward, sp    x begins to be gathered again; dx meanwhile; then as above, but
                                    a rank keeps the sum of its own tokens only
    by rows         forward         y and its sum; with sp a rank keeps that of its own tokens
                    backward        dx, dweight; with a gelu in front of it, through that, too
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


@dataclass(frozen=True)
class Gelu:
    """An activation in front of a product by rows, as `bias_gelu` has it."""

    approximate: str
    impl: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _ops.bias_gelu_forward(x, None, self.approximate, self.impl)

    def backward(self, dy, x, need_y: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """dx, and what `__call__` gave if it is needed."""
        options = (self.approximate, self.impl, need_y)
        dx, _, y = _ops.bias_gelu_backward(dy, x, None, *options)
        return dx, y


def row_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    tp: TensorParallel,
    deferred: Deferred | None = None,
    *,
    gelu: Gelu | None = None,
    again: Again | None = None,
) -> torch.Tensor:
    """tp.leave(linear(x, weight)) + bias of the tensor ranks; of one rank nothing is sent.

    Args:
        x: (B, T, F_tp).
        weight, bias: (C, F_tp) and (C,): the inputs of this rank.
        deferred: as of `column_product`.
        gelu: applied to x first; what it gives is not kept.
        again: makes x, (N, F_tp); None: x is kept.
    Returns:
        (B, T, C), with sp (1, N_sp, C).
    """
    make, *tensors = _parts(x, again)
    arriving: list = []
    options = (tp, deferred, room_of(weight), arriving, gelu, make)
    inner = bias if tp.alone else None
    y = _RowProduct.apply(x.flatten(0, 1), weight, inner, *options, *tensors)
    if tp.alone:
        return y.unflatten(0, x.shape[:2])
    if tp.sp:
        return _Leave.apply(y, tp, arriving)[None] + bias
    return tp.leave(y.unflatten(0, x.shape[:2])) + bias


def product_again(
    again: Again, weight: torch.Tensor, bias: torch.Tensor, tp: TensorParallel
) -> Again:
    """How the result of `column_product` is made a second time, (N, out).

    again: makes its x. With sp the tokens of all ranks are gathered once more.
    """
    axis, tag = tp.axis, Tag("enter, again", tp.axis.layer)
    make_x = again.make  # and not `again`, whose tensors would live as long as the graph

    def make(*tensors):
        x = make_x(*tensors).flatten(0, 1)
        return linear(axis.gather(x, tag) if tp.sp else x, weight, bias)

    return Again(make, again.tensors)


def _parts(x: torch.Tensor, again: Again | None) -> tuple:
    """What makes x, and the tensors it is made of, which are kept."""
    again = again or Again(lambda x: x, (x,))
    return again.make, *(t.detach() for t in again.tensors)


class _ColumnProduct(torch.autograd.Function):
    """Of tokens (N, C) or (N_sp, C); the last inputs are what is kept of them.

    The weight is not saved: where a layer is computed again it would come back as another tensor,
    without the buffer for its gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, tp: TensorParallel, deferred, room, make, *tensors):
        ctx.tp, ctx.deferred, ctx.room, ctx.make = tp, deferred, room, make
        ctx.weight, ctx.layer = weight, tp.axis.layer
        ctx.save_for_backward(*tensors)
        return linear(tp.axis.gather(x, Tag("enter", ctx.layer)) if tp.sp else x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        weight, tensors, make = ctx.weight, ctx.saved_tensors, ctx.make
        axis, sp = ctx.tp.axis, ctx.tp.sp
        tag = Tag("enter, again", ctx.layer)
        rows = Rows(lambda: make(*tensors).flatten(0, 1), axis if sp else None, tag)
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
    def forward(ctx, x, weight, bias, tp, deferred, room, arriving, gelu, make, *tensors):
        ctx.tp, ctx.deferred, ctx.room, ctx.make = tp, deferred, room, make
        ctx.arriving, ctx.gelu = arriving, gelu
        ctx.weight, ctx.layer = weight, tp.axis.layer
        ctx.save_for_backward(*tensors)
        return linear(x if gelu is None else gelu(x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        weight, gelu, apart = ctx.weight, ctx.gelu, _apart(ctx)
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        x = dx = None
        if need_dweight or (gelu is not None and need_dx):
            x = ctx.make(*ctx.saved_tensors).flatten(0, -2)
        if ctx.arriving:
            ctx.arriving.pop().wait()
        if need_dx:
            dx = _ops.product(dy, weight)
        if gelu is None:
            rows = Rows(lambda: x)
        elif apart or not need_dx:
            rows = Rows(lambda: gelu(x))
            dx = gelu.backward(dx, x, False)[0] if need_dx else None
        else:
            dx, y = gelu.backward(dx, x, need_dweight)
            rows = Rows(lambda: y)
        dweight = _weight_gradient(ctx, need_dweight, weight, dy, rows)
        dbias = dy.sum(0) if need_dbias else None
        return dx, dweight, dbias, *(None,) * (len(ctx.needs_input_grad) - 3)


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
