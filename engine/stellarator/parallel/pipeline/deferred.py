"""Products whose weight gradient is made later than their input gradient.

defines: Rows, Deferred, split_linear

A schedule that splits the backward wants the input gradient of a stage first and its weight
gradients when there is nothing else to do. The layers of such a model keep what a weight gradient
is made of, by (stage, micro-batch), and `Deferred.run` makes it.
"""

from collections import deque

import torch

from stellarator.parallel.mesh import Axis
from stellarator_kernels import linear


class Rows:
    """What a weight gradient needs of the input of its product.

    Args:
        x: (N, in); with an axis (N_sp, in), and all its ranks have theirs gathered.
    """

    def __init__(self, x: torch.Tensor, axis: Axis | None = None):
        self._x, self._axis, self._work = x, axis, None

    def begin(self) -> None:
        """Begin to gather them, if they are of several ranks."""
        if self._axis is not None and self._work is None:
            part, size = self._x, self._axis.size * len(self._x)
            self._x = part.new_empty(size, part.shape[1])
            self._work = self._axis.begin_gather(self._x, part)

    def wait(self) -> torch.Tensor:
        """All of them, (N, in)."""
        self.begin()
        if self._work is not None:
            self._work.wait()
        return self._x


class Deferred:
    """Weight gradients that are not made yet.

    Attributes:
        key: where backward passes put them from now on; None: they make them at once.
    """

    def __init__(self):
        self.key = None
        self._waiting: dict[object, deque[tuple[torch.Tensor, torch.Tensor, Rows]]] = {}

    def add(self, weight: torch.Tensor, dy: torch.Tensor, x: Rows) -> None:
        """Keep the two factors of a gradient; dy (N, out), x (N, in)."""
        self._waiting.setdefault(self.key, deque()).append((weight, dy, x))

    @torch.no_grad()
    def run(self, key) -> None:
        """Make the gradients that were put under a key: they are added to `weight.main_grad`.

        What the next one needs of other ranks travels during the present one.
        """
        waiting = self._waiting.pop(key, deque())
        while waiting:
            weight, dy, x = waiting.popleft()
            rows = x.wait()
            if waiting:
                waiting[0][2].begin()
            weight.main_grad.add_(dy.T @ rows)

    @property
    def empty(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting


class _SplitLinear(torch.autograd.Function):
    """linear(x, weight, bias), whose weight gradient may be deferred."""

    @staticmethod
    def forward(ctx, x, weight, bias, deferred: Deferred):
        ctx.save_for_backward(x, weight)
        ctx.deferred, ctx.has_bias = deferred, bias is not None
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy2, x2 = dy.flatten(0, -2), x.flatten(0, -2)
        dweight = None
        if ctx.deferred.key is None:
            dweight = dy2.T @ x2
        else:
            ctx.deferred.add(weight, dy2, Rows(x2))
        return dy @ weight, dweight, dy2.sum(0) if ctx.has_bias else None, None


def split_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, deferred: Deferred
) -> torch.Tensor:
    """x @ weight^T + bias; x (..., in), weight (out, in), bias (out,) or None."""
    return _SplitLinear.apply(x, weight, bias, deferred)
