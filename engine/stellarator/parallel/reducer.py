"""Gradients summed over the data-parallel ranks while the backward pass makes more of them.

A gradient comes by autograd, and is added to its buffer here; or an op adds it there by itself
(`parameter.main_grad()` gives the buffer) and hands nothing on. Of a parameter with two uses, as a
tied embedding, each may come either way: the node of autograd where all of them meet runs once in
a backward pass, after the last one, also if none came to it.

defines: Reducer
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd.graph import get_gradient_edge

from stellarator.parallel.buckets import Bucket

_IN_FLIGHT = 2  # sums at a time that hold memory of their own


class Reducer:
    """Begins the reduction of a bucket when its last gradient is there; `finish` ends them all.

    Gradients are added over micro-batches first, and reduced once, in the micro-batch that
    `last_micro_batch` announces. From ZeRO 2 on whole gradients are not kept: every backward pass
    reduces its own. The ranks make their gradients in the same order, so they reduce the buckets in
    the same order; each sum has the same bits in every run. A sum that holds memory of its own (of
    whole gradients that are not kept, or of rounded copies) ends when the second one behind it has
    begun.

    Args:
        buckets: of all parameters.
        parameters: by name; their gradients go into the buckets from now on.
    """

    def __init__(self, buckets: list[Bucket], parameters: dict[str, torch.nn.Parameter]):
        self._buckets, self._last = buckets, False
        self._stage = buckets[0].data.stage
        self._missing = [set(bucket.names) for bucket in buckets]
        self._begun: list[Bucket] = []  # of this step, where whole gradients are kept
        self._in_flight: list[Bucket] = []
        self._held: set[str] = set()
        self._nodes = []  # with hooks; parameters do not keep theirs
        for index, bucket in enumerate(buckets):
            for name in bucket.names:
                self._attach(index, name, parameters[name])

    def _attach(self, index: int, name: str, parameter: torch.nn.Parameter) -> None:
        """Have a gradient added into its bucket, and be told."""
        bucket = self._buckets[index]
        parameter.main_grad = lambda: bucket.view(bucket.room(), name)
        in_place = self._stage < 2 and parameter.dtype == bucket.grads.dtype
        if in_place:  # autograd adds in place to a gradient that is there
            parameter.grad = parameter.main_grad()
            if bucket.data.axis.size == 1:
                return
        # Not a hook of the parameter: without a gradient some versions of torch leave those out.
        node = get_gradient_edge(parameter).node
        node.register_hook(lambda *_: self._made(index, name, in_place, parameter))
        self._nodes.append(node)

    def _made(self, index: int, name: str, in_place: bool, parameter: torch.nn.Parameter) -> None:
        """A backward pass has made this gradient; `grad` is None if it is all in its buffer."""
        bucket = self._buckets[index]
        assert self._stage >= 2 or bucket not in self._begun, (
            f"the gradient of {name} comes after its reduction began: last_micro_batch was early"
        )
        if not in_place and parameter.grad is not None:
            bucket.view(bucket.room(), name).add_(parameter.grad)
            parameter.grad = None
        if bucket.data.axis.size == 1 or not (self._last or self._stage >= 2):
            return
        self._count(index, {name})

    def _count(self, index: int, names: set[str]) -> None:
        """These gradients are there; begin with the bucket if they were the last of it."""
        self._missing[index] -= names - self._held
        if not self._missing[index]:
            self._begin(index)

    def hold(self, name: str) -> None:
        """From now on the bucket of this parameter is reduced by `finish`."""
        self._held.add(name)

    def made(self, names: set[str]) -> None:
        """The last gradients of these parameters have been made without autograd."""
        for index, bucket in enumerate(self._buckets):
            if bucket.data.axis.size > 1 and names & self._missing[index]:
                self._count(index, names)

    def _begin(self, index: int) -> None:
        """Begin to reduce a bucket; nothing in this backward pass needs its parameters any more."""
        bucket = self._buckets[index]
        self._missing[index] = set(bucket.names)
        bucket.begin_reduce()
        if self._stage < 2:
            self._begun.append(bucket)
        if bucket.summed_apart:
            self._in_flight.append(bucket)
        if len(self._in_flight) > _IN_FLIGHT:
            self._in_flight.pop(0).end_reduce()
        if self._stage == 3:
            bucket.free()

    def zero_grad(self) -> None:
        """Forget the gradients; the buffers stay."""
        self._begun.clear()
        self._in_flight.clear()
        for bucket in self._buckets:
            bucket.zero_grad()

    @contextlib.contextmanager
    def last_micro_batch(self, last: bool = True) -> Iterator[None]:
        """Backward passes in here make the last gradients of a step, if `last`.

        There may be several, each for some of the parameters. What none of them makes is reduced by
        `finish`, without overlap; that is right without this context, too.
        """
        self._last = last
        try:
            yield
        finally:
            self._last = False

    def finish(self) -> None:
        """Wait until every gradient is reduced, after the last backward pass of a step."""
        for index, bucket in enumerate(self._buckets):
            left = bucket not in self._begun if self._stage < 2 else bucket.full_grads is not None
            if left:
                self._begin(index)
        for bucket in self._buckets:
            bucket.end_reduce()
