"""Bytes that a GPU holds, by kind.

defines: Memory, memory_of, stage_activation_bytes, stage_deferred_bytes, logit_bytes

Counted: what the engine allocates on purpose. Not counted: the CUDA context, the caching
allocator's gaps, workspaces of libraries.
"""

from dataclasses import dataclass, fields

from stellarator import sizes
from stellarator.parallel.pipeline.schedules import SPLIT
from stellarator.parallel.pipeline.simulate import Simulation
from stellarator.plan.buckets import buckets_of, made_together
from stellarator.plan.case import Case, Stage
from stellarator.plan.traffic import reduced_itemsize

_IN_FLIGHT = 2  # as in stellarator.parallel.reducer
_MIN_LOGITS = 64 << 20  # as in stellarator_kernels.linear_cross_entropy.chunk_rows


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU of one pipeline rank."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    activations: int  # with what weight gradients wait for, at the worst moment of the schedule
    working: int  # what is computed again for one layer, and the widest tensors of its backward
    logits: int  # of one chunk
    buffers: int  # messages, gathered tokens, keys and values; buckets that are whole for a while

    @property
    def total(self) -> int:
        """All kinds."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_of(case: Case, rank: int, simulation: Simulation) -> Memory:
    """Of a GPU of a pipeline rank.

    Args:
        case: the run.
        rank: on the pipeline axis.
        simulation: of the schedule, of what `stage_costs` says that stages hold.
    """
    count, zero = case.parameters(rank), case.parallel.zero
    shared = -(-count // case.replicas)
    state = {
        kind: round(size * (shared if zero >= sizes.SHARED_FROM[kind] else count))
        for kind, size in case.state_bytes.items()
    }
    return Memory(
        **state,
        activations=int(simulation.peak_activations[rank]),
        working=_working_bytes(case),
        logits=logit_bytes(case) if case.stages[-1].rank == rank else 0,
        buffers=_buffer_bytes(case, rank, simulation),
    )


def stage_activation_bytes(case: Case, stage: Stage) -> int:
    """What the forward of a stage leaves, for one micro-batch.

    The first layer of a stage has one input, as a message is the sum of two. Behind the last layer
    there are the sum of the residual stream with its statistics and, as the loss computes its
    gradients in the forward, those of the states and, not rounded, of the head. Tensor ranks
    compute these in the backward and keep the states.
    """
    model, layout, sp = case.model, case.layout, case.parallel.sp
    recompute, itemsize, N = case.config.train.recompute, case.itemsize, case.tokens
    each = sizes.layer_activation_bytes(model, N, recompute, itemsize, tp=layout.tp, sp=sp)
    stream = N // layout.tp if sp else N
    kept = stage.num_layers * each
    if recompute == "full":
        kept -= stream * model.width * itemsize
    if stage.last:
        kept += stream * (model.width * itemsize + 2 * max(4, itemsize))
        kept += N * model.width * itemsize
        if layout.tp == 1:
            kept += sizes.embedding_parameters(model) * max(4, itemsize)
    return kept


def stage_deferred_bytes(case: Case, stage: Stage) -> int:
    """What a stage holds from its input gradient to its weight gradients, for one micro-batch."""
    tp, sp = case.layout.tp, case.parallel.sp
    each = sizes.layer_deferred_bytes(case.model, case.tokens, case.itemsize, tp=tp, sp=sp)
    return stage.num_layers * each


def logit_bytes(case: Case) -> int:
    """The logits of a chunk: at most what its gradients take, see `chunk_rows`."""
    model, N, itemsize = case.model, case.tokens, case.itemsize
    weight = sizes.embedding_parameters(model, case.layout.tp)
    every = N * (weight // model.width) * itemsize
    most = max(_MIN_LOGITS, (N * model.width + weight) * itemsize)
    return min(every, most)


def _working_bytes(case: Case) -> int:
    """What is computed again of a layer, what goes into the gradient of its gelu and comes out.

    The gradient of what the gelu gave is a tensor of its own where ranks share the products, or a
    schedule splits the backward.
    """
    model, train, tp, parallel = case.model, case.config.train, case.layout.tp, case.parallel
    wide = case.tokens * (model.ffn_width // tp) * case.itemsize
    apart = tp > 1 or (case.layout.pp > 1 and parallel.schedule in SPLIT)
    made = (3 if apart else 2) * wide
    if train.recompute == "none":
        return made
    if train.recompute == "selective":
        return made + wide
    again = sizes.layer_activation_bytes(
        model, case.tokens, "none", case.itemsize, tp=tp, sp=case.parallel.sp
    )
    return made + again


def _buffer_bytes(case: Case, rank: int, simulation: Simulation) -> int:
    """What is received and not yet used, and what is gathered for a moment."""
    model, layout, parallel = case.model, case.layout, case.parallel
    row = case.tokens * model.width * case.itemsize
    message = row // layout.tp if parallel.sp else row
    arriving = [n for (_, to), n in simulation.peak_messages.items() if to == rank]
    held = sum(max(1, n) for n in arriving) * message
    if parallel.sp:
        held += row  # the tokens of all tensor ranks, in front of a product
    if layout.cp > 1:
        kv_heads = max(1, model.num_kv_heads // layout.tp)
        kv = 2 * case.tokens * kv_heads * model.head_width
        if parallel.cp_form == "ring":
            held += 2 * kv * case.itemsize  # in use and on their way
        else:  # of whole rows, with the sums of their gradients
            held += layout.cp * kv * (case.itemsize + max(4, case.itemsize))
    return held + (_bucket_bytes(case, rank) if case.replicas > 1 else 0)


def _bucket_bytes(case: Case, rank: int) -> int:
    """Whole buckets while their gradients are made and summed, and their parameters used.

    Where only own parts of gradients are kept (ZeRO 2), a bucket is whole while they are made, and
    so are all of which one op makes some. With ZeRO 3 a layer ends before the next begins.
    The last bucket is whole from the loss on where it has the head. Then a sum begins, of a rounded
    copy in any stage, while those before are in flight. With ZeRO 3 the parameters of the last
    bucket are there for the whole pass, those of a layer with the next.
    """
    zero, size, summed = case.parallel.zero, case.state_bytes["gradients"], reduced_itemsize(case)
    counts = [bucket.here for bucket in buckets_of(case, rank)]
    last, copied, most = len(counts) - 1, summed if summed != size else 0, 0
    if zero < 2 and not copied:
        return 0
    spans = made_together(case, rank) if zero == 2 else [(i, i) for i in range(len(counts))]
    for index, end in spans:
        count = counts[index]
        whole = set(range(index, end + 1)) if zero >= 2 else set()
        if zero == 3 or (zero == 2 and case.model.tie_embeddings):
            whole.add(last)
        held = sum(counts[i] for i in whole) * size + count * copied
        most = max(most, held + sum(counts[max(0, index - _IN_FLIGHT) : index]) * summed)
    return most + ((2 * counts[0] + counts[last]) * case.itemsize if zero == 3 else 0)
