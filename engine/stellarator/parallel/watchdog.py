"""Ends a run that is stuck, and says where it is.

defines: Watchdog

Each rank has a thread that looks at the journals. When its own rank has been in a collective for
longer than the timeout, or a collective fails because another rank is gone, the first rank that
notices says who is missing (`stellarator.parallel.findings`) and all end on its line
(`stellarator.parallel.verdict`).

A late rank that runs is asked for its stack by a signal, at which Python's faulthandler writes it
even while the rank computes in C: a real-time signal, as schedulers send SIGUSR1 and SIGUSR2 to ask
for a stop. On another machine its own watchdog is asked through a file. A stopped or dead process
cannot show its stack: then the last entry of its journal is all there is.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from stellarator.parallel.findings import report, state_of
from stellarator.parallel.journal import Entry, Journal, file_of, machine, read
from stellarator.parallel.verdict import Verdict

_SIGNAL = signal.SIGRTMIN + 5
_STACKS = 4  # in one report
_TELLING = 5.0  # seconds that a rank waits for the one that speaks


class Watchdog:
    """The thread of one rank; a context manager.

    Args:
        journal: of this rank.
        timeout_seconds: in a collective, after which the run is stuck; within 5 s more it is told.
        tell: called with (text, line) on the one rank that speaks for all. None: print the text.
        leave: called with the line in the thread of the watchdog of each rank, as its main thread
            may wait in C for ever; it is expected to end the process. None: go on.
        look_seconds: between two looks.

    It takes a signal for the stack of this process, and keeps it after `stop`: one that comes late
    must not kill.
    """

    def __init__(
        self,
        journal: Journal,
        timeout_seconds: float,
        tell: Callable[[str, str], None] | None = None,
        leave: Callable[[str], None] | None = None,
        look_seconds: float = 1.0,
    ) -> None:
        self.journal, self.timeout_seconds = journal, timeout_seconds
        self.tell = tell or (lambda text, line: print(text, file=sys.stderr, flush=True))
        self.leave = leave or (lambda line: None)
        self.look_seconds = min(look_seconds, timeout_seconds)
        self._verdict, self._ended = Verdict(journal.folder), threading.Event()
        self._file = file_of(journal.folder, journal.rank, "stack")
        self._asked = file_of(journal.folder, journal.rank, "asked")
        self._stack = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._asked.unlink(missing_ok=True)
        self._stack = open(self._file, "w")  # noqa: SIM115, the signal handler writes to it
        faulthandler.register(_SIGNAL, file=self._stack, all_threads=True)
        self.journal.explain = self.explain
        self.journal.beat()
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stop()
        # What went wrong on all ranks, as `Mesh.together` knows, needs no one to speak for it.
        if isinstance(error, Exception) and not hasattr(error, "told") and self._verdict.claim():
            reason = (str(error) or kind.__name__).splitlines()[0]
            self._verdict.tell(f"rank {self.journal.rank} failed: {reason}")

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def explain(self, entries: Sequence[Entry], error: Exception) -> str:
        """The line for a collective that failed; a `Group` asks for it.

        A process that dies closes its connections a little before it is gone.
        """
        folder, rank = self.journal.folder, self.journal.rank
        others = {r for entry in entries for r in self._members(entry)} - {rank}
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and self._verdict.line is None:
            records, now = [read(folder, r) for r in others], time.time()
            if any(r is not None and state_of(r, now) in ("dead", "ended") for r in records):
                break
            time.sleep(0.05)
        return self._agree(entries[0], f"\n  what failed: {error}")

    def _members(self, entry: Entry) -> tuple[int, ...]:
        return self.journal.members(entry.channel)

    def _watch(self) -> None:
        seen = False
        while not self._ended.wait(self.look_seconds):
            self.journal.beat()
            self.journal.settle()
            if self._asked.exists():
                self._asked.unlink(missing_ok=True)
                faulthandler.dump_traceback(self._stack)
            if (line := self._verdict.line) is not None:
                if seen:  # the main thread had time to notice by itself
                    return self.leave(line)
                seen = True
            entry = self.journal.oldest()
            if entry is not None and time.time() - entry.waits > self.timeout_seconds:
                return self.leave(self._agree(entry))

    def _agree(self, entry: Entry, more: str = "") -> str:
        """The line on which all ranks end; the first of them to come here finds it."""
        speaks = self._verdict.claim()
        if not speaks and (line := self._verdict.wait(_TELLING)) is not None:
            return line
        folder, rank = self.journal.folder, self.journal.rank
        text, running, line = report(folder, rank, entry, self._members(entry))
        for other, stack in self._stacks(running[:_STACKS]).items():
            text += f"\n  stack of rank {other}:\n" + "\n".join(f"    {s}" for s in stack)
        self.tell(text + more, line)
        if speaks:
            self._verdict.tell(line)
        return line

    def _stacks(self, ranks: Sequence[int]) -> dict[int, list[str]]:
        """Ask running processes for their stacks, and wait for all of them two seconds at most."""
        asked = {rank: self._ask(rank) for rank in ranks}
        deadline, found = time.monotonic() + 2.0, {}
        for rank, before in asked.items():
            path, size = file_of(self.journal.folder, rank, "stack"), before
            found[rank] = ["it has no watchdog, so it cannot be asked."]
            while before is not None:
                last, size = size, path.stat().st_size if path.exists() else 0
                if size > before and size == last:
                    threads = path.read_bytes()[before:].decode(errors="replace").split("\n\n")
                    mine = f"in {self._watch.__name__}"
                    stack = "\n".join(t for t in threads if mine not in t)
                    found[rank] = stack.strip().splitlines()
                    break
                if time.monotonic() > deadline:
                    found[rank] = [f"it did not answer within 2 s; look into {path}."]
                    break
                time.sleep(0.05)
        return found

    def _ask(self, rank: int) -> int | None:
        """Ask a process for its stack: the length of its file before; None: it cannot be asked."""
        folder = self.journal.folder
        path, record = file_of(folder, rank, "stack"), read(folder, rank)
        if record is None or not record.heartbeat:  # without a watchdog the signal would kill it
            return None
        before = path.stat().st_size if path.exists() else 0
        if record.machine == machine():
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, _SIGNAL)
        else:
            file_of(folder, rank, "asked").touch()
        return before
