"""Whole tensors out of the parts that ranks hold, one after the other.

defines: Wholes
"""

from collections.abc import Sequence

import torch

from stellarator.parallel.mesh import Axis
from stellarator.parallel.shard import FlatPart, Shard

_BITS = {4: torch.int32, 8: torch.int64}  # a sum of floats would lose the sign of zeros


class Wholes:
    """Gives each tensor of a state as a whole, in order; every rank of the axes takes part.

    Who does not want them calls `rest`, and so does who stops in the middle: the others wait.

    Args:
        parts: this rank's part of each tensor, by name, in the same order on every rank.
        shards: what part that is.
        axes: the ranks that hold parts.
    Cost: memory of one whole tensor; a sum over the ranks of each, of its bits as integers: zeros
        elsewhere, so it is exact.
    """

    def __init__(
        self,
        parts: dict[str, torch.Tensor],
        shards: dict[str, Shard | FlatPart],
        axes: Sequence[Axis],
    ):
        self._parts, self._shards = parts, shards
        self._axes = [axis for axis in axes if axis.size > 1]
        self._left = list(parts)

    def described(self) -> dict[str, torch.Tensor]:
        """Tensors without values, of the whole shapes."""
        return {
            name: torch.empty(self._shards[name].shape, dtype=part.dtype, device="meta")
            for name, part in self._parts.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The next tensor; `name` must be its name."""
        assert self._left.pop(0) == name, "tensors are read in their order"
        part, shard = self._parts[name], self._shards[name]
        if not self._axes:
            return part
        whole = shard.counted_into_(part.new_zeros(shard.shape), part)
        bits = whole.view(_BITS[whole.element_size()])
        for axis in self._axes:
            axis.sum_(bits)
        return whole

    def rest(self) -> None:
        """Take part in the sums that are left."""
        while self._left:
            self.read(self._left[0])
