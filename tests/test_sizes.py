"""Sizes of a model against the model: parameters, FLOPs, bytes kept for the backward.

References: Transformer on the meta device; the storages that are really alive after a forward on a
CPU; the products of tiny models counted by hand (tests/train/test_metrics.py), FlatOptimizer
(tests/train/test_memory.py). Not covered: what a GPU allocates.
"""

import dataclasses
import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stellarator import recipes, sizes
from stellarator.config import ModelConfig, ParallelConfig
from stellarator.model import Transformer, build_model
from stellarator.model.transformer import RECOMPUTE
from stellarator.parallel.collectives import Pending
from stellarator.parallel.mesh import Axis
from stellarator.parallel.pipeline.deferred import Deferred
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator.plan import make_case
from stellarator.plan.memory import stage_activation_bytes
from stellarator.train import flops
from stellarator.train.loop import DTYPES

ROPE = ModelConfig(
    vocab_size=96, width=96, num_heads=6, num_kv_heads=2, ffn_width=384, max_positions=256,
    window=24,
)  # fmt: skip
LEARNED = dataclasses.replace(ROPE, positions="learned", num_kv_heads=1, window=None)
# Every head has its own keys, so qkv is too wide to be kept; the MLP is so narrow that it is.
WIDE = dataclasses.replace(ROPE, num_kv_heads=6, ffn_width=160)


class Made(TorchDispatchMode):
    """Remembers every storage that an operator gives, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu":
                storage = x.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return results


def kept_bytes(model: ModelConfig, N: int, recompute: str, dtype, tp=ALONE) -> int:
    """What is alive between forward and backward of training, beside parameters and gradients."""
    return held_bytes(model, N, recompute, dtype, tp, None)[0]


def held_bytes(
    model: ModelConfig, N: int, recompute: str, dtype, tp: TensorParallel, deferred: Deferred | None
) -> tuple[int, int]:
    """The same, and what is alive behind the backward.

    deferred: of a schedule that makes weight gradients apart.
    """
    built = build_model(model, dtype=dtype, recompute=recompute, tp=tp)
    for module in built.modules():
        if hasattr(module, "deferred"):
            module.deferred = deferred
    for p in built.parameters():
        total = torch.zeros_like(p, dtype=torch.promote_types(dtype, torch.float32))
        p.main_grad, p.grad = lambda total=total: total, torch.zeros_like(p)
    own = {
        x.untyped_storage()._cdata for p in built.parameters() for x in (p, p.grad, p.main_grad())
    }
    tokens = torch.randint(0, model.vocab_size, (1, N))

    def alive() -> int:
        gc.collect()
        return sum(n for key, (ref, n) in storages if key not in own and not ref.expired())

    with Made() as made:
        loss = built(tokens, tokens, reduction="sum")
        storages = made.storages.items()
        forward = alive()
        assert loss.requires_grad
        if deferred is None:
            return forward, 0
        deferred.key = "here"
        loss.backward()
    return forward, alive()


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("model", [ROPE, LEARNED, WIDE], ids=["rope", "learned", "wide"])
def test_activations_of_a_layer_are_what_is_kept(model, recompute, precision):
    """Exactly: three layers less two, which leaves out what is there once."""
    N, dtype = 64, DTYPES[precision]
    two, three = (
        kept_bytes(dataclasses.replace(model, num_layers=L), N, recompute, dtype) for L in (2, 3)
    )
    itemsize = sizes.ITEMSIZE[precision]
    assert itemsize == dtype.itemsize
    assert three - two == sizes.layer_activation_bytes(model, N, recompute, itemsize)


class Alike(Axis):
    """Of ranks that all have the same numbers."""

    def sum_(self, x, tag):
        return x.mul_(self.size)

    def gather(self, x, tag):
        return torch.cat([x] * self.size)

    def scatter_sum(self, x, tag):
        return self.size * x[: len(x) // self.size]

    def begin_sum_(self, x, tag):
        return Pending(result=self.sum_(x, tag))

    def begin_scatter_sum_(self, x, tag):
        return Pending(result=self.sum_(x, tag))

    def begin_gather(self, x, part, tag):
        return Pending(result=x.copy_(self.gather(part, tag)))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("model", [ROPE, LEARNED, WIDE], ids=["rope", "learned", "wide"])
def test_activations_of_a_layer_of_a_tensor_rank_are_what_is_kept(model, sp, recompute):
    """Exactly; what a norm or a gelu made is not kept, nor what other ranks have."""
    N, tp = 64, TensorParallel(Alike("tp", 1, 2), sp)
    two, three = (
        kept_bytes(dataclasses.replace(model, num_layers=L), N, recompute, torch.float32, tp)
        for L in (2, 3)
    )
    assert three - two == sizes.layer_activation_bytes(model, N, recompute, 4, tp=2, sp=sp)


def held_by_a_layer(model: ModelConfig, N: int, recompute: str, dtype, tp=ALONE) -> list[int]:
    """Behind the forward and behind the input gradients of a schedule that splits the backward."""
    two, three = (
        held_bytes(dataclasses.replace(model, num_layers=L), N, recompute, dtype, tp, Deferred())
        for L in (2, 3)
    )
    return [b - a for a, b in zip(two, three, strict=True)]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("model", [ROPE, LEARNED, WIDE], ids=["rope", "learned", "wide"])
def test_what_weight_gradients_that_wait_hold(model, recompute):
    """Exactly, and the same with any recomputation; the forward keeps what it keeps anyway."""
    found = held_by_a_layer(model, 64, recompute, torch.float32)
    forward = sizes.layer_activation_bytes(model, 64, recompute, 4)
    assert found == [forward, sizes.layer_deferred_bytes(model, 64, 4)]


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("model", [ROPE, LEARNED], ids=["rope", "learned"])
def test_what_weight_gradients_of_a_tensor_rank_hold(model, sp):
    tp = TensorParallel(Alike("tp", 1, 2), sp)
    found = held_by_a_layer(model, 64, "none", torch.bfloat16, tp)
    assert found[1] == sizes.layer_deferred_bytes(model, 64, 2, tp=2, sp=sp)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("model", [ROPE, LEARNED], ids=["rope", "learned"])
def test_activations_of_a_whole_model(model, recompute):
    """What a plan counts for a stage that has everything, gradients of the loss included.

    It leaves out the RoPE table, the loss, and up to two vectors of ids or positions.
    """
    N, config = 256, recipes.get("tiny")
    model = dataclasses.replace(model, num_layers=4)
    config = dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, seq_length=N),
        train=dataclasses.replace(
            config.train, micro_batch_size=1, recompute=recompute, precision="bf16"
        ),
    )
    case = make_case(config, ParallelConfig(), 1)
    counted = stage_activation_bytes(case, case.stages[0])
    table = 4 * N * model.head_width if model.positions == "rope" else 0
    rest = kept_bytes(model, N, recompute, torch.bfloat16) - counted - table - 4
    assert rest in (8 * N, 2 * 8 * N)


def test_activations_of_a_tensor_rank():
    """All ranks together hold everything once, but the residual stream without sp each for itself.

    Key/value heads fewer than ranks are held by several ranks.
    """
    N, C = 64, ROPE.width
    for recompute in RECOMPUTE:
        whole = sizes.layer_activation_bytes(ROPE, N, recompute, 2)
        shared = 2 * sizes.layer_activation_bytes(ROPE, N, recompute, 2, tp=2, sp=True)
        assert shared == whole
        extra = 2 * sizes.layer_activation_bytes(ROPE, N, recompute, 2, tp=2) - whole
        statistics = 16 * N if recompute != "full" else 0
        assert extra == 2 * N * C * 2 + statistics
    one, two = (sizes.layer_activation_bytes(LEARNED, N, "none", 2, tp=t, sp=True) for t in (1, 2))
    assert 2 * two - one == 2 * N * LEARNED.head_width * 2


@pytest.mark.parametrize("name", recipes.names())
def test_parameters_are_those_of_the_model(name):
    model = recipes.get(name).model
    built = Transformer(model, device="meta")
    assert sizes.num_parameters(model) == sum(p.numel() for p in built.parameters())
    layer = sum(p.numel() for p in built.layers[0].parameters())
    assert sizes.layer_parameters(model) == layer
    products = [p for n, p in built.layers.named_parameters() if p.dim() == 2]
    head = built.head_weight.numel()
    assert sizes.matmul_parameters(model) == sum(p.numel() for p in products) + head


def test_parameters_of_tensor_ranks():
    """All shards together are the layer once, and what every rank has, again for each other one."""
    C, D = 96, 16
    for tp in (2, 3, 6):
        repeated = 6 * C  # norms, and the biases of the two row-parallel products
        copies = (tp - 1) * repeated
        for model in (ROPE, LEARNED) if tp == 2 else (LEARNED,):
            kv = max(0, tp - model.num_kv_heads) * 2 * D * (C + 1)
            assert tp * sizes.layer_parameters(model, tp) == (
                sizes.layer_parameters(model) + copies + kv
            )
    assert sizes.embedding_parameters(ROPE, 5) == 20 * 96


@pytest.mark.parametrize("name", ["starcoderbase", "starcoder2_3b_long", "demo"])
def test_flops_of_a_row_are_those_of_a_batch(name):
    config = recipes.get(name)
    T = config.data.seq_length
    pairs = sizes.row_pairs(config.model, T)
    assert sizes.model_flops(config.model, T, pairs) == flops.batch_flops(config.model, [T])
