"""Products whose weight gradient is made later than their input gradient.

defines: Deferred, split_linear

A schedule that splits the backward wants the input gradient of a stage first and its weight
gradients when there is nothing else to do. The layers of such a model keep what a weight gradient
is made of, by (stage, micro-batch), and `Deferred.run` makes it.
"""

import torch

from stellarator.parallel.gradients import room_of
from stellarator_kernels import linear
from stellarator_kernels.linear import Room, gradient_or_add


class Deferred:
    """Weight gradients that are not made yet.

    Attributes:
        key: where backward passes put them from now on; None: they make them at once.
    """

    def __init__(self):
        self.key = None
        self._waiting: dict[object, list[tuple[torch.Tensor, ...]]] = {}

    def add(self, weight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
        """Keep the two factors of a gradient; dy (N, out), x (N, in)."""
        self._waiting.setdefault(self.key, []).append((weight, dy, x))

    @torch.no_grad()
    def run(self, key) -> None:
        """Make the gradients that were put under a key: they are added to `weight.main_grad()`."""
        for weight, dy, x in self._waiting.pop(key, ()):
            dweight = gradient_or_add(dy, x, "auto", weight.main_grad)
            if dweight is not None:
                weight.main_grad().add_(dweight)

    @property
    def empty(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting


class _SplitLinear(torch.autograd.Function):
    """linear(x, weight, bias), whose weight gradient may be deferred."""

    @staticmethod
    def forward(ctx, x, weight, bias, deferred: Deferred, room: Room | None):
        ctx.save_for_backward(x, weight)
        ctx.deferred, ctx.has_bias, ctx.room = deferred, bias is not None, room
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy2, x2 = dy.flatten(0, -2), x.flatten(0, -2)
        dweight = None
        if ctx.deferred.key is None:
            dweight = gradient_or_add(dy2, x2, "auto", ctx.room)
        else:
            ctx.deferred.add(weight, dy2, x2)
        return dy @ weight, dweight, dy2.sum(0) if ctx.has_bias else None, None, None


def split_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, deferred: Deferred
) -> torch.Tensor:
    """x @ weight^T + bias; x (..., in), weight (out, in), bias (out,) or None."""
    return _SplitLinear.apply(x, weight, bias, deferred, room_of(weight))
