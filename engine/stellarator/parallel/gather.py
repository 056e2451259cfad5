"""Whole tensors out of the parts that tensor ranks hold, one after the other.

defines: Wholes
"""

import torch

from stellarator.parallel.mesh import Axis
from stellarator.parallel.shard import Shard


class Wholes:
    """Gives each tensor of a state as a whole, in order; every rank of the axis takes part.

    Who does not want them calls `rest`, and so does who stops in the middle: the others wait.

    Args:
        parts: this rank's part of each tensor, by name, in the same order on every rank.
        shards: what part that is.
        axis: the ranks.
    Cost: memory of one whole tensor; a sum over the ranks of each (zeros elsewhere: exact).
    """

    def __init__(self, parts: dict[str, torch.Tensor], shards: dict[str, Shard], axis: Axis):
        self._parts, self._shards, self._axis = parts, shards, axis
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
        if self._axis.size == 1:
            return part
        return self._axis.sum_(shard.counted_into_(part.new_zeros(shard.shape), part))

    def rest(self) -> None:
        """Take part in the sums that are left."""
        while self._left:
            self.read(self._left[0])
