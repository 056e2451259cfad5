"""Who is missing when a collective does not end, and where that rank is instead.

defines: report, Watchdog

Each rank has a thread that looks at the journals of all. When its own rank has been in a collective
for longer than the timeout, it says for each member of the group whether it entered, whether its
process runs, is stopped or is dead, and what it did last; who is late because it waits elsewhere is
followed to whom it waits for. The same text explains a collective that fails because a rank died.

What can be known of a late rank: of a process of this machine /proc says whether it runs. A running
one is sent SIGUSR2, at which Python's faulthandler writes its stack even while it computes in C. On
another machine its own watchdog is asked through a file, and is believed alive while it writes its
heartbeat. A stopped or dead process cannot show its stack: then the last entry of its journal is
all there is. Clocks of several machines are taken to agree to a second.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stellarator.parallel.journal import (
    Entry,
    Journal,
    Record,
    file_of,
    machine,
    process_state,
    read,
)

_SIGNAL = signal.SIGUSR2
_STACKS = 4  # in one report
_SILENT = 10.0  # seconds without a heartbeat after which a rank elsewhere is not believed alive
_GONE = ("dead", "stopped", "ended", "silent")


@dataclass(frozen=True)
class _Finding:
    """One member of a channel, seen from one who waits there."""

    rank: int
    position: str  # "missing", "elsewhere", "waits", "left"
    state: str  # "alive", "unknown" or one of _GONE
    entry: Entry | None = None  # what it entered at this number
    record: Record | None = None

    @property
    def guilty(self) -> bool:
        """Whether the others wait for it."""
        return self.position in ("missing", "elsewhere") or (
            self.position == "waits" and self.state in _GONE
        )


def _state(record: Record, now: float) -> str:
    """Whether the process of a journal runs."""
    if record.closed:
        return "ended"
    if record.machine == machine():
        found = process_state(record.pid)
        if found is None or found[0] in "ZX" or found[1] != record.started:
            return "dead"
        return "stopped" if found[0] in "Tt" else "alive"
    if not record.heartbeat:
        return "unknown"
    return "silent" if now - record.heartbeat > _SILENT else "alive"


def _examine(folder, rank: int, entry: Entry, now: float) -> _Finding:
    record = read(folder, rank)
    if record is None:
        return _Finding(rank, "missing", "unknown")
    state, theirs = _state(record, now), record.find(entry.channel, entry.sequence)
    if record.count(entry.channel) < entry.sequence:
        return _Finding(rank, "missing", state, record=record)
    if theirs is not None and theirs.call != entry.call:
        return _Finding(rank, "elsewhere", state, theirs, record)
    position = "waits" if theirs is not None and theirs.left is None else "left"
    return _Finding(rank, position, state, theirs, record)


def _process(finding: _Finding, now: float) -> str:
    """Its process, in words."""
    record = finding.record
    if record is None:
        return "it has no journal: it never came so far"
    words = {
        "alive": "it runs",
        "stopped": "it is stopped (state T), so that it cannot show its stack",
        "dead": "it is dead",
        "ended": "it has ended as it should",
        "silent": f"no sign of life for {now - record.heartbeat:.1f} s: it is stopped or dead, or "
        "its machine is",
        "unknown": "it has no watchdog, so whether it runs is not known",
    }
    return f"{words[finding.state]}, pid {record.pid} on {record.host}"


def _waited(entry: Entry, now: float) -> float:
    """Seconds since its rank waits there; since it was begun, if it does not."""
    return now - (entry.entered if entry.waits is None else entry.waits)


def _did_last(record: Record | None, now: float) -> str:
    last = record.last if record is not None else None
    if last is None:
        return "It has entered no collective."
    if last.left is None:
        return f"It is in {last}, for {_waited(last, now):.1f} s."
    return f"It last left {last}, {now - last.left:.1f} s ago."


def _lines(folder, me: int, entry: Entry, members: Sequence[int], now: float, seen: set[int]):
    """(lines, findings of the late) for one who waits; follows those who wait elsewhere."""
    findings = [_examine(folder, r, entry, now) for r in members if r != me]
    lines, found = [], []
    seen.add(me)
    for f in findings:
        if not f.guilty:
            continue
        found.append(f)
        if f.rank in seen:
            lines.append(f"rank {f.rank} is missing, which waits as said above: a circle.")
            continue
        seen.add(f.rank)
        waits = f.record.waits if f.record is not None else None
        if f.position == "elsewhere":
            lines.append(
                f"rank {f.rank} entered {f.entry}, {f.entry.elements} elements, instead: "
                f"{_process(f, now)}."
            )
        elif f.position == "waits":
            lines.append(f"rank {f.rank} entered it and did not go on: {_process(f, now)}.")
        elif waits is None or f.state in _GONE:
            text = f"{_process(f, now)}. {_did_last(f.record, now)}"
            lines.append(f"rank {f.rank} is missing: {text}")
        else:
            since = f"{_waited(waits, now):.1f} s"
            lines.append(f"rank {f.rank} is missing: {_process(f, now)}.")
            lines.append(f"  It waits in {waits}, for {since}, where")
            theirs = f.record.members(waits.channel)
            more, deeper = _lines(folder, f.rank, waits, theirs, now, seen)
            lines += [f"  {line}" for line in more]
            found += deeper
    alike = [
        f"rank {f.rank} ({_waited(f.entry, now):.1f} s)"
        for f in findings
        if f.position == "waits" and not f.guilty and f.entry.waits is not None
    ]
    if alike:
        more = f" and {len(alike) - 8} more" if len(alike) > 8 else ""
        lines.append(f"waiting as well: {', '.join(alike[:8])}{more}.")
    if not found:
        lines.append("nobody is missing: all have entered it, so the network or a device is stuck.")
    return lines, found


def report(folder, rank: int, entry: Entry, members: Sequence[int]) -> tuple[str, list[int]]:
    """What there is to say when `rank` waits in `entry`: (text, ranks that are late but run)."""
    now = time.time()
    lines, found = _lines(folder, rank, entry, members, now, set())
    head = (
        f"watchdog: rank {rank} has waited {_waited(entry, now):.1f} s in {entry}, "
        f"{entry.elements} elements."
    )
    running = {f.rank: None for f in found if f.state == "alive" and f.rank != rank}
    return "\n  ".join([head, *lines]), list(running)


class Watchdog:
    """The thread of one rank; a context manager.

    Args:
        journal: of this rank.
        timeout_seconds: in a collective, after which it reports; it does so within 5 s more.
        say: called with the text, once for each collective that takes too long. None: stderr.
        look_seconds: between two looks.

    It takes SIGUSR2 for the stack of this process, and keeps it after `stop`: one that comes late
    must not kill.
    """

    def __init__(
        self,
        journal: Journal,
        timeout_seconds: float,
        say: Callable[[str], None] | None = None,
        look_seconds: float = 1.0,
    ) -> None:
        self.journal, self.timeout_seconds = journal, timeout_seconds
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.look_seconds = min(look_seconds, timeout_seconds)
        self._told, self._ended = 0, threading.Event()
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

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def explain(self, entries: Sequence[Entry], error: Exception) -> str:
        """The text for a collective that failed; a `Group` asks for it.

        A process that dies closes its connections a little before it is gone.
        """
        folder, rank = self.journal.folder, self.journal.rank
        others = {r for entry in entries for r in self._members(entry)} - {rank}
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            records, now = [read(folder, r) for r in others], time.time()
            if any(r is not None and _state(r, now) in ("dead", "ended") for r in records):
                break
            time.sleep(0.05)
        texts = [report(folder, rank, entry, self._members(entry))[0] for entry in entries]
        return "\n".join([*texts, f"  what failed: {error}"])

    def _members(self, entry: Entry) -> tuple[int, ...]:
        return self.journal.members(entry.channel)

    def _watch(self) -> None:
        while not self._ended.wait(self.look_seconds):
            self.journal.beat()
            self.journal.settle()
            if self._asked.exists():
                self._asked.unlink(missing_ok=True)
                faulthandler.dump_traceback(self._stack)
            entry = self.journal.oldest()
            if (
                entry is not None
                and entry.number > self._told
                and time.time() - entry.waits > self.timeout_seconds
            ):
                self._told = entry.number
                self.say(self._text(entry))

    def _text(self, entry: Entry) -> str:
        """The report, and stacks if this is the lowest rank that waits: one asks, not all."""
        folder, members = self.journal.folder, self._members(entry)
        text, running = report(folder, self.journal.rank, entry, members)
        now = time.time()
        others = (_examine(folder, r, entry, now) for r in members if r < self.journal.rank)
        if any(f.position == "waits" and f.state == "alive" for f in others):
            return text
        for rank, stack in self._stacks(running[:_STACKS]).items():
            text += f"\n  stack of rank {rank}:\n" + "\n".join(f"    {s}" for s in stack)
        return text

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
