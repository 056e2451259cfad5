"""What a run does when its watchdog finds it stuck: the report goes to all who look, the run ends.

Also names the ranks that are slow.

defines: watchdog, journals_of, remove_journals, report_of, SlowRanks
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median_low

from stellarator.files import write_text
from stellarator.parallel.journal import Journal
from stellarator.parallel.mesh import Mesh
from stellarator.parallel.stragglers import WorkTimes
from stellarator.parallel.watchdog import Watchdog
from stellarator.progress import show
from stellarator.train.metrics import RunLog, write_status


def journals_of(folder: Path) -> Path:
    """Where the journals of a run lie, those of each start in a folder of its own."""
    return folder / "journals"


def remove_journals(folder: Path, but: Path | None = None) -> None:
    """Remove the journals of a run, which nobody reads any more; `but`: not these."""
    for path in journals_of(folder).glob("*"):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)
    if but is None:
        with contextlib.suppress(OSError):
            journals_of(folder).rmdir()


def report_of(folder: Path, journal: Journal) -> Path:
    """The file with the watchdog's report of this start, if there is one."""
    return folder / "watchdog" / f"{journal.folder.name}.txt"


def watchdog(
    journal: Journal, folder: Path, timeout_seconds: float, step: Callable[[], int]
) -> Watchdog:
    """A watchdog that ends the process, with exit code 1, when the run cannot go on.

    The rank that speaks for all prints the report, and writes it to watchdog/<start>.txt and its
    short form into status.json; every rank prints that as its error.

    Args:
        journal: of this rank.
        folder: of the run.
        timeout_seconds: of a collective.
        step: gives the updates done, for status.json.
    """

    def tell(text: str, line: str) -> None:
        path = report_of(folder, journal)
        show(f"{text}\n  This report is in {path}.", sys.stderr)
        with contextlib.suppress(OSError):  # a full disk may be why
            path.parent.mkdir(exist_ok=True)
            write_text(path, text + "\n")
            write_status(folder, "failed", step(), f"{line} See {path}.")

    def leave(line: str) -> None:
        show(f"error: rank {journal.rank} stops: {line}", sys.stderr)
        # Not an exception: the main thread waits in C, and threads of gloo or NCCL with it.
        os._exit(1)

    return Watchdog(journal, timeout_seconds, tell, leave)


class SlowRanks:
    """Says which ranks work longer on a step than the others do; of one rank nothing.

    Attributes:
        times: to be told when a step begins and ends.
    """

    def __init__(self, mesh: Mesh, log: RunLog):
        self.times, self._log = WorkTimes(mesh), log
        self._slow: set[int] = set()
        self._told: set[int] = set()

    def look(self, step: int) -> None:
        """Record the times since the last look; all ranks call it.

        A rank that is slow for the second time in a row is named, once until it has recovered.
        """
        if self.times.mesh.world.size == 1:
            return
        seconds = self.times.gather()
        found = {each.rank: each for each in self.times.slow(seconds)}
        slow = {str(rank): each.seconds for rank, each in found.items()}
        values = {"step": step, "median_seconds": median_low(seconds), "max_seconds": max(seconds)}
        self._log.record("ranks", values | {"slow": slow})
        twice = self._slow & set(found)
        for rank in sorted(twice - self._told):
            self._log.warn(f"{found[rank]}, since the last line.")
        self._slow, self._told = set(found), self._told & set(found) | twice
