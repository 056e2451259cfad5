"""A link between ranks that is as slow as one says, and what travels on it when.

defines: Span, Link, LinkedAxis, LinkedGroup

On a machine whose few cores compute, gloo's threads take time from what they should run beside, and
nobody can see when a message of theirs arrived. So a benchmark or a test puts a link in front: the
data goes over gloo as ever, and is there when gloo has it and the link would have carried it, at a
given bandwidth, one message behind the other. Waiting for the link takes no processor.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from stellarator.parallel.collectives import Group
from stellarator.parallel.mesh import Axis


class Span(NamedTuple):
    """Something that went on from `start` to `end`, in seconds."""

    kind: str  # "computation", "communication", "waiting"
    name: str
    start: float
    end: float


class _Message:
    """What was begun; `wait` until it has arrived."""

    def __init__(self, spans: list[Span], name: str, inner, start: float, end: float):
        self._spans, self._name, self._inner = spans, name, inner
        self._start, self._end = start, end

    def wait(self):
        """What the inner one gives."""
        if self._inner is not None:
            begun = time.perf_counter()
            self._result, self._inner = self._inner.wait(), None
            arrived = time.perf_counter()
            if arrived > max(self._end, begun + 1e-3):  # gloo was slower than the link
                self._end = arrived
            time.sleep(max(0.0, self._end - arrived))
            self._spans.append(Span("communication", self._name, self._start, self._end))
            self._spans.append(Span("waiting", self._name, begun, time.perf_counter()))
        return self._result


class Link:
    """Carries what one rank sends.

    Args:
        gbps: GB/s.
        latency_us: of every message.
    Attributes:
        at_once: wait for every message where it begins, so that nothing overlaps.
        spans: of the messages that were waited for, and of the waiting.
    """

    def __init__(self, gbps: float, latency_us: float):
        self._seconds_per_byte, self._latency = 1e-9 / gbps, 1e-6 * latency_us
        self._free, self.at_once, self.spans = 0.0, False, []

    def carry(self, name: str, inner, num_bytes: float) -> _Message:
        """Begin a message whose data `inner` carries."""
        start = max(self._free, time.perf_counter())
        self._free = start + self._latency + num_bytes * self._seconds_per_byte
        message = _Message(self.spans, name, inner, start, self._free)
        if self.at_once:
            message.wait()
        return message


@dataclass(frozen=True)
class LinkedAxis(Axis):
    """An axis whose ranks form a ring of such links."""

    link: Link | None = None

    def _carry(self, name: str, work, x: torch.Tensor, times: int = 1) -> _Message:
        return self.link.carry(name, work, times * x.nbytes * (self.size - 1) / self.size)

    def sum_(self, x, tag):
        self.begin_sum_(x, tag).wait()
        return x

    def gather(self, x, tag):
        found = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        self.begin_gather(found, x.contiguous(), tag).wait()
        return found

    def scatter_sum(self, x, tag):
        x = x.clone(memory_format=torch.contiguous_format)
        self.begin_scatter_sum_(x.view(-1), tag).wait()
        return x.unflatten(0, (self.size, -1))[self.rank].clone()

    def begin_sum_(self, x, tag):
        return self._carry("sum", super().begin_sum_(x, tag), x, 2)

    def begin_scatter_sum_(self, x, tag):
        return self._carry("scattered sum", super().begin_scatter_sum_(x, tag), x)

    def begin_gather(self, x, part, tag):
        return self._carry("gather", super().begin_gather(x, part, tag), x)


class LinkedGroup(Group):
    """A group whose messages go over such links; its other collectives do not."""

    link: Link

    def exchange(self, sends, receives, tag):
        num_bytes = max(sum(m.tensor.nbytes for m in both) for both in (sends, receives))
        pending = super().exchange(sends, receives, tag)
        return self.link.carry("exchange", pending, num_bytes) if sends or receives else pending
