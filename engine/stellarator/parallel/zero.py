"""ZeRO 3: the parameters of a layer are gathered when it is used, and freed after.

defines: Gatherer

The next layer is on its way while one computes: the one behind it in a forward pass, the one
before it in a backward pass. What belongs to no layer (embeddings, the last norm, the head) is used
at both ends of the model; it stays from the forward pass until its gradients are made.

Source: Rajbhandari et al. 2020, arXiv:1910.02054; that views keep their storage while its memory
comes and goes, after Zhao et al. 2023, arXiv:2304.11277.
"""

from collections.abc import Sequence
from functools import partial

import torch

from stellarator.parallel.buckets import Bucket


class Gatherer:
    """Hooks on the layers that gather and free their buckets. The reducer frees them, too.

    Args:
        model: calls every layer once in a pass, in their order.
        layers: of the model. One that computes again in the backward pass finds its parameters
            gathered.
        buckets: of the layers.
        rest: of what belongs to no layer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        buckets: Sequence[Bucket],
        rest: Bucket,
    ):
        self._buckets = [rest, *buckets]
        for index, module in enumerate((model, *layers)):
            module.register_forward_pre_hook(partial(self._enter, index))
            module.register_forward_hook(partial(self._leave, index))

    def _enter(self, index: int, module, arguments) -> None:
        """A forward pass begins."""
        self._buckets[index].gather()
        if not self._buckets[index].in_backward:
            self._buckets[(index + 1) % len(self._buckets)].begin_gather()

    def _leave(self, index: int, module, arguments, output) -> None:
        """A forward pass is done."""
        bucket = self._buckets[index]
        if bucket.in_backward:  # computed again: its gradients are still to be made
            return
        outputs = output if isinstance(output, tuple) else (output,)
        followed = [x for x in outputs if x.requires_grad]
        for x in followed:
            x.register_hook(partial(self._turn, index))
        # The backward pass begins with the model's end.
        if not (followed and index in (0, len(self._buckets) - 1)):
            bucket.free()

    def _turn(self, index: int, gradient: torch.Tensor) -> None:
        """The backward pass of a module is about to begin."""
        bucket = self._buckets[index]
        bucket.gather()
        bucket.in_backward = True
        self._buckets[index - 1].begin_gather()  # behind the first one is the last
