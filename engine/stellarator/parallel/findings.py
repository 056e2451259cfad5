"""Who is missing when a collective does not end, from what the journals of all ranks say.

defines: Report, report, state_of

For each member of the group: whether it entered, whether its process runs, is stopped or is dead,
and what it did last; who is late because it waits elsewhere is followed to whom it waits for.

Of a process of this machine /proc says whether it runs. One of another machine is believed alive
while its watchdog writes its heartbeat. Clocks of several machines are taken to agree to a second.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stellarator.parallel.journal import Entry, Record, machine, process_state, read

# Seconds without a heartbeat after which a rank elsewhere is not believed alive: an NFS client may
# show a file as it was a minute ago (acregmax).
_SILENT = 90.0
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


def state_of(record: Record, now: float) -> str:
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
    state, theirs = state_of(record, now), record.find(entry.channel, entry.sequence)
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


class Report(NamedTuple):
    """What there is to say when a rank waits."""

    text: str
    running: list[int]  # ranks that are late, whose processes run
    line: str  # the same in short


def report(folder, rank: int, entry: Entry, members: Sequence[int]) -> Report:
    """Who it is that `rank`, which waits in `entry`, waits for."""
    now = time.time()
    lines, found = _lines(folder, rank, entry, members, now, set())
    head = (
        f"watchdog: rank {rank} has waited {_waited(entry, now):.1f} s in {entry}, "
        f"{entry.elements} elements."
    )
    running = {f.rank: None for f in found if f.state == "alive" and f.rank != rank}
    return Report("\n  ".join([head, *lines]), list(running), _short(rank, entry, found, now))


def _short(rank: int, entry: Entry, found: Sequence[_Finding], now: float) -> str:
    """One line that names who began it: of a chain of waiting ranks its end."""
    ends = [f for f in found if f.state in _GONE or f.record is None or f.record.waits is None]
    ends = ends or [f for f in found if f.position == "elsewhere"] or found
    if not ends:
        return f"all have entered {entry}, and it does not end: the network or a device is stuck"
    first, others = ends[0], sorted({f.rank for f in ends[1:]} - {ends[0].rank})
    if first.position == "elsewhere":
        text = f"rank {rank} is in {entry}, rank {first.rank} in {first.entry}"
    else:
        process = _process(first, now)
        text = f"rank {first.rank} holds up {entry}: {process}. {_did_last(first.record, now)}"
    more = f" So do {len(others)} others: {', '.join(map(str, others[:8]))}." if others else ""
    return text.rstrip(".") + "." + more
