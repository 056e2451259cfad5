"""Whole tensors out of the parts that ranks hold, one after the other.

defines: Wholes
"""

from collections.abc import Mapping, Sequence

import torch

from stellarator.parallel.mesh import Axis
from stellarator.parallel.shard import FlatPart, Shard

_BITS = {4: torch.int32, 8: torch.int64}  # a sum of floats would lose the sign of zeros


class Wholes:
    """Gives each tensor of a state as a whole, in order; every rank of the axes takes part.

    Who does not want them calls `rest`, and so does who stops in the middle: the others wait.

    Args:
        parts: of the tensors of which this rank holds something: that, by name.
        shards: what part of the whole that is.
        described: all tensors, without values ("meta"), in one order on every rank.
        axes: over which the parts are spread.
        device: where the wholes are put together.
    Cost: memory of one whole tensor; a sum over the ranks of each, of its bits as integers: zeros
        elsewhere, so it is exact.
    """

    def __init__(
        self,
        parts: Mapping[str, torch.Tensor],
        shards: dict[str, Shard | FlatPart],
        described: dict[str, torch.Tensor],
        axes: Sequence[Axis],
        device: torch.device,
    ):
        self._parts, self._shards, self.described = parts, shards, described
        self._axes, self._device = [axis for axis in axes if axis.size > 1], device
        self._left = list(described)

    def read(self, name: str) -> torch.Tensor:
        """The next tensor; `name` must be its name."""
        assert self._left.pop(0) == name, "tensors are read in their order"
        part = self._parts.get(name)
        if not self._axes:
            return part
        whole = torch.zeros_like(self.described[name], device=self._device)
        if part is not None:
            self._shards[name].counted_into_(whole, part)
        bits = whole.view(_BITS[whole.element_size()])
        for axis in self._axes:
            axis.sum_(bits, f"whole {name}")
        return whole

    def rest(self) -> None:
        """Take part in the sums that are left."""
        while self._left:
            self.read(self._left[0])
