"""Collectives on one group of ranks, each with a tag of what it is for.

defines: Group, Message, Pending

A `Group` is given to what communicates; nothing is looked up in a module. It writes into a journal
what is entered and left, from which a watchdog names who is missing. In a group of one rank every
call returns what it was given.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stellarator.parallel.journal import Entry, Journal, Tag


@dataclass(frozen=True)
class Message:
    """A tensor that goes to, or comes from, a rank of the group."""

    tensor: torch.Tensor
    peer: int  # its index in the group


class Pending:
    """Communication that was started; `wait` before its tensors are used or changed."""

    def __init__(self, works: Sequence = (), result=None, group=None, entries=(), keep=()):
        self._works, self._result, self._group = works, result, group
        self._entries, self._keep = entries, keep  # sent tensors live until they are sent

    def wait(self):
        """The result; on a GPU its stream waits, not the host."""
        works, self._works = self._works, ()
        if works:
            self._group._finish(works, self._entries)
        self._keep = ()
        return self._result


class Group:
    """Ranks that communicate.

    Args:
        process_group: of torch.distributed; None: this process alone.
        name: of the group, the same on all its ranks ("tp"), for the journal.
        journal: of this process, or None. Its `explain` gives the message of an error.

    `tag` of each call is a `Tag` or the name of its op. Tensors are contiguous.
    """

    def __init__(self, process_group, name: str, journal: Journal | None = None) -> None:
        self.process_group, self.name, self.journal = process_group, name, journal
        alone = process_group is None
        self.ranks = (0,) if alone else tuple(dist.get_process_group_ranks(process_group))
        self.size = len(self.ranks)
        self.rank = 0 if alone else dist.get_rank(process_group)  # index of this process in it
        # The work of gloo's reduce_scatter never says that it is completed (torch 2.13).
        self._host_waits = not alone and dist.get_backend(process_group) == "gloo"
        if journal is not None and self.size > 1:
            journal.register(name, self.ranks)

    def all_reduce(
        self, x: torch.Tensor, tag: Tag | str, *, maximum=False, wait=True
    ) -> torch.Tensor | Pending:
        """The sum, or maximum, over the ranks, in place."""
        if self.size == 1:
            return x if wait else Pending(result=x)
        op = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        return self._run("all_reduce", tag, x, wait, lambda: dist.all_reduce(x, op, **self._with))

    def all_gather(
        self, x: torch.Tensor, tag: Tag | str, *, dim=0, wait=True, into=None
    ) -> torch.Tensor | Pending:
        """The tensors of all ranks, in order, along a dimension. `wait=False` needs dim 0.

        into: takes the result, for dim 0; x may be its part.
        """
        if self.size == 1:
            return x if wait else Pending(result=x)
        assert dim == 0 or (wait and into is None), "what arrives must be moved when it is there"
        whole = x.new_empty((self.size * x.shape[0], *x.shape[1:])) if into is None else into
        gather = _newest("all_gather_single", "all_gather_into_tensor")
        done = self._run("all_gather", tag, x, wait, lambda: gather(whole, x, **self._with), whole)
        if dim == 0:
            return done
        return whole.unflatten(0, (self.size, -1)).movedim(0, dim).flatten(dim, dim + 1)

    def reduce_scatter(
        self, x: torch.Tensor, tag: Tag | str, *, dim=0, wait=True, into=None
    ) -> torch.Tensor | Pending:
        """This rank's part, along a dimension, of the sum over the ranks.

        into: takes the result; it may be that part of x.
        """
        if self.size == 1:
            return x if wait else Pending(result=x)
        if x.shape[dim] % self.size:
            raise ValueError(
                f"reduce_scatter: expected a size along dim {dim} that the {self.size} ranks of "
                f"{self.name} divide, got {tuple(x.shape)}. Pad it."
            )
        parts = x.unflatten(dim, (self.size, -1)).movedim(dim, 0).contiguous()
        part, parts = torch.empty_like(parts[0]) if into is None else into, parts.flatten(0, 1)
        scatter = _newest("reduce_scatter_single", "reduce_scatter_tensor")
        return self._run(
            *("reduce_scatter", tag, x, wait),
            lambda: scatter(part, parts, **self._with),
            part,
            keep=parts,
        )

    def broadcast(
        self, x: torch.Tensor, source: int, tag: Tag | str, *, wait=True
    ) -> torch.Tensor | Pending:
        """The tensor of one rank, its index in the group, in place on the others."""
        if self.size == 1:
            return x if wait else Pending(result=x)
        return self._run(
            *("broadcast", tag, x, wait),
            lambda: dist.broadcast(x, self.ranks[source], **self._with),
        )

    def send(self, x: torch.Tensor, to: int, tag: Tag | str, *, wait=True) -> Pending | None:
        """To one rank of the group."""
        pending = self.exchange([Message(x, to)], [], tag)
        if not wait:
            return pending
        pending.wait()
        return None

    def recv(
        self, x: torch.Tensor, source: int, tag: Tag | str, *, wait=True
    ) -> torch.Tensor | Pending:
        """From one rank of the group, into `x`."""
        pending = self.exchange([], [Message(x, source)], tag)
        if wait:
            pending.wait()
        return x if wait else pending

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: Tag | str
    ) -> Pending:
        """Start messages, all at once, so that no order of them can block.

        Messages from one rank to another arrive in the order in which they were started.
        """
        both = [("send", dist.isend, m) for m in sends] + [
            ("recv", dist.irecv, m) for m in receives
        ]
        if not both:
            return Pending()
        entries = [self._enter(kind, tag, m.tensor, False, m.peer) for kind, _, m in both]
        operations = [
            dist.P2POp(call, m.tensor, self.ranks[m.peer], self.process_group)
            for _, call, m in both
        ]
        tensors = [m.tensor for m in sends]
        works = self._start(lambda: dist.batch_isend_irecv(operations), entries)
        return Pending(works, None, self, entries, tensors)

    @property
    def _with(self) -> dict:
        return {"group": self.process_group, "async_op": True}

    def _run(self, kind, tag, x, wait, call, result=None, keep=None):
        """One collective: start it, and wait for it or return what waits."""
        entries = [self._enter(kind, tag, x, wait)]
        works = [self._start(call, entries, wait)]
        pending = Pending(works, x if result is None else result, self, entries, keep)
        return pending.wait() if wait else pending

    def _enter(self, kind: str, tag, x, wait: bool, peer: int | None = None) -> Entry | None:
        if self.journal is None:
            return None
        channel = self.name
        if peer is not None:
            ends = (self.rank, peer) if kind == "send" else (peer, self.rank)
            channel = f"{self.name}:{self.ranks[ends[0]]}>{self.ranks[ends[1]]}"
        # What a GPU has queued it waits for, whether the host does or not.
        return self.journal.enter(channel, kind, tag, x.numel(), wait or not self._host_waits)

    def _start(self, call, entries, wait=False):
        """What `call` returns: one work, or a list of them."""
        try:
            works = call()
        except RuntimeError as error:
            self._fail(entries, error)
        if self.journal is not None and not wait:
            for entry, work in self._pairs(entries, works):
                self.journal.leave_later(entry, work)
        return works

    def _finish(self, works, entries) -> None:
        """Wait, and note what is done; a GPU has only queued it, and is asked again later."""
        if self.journal is not None:
            for entry in entries:
                if entry.waits is None:
                    self.journal.wait(entry)
            begun = self._now()
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._fail(entries, error)
        if self.journal is not None:
            self.journal.waited(begun, self._now())
            for entry, work in self._pairs(entries, works):
                if self._host_waits or work.is_completed():
                    self.journal.leave(entry)
                else:
                    self.journal.leave_later(entry, work)

    def _now(self):
        """Of the host, or of the stream of the GPU that waits in its place."""
        if self._host_waits:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _pairs(entries, works):
        """Each entry with its work; NCCL has one work for all messages of an exchange."""
        works = works if isinstance(works, list) else [works]
        return zip(
            entries, works if len(works) == len(entries) else works * len(entries), strict=True
        )

    def _fail(self, entries, error: RuntimeError):
        if self.journal is None or self.journal.explain is None:
            raise error
        raise RuntimeError(self.journal.explain(entries, error)) from error


def _newest(*names: str):
    """The first of these functions that torch has: 2.13 warns of the names that 2.11 has."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))
