"""Pipeline schedules as data: for every rank the list of what it does, in order.

defines: Action, FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, NAMES, SPLIT, make, placement,
problems, default_stages_per_rank

A stage is a run of consecutive layers; stage 0 has the embedding, the last one the loss. A backward
is one action, or is split: only the input gradient is waited for by the stage before, the weight
gradient fills what would be idle time. Standard library only.

Sources: GPipe, Huang et al. 2018, arXiv:1811.06965; 1F1B and interleaved 1F1B, Narayanan et al.
2021, arXiv:2104.04473; ZB-H1, Qi et al. 2023, arXiv:2401.10241; ZB-V, Qi et al. 2024,
arXiv:2405.15362.
"""

from collections import Counter
from typing import NamedTuple

FORWARD = "forward"
BACKWARD = "backward"
INPUT_GRADIENT = "input gradient"
WEIGHT_GRADIENT = "weight gradient"


class Action(NamedTuple):
    """What a rank does at one time."""

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind} of stage {self.stage}, micro-batch {self.micro_batch}"


class _Line:
    """The actions of one rank. A stage takes its micro-batches in order, for each kind of action.

    Actions on micro-batches that do not exist are left out. So the order for fewer micro-batches is
    that for more of them without some: what waits for nobody in a circle still does not.
    """

    def __init__(self, num_micro_batches: int):
        self.num_micro_batches = num_micro_batches
        self.actions: list[Action] = []
        self.done: Counter = Counter()

    def add(self, stage: int, *kinds: str) -> None:
        """The next action of each of these kinds on a stage."""
        for kind in kinds:
            micro_batch = self.done[kind, stage]
            self.done[kind, stage] += 1
            if micro_batch < self.num_micro_batches:
                self.actions.append(Action(kind, stage, micro_batch))


def _gpipe(line: _Line, rank: int, p: int, m: int, v: int) -> None:
    """All forwards, then all backwards."""
    for kind in (FORWARD, BACKWARD):
        for _ in range(m):
            line.add(rank, kind)


def _1f1b(line: _Line, rank: int, p: int, m: int, v: int) -> None:
    """As many forwards as there are ranks behind, then one forward and one backward in turn."""
    ahead = min(p - rank - 1, m)
    for _ in range(ahead):
        line.add(rank, FORWARD)
    for _ in range(m - ahead):
        line.add(rank, FORWARD, BACKWARD)
    for _ in range(ahead):
        line.add(rank, BACKWARD)


def _interleaved(line: _Line, rank: int, p: int, m: int, v: int) -> None:
    """1F1B over v stages a rank: groups of p micro-batches pass all of them, one after the other.

    Where p does not divide m, the last group is made full by micro-batches that are then left out.
    """
    rounds = -(-m // p) * v
    forwards = [rank + p * (turn % v) for turn in range(rounds) for _ in range(p)]
    backwards = [rank + p * (v - 1 - turn % v) for turn in range(rounds) for _ in range(p)]
    ahead = min(2 * (p - rank - 1) + (v - 1) * p, len(forwards))
    for stage in forwards[:ahead]:
        line.add(stage, FORWARD)
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        line.add(forward, FORWARD)
        line.add(backward, BACKWARD)
    for stage in backwards[len(forwards) - ahead :]:
        line.add(stage, BACKWARD)


def _zb_h1(line: _Line, rank: int, p: int, m: int, v: int) -> None:
    """1F1B whose weight gradients lag behind by `rank` micro-batches, and by all at the end."""
    ahead = min(p - rank - 1, m)
    for _ in range(ahead):
        line.add(rank, FORWARD)
    for number in range(m):
        if number < m - ahead:
            line.add(rank, FORWARD)
        line.add(rank, INPUT_GRADIENT)
        if number >= rank:
            line.add(rank, WEIGHT_GRADIENT)
    for _ in range(min(rank, m)):
        line.add(rank, WEIGHT_GRADIENT)


def _zb_v(line: _Line, rank: int, p: int, m: int, v: int) -> None:
    """Two stages a rank, from the first rank to the last one and back.

    The loss of a micro-batch is known on the rank where it began. At most 2p activations of a stage
    are held, and where all three kinds take equally long, no rank is idle from its first action to
    its last one, from 2p - 1 micro-batches on.
    """
    down, up = rank, 2 * p - 1 - rank
    whole = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
    for _ in range(2 * (p - rank) - 1):
        line.add(down, FORWARD)
    for _ in range(rank):
        line.add(up, FORWARD)
        line.add(down, FORWARD)
    for _ in range(p - rank):
        line.add(up, *whole)
    while line.done[FORWARD, up] < m:
        line.add(down, *whole)
        line.add(up, *whole)
    for _ in range(rank):
        line.add(down, INPUT_GRADIENT)
        line.add(up, INPUT_GRADIENT)
    for _ in range(p - rank):
        line.add(down, INPUT_GRADIENT, WEIGHT_GRADIENT)
    for stage in (up, down):
        for _ in range(rank):
            line.add(stage, WEIGHT_GRADIENT)


_MAKERS = {
    "gpipe": _gpipe,
    "1f1b": _1f1b,
    "interleaved": _interleaved,
    "zb_h1": _zb_h1,
    "zb_v": _zb_v,
}
NAMES = tuple(_MAKERS)
SPLIT = ("zb_h1", "zb_v")  # schedules with input and weight gradients apart


def default_stages_per_rank(name: str) -> int:
    """The fewest stages of a rank that a schedule works with."""
    return 2 if name in ("interleaved", "zb_v") else 1


def problems(name: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> list[str]:
    """Why a schedule cannot be made, each with what to do; nothing: an empty list."""
    if name not in _MAKERS:
        return [f"parallel.schedule: expected one of {', '.join(NAMES)}, got {name!r}. Pass one."]
    found = []
    sizes = {"pp": num_ranks, "num_micro_batches": num_micro_batches}
    for what, value in sizes.items():
        if value < 1:
            found.append(f"parallel: expected {what} of at least 1, got {value}. Pass 1 or more.")
    least, v = default_stages_per_rank(name), stages_per_rank
    if v < least or (v > least and name != "interleaved"):
        wanted = f"at least {least}" if name == "interleaved" else str(least)
        found.append(
            f"parallel.stages_per_rank: expected {wanted} for schedule {name}, got {v}. "
            f"Pass {least}, or another schedule."
        )
    return found


def _check(name: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> None:
    if found := problems(name, num_ranks, num_micro_batches, stages_per_rank):
        raise ValueError("\n".join(found))


def placement(name: str, num_ranks: int, stages_per_rank: int = 1) -> list[int]:
    """The rank of each stage.

    Stages go round the ranks; those of zb_v go there and back.

    Raises:
        ValueError: such a schedule does not exist.
    """
    _check(name, num_ranks, 1, stages_per_rank)
    ranks = list(range(num_ranks))
    return ranks + ranks[::-1] if name == "zb_v" else ranks * stages_per_rank


def make(
    name: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int = 1
) -> list[list[Action]]:
    """What each rank does, in order.

    Args:
        name: one of NAMES.
        num_ranks: p.
        num_micro_batches: m, any number.
        stages_per_rank: v; 2 for zb_v, 2 or more for interleaved, else 1.
    Raises:
        ValueError: such a schedule does not exist; with every reason.
    """
    _check(name, num_ranks, num_micro_batches, stages_per_rank)
    lines = [_Line(num_micro_batches) for _ in range(num_ranks)]
    for rank, line in enumerate(lines):
        _MAKERS[name](line, rank, num_ranks, num_micro_batches, stages_per_rank)
    return [line.actions for line in lines]
