"""What a GPU sends in one step, by axis.

defines: Traffic, LayerTraffic, traffic_of, layer_traffic, message_bytes, reduced_itemsize

Rings: of n bytes over g ranks a gather or a reduce-scatter sends (g - 1) / g * n from each rank, an
all-reduce twice that. A message is one call of a collective, or one send.
"""

import math
from dataclasses import dataclass
from functools import cache

from stellarator import sizes
from stellarator.plan.buckets import buckets_of
from stellarator.plan.case import Case


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends on one axis for one purpose."""

    axis: str  # "tp", "cp", "dp", "pp"
    purpose: str
    num_bytes: int
    num_messages: int


@dataclass(frozen=True)
class LayerTraffic:
    """Of one layer and one micro-batch, in one direction."""

    tp_bytes: float
    tp_messages: int
    cp_bytes: float
    cp_messages: int


def _gather(num_bytes: float, ranks: int) -> float:
    """Bytes that each rank of a gather or reduce-scatter sends."""
    return (ranks - 1) / ranks * num_bytes


def message_bytes(case: Case) -> int:
    """One micro-batch between two stages, one way; tensor ranks with sp send a part each."""
    whole = case.tokens * case.model.width * case.itemsize
    return whole // case.layout.tp if case.parallel.sp else whole


def layer_traffic(case: Case, direction: str) -> LayerTraffic:
    """Of a "forward" or a "backward".

    Tensor axis: the results of the two row-parallel products forward, the input gradients of the
    two column-parallel ones back. With sp each is a gather and a reduce-scatter, and the backward
    gathers the inputs of the two products again; the second one's once more if that is computed
    again ("selective"). Where a layer is ("full"), so is sent what its forward sends, but for the
    last sum, behind which it keeps nothing. Context axis: keys and values go as far as the window
    sees, or by "gather" to all; again in a backward, with the sums of their gradients, which are
    not rounded; and once more where the layer is computed again.
    """
    model, tp, cp = case.model, case.layout.tp, case.layout.cp
    back = direction == "backward"
    row = case.tokens * model.width * case.itemsize
    recompute = case.config.train.recompute
    again = back and recompute == "full"
    if case.parallel.sp:  # gathers and reduce-scatters; all-reduces send twice as much
        calls = 4 + 2 * back + 3 * again + (back and recompute == "selective")
        tp_bytes = calls * _gather(row, tp)
    else:
        calls = 2 + again
        tp_bytes = calls * 2 * _gather(row, tp)
    if cp == 1:
        return LayerTraffic(tp_bytes, calls if tp > 1 else 0, 0, 0)
    kv = 2 * case.tokens * max(1, model.num_kv_heads // tp) * model.head_width
    passes = 1 + again
    times, exchanges = _context_hops(case)
    cp_bytes = times * kv * (passes * case.itemsize + back * max(4, case.itemsize))
    return LayerTraffic(tp_bytes, calls if tp > 1 else 0, cp_bytes, exchanges * (passes + back))


def _context_hops(case: Case) -> tuple[float, int]:
    """(how often a rank sends as much as its own keys and values, in how many exchanges).

    By a ring a rank has two of 2 * cp chunks of a row, so that causal work is even. A window of W
    reaches back over the chunks that W - 1 tokens touch; each chunk goes from rank to rank to all
    that see it, up and down, in `parallel.zigzag`. What is sent differs by rank; this is the mean.
    """
    cp, window, last = case.layout.cp, case.model.window, 2 * case.layout.cp - 1
    if case.parallel.cp_form == "gather":
        return cp - 1, 1
    chunk = case.config.data.seq_length // (2 * cp)
    reach = last if window is None else math.ceil((window - 1) / chunk)
    return _ring_hops(cp, min(reach, last))


@cache
def _ring_hops(cp: int, reach: int) -> tuple[float, int]:
    """The same of a ring, where every chunk is seen from `reach` chunks behind it."""
    last, sent, furthest = 2 * cp - 1, 0, 0
    for own in range(last + 1):
        ranks = [min(c, last - c) for c in range(own, min(own + reach, last) + 1)]
        sent += max(ranks) - min(ranks)
        furthest = max(furthest, max(ranks) - ranks[0], ranks[0] - min(ranks))
    return sent / (2 * cp), furthest


def traffic_of(case: Case, rank: int) -> list[Traffic]:
    """What a GPU of a pipeline rank sends in a step; nothing for axes of one rank."""
    layers = sum(stage.num_layers for stage in case.stages if stage.rank == rank)
    found = [*_tensor(case, rank, layers), *_pipeline(case, rank), *_data(case, rank)]
    if case.layout.cp > 1:
        ways = [layer_traffic(case, way) for way in ("forward", "backward")]
        times = case.num_micro_batches * layers
        num_bytes = round(times * sum(way.cp_bytes for way in ways))
        num_messages = times * sum(way.cp_messages for way in ways)
        found.append(Traffic("cp", "keys, values, their gradients", num_bytes, num_messages))
    return found


def _tensor(case: Case, rank: int, layers: int) -> list[Traffic]:
    model, tp, sp, m = case.model, case.layout.tp, case.parallel.sp, case.num_micro_batches
    if tp == 1:
        return []
    ways = [layer_traffic(case, way) for way in ("forward", "backward")]
    num_bytes = round(m * layers * sum(way.tp_bytes for way in ways))
    num_messages = m * layers * sum(way.tp_messages for way in ways)
    found = [Traffic("tp", "results of products", num_bytes, num_messages)]
    row = case.tokens * model.width * case.itemsize
    ends = [s for s in case.stages if s.rank == rank for end in (s.first, s.last) if end]
    if ends:
        # Of the embedding its rows, of the head the gradient of its input.
        num_bytes = round(len(ends) * m * 2 * _gather(row, tp))
        num_messages = len(ends) * m * (2 if sp else 1)
        found.append(Traffic("tp", "embedding and head", num_bytes, num_messages))
    if case.stages[-1].rank == rank:
        # Three numbers a token, from each rank to all others.
        num_bytes = m * (tp - 1) * 3 * case.tokens * max(4, case.itemsize)
        found.append(Traffic("tp", "softmax of the split vocabulary", num_bytes, m))
    # With sp norms, some biases and positions; keys and values whose heads several ranks hold.
    shared = [b.shared for b in buckets_of(case, rank) if b.shared]
    if shared:
        times = m if case.parallel.zero >= 2 and case.replicas > 1 else 1
        num_bytes = round(times * 2 * _gather(sum(shared) * case.state_bytes["gradients"], tp))
        found.append(Traffic("tp", "shared gradients", num_bytes, times * len(shared)))
    return found


def _pipeline(case: Case, rank: int) -> list[Traffic]:
    pairs = list(zip(case.stages, case.stages[1:], strict=False))
    forward = sum(a.rank == rank and b.rank != rank for a, b in pairs)
    back = sum(b.rank == rank and a.rank != rank for a, b in pairs)
    found = []
    if num_messages := case.num_micro_batches * (forward + back):
        num_bytes = num_messages * message_bytes(case)
        found.append(Traffic("pp", "states and their gradients", num_bytes, num_messages))
    if case.ties_ranks and rank in (case.stages[0].rank, case.stages[-1].rank):
        weight = sizes.embedding_parameters(case.model, case.layout.tp)
        num_bytes = round(2 * _gather(weight * case.state_bytes["gradients"], 2))
        found.append(Traffic("pp", "gradient of the tied embedding", num_bytes, 1))
    return found


def _data(case: Case, rank: int) -> list[Traffic]:
    """Bucket by bucket; ranks of the context axis are replicas, too.

    ZeRO 3 gathers a layer for each forward and each backward. The last layer and the rest stay from
    the one to the other.
    """
    replicas, zero, m = case.replicas, case.parallel.zero, case.num_micro_batches
    if replicas == 1:
        return []
    counts = [bucket.here for bucket in buckets_of(case, rank)]
    gradients = sum(counts) * reduced_itemsize(case)
    if zero == 0:
        num_bytes = round(2 * _gather(gradients, replicas))
        return [Traffic("dp", "sum of gradients", num_bytes, len(counts))]
    times = m if zero >= 2 else 1
    num_bytes = round(times * _gather(gradients, replicas))
    found = [Traffic("dp", "sum of gradients, in parts", num_bytes, times * len(counts))]
    if zero == 3:
        *layers, last, rest = counts[-2::-1] + counts[-1:]
        counts = m * (2 * layers + [last, rest])
    num_bytes = round(_gather(sum(counts) * case.itemsize, replicas))
    return [*found, Traffic("dp", "parameters from their parts", num_bytes, len(counts))]


def reduced_itemsize(case: Case) -> int:
    """Bytes of a gradient while it is summed over the replicas."""
    return 2 if case.parallel.reduce_dtype == "bf16" else case.state_bytes["gradients"]
