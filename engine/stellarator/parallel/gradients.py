"""Gradients of parameters: where they are added; of what several tensor ranks hold, made whole.

defines: room_of, SharedGradients, counted_spans
"""

import math
from collections.abc import Callable

import torch

from stellarator.parallel.journal import NOWHERE, Tag
from stellarator.parallel.shard import Shard
from stellarator.parallel.tensor import TensorParallel


def room_of(parameter: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """What gives the buffer that sums this gradient without rounding, in its shape.

    An op that is given it may add to it and hand nothing on to autograd. None where nobody trains,
    and where hooks wait for the gradient.
    """
    unused = not torch.is_grad_enabled() or parameter._backward_hooks
    return None if unused else getattr(parameter, "main_grad", None)


class SharedGradients:
    """Sums the shares of a gradient that the holders of a parameter have, in one reduction.

    Args:
        grads: gradient of each parameter, by name; summed in place.
        shards: what part of each parameter is here. Of a piece with `partial` each copy has only a
            share of the gradient.
        tp: the ranks.
    Cost: one all-reduce of the partial pieces: key/value heads where several ranks have one; with
        sequence parallelism norms, biases behind products by rows and learned positions, too.
    """

    def __init__(
        self, grads: dict[str, torch.Tensor], shards: dict[str, Shard], tp: TensorParallel
    ):
        self.axis = tp.axis
        self._slots: list[tuple[torch.Tensor, int]] = []  # of this rank: part, where it starts
        self._total = 0
        for name, shard in shards.items():
            for piece, part in shard.parts(grads[name]):
                if piece.partial and piece.copies > 1:
                    # Every rank has the same slots, one for each different piece.
                    number = self.axis.rank // piece.copies
                    self._slots.append((part, self._total + number * part.numel()))
                    self._total += self.axis.size // piece.copies * part.numel()

    def sum_(self) -> None:
        """Make the gradients whole; every rank calls it."""
        if not self._slots:
            return
        buffer = self._slots[0][0].new_zeros(self._total)
        for part, start in self._slots:
            buffer[start : start + part.numel()].copy_(part.reshape(-1))
        self.axis.sum_(buffer, Tag("shared gradients", NOWHERE))
        for part, start in self._slots:
            part.copy_(buffer[start : start + part.numel()].view(part.shape))


def counted_spans(shards: list[tuple[int, Shard]]) -> list[tuple[int, int]]:
    """[start, end) of the elements that count here, in a flat buffer of parameters.

    Of what several ranks hold, only the first copy counts.

    Args:
        shards: of each parameter, in rising order of where it starts in the buffer.
    """
    spans: list[tuple[int, int]] = []
    for start, shard in shards:
        rows = [(piece.length, piece.copy == 0) for piece in shard.pieces]
        if shard.dim > 0:  # pieces of columns lie in turns; every one of them counts
            assert all(counts for _, counts in rows), "columns are not held twice"
            rows = [(shard.local_shape[0], True)]
        inner = math.prod(shard.local_shape[1:])
        for length, counts in rows:
            end = start + length * inner
            if counts and spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            elif counts:
                spans.append((start, end))
            start = end
    return spans
