"""Which ranks are slow.

defines: Straggler, rank_seconds, stragglers
"""

from collections.abc import Sequence
from statistics import median_low
from typing import NamedTuple

import torch

from stellarator.parallel.collectives import Group
from stellarator.parallel.journal import Tag


class Straggler(NamedTuple):
    """A rank whose own work takes longer than that of most."""

    rank: int
    seconds: float
    median_seconds: float

    def __str__(self) -> str:
        more = self.seconds / self.median_seconds - 1.0
        return (
            f"rank {self.rank} is slow: {self.seconds:.3g} s a step, {more:.0%} more than the "
            f"median of {self.median_seconds:.3g} s"
        )


def rank_seconds(
    seconds: float, group: Group, device: torch.device, tag: Tag | str = "rank_seconds"
) -> list[float]:
    """What every rank of the group measured, in their order; all get the same list.

    Pass the time of a rank's own work, best as a mean of several steps: whole steps take equally
    long on all ranks, as they wait for each other.
    """
    mine = torch.tensor([seconds], dtype=torch.float64, device=device)
    return group.all_gather(mine, tag).tolist()


def stragglers(
    seconds: Sequence[float], ranks: Sequence[int] | None = None, tolerance: float = 0.2
) -> list[Straggler]:
    """Ranks that took more than (1 + tolerance) times the median, the slowest first.

    The median is the lower one, so that of two ranks the slow one can be told; it holds while at
    least half of the ranks are well.

    Args:
        seconds: from `rank_seconds`.
        ranks: their names; None: 0, 1 ...
    """
    median = median_low(seconds)
    names = range(len(seconds)) if ranks is None else ranks
    slow = [
        Straggler(rank, s, median)
        for rank, s in zip(names, seconds, strict=True)
        if s > (1.0 + tolerance) * median
    ]
    return sorted(slow, key=lambda found: -found.seconds)
