"""Runs a schedule on real processes.

defines: Links, Executor

Every rank walks down its list of actions. What a stage needs from another rank was sent there as
soon as it was made; it is received into a buffer that was posted in the order in which the other
rank sends, which its own list says. A send is waited for when a message shows that the other rank
has taken it, or at the end: no rank waits for one that does not wait for something earlier, so
what the simulator proves of a schedule holds here. On NCCL the first message of a link is also a
meeting of both hosts; that no schedule makes a circle of these is a test of its own.

A message is the residual stream of a micro-batch, or its gradient: one tensor.
"""

import contextlib
from collections import deque
from collections.abc import Callable

import torch

from stellarator.parallel.collectives import Pending
from stellarator.parallel.journal import NOWHERE, Tag
from stellarator.parallel.mesh import Axis, Mesh
from stellarator.parallel.pipeline.deferred import Deferred
from stellarator.parallel.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
)

MAKE_WEIGHT_GRADIENTS = (BACKWARD, WEIGHT_GRADIENT)


class Links:
    """Process groups of two ranks, one for each direction in which neighbours send.

    One for both directions would make NCCL wait for a send before it receives: a deadlock when both
    send first.

    Args:
        mesh: of this process; every process makes the links of all pipelines.
    """

    def __init__(self, mesh: Mesh):
        self.axis, columns = mesh.pp, mesh.layout.groups("pp")
        size = self.axis.size
        steps = [(a, (a + 1) % size) for a in range(size if size > 2 else 1)]
        self._links = {
            pair: mesh.among(
                "link {}-{}".format(*pair), [sorted(column[r] for r in pair) for column in columns]
            )
            for pair in [*steps, *(step[::-1] for step in steps)]
        }

    def send(self, x: torch.Tensor, to: int, key: tuple) -> Pending:
        """Begin to send what `key` says to a rank of the axis; keeps x until it is sent."""
        link = self._links[self.axis.rank, to]
        return link.group.send(x, 1 - link.rank, _tag(key), wait=False)

    def receive(self, x: torch.Tensor, source: int, key: tuple) -> Pending:
        """Begin to receive into x what `key` says."""
        link = self._links[source, self.axis.rank]
        return link.group.recv(x, 1 - link.rank, _tag(key), wait=False)


def _tag(key: tuple) -> Tag:
    """Of a message, alike at both ends: (FORWARD or BACKWARD, receiving stage, micro-batch)."""
    kind, stage, micro_batch = key
    what = "input" if kind == FORWARD else "gradient"
    return Tag(f"{what} of stage {stage}", NOWHERE, micro_batch)


class _Inbox:
    """Receives what one rank sends, in the order in which it does."""

    def __init__(self, links: Links, source: int, keys: list[tuple], empty: Callable):
        self.links, self.source, self.empty = links, source, empty
        self.coming, self.posted = deque(keys), {}

    def _post(self) -> None:
        key = self.coming.popleft()
        buffer = self.empty(key[2])
        self.posted[key] = buffer, self.links.receive(buffer, self.source, key)

    def take(self, key: tuple) -> torch.Tensor:
        """Wait for one message; the one behind it is on its way meanwhile."""
        while key not in self.posted:
            self._post()
        if len(self.posted) == 1 and self.coming:
            self._post()
        buffer, handle = self.posted.pop(key)
        handle.wait()
        return buffer


def messages(actions: list[Action], ranks: list[int], to: int) -> list[tuple]:
    """(FORWARD or BACKWARD, receiving stage, micro-batch) of what a rank sends another, in order.

    Args:
        actions: of the sending rank.
        ranks: of each stage.
        to: the receiving rank.
    """
    found = []
    for kind, stage, micro_batch in actions:
        if kind == FORWARD and stage + 1 < len(ranks) and ranks[stage + 1] == to:
            found.append((FORWARD, stage + 1, micro_batch))
        if kind in (BACKWARD, INPUT_GRADIENT) and stage > 0 and ranks[stage - 1] == to:
            found.append((BACKWARD, stage - 1, micro_batch))
    return found


def _places(actions: list[Action]) -> dict[tuple, int]:
    """Where in the list the message (FORWARD or BACKWARD, stage, micro-batch) is taken."""
    return {
        (FORWARD if kind == FORWARD else BACKWARD, stage, micro_batch): index
        for index, (kind, stage, micro_batch) in enumerate(actions)
        if kind != WEIGHT_GRADIENT
    }


class Last:
    """Is told of the passes that make the last gradients of a stage; this one does nothing."""

    def backward(self) -> contextlib.AbstractContextManager:
        """A block with the backward pass of a stage that makes its last gradients."""
        return contextlib.nullcontext()

    def made(self, stage: int) -> None:
        """Its last weight gradients were made apart, and its others before."""


class Executor:
    """Runs schedules of one placement of stages.

    Args:
        axis: the ranks of the pipeline.
        links: to the neighbours; None where there is one rank.
        ranks: of each stage.
        deferred: that of the model's layers, for schedules that split the backward.
    """

    def __init__(self, axis: Axis, links: Links | None, ranks: list[int], deferred: Deferred):
        self.axis, self.links, self.ranks, self.deferred = axis, links, ranks, deferred
        self.done: list[Action] = []  # of the last run, in the order in which they were finished

    def run(
        self,
        schedule: list[list[Action]],
        forward: Callable[[int, int, torch.Tensor | None], torch.Tensor],
        empty: Callable[[int], torch.Tensor],
        last: Last | None = None,
    ) -> torch.Tensor | float:
        """Do this rank's actions.

        Args:
            schedule: of every rank.
            forward: (stage, micro-batch, input or None for stage 0) -> output, of the last stage
                the loss.
            empty: micro-batch -> a tensor like the input of a stage.
            last: told of the passes that make the last gradients of a stage.
        Returns:
            the sum of the losses; 0.0 on ranks without the last stage.
        """
        mine, rank = schedule[self.axis.rank], self.axis.rank
        self._inboxes = {
            source: _Inbox(self.links, source, messages(actions, self.ranks, rank), empty)
            for source, actions in enumerate(schedule)
            if source != rank
        }
        self._local: dict[tuple, torch.Tensor] = {}
        self._sent: dict[int, list[tuple[int, Pending]]] = {rank: [] for rank in self._inboxes}
        self._places, self.done = [_places(actions) for actions in schedule], []
        inputs: dict[tuple[int, int], torch.Tensor | None] = {}
        outputs: dict[tuple[int, int], object] = {}
        total, end, last = 0.0, len(self.ranks) - 1, last or Last()
        ends = {action.stage: action for action in mine if action.kind in MAKE_WEIGHT_GRADIENTS}
        for action in mine:
            kind, stage, micro_batch = action
            place = stage, micro_batch
            self.axis.at(micro_batch=micro_batch, layer=None)
            if kind == FORWARD:
                x = self._take((FORWARD, *place), stage - 1) if stage > 0 else None
                inputs[place] = x if x is None else x.requires_grad_(torch.is_grad_enabled())
                y = forward(stage, micro_batch, inputs[place])
                if torch.is_grad_enabled():
                    # Not the output itself: the backward does not need its values.
                    outputs[place] = torch.autograd.graph.get_gradient_edge(y)
                if stage == end:
                    total = total + y.detach()
                else:
                    self._put((FORWARD, stage + 1, micro_batch), y.detach())
            elif kind == WEIGHT_GRADIENT:
                self.deferred.run(place)
                if action == ends[stage]:
                    last.made(stage)
            else:
                self.deferred.key = place if kind == INPUT_GRADIENT else None
                dy = self._take((BACKWARD, *place), stage + 1) if stage < end else None
                with last.backward() if action == ends[stage] else contextlib.nullcontext():
                    torch.autograd.backward(outputs.pop(place), dy)
                self.deferred.key = None
                x = inputs.pop(place)
                if x is not None:
                    self._put((BACKWARD, stage - 1, micro_batch), x.grad)
            self.done.append(action)
        for source, sent in self._sent.items():
            self._sent[source] = []
            for _, handle in sent:
                handle.wait()
        self.axis.at(micro_batch=None, layer=None)
        assert self.deferred.empty, "every weight gradient has its action"
        return total

    def _put(self, key: tuple, x: torch.Tensor) -> None:
        """Send x to the rank of the stage that waits for it."""
        to = self.ranks[key[1]]
        if to == self.axis.rank:
            self._local[key] = x
            return
        taken = self._places[to][key]  # the action that takes it
        self._sent[to].append((taken, self.links.send(x.contiguous(), to, key)))

    def _take(self, key: tuple, sender: int) -> torch.Tensor:
        """What the stage `sender` has sent."""
        source = self.ranks[sender]
        if source == self.axis.rank:
            return self._local.pop(key)
        found = self._inboxes[source].take(key)
        here = self._places[source][key[0], sender, key[2]]  # so far the other rank has come
        for taken, handle in self._sent[source]:
            if taken <= here:
                handle.wait()
        self._sent[source] = [each for each in self._sent[source] if each[0] > here]
        return found
