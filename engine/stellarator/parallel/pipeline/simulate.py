"""Runs a schedule on paper: whether it ends, when, how long ranks are idle, what they hold.

defines: Costs, Span, Simulation, DeadlockError, simulate, validate

Every rank does its actions strictly in order; each begins when the rank is free and what it needs
is there. With exact numbers (int, Fraction) the results are exact. Standard library only.

What an action needs:
    forward of a stage           the same of the stage before
    backward or input gradient   the forward of the stage, and the gradient from the stage behind,
                                 which its backward or its input gradient gives
    weight gradient              the input gradient of the stage
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stellarator.parallel.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
)

_GRADIENT = "gradient"  # what BACKWARD and INPUT_GRADIENT both give to the stage before


@dataclass(frozen=True)
class Costs:
    """Durations of the actions of each stage, in any unit of time, and what its forward leaves.

    A whole backward takes `input_gradient` + `weight_gradient`.
    """

    forward: Sequence
    input_gradient: Sequence
    weight_gradient: Sequence
    latency: float = 0  # of a message between ranks
    activation: Sequence | None = None  # of one micro-batch, in any unit; None: 1 each
    deferred: Sequence | None = None  # held from B to W, in that unit; None: the activation

    @classmethod
    def uniform(cls, num_stages: int, F=1, B=1, W=1, **others) -> "Costs":
        """The same for every stage."""
        return cls(*([x] * num_stages for x in (F, B, W)), **others)

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.forward)

    def duration(self, action: Action):
        """Of one action."""
        stage = action.stage
        if action.kind == FORWARD:
            return self.forward[stage]
        if action.kind == INPUT_GRADIENT:
            return self.input_gradient[stage]
        if action.kind == WEIGHT_GRADIENT:
            return self.weight_gradient[stage]
        return self.input_gradient[stage] + self.weight_gradient[stage]


class Span(NamedTuple):
    """When an action runs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found; lists are by rank.

    An activation counts as held from the start of its forward to the end of its backward. Where
    the backward is split, `Costs.deferred` counts from there to the end of the weight gradient.
    """

    timeline: list[list[Span]]
    work: list  # time of the rank's actions
    peak_activations: list  # the most that was held at one time, in units of `Costs.activation`
    num_messages: int  # between ranks, all of them
    # (from rank, to rank): the most that were sent and not yet used at one time
    peak_messages: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def makespan(self):
        """From the first action of all to the last one."""
        return max(line[-1].end for line in self.timeline)

    @property
    def idle(self) -> list:
        """Time of each rank without an action, of the whole makespan."""
        return [self.makespan - work for work in self.work]

    @property
    def idle_inside(self) -> list:
        """The same from the first to the last action of the rank itself."""
        ends = ((line[0].start, line[-1].end) for line in self.timeline)
        return [end - start - work for (start, end), work in zip(ends, self.work, strict=True)]

    @property
    def bubble(self):
        """Idle time of the busiest rank over its work."""
        return (self.makespan - max(self.work)) / max(self.work)


class DeadlockError(ValueError):
    """Ranks wait for each other; `waiting` has (rank, action, what it needs) of each of them."""

    def __init__(self, waiting: list[tuple[int, Action, str]]):
        self.waiting = waiting
        lines = (f"rank {r} stands at {action}, which needs the {x}" for r, action, x in waiting)
        super().__init__("deadlock: " + "; ".join(lines) + ". Change the order of the schedule.")


def validate(
    schedule: list[list[Action]], num_stages: int, num_micro_batches: int | None = None
) -> list[str]:
    """What is missing, double or in a wrong place; nothing: an empty list.

    Whether the order lets all ranks finish is for `simulate` to say.

    Args:
        schedule: actions of each rank.
        num_stages: S.
        num_micro_batches: m; None: as many as there seem to be.
    """
    found, homes = [], {}
    counts = Counter(action for line in schedule for action in line)
    m = num_micro_batches
    if m is None:
        m = 1 + max((action.micro_batch for action in counts), default=-1)
    kinds = (FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
    for rank, line in enumerate(schedule):
        if not line:
            found.append(f"rank {rank} has nothing to do")
        for action in line:
            home = homes.setdefault(action.stage, rank)
            if home != rank:
                found.append(f"{action} is on rank {rank}, its stage on rank {home}")
            if action.kind not in kinds or not (
                0 <= action.stage < num_stages and 0 <= action.micro_batch < m
            ):
                found.append(f"{action}: there is no such action")
    for stage in range(num_stages):
        for micro_batch in range(m):
            split = (
                counts[Action(INPUT_GRADIENT, stage, micro_batch)]
                or (counts[Action(WEIGHT_GRADIENT, stage, micro_batch)])
            )
            wanted = (1, 0, 1, 1) if split else (1, 1, 0, 0)
            for kind, number in zip(kinds, wanted, strict=True):
                action = Action(kind, stage, micro_batch)
                if counts[action] != number:
                    found.append(f"{action}: expected {number} times, got {counts[action]}")
    return found


def simulate(schedule: list[list[Action]], costs: Costs) -> Simulation:
    """Run a schedule on paper.

    Args:
        schedule: what `schedules.make` gives, or any other list of actions for each rank.
        costs: of its stages.
    Raises:
        ValueError: `validate` finds something wrong.
        DeadlockError: ranks wait for each other; it says who, at what, for what.
    """
    if found := validate(schedule, costs.num_stages):
        raise ValueError("schedule: " + "; ".join(found) + ".")
    home = {action.stage: rank for rank, line in enumerate(schedule) for action in line}
    done: dict[tuple, float] = {}  # what an action gives -> when it is there, on its own rank
    timeline: list[list[Span]] = [[] for _ in schedule]
    used: dict[tuple[int, int], list[tuple]] = {}  # link -> (sent, used) of each message
    ready = list(range(len(schedule)))
    waiting: dict[tuple, list[int]] = {}  # what ranks stopped for -> these ranks
    while ready:
        rank = ready.pop()
        line, spans = schedule[rank], timeline[rank]
        while len(spans) < len(line):
            action = line[len(spans)]
            needs = _needs(action, costs.num_stages)
            missing = [need for need in needs if need not in done]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            start = spans[-1].end if spans else 0
            for need in needs:
                away = home[need[1]] != rank
                start = max(start, done[need] + (costs.latency if away else 0))
            for need in needs:
                if home[need[1]] != rank:
                    link = used.setdefault((home[need[1]], rank), [])
                    link.append((done[need], start))
            spans.append(Span(action, start, start + costs.duration(action)))
            for given in _gives(action):
                done[given] = spans[-1].end
                ready += waiting.pop(given, [])
    if waiting:
        raise DeadlockError(
            [
                (rank, schedule[rank][len(timeline[rank])], _words(need, home))
                for need, ranks in sorted(waiting.items(), key=lambda item: min(item[1]))
                for rank in ranks
            ]
        )
    return Simulation(
        timeline=timeline,
        work=[sum(costs.duration(action) for action in line) for line in schedule],
        peak_activations=[_peak_held(spans, costs) for spans in timeline],
        num_messages=sum(len(messages) for messages in used.values()),
        peak_messages={link: _most(_changes(messages)) for link, messages in used.items()},
    )


def _needs(action: Action, num_stages: int) -> list[tuple]:
    """What must be there before an action begins: (kind, stage, micro-batch) each."""
    kind, stage, micro_batch = action
    if kind == FORWARD:
        return [(FORWARD, stage - 1, micro_batch)] if stage else []
    if kind == WEIGHT_GRADIENT:
        return [(INPUT_GRADIENT, stage, micro_batch)]
    behind = [(_GRADIENT, stage + 1, micro_batch)] if stage + 1 < num_stages else []
    return [(FORWARD, stage, micro_batch), *behind]


def _gives(action: Action) -> list[tuple]:
    """What is there when an action has ended."""
    gradient = action.kind in (BACKWARD, INPUT_GRADIENT)
    return [tuple(action), *([(_GRADIENT, *action[1:])] if gradient else [])]


def _words(need: tuple, home: dict[int, int]) -> str:
    """What is needed, and who gives it."""
    return f"{Action(*need)} (rank {home[need[1]]})"


def _peak_held(spans: list[Span], costs: Costs):
    """The most activations that a rank holds at one time."""
    sizes = costs.activation or [1] * costs.num_stages
    apart, changes = costs.deferred or sizes, []
    for (kind, stage, _), start, end in spans:
        if kind == FORWARD:
            changes.append((start, sizes[stage]))
        elif kind == INPUT_GRADIENT:
            changes.append((end, apart[stage] - sizes[stage]))
        else:
            changes.append((end, -(apart if kind == WEIGHT_GRADIENT else sizes)[stage]))
    return _most(changes)


def _changes(messages: list[tuple]) -> list[tuple]:
    """Of the number of messages that are under way."""
    return [change for sent, taken in messages for change in ((sent, 1), (taken, -1))]


def _most(changes: list[tuple]):
    """The largest sum of changes (time, by how much); what ends at a time goes before the rest."""
    total = most = 0
    for _, change in sorted(changes):
        total += change
        most = max(most, total)
    return most
