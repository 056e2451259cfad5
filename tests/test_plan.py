"""`stellarator plan`: StarCoderBase's layout by hand, memory and traffic by closed forms, search.

References: arithmetic from the published shape and layout; FlatOptimizer and the kernels' cost
functions; real buffers of a tiny model (tests/test_sizes.py has its activations). Not covered:
whether a machine is as fast as assumed.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from stellarator import recipes, settings, sizes
from stellarator.cli import main
from stellarator.config import OptimConfig, ParallelConfig
from stellarator.model import Transformer, build_model
from stellarator.parallel.buckets import DataParallel
from stellarator.parallel.buckets import plan as plan_buckets
from stellarator.parallel.collectives import Pending
from stellarator.parallel.gradients import SharedGradients
from stellarator.parallel.layout import Part
from stellarator.parallel.mesh import Axis
from stellarator.parallel.pipeline.schedules import (
    FORWARD,
    INPUT_GRADIENT,
    default_stages_per_rank,
    make,
)
from stellarator.parallel.shard import shards_of
from stellarator.parallel.tensor import TensorParallel
from stellarator.parallel.zigzag import Plan as Ring
from stellarator.plan import (
    Machine,
    command,
    make_case,
    make_plan,
    memory_of,
    plan_lines,
    search,
    search_lines,
    traffic_of,
)
from stellarator.plan.buckets import Bucket, buckets_of
from stellarator.plan.estimate import optimizer_seconds, stage_costs
from stellarator.plan.memory import logit_bytes, stage_activation_bytes, stage_deferred_bytes
from stellarator.plan.search import layouts
from stellarator.plan.traffic import LayerTraffic, layer_traffic
from stellarator.settings import ConfigError
from stellarator.train.optimizer import FlatOptimizer
from stellarator_kernels import cost
from stellarator_kernels.linear_cross_entropy import chunk_rows

BASE = recipes.get("starcoderbase")
PUBLISHED = ParallelConfig(tp=4, sp=True, pp=4, zero=1)
GIB = 2**30


def plan_of(config=BASE, num_gpus=512, machine=None, **values):
    case = make_case(config, dataclasses.replace(PUBLISHED, **values), num_gpus)
    return make_plan(case, machine or Machine())


def small(**train):
    """A model of four layers, rows of 64 tokens."""
    config = recipes.get("tiny")
    model = dataclasses.replace(config.model, num_layers=4)
    changed = {"global_batch_size": 8, "micro_batch_size": 1, **train}
    return dataclasses.replace(
        config, model=model, train=dataclasses.replace(config.train, **changed)
    )


def sent(plan, rank, axis):
    """{purpose: (bytes, messages)} of a pipeline rank on an axis."""
    return {t.purpose: (t.num_bytes, t.num_messages) for t in plan.traffic[rank] if t.axis == axis}


# The published run: 512 GPUs, tensor 4, pipeline 4, data 32.


def test_starcoderbase_batch_and_parameters():
    """Widths of a tensor rank: 12 heads, K and V of the only one, a quarter of the MLP."""
    case = make_case(BASE, PUBLISHED, 512)
    assert case.layout.dp == 32 and case.num_micro_batches == 16
    assert case.step_tokens == 4_194_304
    assert [stage.num_layers for stage in case.stages] == [10, 10, 10, 10]
    C = 6144
    qkv = (12 + 2) * 128
    layer = C * qkv + qkv + C * C // 4 + C + 2 * C * C + C + C + 4 * C
    assert layer == 95_989_504
    vocabulary, positions = 49152 // 4 * C, 8192 * C
    assert [case.parameters(rank) for rank in range(4)] == [
        10 * layer + vocabulary + positions,
        10 * layer,
        10 * layer,
        10 * layer + 2 * C + vocabulary,
    ]
    # One copy of everything makes the model: K and V, biases and norms of each layer are on every
    # tensor rank, positions too, and the tied embedding on the first and the last pipeline rank.
    everything = 4 * sum(case.parameters(rank) for rank in range(4))
    repeated = 3 * (40 * (2 * 128 * (C + 1) + 6 * C) + positions + 2 * C) + 49152 * C
    assert everything - repeated == 15_517_456_384 == sizes.num_parameters(BASE.model)


def test_starcoderbase_memory():
    plan = plan_of()
    for rank, memory in enumerate(plan.memory):
        count = plan.case.parameters(rank)
        assert memory.parameters == 2 * count and memory.gradients == 4 * count
        assert memory.masters == 4 * -(-count // 32) and memory.moments == 8 * -(-count // 32)
        kinds = dataclasses.asdict(memory)
        assert memory.total == sum(kinds.values())
    # 1F1B: rank r holds 4 - r micro-batches of ten layers. Selective: two sums of the residual
    # stream with their statistics (a quarter of the tokens, with sp), q, k, v, the heads' outputs
    # and lse.
    N, C = 8192, 6144
    layer = 2 * (2 * N // 4 * C + N * (1792 + 1536)) + 4 * N * 12 + 4 * N // 4 * 4
    for rank in range(3):
        assert plan.memory[rank].activations == (4 - rank) * 10 * layer
    last = 10 * layer + N // 4 * (2 * C + 8) + 2 * C * N
    assert plan.memory[3].activations == last
    # What goes into the gelu again, what comes out of it and the gradients of both; the logits are
    # one chunk; messages of a quarter of the tokens arrive from one side or both, one row is
    # gathered.
    assert {memory.working for memory in plan.memory} == {4 * 2 * N * C}
    assert [memory.logits for memory in plan.memory] == [0, 0, 0, N * 12288 * 2]
    row = N * C * 2
    assert [memory.buffers - row for memory in plan.memory] == [
        arriving * row // 4 for arriving in (1, 2, 2, 1)
    ]
    assert plan.fits and 10 < plan.memory[0].total / GIB < 12


def test_starcoderbase_bubble_and_traffic():
    plan = plan_of()
    assert plan.schedule_bubble == 3 / 16
    assert 0.15 < plan.simulation.bubble < 3 / 16  # the head makes the last stage the busiest
    row = 8192 * 6144 * 2
    m = 16
    # Forward two gathers and two reduce-scatters a layer, back the same and two gathers again, and
    # one more for the product into the gelu, which is computed again.
    assert sent(plan, 1, "tp")["results of products"] == (m * 10 * 11 * row * 3 // 4, m * 10 * 11)
    assert sent(plan, 1, "pp") == {"states and their gradients": (2 * m * row // 4, 2 * m)}
    tied = sent(plan, 0, "pp")["gradient of the tied embedding"]
    assert tied == (12288 * 6144 * 4, 1)
    # Each of the four matrices of a layer fills a bucket, positions and embedding two more.
    count, buckets = plan.case.parameters(0), 4 * 10 + 2
    assert sent(plan, 0, "dp") == {
        "sum of gradients, in parts": (round(31 / 32 * 4 * count), buckets),
        "parameters from their parts": (round(31 / 32 * 2 * count), buckets),
    }
    # Three numbers a token to three others; norms and biases of 4 C + 2 C, one key/value head, in
    # all buckets but those of the MLP's first product.
    assert sent(plan, 3, "tp")["softmax of the split vocabulary"] == (m * 3 * 12 * 8192, m)
    shared = 10 * (6 * 6144 + 2 * 128 * (6144 + 1))
    assert sent(plan, 1, "tp")["shared gradients"] == (2 * shared * 4 * 3 // 4, 31)


def test_starcoderbase_flops():
    """6 * N * tokens and attention: 40 layers of 48 heads of 128, over rows of 8,192."""
    matmul = 40 * (6144 * (6144 + 256) + 6144**2 + 2 * 6144 * 24576) + 49152 * 6144
    pairs = 8192 * 8193 // 2
    expected = 6 * matmul * 4_194_304 + 512 * 12 * 128 * 48 * 40 * pairs
    plan = plan_of()
    assert plan.model_flops == expected
    rate = 4_194_304 / plan.step_seconds
    assert plan.mfu == pytest.approx(expected / 4_194_304 * rate / (512 * 312e12))


# Parts of a plan.


@pytest.mark.parametrize(
    "precision,weights",
    [("bf16", "masters"), ("fp32", "masters"), ("fp64", "masters")]
    + [("bf16", "remainders"), ("bf16", "stochastic")],
)
def test_state_on_one_gpu_is_what_the_optimizer_holds(precision, weights):
    optim = OptimConfig(weights=weights)
    config = dataclasses.replace(small(precision=precision), optim=optim)
    memory = make_plan(make_case(config, ParallelConfig(), 1), Machine()).memory[0]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    model = Transformer(config.model, dtype=dtype)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    held = {"parameters": 0, "gradients": 0, "masters": 0, "moments": 0}
    for bucket in FlatOptimizer(model, optim).buckets:
        buffers = {"parameters": [bucket.params], "gradients": [bucket.grads]}
        for kind, tensors in (buffers | bucket.states.tensors()).items():
            held[kind] += sum(x.nbytes for x in tensors)
    assert {kind: getattr(memory, kind) for kind in held} == held


def test_bytes_that_an_update_moves():
    """By hand: gradients read for the norm and the update, the rest read and written."""
    machine, each = Machine(), {}
    for kinds in itertools.product(("masters", "remainders", "stochastic"), ("fp32", "8bit")):
        optim = OptimConfig(weights=kinds[0], moments=kinds[1])
        config = dataclasses.replace(small(precision="bf16"), optim=optim)
        case = make_case(config, ParallelConfig(), 1)
        moved = optimizer_seconds(case, machine) * machine.hbm_gbps * 1e9
        each[kinds] = moved / case.parameters(0)
    moments = {"fp32": 16, "8bit": 4 * (1 + 4 / 256)}
    weights = {"masters": 8 + 2, "remainders": 4 + 4, "stochastic": 4}
    expected = {(w, m): weights[w] + moments[m] + 8 for w, m in each}
    assert each == pytest.approx(expected)


def test_zero_shares_out_one_kind_after_the_other():
    plans = [plan_of(num_gpus=16, zero=zero, tp=1, sp=False, pp=1).memory for zero in range(4)]
    whole, *shared = [memory[0] for memory in plans]
    # Each matrix of a layer has a bucket. Whole gradients of the embedding, of the three buckets of
    # which the MLP and its norm make some (both of the MLP, and that of attention's last product
    # with the norm), and of the two before them, in flight: those of attention. With ZeRO 3 a layer
    # is a bucket, whose parameters are there with the next, and so is the rest.
    C, layer = 6144, sizes.layer_parameters(BASE.model)
    embedding, out = 49152 * C, C * C + 3 * C
    rest = embedding + 8192 * C + 2 * C
    assert [memory.buffers - whole.buffers for memory in shared] == [
        0,
        4 * (embedding + layer + out),
        4 * (rest + 3 * layer) + 2 * (rest + 2 * layer),
    ]
    for zero, memory in enumerate(shared, 1):
        for least, kind in ((1, "masters"), (1, "moments"), (2, "gradients"), (3, "parameters")):
            part = 16 if zero >= least else 1
            assert getattr(memory, kind) == pytest.approx(getattr(whole, kind) / part, rel=1e-6)


class Counting(Axis):
    """Of two ranks, of which one is there; notes what all buckets hold when a sum begins."""

    def look(self, x):
        gradients, parameters = [x], 0
        for bucket in self.buckets:
            gradients += [bucket.full_grads, *(bucket._reducing or ())[:1]]
            if bucket.data.stage == 3:
                parameters += bucket.full_params.untyped_storage().nbytes()
        kept = [b.full_grads for b in self.buckets if b.data.stage < 2]  # for the whole step
        each = {id(g): g.nbytes for g in gradients if g is not None}
        self.held.append(parameters + sum(each.values()) - sum(g.nbytes for g in kept))
        return Pending()

    def begin_sum_(self, x, tag):
        return self.look(x)

    def begin_scatter_sum_(self, x, tag):
        return self.look(x)

    def begin_gather(self, x, part, tag):
        x.zero_()
        return Pending()


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("zero", "tie"), [(0, True), (1, True), (2, True), (2, False), (3, True), (3, False)]
)
@pytest.mark.parametrize("bucket_mib", [0.1, 0.02])
def test_whole_buckets_are_those_that_live_at_once(zero, tie, reduce_dtype, bucket_mib):
    """Gradients that are made and summed, rounded copies, gathered parameters: real buffers."""
    config = small(precision="bf16")
    shape = dataclasses.replace(config.model, tie_embeddings=tie)
    config = dataclasses.replace(config, model=shape)
    parallel = ParallelConfig(zero=zero, bucket_mib=bucket_mib, reduce_dtype=reduce_dtype)
    planned = make_plan(make_case(config, parallel, 2), Machine()).memory[0].buffers
    model = build_model(shape)
    axis = Counting("dp", 0, 2)
    rounded = torch.bfloat16 if reduce_dtype == "bf16" else None
    data = DataParallel(axis, zero, int(bucket_mib * 2**20), rounded)
    optimizer = FlatOptimizer(model, config.optim, dtype=torch.bfloat16, data=data)
    axis.__dict__.update(buckets=optimizer.buckets, held=[])
    tokens = torch.arange(64)[None]
    with optimizer.last_micro_batch():
        model(tokens, tokens, reduction="sum").backward()
    optimizer.complete_grads()
    assert len(axis.held) == len(optimizer.buckets) > 4
    padding = 4 * 2 * 256 * 4  # of the buckets that are whole at a time
    assert planned * 0.98 <= max(axis.held) <= planned * 1.01 + padding


def test_buckets_are_those_of_training():
    """Sizes, and what several tensor ranks share, on every rank of a pipeline."""
    for tp, sp, pp, zero, tie in [
        (1, False, 1, 1, True),
        (4, True, 2, 1, True),
        (4, False, 1, 2, False),
        (2, True, 1, 3, True),
        (2, True, 2, 0, False),
    ]:
        config = small()
        shape = dataclasses.replace(
            config.model, tie_embeddings=tie, positions="learned", num_kv_heads=2
        )
        config = dataclasses.replace(config, model=shape)
        parallel = ParallelConfig(tp=tp, sp=sp, pp=pp, zero=zero, bucket_mib=0.1)
        case = make_case(config, parallel, 2 * tp * pp)
        start = 0
        for stage in case.stages:
            layers = tuple(range(start, start + stage.num_layers))
            start += stage.num_layers
            mine = TensorParallel(Axis("tp", 0, tp), sp)
            model = Transformer(
                shape, tp=mine, part=Part(layers, stage.first, stage.last), device="meta"
            )
            named, shards = list(model.named_parameters()), shards_of(model)
            data = DataParallel(Axis("dp", 0, 2), zero, int(0.1 * 2**20))
            expected = []
            for bucket in plan_buckets(named, shards, list(model.layers), data):
                grads = {name: torch.zeros(p.shape) for name, p in bucket}
                own = {name: shards[name] for name in grads}
                whole = sum(math.prod(shards[name].shape) for name in grads)
                here = sum(p.numel() for _, p in bucket)
                expected.append(Bucket(whole, here, SharedGradients(grads, own, mine)._total))
            assert buckets_of(case, stage.rank) == expected
            assert sum(b.here for b in expected) == case.parameters(stage.rank)


def test_tied_and_untied_ends():
    """A V-shaped pipeline has both ends on rank 0: a tied embedding is there once."""
    V, C = 512, 64
    for tie in (True, False):
        config = small()
        model = dataclasses.replace(config.model, tie_embeddings=tie)
        config = dataclasses.replace(config, model=model)
        total = sizes.num_parameters(model)
        straight = make_case(config, ParallelConfig(pp=2), 2)
        folded = ParallelConfig(pp=2, schedule="zb_v", stages_per_rank=2)
        folded = make_case(config, folded, 2)
        assert sum(straight.parameters(r) for r in range(2)) == total + (V * C if tie else 0)
        assert sum(folded.parameters(r) for r in range(2)) == total
        assert straight.ties_ranks == tie and not folded.ties_ranks


@pytest.mark.parametrize("shape", [(8192, 6144, 49152), (4096, 3072, 49152), (64, 64, 512)])
def test_logits_are_those_of_a_chunk(shape):
    """From above, but no more than a chunk may have."""
    N, C, V = shape
    config = small(precision="bf16")
    model = dataclasses.replace(config.model, width=C, vocab_size=V)
    data = dataclasses.replace(config.data, seq_length=N)
    case = make_case(dataclasses.replace(config, model=model, data=data), ParallelConfig(), 1)
    rows = chunk_rows(N, C, V, 2)
    logits = logit_bytes(case)
    assert rows * V * 2 <= logits <= max(rows * V * 2, (N + V) * C * 2, 64 << 20)
    assert logits <= N * V * 2


def test_activations_by_schedule():
    """Eight micro-batches on four stages: GPipe holds all of them, 1F1B four at most."""
    config = small(precision="bf16")
    found = {}
    for schedule in ("gpipe", "1f1b"):
        case = make_case(config, ParallelConfig(pp=4, schedule=schedule), 4)
        plan = make_plan(case, Machine())
        each = [stage_activation_bytes(case, stage) for stage in case.stages]
        held = [memory.activations for memory in plan.memory]
        found[schedule] = [a / b for a, b in zip(held, each, strict=True)]
        assert memory_of(case, 0, plan.simulation) == plan.memory[0]
    assert found["gpipe"] == [8, 8, 8, 8] and found["1f1b"] == [4, 3, 2, 1]


@pytest.mark.parametrize("schedule", ["zb_h1", "zb_v"])
def test_a_split_backward_holds_what_its_weight_gradients_need(schedule):
    """Summed over each rank's actions in their order. It does not fit where 1F1B does."""
    config = small(recompute="full")
    v = default_stages_per_rank(schedule)
    case = make_case(config, ParallelConfig(pp=2, schedule=schedule, stages_per_rank=v), 2)
    plan = make_plan(case, Machine())
    kept, waits = zip(
        *((stage_activation_bytes(case, s), stage_deferred_bytes(case, s)) for s in case.stages),
        strict=True,
    )
    for line, memory in zip(make(schedule, 2, 8, v), plan.memory, strict=True):
        held = [0]
        for kind, s, _ in line:
            changes = {FORWARD: kept[s], INPUT_GRADIENT: waits[s] - kept[s]}
            held.append(held[-1] + changes.get(kind, -waits[s]))
        assert memory.activations == max(held) and held[-1] == 0
    plain = make_plan(make_case(config, ParallelConfig(pp=2), 2), Machine())
    most, less = (max(m.total for m in p.memory) for p in (plan, plain))
    machine = Machine(memory_gib=(most + less) / 2 / 2**30, reserve_gib=0)
    assert make_plan(plain.case, machine).fits and not make_plan(case, machine).fits


def test_recomputation_changes_memory_and_time():
    plans = {}
    for mode in ("none", "selective", "full"):
        train = dataclasses.replace(BASE.train, recompute=mode)
        plans[mode] = plan_of(dataclasses.replace(BASE, train=train))
    held = [plan.memory[0].activations for plan in plans.values()]
    seconds = [plan.step_seconds for plan in plans.values()]
    assert held == sorted(held, reverse=True) and len(set(held)) == 3
    assert seconds == sorted(seconds) and len(set(seconds)) == 3
    assert len({plan.model_flops for plan in plans.values()}) == 1


def test_durations_without_links_are_flops_over_the_rate():
    """On one GPU: the model's FLOPs, and of attention five products back instead of four."""
    config = small(recompute="none")
    case = make_case(config, ParallelConfig(), 1)
    machine = Machine(tflops=2e-6, efficiency=0.25)  # 5e5 FLOP/s
    plan = make_plan(case, machine)
    model, T = config.model, 64
    pairs = sum(min(q + 1, 32) for q in range(T))
    extra = 2 * 16 * 4 * 4 * pairs * 8
    assert plan.simulation.makespan * 5e5 == pytest.approx(plan.model_flops + extra)
    assert plan.simulation.bubble == pytest.approx(0, abs=1e-9)
    split = stage_costs(case, machine)
    weights = 2 * T * model.num_layers * sizes.layer_matmul_parameters(model) / 5e5
    assert split.weight_gradient[0] == pytest.approx(weights)


def test_optimizer_moves_what_its_cost_says():
    for precision, itemsize in (("bf16", 2), ("fp32", 4)):
        case = make_case(small(precision=precision), ParallelConfig(), 1)
        n = case.parameters(0)
        moved = cost.adamw(n, itemsize, 4, master=precision == "bf16").forward_bytes
        moved += cost.grad_norm(n, 4).forward_bytes
        assert optimizer_seconds(case, Machine(hbm_gbps=1)) == pytest.approx(moved / 1e9)
        shared = make_case(small(precision=precision), ParallelConfig(zero=1), 2)
        assert optimizer_seconds(shared, Machine(hbm_gbps=1)) == pytest.approx(moved / 2e9)


@pytest.mark.parametrize(("window", "hops"), [(None, 7), (4096, 4), (2, 1), (1025, 1), (1026, 2)])
def test_keys_and_values_go_as_far_as_the_window_sees(window, hops):
    """Rows of 16,384 on eight context ranks: chunks of 1,024; recompute="selective".

    The blocks are those that the ring sends: forward and back in bf16, and back the sums of their
    gradients, too, in fp32.
    """
    config = recipes.get("starcoder2_3b_long")
    model = dataclasses.replace(config.model, window=window)
    config = dataclasses.replace(config, model=model)
    case = make_case(config, ParallelConfig(cp=8), 8)
    (found,) = [t for t in traffic_of(case, 0) if t.axis == "cp"]
    rings = [Ring(rank, 8, 1, 16384, window=window) for rank in range(8)]
    sends = [blocks for ring in rings for step in ring.steps for _, blocks in step.sends]
    block, layers = 2 * 1024 * 2 * 128, 30 * 160
    assert found.num_messages == 3 * hops * layers
    assert found.num_bytes == layers * sum(map(len, sends)) * block * (2 * 2 + 4) / 8
    kv = 2 * block * 2
    assert make_plan(case, Machine()).memory[0].buffers == 2 * kv  # in use and on the way
    case = make_case(config, ParallelConfig(cp=8, cp_form="gather"), 8)
    (found,) = [t for t in traffic_of(case, 0) if t.axis == "cp"]
    assert found.num_messages == 3 * layers
    assert found.num_bytes == layers * 7 * 2 * block * (2 * 2 + 4)
    assert make_plan(case, Machine()).memory[0].buffers == 8 * (kv + 2 * kv)


@pytest.mark.parametrize(
    ("recompute", "back", "keys"), [("none", 2, 1), ("selective", 2, 1), ("full", 3, 2)]
)
def test_what_is_computed_again_is_sent_again(recompute, back, keys):
    """One of the two sums of a layer, and a cut row's keys and values; not with "selective"."""
    train = dataclasses.replace(BASE.train, recompute=recompute)
    config = dataclasses.replace(BASE, train=train)
    case = make_case(config, ParallelConfig(tp=2, cp=2), 512)
    row, kv = 4096 * 6144 * 2, 2 * 4096 * 128
    each = 3 / 4 * kv  # early chunks up, late ones down: 3 of 4 in all, by both ranks
    assert layer_traffic(case, "forward") == LayerTraffic(2 * row, 2, 2 * each, 1)
    assert layer_traffic(case, "backward") == LayerTraffic(
        back * row, back, (2 * keys + 4) * each, keys + 1
    )


def test_zero_shares_out_over_the_context_ranks_too():
    cut, plain = (make_case(BASE, ParallelConfig(zero=3, cp=cp), 512) for cp in (2, 1))
    one, two = (make_plan(case, Machine()) for case in (cut, plain))
    for kind in ("parameters", "gradients", "masters", "moments"):
        assert getattr(one.memory[0], kind) == getattr(two.memory[0], kind)
    assert one.optimizer_seconds == two.optimizer_seconds
    gathered = "parameters from their parts"
    assert sent(one, 0, "dp")[gathered][0] == 2 * sent(two, 0, "dp")[gathered][0]


def test_tensor_traffic_without_sp_is_as_large_but_for_what_is_gathered_again():
    """An all-reduce sends what a gather and a reduce-scatter send; messages of stages are whole.

    Three gathers a layer more: of the inputs of both products, and of the second one when it is
    computed again.
    """
    plain, shared = plan_of(sp=False), plan_of()
    row = 8192 * 6144 * 2
    again = 16 * 10 * 3 * row * 3 // 4
    one, two = (sent(p, 1, "tp")["results of products"][0] for p in (plain, shared))
    assert two - one == again
    one, two = (sent(p, 1, "pp")["states and their gradients"][0] for p in (plain, shared))
    assert one == 4 * two


def test_zero_traffic():
    """Four tensor ranks; dp 128, m 4. Four buckets a layer and two for positions and embedding;
    with ZeRO 3 one a layer, of which the last one stays from the forward to the backward, and one
    for the rest, which does so, too."""
    case = make_case(BASE, ParallelConfig(tp=4), 512)
    count, layer = case.parameters(0), sizes.layer_parameters(BASE.model, 4)
    found = [sent(plan_of(zero=zero, pp=1), 0, "dp") for zero in range(4)]
    part, m = 127 / 128, 4
    assert found[0] == {"sum of gradients": (round(2 * 4 * part * count), 162)}
    gathered = "parameters from their parts"
    assert found[1][gathered] == (round(2 * part * count), 162)
    assert found[2]["sum of gradients, in parts"] == (round(m * 4 * part * count), m * 162)
    assert found[3][gathered] == (round(m * 2 * part * (count + 39 * layer)), m * (2 * 39 + 2))
    alone = plan_of(num_gpus=16, zero=0)
    assert sent(alone, 1, "dp") == {}
    halved = sent(plan_of(zero=0, pp=1, reduce_dtype="bf16"), 0, "dp")
    assert halved == {"sum of gradients": (round(2 * 2 * part * count), 162)}


def test_axes_that_leave_a_node_use_the_network():
    case = make_case(BASE, ParallelConfig(tp=4, pp=4), 512)
    machine = Machine()
    speeds = [machine.bandwidth(case, axis) for axis in ("tp", "cp", "dp", "pp")]
    assert speeds == [300e9, 300e9, 25e9, 25e9]
    for num_gpus, speed in ((3, 25e9), (4, 300e9)):
        assert dataclasses.replace(machine, gpus_per_node=num_gpus).bandwidth(case, "tp") == speed


def test_messages_and_replicas_take_their_time():
    """Slow links: a pipeline of two stages with one micro-batch waits for two messages."""
    case = make_case(small(global_batch_size=2), ParallelConfig(pp=2), 4)
    fast, slow = (
        make_plan(case, Machine(network_gbps=gbps, gpus_per_node=1)) for gbps in (1e9, 1e-6)
    )
    message = 64 * 64 * 4
    waited = slow.simulation.makespan - fast.simulation.makespan
    assert waited == pytest.approx(2 * message / 1e3)
    tied = 512 * 64 * 4
    expected = (4 * case.parameters(1) + tied) / 1e3  # the last one has the final norm, too
    assert slow.replicas_seconds == pytest.approx(expected)


# Search and the command line.


def fastest_by_trying_all(config, num_gpus, machine, top):
    """(seconds of the fastest layouts that fit, one of those that differ in sp and zero alone;
    how many work; how many do not; how many fit)."""
    best, tried, refused, fitting = {}, 0, 0, 0
    for parallel in layouts(config, num_gpus):
        try:
            plan = make_plan(make_case(config, parallel, num_gpus), machine)
        except ConfigError:
            refused += 1
            continue
        tried += 1
        if plan.fits:
            fitting += 1
            key = dataclasses.replace(parallel, sp=False, zero=0)
            best[key] = min(plan.step_seconds, best.get(key, plan.step_seconds))
    return sorted(best.values())[:top], tried, refused, fitting


@pytest.mark.parametrize("memory_gib", [0.0012, 0.0015, 0.003])
@pytest.mark.parametrize("network_gbps", [25, 1e-3])
def test_search_finds_what_trying_all_finds(memory_gib, network_gbps):
    """With a machine so small that many layouts do not fit, and one whose links count."""
    config = small(precision="bf16", recompute="full")
    machine = Machine(
        tflops=1e-3, memory_gib=memory_gib, reserve_gib=0, gpus_per_node=2,
        network_gbps=network_gbps,
    )  # fmt: skip
    seconds, tried, refused, fitting = fastest_by_trying_all(config, 4, machine, 4)
    assert 0 < fitting < tried and refused > 0
    found = search(config, 4, machine, top=4)
    assert [p.step_seconds for p in found.plans] == seconds and all(p.fits for p in found.plans)
    assert (found.num_tried, found.num_refused) == (tried, refused)


def test_a_search_proposes_what_training_accepts():
    """And refuses for the same reasons, word for word."""
    config = dataclasses.replace(small(), folder="runs/x")
    accepted = refused = 0
    for parallel in layouts(config, 8):
        said = settings.check_layout(dataclasses.replace(config, parallel=parallel), 8)
        try:
            make_case(config, parallel, 8)
            accepted += 1
        except ConfigError as error:
            refused += 1
            assert error.problems == said
        else:
            assert said == [], parallel
    assert accepted > 50 and refused > 50
    for plan in search(config, 8, Machine(), top=40).plans:
        proposed = dataclasses.replace(config, parallel=plan.case.parallel)
        assert settings.check_layout(proposed, 8) == []


def test_a_search_without_a_result_says_so():
    config = small()
    none = search(config, 4, Machine(memory_gib=1e-6, reserve_gib=0))
    assert none.plans == [] and none.num_too_large == none.num_tried
    assert "none fits" in "\n".join(search_lines(none, Machine()))
    none = search(config, 7 * 11, Machine())
    assert none.num_tried == 0 < none.num_refused
    assert (
        "none works; most of them lack the same: train.global" in search_lines(none, Machine())[1]
    )


def test_what_is_no_layout_is_kept(monkeypatch):
    """Buckets and their dtype, beside options and in a search."""
    own = ParallelConfig(bucket_mib=7.0, reduce_dtype="bf16")
    config = dataclasses.replace(small(), parallel=own)
    assert {(p.bucket_mib, p.reduce_dtype) for p in layouts(config, 4)} == {(7.0, "bf16")}
    seen = []
    monkeypatch.setattr(command, "make_case", lambda config, layout, n: seen.append(layout))
    monkeypatch.setattr(command, "make_plan", lambda *_: SimpleNamespace(fits=True))
    monkeypatch.setattr(command, "plan_lines", lambda *_: [])
    assert command.run(config, 4, {"tp": 2, "zero": None, "pp": None}, {}) == ([], True)
    assert seen == [dataclasses.replace(own, tp=2)]


def test_search_tries_every_axis():
    tried = list(layouts(small(), 8))
    assert {p.tp for p in tried} == {1, 2, 4} and {p.pp for p in tried} == {1, 2, 4}
    assert {p.cp for p in tried} == {1, 2, 4, 8} and {p.zero for p in tried} == {0, 1, 2, 3}
    assert {p.sp for p in tried if p.tp > 1} == {False, True}
    assert not any(p.sp for p in tried if p.tp == 1)
    assert {p.schedule for p in tried} == {"1f1b", "interleaved", "zb_h1", "zb_v"}
    assert len(set(tried)) == len(tried)


def test_the_printed_plan_of_starcoderbase(capsys):
    words = "plan --recipe starcoderbase --gpus 512 --tp 4 --sp --pp 4 --zero 1 --tflops 312"
    assert main(words.split()) == 0
    text = capsys.readouterr().out
    for part in (
        "starcoderbase: 15,517,456,384 parameters, bf16, recompute selective\n",
        "layout of 512 GPUs: tp 4 with sp, cp 1, pp 4 (1f1b), dp 32, zero 1\n",
        "step: 512 rows of 8,192 tokens = 4,194,304 tokens; 16 micro-batches of 1 on each of 32 "
        "replicas\n",
        "layers of the stages: 10 10 10 10\n",
        "1,085,724,160\n",
        "fits: 80 GiB less 6",
        "18.8% if all were alike",
        "given: tflops 312\n",
        "assumed, not measured: efficiency 0.5, hbm_gbps 2039, memory_gib 80",
    ):
        assert part in text
    plan = make_plan(make_case(BASE, PUBLISHED, 512), Machine())
    assert text.splitlines() == plan_lines(plan, ["tflops"])


@pytest.mark.parametrize(
    ("name", "num_gpus", "axes", "num_micro_batches"),
    [
        ("starcoder2_3b", 160, "tp 1, cp 1, pp 1, dp 160, zero 1", 4),
        ("starcoder2_7b", 432, "tp 2 with sp, cp 1, pp 1, dp 216, zero 1", 4),
        ("starcoder2_15b", 1024, "tp 8 with sp, cp 1, pp 4 (1f1b), dp 32, zero 1", 31),
        ("starcoder2_3b_long", 160, "tp 1, cp 1, pp 1, dp 160, zero 1", 1),
        ("starcoder2_7b_long", 432, "tp 2 with sp, cp 1, pp 1, dp 216, zero 1", 1),
        ("starcoder2_15b_long", 992, "tp 8 with sp, cp 1, pp 1, dp 124, zero 1", 2),
        ("santacoder", 96, "tp 1, cp 1, pp 1, dp 96, zero 0", 1),
        ("starcoderbase_1b", 128, "tp 1, cp 1, pp 1, dp 128, zero 0", 1),
        ("starcoderbase_3b", 256, "tp 1, cp 1, pp 1, dp 256, zero 0", 1),
        ("starcoderbase_7b", 512, "tp 2, cp 1, pp 1, dp 256, zero 1", 2),
        ("starcoderbase", 512, "tp 4 with sp, cp 1, pp 4 (1f1b), dp 32, zero 1", 16),
        ("starcoder", 512, "tp 4 with sp, cp 1, pp 4 (1f1b), dp 32, zero 1", 16),
    ],
)
def test_layouts_of_the_recipes(name, num_gpus, axes, num_micro_batches, capsys):
    """Training accepts them on the machines that the docstrings name, and they fit into 80 GiB.

    Of the first generation they are the published ones (tensor, pipeline, data parallel).
    """
    config = recipes.get(name)
    assert settings.check(config) + settings.check_layout(config, num_gpus) == []
    assert main(["plan", "--recipe", name, "--gpus", str(num_gpus)]) == 0
    text = capsys.readouterr().out
    assert f"\nlayout of {num_gpus} GPUs: {axes}\n" in text
    assert f"; {num_micro_batches} micro-batches of {config.train.micro_batch_size} on" in text
    assert "\nfits: 80 GiB" in text


def test_every_large_recipe_has_a_checked_layout():
    (mark,) = test_layouts_of_the_recipes.pytestmark
    assert {case[0] for case in mark.args[1]} | {"demo", "tiny"} == set(recipes.names())


def test_a_layout_that_is_given_replaces_that_of_the_recipe(capsys):
    words = ["plan", "--recipe", "starcoderbase", "--gpus", "512"]
    assert main([*words, "--tp", "4", "--sp", "--pp", "4", "--zero", "1"]) == 0
    asked = capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out == asked
    assert main([*words, "--zero", "0"]) == 1  # all of it on each GPU
    assert "layout of 512 GPUs: tp 1, cp 1, pp 1, dp 512, zero 0\n" in capsys.readouterr().out
    assert main([*words, "parallel.pp=2"]) == 0
    assert "tp 4 with sp, cp 1, pp 2 (1f1b), dp 64, zero 1\n" in capsys.readouterr().out


def test_values_of_the_recipe_can_be_changed(capsys):
    words = ["plan", "--recipe", "starcoderbase", "--gpus", "4", "--pp", "4", "--schedule", "zb_v"]
    assert main([*words, "train.global_batch_size=8", "--memory-gib", "10"]) == 1
    text = capsys.readouterr().out
    assert "pp 4 (zb_v x 2 stages)" in text and "8 micro-batches of 1 on each of 1 r" in text
    assert "DOES NOT FIT: 10 GiB less 6 for what is not counted leave 4" in text
    assert main(["plan", "--gpus", "2", "--cp", "2", "--cp-form", "gather"]) == 0
    assert "cp 2 (gather), pp 1, dp 1" in capsys.readouterr().out
    assert main(["plan", "--gpus", "2", "--search", "--top", "2"]) == 0
    assert "layouts work" in capsys.readouterr().out
    words = ["plan", "--recipe", "starcoderbase", "--gpus", "8", "--search"]
    assert main([*words, "train.global_batch_size=8", "--memory-gib", "10"]) == 1
    assert "none fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["--recipe", "starcoderbase", "--gpus", "500", "--tp", "7", "--pp", "41"],
            ["4 problems", "= 287 divides, got 500", "num_heads = 48, got 7", "num_layers = 40"],
        ),
        (["--gpus", "2", "--pp", "2", "--schedule", "nix"], ["expected one of gpipe, 1f1b"]),
        (["--search", "--tp", "2"], ["expected --search or a layout, got both: tp"]),
        (["--tp", "2", "parallel.zero=3"], ["by options or by words, got parallel.zero=3 beside"]),
        (["--search", "parallel.tp=2"], ["by options or by words, got parallel.tp=2 beside"]),
        (["--gpus", "2", "--top", "3"], ["expected --top with --search, got --top 3 alone"]),
        (["--tpp", "2"], ["Did you mean --tp for --tpp?"]),
        (["--efficiency", "1.5"], ["above 0 and up to 1, got '1.5'"]),
        (["tp=4"], ["unknown name 'tp'"]),
        (["--recipe", "starcoderbas"], ["Did you mean 'starcoderbase'"]),
    ],
)
def test_what_cannot_be_planned_says_why(words, parts, capsys):
    try:
        code = main(["plan", *words])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    for part in parts:
        assert part in error, error


def test_what_is_not_counted_needs_room():
    plan = plan_of()
    needed = max(memory.total for memory in plan.memory) / GIB
    for memory_gib, fits in ((needed + 6.01, True), (needed + 5.99, False)):
        assert plan_of(machine=Machine(memory_gib=memory_gib)).fits == fits


def test_a_figure_of_the_machine_is_above_zero():
    case = make_case(BASE, PUBLISHED, 512)
    with pytest.raises(ValueError, match="expected link_gbps above 0, got 0"):
        make_plan(case, Machine(link_gbps=0))
