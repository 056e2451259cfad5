"""Which ranks are slow.

defines: Straggler, WorkTimes, stragglers
"""

import time
from collections.abc import Sequence
from statistics import median_low
from typing import NamedTuple

import torch

from stellarator.parallel.mesh import Mesh


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


def stragglers(
    seconds: Sequence[float],
    ranks: Sequence[int] | None = None,
    tolerance: float = 0.2,
    least_seconds: float = 0.01,
) -> list[Straggler]:
    """Ranks that took more than (1 + tolerance) times the median, the slowest first.

    The median is the lower one, so that of two ranks the slow one can be told; it holds while at
    least half of the ranks are well.

    Args:
        seconds: of each rank's own work.
        ranks: their names; None: 0, 1 ...
        least_seconds: by which they took longer; less is noise.
    """
    median = median_low(seconds)
    names = range(len(seconds)) if ranks is None else ranks
    slow = [
        Straggler(rank, s, median)
        for rank, s in zip(names, seconds, strict=True)
        if s > (1.0 + tolerance) * median and s - median >= least_seconds
    ]
    return sorted(slow, key=lambda found: -found.seconds)


class WorkTimes:
    """How long this rank works on a step, beside the others.

    Whole steps take equally long on all ranks, as they wait for each other; so what a rank waited
    in collectives, as its journal knows, does not count.

    Args:
        mesh: of this process; of a single one nothing is measured.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._seconds, self._steps, self._begun = 0.0, 0, 0.0

    def begin(self) -> None:
        """A step begins."""
        self._begun = self._now()

    def end(self) -> None:
        """A step ends."""
        self._seconds += self._now() - self._begun
        self._steps += 1

    def gather(self) -> list[float]:
        """Seconds of own work a step since the last call, of every rank; all ranks call it."""
        mean = self._seconds / max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        mine = torch.tensor([mean], dtype=torch.float64, device=self.mesh.device)
        return self.mesh.world.gather(mine, "work times").tolist()

    def slow(self, seconds: Sequence[float]) -> list[Straggler]:
        """Stragglers, each among the ranks that have the same stages of the pipeline."""
        places = [self.mesh.layout.place(rank)["pp"] for rank in range(len(seconds))]
        found = []
        for stage in sorted(set(places)):
            ranks = [rank for rank, place in enumerate(places) if place == stage]
            found += stragglers([seconds[rank] for rank in ranks], ranks)
        return sorted(found, key=lambda each: -each.seconds)

    def _now(self) -> float:
        """Time that this process did not wait."""
        waited = self.mesh.journal.waited_seconds if self.mesh.journal is not None else 0.0
        return time.perf_counter() - waited
