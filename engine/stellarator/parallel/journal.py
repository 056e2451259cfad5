"""Which collectives this process entered and left, where every other process can read it.

defines: Tag, NOWHERE, Entry, Record, Journal, read, file_of

A journal is one small file per rank, mapped into memory: what is written there is seen by all
processes of the machine at once, also while this one is stopped, and stays when it dies. On other
machines it is seen as soon as the file system of the folder shows it.

Collectives are counted per channel. A channel is what its members must enter in the same order: a
group ("tp"), or one direction between two ranks of it ("pp:0>4"). Two ranks that are at the same
number of a channel must be in the same collective; one whose number is lower is missing there.

File: a header, then for each channel its last `_KEPT` entries, each with a check sum, so that one
which is being written is not believed.
"""

import contextlib
import json
import mmap
import os
import socket
import struct
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_KEPT = 8  # entries of a channel
_CHANNELS = 256
_SLOT = 256  # bytes of an entry
_HEADER = 512
_ENTRY = struct.Struct("=QQdddQiii64s24s88s")
_SUM = struct.Struct("=I")
_STATIC = struct.Struct("=8sqqi64s128s")  # mark, pid, start of the process, rank, host, machine
_CHANGING = struct.Struct("@dqq")  # heartbeat, closed, number of channels
_CHANGING_AT = 384
_MARK = b"STELJRN2"
NOWHERE = -1  # of a collective that belongs to no layer, or to no micro-batch


class Tag(NamedTuple):
    """What a collective is for. None: as the journal's `where` says; NOWHERE: in none."""

    op: str
    layer: int | None = None
    micro_batch: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        names = (("step", self.step), ("micro-batch", self.micro_batch), ("layer", self.layer))
        places = [f"{name} {value}" for name, value in names if value is not None]
        return f"`{self.op}`" + (f" ({', '.join(places)})" if places else "")


class Entry(NamedTuple):
    """One collective of one rank."""

    number: int  # among all of this rank
    sequence: int  # in its channel; both from 1
    channel: str
    kind: str  # all_reduce, send ...
    tag: Tag
    elements: int
    entered: float  # seconds since 1970
    waits: float | None = None  # since when its rank waits for it; None: it has only begun it
    left: float | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.tag}, number {self.sequence} of {self.channel}"

    @property
    def call(self) -> tuple:
        """What all who enter it must agree on; the two ends of a message are one thing."""
        kind = "message" if self.kind in ("send", "recv") else self.kind
        return kind, self.tag, self.elements


@dataclass(frozen=True)
class Record:
    """All that is in one journal."""

    rank: int
    pid: int
    started: int  # of the process, in clock ticks since boot
    host: str
    machine: str  # processes of one machine see each other's pid
    heartbeat: float  # when its watchdog was last alive; 0: it has none
    closed: bool
    entries: tuple[Entry, ...] = ()
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def count(self, channel: str) -> int:
        """How many collectives of a channel it has entered."""
        return max((e.sequence for e in self.entries if e.channel == channel), default=0)

    def find(self, channel: str, sequence: int) -> Entry | None:
        """One of its newer entries."""
        found = (e for e in self.entries if (e.channel, e.sequence) == (channel, sequence))
        return next(found, None)

    @property
    def last(self) -> Entry | None:
        """What it entered last."""
        return max(self.entries, key=lambda e: e.number, default=None)

    @property
    def waits(self) -> Entry | None:
        """What it has waited for the longest."""
        waiting = (e for e in self.entries if e.left is None and e.waits is not None)
        return min(waiting, key=lambda e: e.waits, default=None)

    def members(self, channel: str) -> tuple[int, ...]:
        """Ranks of a channel."""
        return _members(channel, self.groups)


def _members(channel: str, groups: dict) -> tuple[int, ...]:
    group, _, pair = channel.partition(":")
    return tuple(map(int, pair.split(">"))) if pair else groups.get(group, ())


def file_of(folder, rank: int, kind: str = "journal") -> Path:
    """Where a rank keeps its journal, its groups, its stack."""
    return Path(folder) / f"rank_{rank:05d}.{kind}"


def machine() -> str:
    """Alike for processes that can look at each other."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def process_state(pid: int) -> tuple[str, int] | None:
    """(state letter, start in clock ticks since boot) of a process of this machine, if it lives."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return words[0], int(words[19])


class Journal:
    """The journal of this process: one writer, any readers.

    Args:
        folder: of the run; made if it is not there.
        rank: of this process among all.
    """

    def __init__(self, folder, rank: int):
        self.folder, self.rank = Path(folder), rank
        self.where = Tag("")
        self.open: dict[int, Entry] = {}
        self.explain = None  # (entries, error) -> message of a collective that failed
        self._numbers, self._channels, self._groups = 0, {}, {}
        self._started: dict[str, deque[tuple[Entry, object]]] = {}  # of each channel, in order
        self._waited, self._waits = 0.0, []
        self._lock = threading.Lock()  # backward may run in another thread than forward
        self.folder.mkdir(parents=True, exist_ok=True)
        file_of(folder, rank, "groups").unlink(missing_ok=True)
        size = _HEADER + _CHANNELS * _KEPT * _SLOT
        path = file_of(folder, rank)
        fresh = path.with_suffix(".new")
        with open(fresh, "wb+") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        texts = socket.gethostname().encode()[:64], machine().encode()[:128]
        pid = os.getpid()
        _STATIC.pack_into(self._map, 0, _MARK, pid, process_state(pid)[1], rank, *texts)
        os.replace(fresh, path)  # a reader of an older run keeps the older file

    def at(self, **places: int | None) -> None:
        """Where the run is from now on: step, micro_batch, layer; None: in none."""
        self.where = self.where._replace(**places)

    def complete(self, tag: Tag | str) -> Tag:
        """A tag with the places that the caller left to the journal."""
        if isinstance(tag, str):
            tag = Tag(tag)
        layer, micro_batch, step = (
            there if given is None else None if given == NOWHERE else given
            for given, there in zip(tag[1:], self.where[1:], strict=True)
        )
        return Tag(tag.op[:88], layer, micro_batch, step)

    def register(self, group: str, ranks: tuple[int, ...]) -> None:
        """Who is in a group, for those who follow a chain of waiting ranks."""
        if self._groups.setdefault(group, tuple(ranks)) != tuple(ranks):
            raise ValueError(
                f"journal: expected one group named {group!r}, got ranks {self._groups[group]} "
                f"and {tuple(ranks)}. Give groups of this process different names."
            )
        path = file_of(self.folder, self.rank, "groups")
        fresh = path.with_suffix(".groups_new")
        fresh.write_text(json.dumps(self._groups))
        os.replace(fresh, path)

    def members(self, channel: str) -> tuple[int, ...]:
        """Ranks of a channel."""
        return _members(channel, self._groups)

    def enter(
        self, channel: str, kind: str, tag: Tag | str, elements: int, waits: bool = True
    ) -> Entry:
        """Note that this process enters a collective; not `waits`: it only begins it."""
        if self._started:
            self.settle()
        now = time.time()
        with self._lock:
            if channel not in self._channels:
                self._add(channel)
            index, sequence, name = self._channels[channel]
            self._channels[channel] = index, sequence + 1, name
            self._numbers += 1
            entry = Entry(
                *(self._numbers, sequence + 1, channel, kind, self.complete(tag), elements, now),
                now if waits else None,
            )
            self.open[entry.number] = entry
            self._write(entry, index, name)
        return entry

    def wait(self, entry: Entry) -> None:
        """Note that this process goes no further until what it began is done."""
        with self._lock:
            found = self.open.get(entry.number)
            if found is not None and found.waits is None:
                self.open[entry.number] = found._replace(waits=time.time())
                self._rewrite(self.open[entry.number])

    def leave(self, entry: Entry) -> None:
        """Note that it is done."""
        with self._lock:
            found = self.open.get(entry.number)
            if found is not None:
                self._leave(found)

    def _leave(self, entry: Entry) -> None:
        del self.open[entry.number]
        self._rewrite(entry, time.time())

    def _rewrite(self, entry: Entry, left: float = 0.0) -> None:
        """Write an entry again."""
        index, newest, name = self._channels[entry.channel]
        if entry.sequence + _KEPT > newest:  # else the slot has a newer one
            self._write(entry, index, name, left)

    def waited(self, begun, ended) -> None:
        """Note from when to when this process, or its GPU, waited: seconds, or recorded events."""
        with self._lock:
            if isinstance(begun, float):
                self._waited += ended - begun
            else:
                self._waits.append((begun, ended))

    @property
    def waited_seconds(self) -> float:
        """In all collectives so far; of a GPU, as far as it has come."""
        with self._lock:
            while self._waits and self._waits[0][1].query():
                begun, ended = self._waits.pop(0)
                self._waited += begun.elapsed_time(ended) / 1e3
            return self._waited

    def leave_later(self, entry: Entry, work) -> None:
        """It was only started: it is left when `work.is_completed()`."""
        with self._lock:
            self._started.setdefault(entry.channel, deque()).append((entry, work))

    def settle(self) -> None:
        """Note what of the started is done by now: of a channel one is done after the other."""
        with self._lock:
            for started in self._started.values():
                while started:
                    entry, work = started[0]
                    found = self.open.get(entry.number)
                    if found is not None:
                        if not work.is_completed():
                            break
                        self._leave(found)
                    started.popleft()

    def oldest(self) -> Entry | None:
        """What this process has waited for the longest."""
        with self._lock:
            waiting = [e for e in self.open.values() if e.waits is not None]
        return min(waiting, key=lambda e: e.waits, default=None)

    def beat(self) -> None:
        """Note that this process lives; its watchdog calls it."""
        with self._lock:
            self._change(heartbeat=time.time())
        with contextlib.suppress(OSError):  # a full disk, or a file system that is gone
            self._map.flush()  # to other machines; those of this one see the memory itself

    def close(self) -> None:
        """Note that this process ends as it should."""
        with self._lock:
            self._change(closed=1)

    def _add(self, channel: str) -> None:
        if len(self._channels) == _CHANNELS or len(channel.encode()) > 64:
            raise RuntimeError(
                f"journal: expected at most {_CHANNELS} channels with names of at most 64 bytes, "
                f"got {channel!r} after {len(self._channels)}. Name groups shortly."
            )
        self._channels[channel] = len(self._channels), 0, channel.encode()
        self._change(channels=len(self._channels))

    def _change(self, **values) -> None:
        """Under the lock: what two threads read and write back, one of them would lose."""
        heartbeat, closed, channels = _CHANGING.unpack_from(self._map, _CHANGING_AT)
        found = {"heartbeat": heartbeat, "closed": closed, "channels": channels} | values
        _CHANGING.pack_into(self._map, _CHANGING_AT, *found.values())

    def _write(self, entry: Entry, index: int, name: bytes, left: float = 0.0) -> None:
        tag = entry.tag
        places = (-1 if p is None else p for p in (tag.step, tag.micro_batch, tag.layer))
        data = _ENTRY.pack(
            entry.number, entry.sequence, entry.entered, entry.waits or 0.0, left, entry.elements,
            *places, name, entry.kind.encode(), tag.op.encode()[:88],
        )  # fmt: skip
        at = _HEADER + (index * _KEPT + entry.sequence % _KEPT) * _SLOT
        data += _SUM.pack(zlib.crc32(data))
        self._map[at : at + len(data)] = data


def read(folder, rank: int) -> Record | None:
    """The journal of a rank; None: there is none yet."""
    try:
        data = file_of(folder, rank).read_bytes()
        groups = file_of(folder, rank, "groups")
        groups = json.loads(groups.read_text()) if groups.exists() else {}
    except FileNotFoundError:
        return None
    mark, pid, started, rank, host, machine_name = _STATIC.unpack_from(data)
    if mark != _MARK:
        return None
    heartbeat, closed, channels = _CHANGING.unpack_from(data, _CHANGING_AT)
    slots = (_HEADER + n * _SLOT for n in range(channels * _KEPT))
    entries = tuple(e for e in (_parse(data, at) for at in slots) if e is not None)
    groups = {name: tuple(ranks) for name, ranks in groups.items()}
    texts = _text(host), _text(machine_name)
    return Record(rank, pid, started, *texts, heartbeat, bool(closed), entries, groups)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _parse(data: bytes, at: int) -> Entry | None:
    """The entry of a slot; None where there is none, or half of one."""
    body = data[at : at + _ENTRY.size]
    number, sequence, entered, waits, left, elements, *rest = _ENTRY.unpack(body)
    step, micro_batch, layer, *texts = rest
    if number == 0 or zlib.crc32(body) != _SUM.unpack_from(data, at + _ENTRY.size)[0]:
        return None
    step, micro_batch, layer = (None if p < 0 else p for p in (step, micro_batch, layer))
    channel, kind, op = map(_text, texts)
    tag = Tag(op, layer, micro_batch, step)
    times = entered, waits or None, left or None
    return Entry(number, sequence, channel, kind, tag, elements, *times)
