"""Who is where, and which layouts cannot work: arithmetic on ranks, without torch.

defines: AXES, Layout, Part, layout_of, problems, kv_heads_of

Ranks are numbered with the tensor axis fastest and the pipeline axis slowest: what talks most sits
closest. Sizes of axes have the names of ParallelConfig; dp is what the other axes leave.
"""

import math
from dataclasses import dataclass

from stellarator.config import ModelConfig, ParallelConfig
from stellarator.parallel.pipeline import schedules

AXES = ("tp", "cp", "dp", "pp")  # fastest first


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; the ranks are 0 .. size - 1."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def place(self, rank: int) -> dict[str, int]:
        """The rank's index on each axis."""
        found = {}
        for axis in AXES:
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found

    def rank(self, place: dict[str, int]) -> int:
        """The rank at these indices."""
        found = 0
        for axis in reversed(AXES):
            found = found * getattr(self, axis) + place[axis]
        return found

    def groups(self, *axes: str) -> list[list[int]]:
        """Ranks that differ on these axes only: all such sets, each in rising order."""
        found: dict[tuple, list[int]] = {}
        for rank in range(self.size):
            place = self.place(rank)
            key = tuple(place[axis] for axis in AXES if axis not in axes)
            found.setdefault(key, []).append(rank)
        return list(found.values())


@dataclass(frozen=True)
class Part:
    """What a rank of a pipeline holds: the numbers of its layers, and what is at the ends."""

    layers: tuple[int, ...]
    first: bool = True  # the embedding
    last: bool = True  # the final norm and the output matrix


def layout_of(parallel: ParallelConfig, world_size: int) -> Layout:
    """The layout of so many processes.

    Raises:
        ValueError: the other axes do not divide the processes.
    """
    model_size = parallel.tp * parallel.cp * parallel.pp
    if min(parallel.tp, parallel.cp, parallel.pp, world_size) < 1 or world_size % model_size:
        raise ValueError(
            f"parallel: expected a number of processes that tp * cp * pp = {parallel.tp} * "
            f"{parallel.cp} * {parallel.pp} = {model_size} divides, got {world_size}. "
            f"Start {max(1, -(-world_size // max(1, model_size))) * max(1, model_size)}."
        )
    return Layout(parallel.tp, parallel.cp, world_size // model_size, parallel.pp)


def kv_heads_of(num_kv_heads: int, tp: int, tp_rank: int) -> range:
    """The key/value heads that a tensor rank holds.

    Each head is on one rank, or, where there are fewer heads than ranks, on tp / G ranks.
    """
    if num_kv_heads >= tp:
        share = num_kv_heads // tp
        return range(tp_rank * share, (tp_rank + 1) * share)
    head = tp_rank * num_kv_heads // tp
    return range(head, head + 1)


def value_problems(parallel: ParallelConfig) -> list[str]:
    """What of the sizes is wrong in itself, whatever they are for; nothing: an empty list."""
    found = [
        f"parallel.{name}: expected at least 1, got {getattr(parallel, name)}. Pass 1 for none."
        for name in ("tp", "pp", "cp", "stages_per_rank")
        if getattr(parallel, name) < 1
    ]
    if parallel.zero not in range(4):
        found.append(f"parallel.zero: expected 0, 1, 2 or 3, got {parallel.zero}. Pass 0.")
    return found


def problems(
    model: ModelConfig,
    parallel: ParallelConfig,
    world_size: int,
    *,
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int,
) -> list[str]:
    """Everything for which a layout cannot work, each with what to do; none: an empty list."""
    p, found = parallel, value_problems(parallel)
    if min(p.tp, p.pp, p.cp, p.stages_per_rank) < 1:  # with nothing else to compare
        return found

    def expect(right: bool, what: str, got, todo: str) -> None:
        if not right:
            found.append(f"{what}, got {got}. {todo}.")

    ways = p.tp * p.cp * p.pp
    expect(
        world_size % ways == 0,
        f"parallel: expected processes that tp * cp * pp = {ways} divides",
        world_size,
        f"Start {-(-world_size // ways) * ways}, or pass another parallel.tp, pp or cp",
    )
    H, G = model.num_heads, model.num_kv_heads
    divisors = f"Pass a divisor of {H} heads and {model.ffn_width} MLP columns"
    expect(H % p.tp == 0, f"parallel.tp: expected a divisor of num_heads = {H}", p.tp, divisors)
    expect(
        model.ffn_width % p.tp == 0,
        f"parallel.tp: expected a divisor of ffn_width = {model.ffn_width}",
        p.tp,
        divisors,
    )
    expect(
        G % p.tp == 0 or p.tp % G == 0,
        f"parallel.tp: expected a divisor or a multiple of num_kv_heads = {G}",
        p.tp,
        "Each rank has whole key/value heads, or each head is on equally many ranks",
    )
    stages = p.pp * p.stages_per_rank
    expect(
        stages <= model.num_layers,
        f"parallel.pp * stages_per_rank: expected at most num_layers = {model.num_layers}",
        stages,
        "Every stage holds at least one layer",
    )
    expect(
        stages == 1 or p.zero < 2 or p.zero > 3,
        f"parallel.zero: expected 0 or 1 with {stages} pipeline stages",
        p.zero,
        "A pipeline adds the gradients of its micro-batches in whole buffers: pass zero=1",
    )
    expect(not p.sp or p.tp > 1, "parallel.sp: expected false without tp", p.sp, "Pass sp=false")
    parts = p.cp * math.lcm(p.tp if p.sp else 1, 2 if p.cp > 1 else 1)
    expect(
        seq_length % parts == 0,
        f"data.seq_length: expected a multiple of {parts} for cp = {p.cp} and sp = {p.sp}",
        seq_length,
        f"Pass {-(-seq_length // parts) * parts}",
    )
    dp = -(-world_size // ways)  # of as many as are asked for above
    expect(
        global_batch_size % (micro_batch_size * dp) == 0,
        f"train.global_batch_size: expected a multiple of micro_batch_size * dp = "
        f"{micro_batch_size} * {dp}",
        global_batch_size,
        f"Pass {-(-global_batch_size // (micro_batch_size * dp)) * micro_batch_size * dp}",
    )
    num_micro_batches = max(1, global_batch_size // (micro_batch_size * dp))
    if p.schedule in schedules.NAMES:
        found += schedules.problems(p.schedule, p.pp, num_micro_batches, p.stages_per_rank)
    return found
