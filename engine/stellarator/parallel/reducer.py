"""Gradients summed over the data-parallel ranks while the backward pass makes more of them.

defines: Reducer
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch

from stellarator.parallel.buckets import Bucket

_IN_FLIGHT = 2  # buckets whose whole gradients live at a time where only own parts are kept


class Reducer:
    """Begins the reduction of a bucket when its last gradient is there; `finish` ends them all.

    Gradients are added over micro-batches first, and reduced once, in the micro-batch that
    `last_micro_batch` announces. From ZeRO 2 on whole gradients are not kept: every backward pass
    reduces its own. The ranks make their gradients in the same order, so they reduce the buckets in
    the same order; each sum has the same bits in every run.

    Args:
        buckets: of all parameters.
        parameters: by name; autograd adds their gradients into the buckets from now on.
    """

    def __init__(self, buckets: list[Bucket], parameters: dict[str, torch.nn.Parameter]):
        self._buckets, self._last = buckets, False
        self._stage = buckets[0].data.stage
        self._missing = [set(bucket.names) for bucket in buckets]
        self._begun: list[Bucket] = []
        for index, bucket in enumerate(buckets):
            for name in bucket.names:
                self._attach(index, name, parameters[name])

    def _attach(self, index: int, name: str, parameter: torch.nn.Parameter) -> None:
        """Have autograd add a gradient into its bucket, and say so."""
        bucket = self._buckets[index]
        if self._stage < 2:  # for who makes gradients without autograd
            parameter.main_grad = bucket.view(bucket.full_grads, name)
        in_place = self._stage < 2 and parameter.dtype == bucket.grads.dtype
        if in_place:  # autograd adds in place to a gradient that is there
            parameter.grad = parameter.main_grad
            if bucket.data.axis.size == 1:
                return
        made = partial(self._made, index, name, in_place)
        parameter.register_post_accumulate_grad_hook(made)

    def _made(self, index: int, name: str, in_place: bool, parameter: torch.nn.Parameter) -> None:
        """A backward pass has made this gradient."""
        bucket = self._buckets[index]
        assert self._stage >= 2 or bucket not in self._begun, (
            f"the gradient of {name} comes after its reduction began: last_micro_batch was early"
        )
        if not in_place:
            bucket.view(bucket.room(), name).add_(parameter.grad)
            parameter.grad = None
        if bucket.data.axis.size == 1 or not (self._last or self._stage >= 2):
            return
        self._missing[index].discard(name)
        if not self._missing[index]:
            self._begin(index)

    def _begin(self, index: int) -> None:
        """Begin to reduce a bucket; nothing in this backward pass needs its parameters any more."""
        bucket = self._buckets[index]
        self._missing[index] = set(bucket.names)
        bucket.begin_reduce()
        self._begun.append(bucket)
        if self._stage >= 2 and len(self._begun) > _IN_FLIGHT:
            self._begun.pop(0).end_reduce()
        if self._stage == 3:
            bucket.free()

    def zero_grad(self) -> None:
        """Forget the gradients; the buffers stay."""
        self._begun.clear()
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
