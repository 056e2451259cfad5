"""Products whose weight gradient is made later than their input gradient.

defines: Rows, Deferred

A schedule that splits the backward wants the input gradient of a stage first and its weight
gradients when there is nothing else to do. The layers of such a model keep what a weight gradient
is made of, by (stage, micro-batch), and `Deferred.run` makes it.
"""

from collections import deque
from collections.abc import Callable

import torch

from stellarator.parallel.journal import Tag
from stellarator.parallel.mesh import Axis
from stellarator_kernels.linear import gradient_or_add


class Rows:
    """The input of a product, as its weight gradient needs it.

    Args:
        make: gives (N, in); with an axis (N_sp, in), and those of all its ranks are gathered.
        tag: of the gather.
    """

    def __init__(
        self,
        make: Callable[[], torch.Tensor],
        axis: Axis | None = None,
        tag: Tag | str = "inputs of a product",
    ):
        self._make, self._axis, self._tag = make, axis, tag
        self._x = self._work = None

    def begin(self) -> None:
        """Make this rank's, and begin to gather the others'."""
        if self._x is not None:
            return
        self._x = self._make()
        if self._axis is not None:
            part, size = self._x, self._axis.size * len(self._x)
            self._x = part.new_empty(size, part.shape[1])
            self._work = self._axis.begin_gather(self._x, part, self._tag)

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
        """Make the gradients that were put under a key: they are added to `weight.main_grad()`.

        What the next one needs of other ranks travels during the present one.
        """
        waiting = self._waiting.pop(key, deque())
        while waiting:
            weight, dy, x = waiting.popleft()
            rows = x.wait()
            if waiting:
                waiting[0][2].begin()
            dweight = gradient_or_add(dy, rows, "auto", weight.main_grad)
            if dweight is not None:
                weight.main_grad().add_(dweight)

    @property
    def empty(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting
