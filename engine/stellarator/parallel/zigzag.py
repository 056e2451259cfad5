"""Rows of tokens cut over the ranks of a context group: who holds what, sees what, sends what.

defines: chunks_of, owner, positions, shard, unshard, Call, calls_between, calls_to_row,
    Block, Step, Plan

Pure. A row of T tokens is 2P chunks for P ranks, and rank r holds chunks r and 2P - 1 - r: under a
causal mask a late chunk sees much and its early partner little, so that all ranks work alike.

The keys and values of a chunk travel from rank to rank, up from r to r + 1 ... and down to r - 1
..., exactly as far as somebody sees them. Whatever the mask (causal, bidirectional, a window,
documents), the chunks that see chunk c are neighbours of it and of each other, and folding the row
at its middle keeps neighbours neighbours: no rank passes on what it does not use itself. A ring
that hands everything on P - 1 times moves a third more under a causal mask; under a window of at
most a chunk here each chunk is sent once.

Letters: P ranks, B rows, T tokens of a row, n = T/2P tokens of a chunk.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of a rank, in the order in which it holds them."""
    return rank, 2 * size - 1 - rank


def owner(chunk: int, size: int) -> int:
    """The rank that holds a chunk."""
    return min(chunk, 2 * size - 1 - chunk)


def _chunk_length(T: int, size: int) -> int:
    if T % (2 * size):
        raise ValueError(
            f"context parallelism: expected rows of a multiple of 2 * {size} tokens, got {T}. "
            f"Pad them to {-(-T // (2 * size)) * 2 * size}."
        )
    return T // (2 * size)


def positions(rank: int, size: int, T: int, device=None) -> torch.Tensor:
    """(T/P,) int64: where in the row the tokens of a rank are."""
    return shard(torch.arange(T, device=device), rank, size, dim=0)


def shard(x: torch.Tensor, rank: int, size: int, dim: int = 1) -> torch.Tensor:
    """The part of a rank of what has one entry per token: tokens, targets, positions, hidden."""
    if size == 1:
        return x
    n = _chunk_length(x.shape[dim], size)
    return torch.cat([x.narrow(dim, c * n, n) for c in chunks_of(rank, size)], dim)


def unshard(parts: list[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """The whole from the parts of all ranks, in their order."""
    halves = [part.chunk(2, dim) for part in parts]
    early, late = zip(*halves, strict=True)
    return torch.cat([*early, *reversed(late)], dim) if len(parts) > 1 else parts[0]


class Call(NamedTuple):
    """One call of attention: queries [start, stop) to keys [start, stop), positions in the row.

    mask: "full"; "causal", aligned at the ends; "mirrored", causal and aligned when queries and
    keys are both reversed: query q0 + i sees the keys from k0 + i on, the lower edge of a window.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    mask: str
    window: int | None = None
    bounds: tuple[int, ...] | None = None  # documents inside: 0, ends, length; needs q == k


def _document(bounds: tuple[int, ...], position: int) -> tuple[int, int]:
    """Start and stop of the document that has a position."""
    at = bisect_right(bounds, position)
    return bounds[at - 1], bounds[at]


def _square(start: int, stop: int, bounds, causal: bool, window) -> Call:
    """Queries to keys of the same place, documents and all."""
    inside = sorted({0, stop - start, *(n - start for n in bounds if start < n < stop)})
    place = start, stop
    documents = tuple(inside) if len(inside) > 2 else None
    return Call(place, place, "causal" if causal else "full", window, documents)


def calls_between(
    q: tuple[int, int],
    k: tuple[int, int],
    bounds: tuple[int, ...],
    causal: bool,
    window: int | None,
) -> list[Call]:
    """The calls that make up what one chunk of queries sees of one chunk of keys.

    At most one document reaches from one chunk into another. A window cuts a staircase from that
    rectangle, whose queries with all keys are one call and the others a mirrored one.
    """
    if q == k:
        return [_square(*q, bounds, causal, window)]
    (q0, q1), (k0, k1) = q, k
    if k0 >= q1:
        start, stop = _document(bounds, q1 - 1)
        if causal or stop <= k0:
            return []
        return [Call((max(q0, start), q1), (k0, min(k1, stop)), "full")]
    start, stop = _document(bounds, q0)
    if start >= k1:
        return []
    q1, k0 = min(q1, stop), max(k0, start)
    if window is None:
        return [Call((q0, q1), (k0, k1), "full")]
    seeing_all, seeing_any = k0 + window, k1 + window - 1  # the first queries that do not
    calls = []
    if q0 < seeing_all:
        calls.append(Call((q0, min(q1, seeing_all)), (k0, k1), "full"))
    q0, q1 = max(q0, seeing_all), min(q1, seeing_any)
    if q0 < q1:
        calls.append(Call((q0, q1), (q0 - window + 1, k1), "mirrored"))
    return calls


def calls_to_row(
    q: tuple[int, int], bounds: tuple[int, ...], causal: bool, window: int | None
) -> list[Call]:
    """The calls that make up what a chunk of queries sees of the whole row, each query in one.

    A document that began in an earlier chunk is one, one that ends in a later chunk (which matters
    without `causal`) another, all others a third.
    """
    q0, q1 = q
    start, stop = _document(bounds, q0)
    calls = []
    if start < q0 or (stop > q1 and not causal):
        end = min(stop, q1)
        if causal:
            low = start if window is None else max(start, q0 - window + 1)
            calls.append(Call((q0, end), (low, end), "causal", window))
        else:
            calls.append(Call((q0, end), (start, stop), "full"))
        q0 = end
    start, stop = _document(bounds, q1 - 1)
    tail = [Call((start, q1), (start, stop), "full")] if stop > q1 > q0 and not causal else []
    q1 = start if tail else q1
    if q0 < q1:
        calls.append(_square(q0, q1, bounds, causal, window))
    return calls + tail


class Block(NamedTuple):
    """Keys and values of one chunk, of one row or of rows with the same documents."""

    slot: int
    chunk: int


class Step(NamedTuple):
    """What a rank does at one distance: each message is (rank, blocks).

    `sends` and `receives` are keys and values before the calls. The sums of their gradients go on
    as `sends` of the next step do, or, from the last rank that sees a block, `home`.
    """

    sends: tuple[tuple[int, tuple[Block, ...]], ...]
    receives: tuple[tuple[int, tuple[Block, ...]], ...]
    calls: tuple[tuple[Block, Call], ...]
    home_sends: tuple[tuple[int, tuple[Block, ...]], ...]
    home_receives: tuple[tuple[int, tuple[Block, ...]], ...]


@dataclass(frozen=True)
class Plan:
    """What one rank does in attention; the same for all layers, and made once per micro-batch.

    Args:
        rank, size: of the context group.
        B, T: rows and their tokens, of all ranks.
        cu_seqlens: bounds of the documents in the B*T tokens of the rows, one after the other; each
            row ends with one. None: a row is one document.
        causal, window: as in flash_attention.
    """

    rank: int
    size: int
    B: int
    T: int
    cu_seqlens: tuple[int, ...] | None = None
    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        _chunk_length(self.T, self.size)
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(
                "context attention: expected a window of at least 1, with causal=True, got "
                f"window={self.window}, causal={self.causal}. Pass None for no window."
            )
        if self.cu_seqlens is not None:
            object.__setattr__(self, "cu_seqlens", tuple(map(int, self.cu_seqlens)))
            ends, whole = self.cu_seqlens, self.B * self.T
            rising = list(ends) == sorted(ends) and ends[:1] == (0,) and ends[-1] == whole
            if not rising or not set(range(0, whole, self.T)) <= set(ends):
                raise ValueError(
                    f"context attention: expected cu_seqlens that rises from 0 to B * T = {whole} "
                    f"and has every multiple of T = {self.T}, got {ends[:8]} ... {ends[-1:]}. "
                    "Pass 0 and the end of each document; rows share none."
                )

    @property
    def chunk_length(self) -> int:
        """n."""
        return self.T // (2 * self.size)

    def place(self, chunk: int) -> tuple[int, int]:
        """Positions of a chunk."""
        return chunk * self.chunk_length, (chunk + 1) * self.chunk_length

    def local(self, position: int) -> int:
        """Where a rank that holds it has a position."""
        chunk, offset = divmod(position, self.chunk_length)
        return offset + (0 if chunk < self.size else self.chunk_length)

    @cached_property
    def slots(self) -> tuple[tuple[slice, tuple[int, ...]], ...]:
        """(rows, bounds of their documents): all rows at once, or with documents one by one."""
        if self.cu_seqlens is None:
            return ((slice(0, self.B), (0, self.T)),)
        found = []
        for row in range(self.B):
            low, high = row * self.T, (row + 1) * self.T
            bounds = sorted({n - low for n in self.cu_seqlens if low <= n <= high})
            found.append((slice(row, row + 1), tuple(bounds)))
        return tuple(found)

    @cached_property
    def _tensors(self) -> dict[tuple, torch.Tensor]:
        return {}

    def documents(self, call: Call, device: torch.device) -> torch.Tensor | None:
        """(E+1,) int32: the bounds inside a call, brought to the device once."""
        key = call.bounds, device
        if call.bounds is not None and key not in self._tensors:
            self._tensors[key] = torch.tensor(call.bounds, dtype=torch.int32, device=device)
        return self._tensors.get(key)

    def _calls(self, slot: int, q_chunk: int, k_chunk: int) -> list[Call]:
        bounds, places = self.slots[slot][1], (self.place(q_chunk), self.place(k_chunk))
        return calls_between(*places, bounds, self.causal, self.window)

    @cached_property
    def reach(self) -> dict[Block, tuple[int, int]]:
        """How far each block goes, up and down."""
        found = {}
        for slot in range(len(self.slots)):
            for chunk in range(2 * self.size):
                seen_by = [c for c in range(2 * self.size) if self._calls(slot, c, chunk)]
                ranks = [owner(c, self.size) for c in (*seen_by, chunk)]
                here = owner(chunk, self.size)
                found[Block(slot, chunk)] = max(ranks) - here, here - min(ranks)
        return found

    def _owned(self, rank: int) -> list[Block]:
        if not 0 <= rank < self.size:
            return []
        slots = range(len(self.slots))
        return [Block(slot, c) for slot in slots for c in chunks_of(rank, self.size)]

    def _arriving(self, rank: int, distance: int) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
        """Blocks that come to a rank from below and from above."""
        sources = self._owned(rank - distance), self._owned(rank + distance)
        up, down = (
            tuple(b for b in blocks if self.reach[b][way] >= distance)
            for way, blocks in enumerate(sources)
        )
        return (up, down) if 0 <= rank < self.size else ((), ())

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """One for each distance from 0, equally many on all ranks."""
        furthest = max(max(ways) for ways in self.reach.values())
        return tuple(self._step(distance) for distance in range(furthest + 1))

    def _step(self, s: int) -> Step:
        rank = self.rank
        if s == 0:
            return Step((), (), self._calls_to(self._owned(rank)), (), ())
        up, down = self._arriving(rank, s)
        sends = (
            (rank + 1, self._arriving(rank + 1, s)[0]),
            (rank - 1, self._arriving(rank - 1, s)[1]),
        )
        ends = [
            tuple(b for b in own if self.reach[b][way] == s) for way, own in ((0, up), (1, down))
        ]
        mine = [tuple(b for b in self._owned(rank) if self.reach[b][way] == s) for way in (0, 1)]
        messages = (
            sends,
            ((rank - 1, up), (rank + 1, down)),
            ((rank - s, ends[0]), (rank + s, ends[1])),
            ((rank + s, mine[0]), (rank - s, mine[1])),
        )
        sends, receives, home_sends, home_receives = (
            tuple(message for message in both if message[1]) for both in messages
        )
        return Step(sends, receives, self._calls_to(up + down), home_sends, home_receives)

    def _calls_to(self, blocks) -> tuple[tuple[Block, Call], ...]:
        """What this rank sees of these blocks."""
        own = chunks_of(self.rank, self.size)
        return tuple(
            (b, call) for b in blocks for c in own for call in self._calls(b.slot, c, b.chunk)
        )

    @cached_property
    def row_calls(self) -> tuple[tuple[int, Call], ...]:
        """(slot, call) for a rank that has the keys and values of whole rows."""
        return tuple(
            (slot, call)
            for slot, (_, bounds) in enumerate(self.slots)
            for chunk in chunks_of(self.rank, self.size)
            for call in calls_to_row(self.place(chunk), bounds, self.causal, self.window)
        )
