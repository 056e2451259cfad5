"""Gradients that ops add to the flat buffers by themselves, unrounded, in bf16 training.

Reference: the same bf16 weights in float64, by autograd. Layouts on processes are in
tests/parallel (to the bit among the stages of ZeRO in test_zero.py); here tensor ranks of one
process stand for them, their sums taken by hand. The Triton kernels run in tests/ops.
"""

import dataclasses
import gc
import sys
import weakref
from functools import partial

import pytest
import torch

from stellarator.config import OptimConfig
from stellarator.model import build_model
from stellarator.parallel import products
from stellarator.parallel.buckets import DataParallel
from stellarator.parallel.gradients import room_of
from stellarator.parallel.loss import vocabulary_cross_entropy
from stellarator.parallel.mesh import Axis
from stellarator.parallel.pipeline.deferred import Deferred, Rows
from stellarator.train.optimizer import FlatOptimizer
from stellarator_kernels import dispatch, linear_cross_entropy_statistics, mlp
from stellarator_kernels.linear import gradient_or_add
from stellarator_kernels.widened import widens

NAME = "embedding.weight"
KERNELS = sys.modules[gradient_or_add.__module__]  # its function of the same name hides it
MLP = sys.modules[mlp.__module__]


@pytest.fixture
def config(tiny_config):
    """Few classes, so that each is a target and an input many times."""
    return dataclasses.replace(tiny_config.model, vocab_size=16, init_std=0.3, tie_embeddings=True)


def data(B=8, T=64):
    generator = torch.Generator().manual_seed(4)
    return torch.randint(16, (B, T + 1), generator=generator)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_tied_gradient_is_that_of_two_summed_in_fp32(recompute, config):
    """What flows back in bf16 is given: the two uses alone, from fp32 buffers, add up to it."""
    tokens, found = data(), {}
    for which in ("both", "embedding", "head"):
        model = build_model(config, dtype=torch.bfloat16, seed=3, recompute=recompute)
        optimizer = FlatOptimizer(model, OptimConfig())
        weight, room = model.embedding.weight, model.embedding.weight.main_grad
        asked = []

        def give(which=which, asked=asked, room=room):
            asked.append(None)  # the head asks in the forward, the embedding in the backward
            kept = which == "both" or which == ("head" if len(asked) == 1 else "embedding")
            return room() if kept else torch.zeros_like(room())

        weight.main_grad = give
        model(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
        assert len(asked) == 2 and weight.grad is None
        found[which] = optimizer.grad(NAME).clone()
    assert found["embedding"].any() and found["head"].any()
    torch.testing.assert_close(
        found["both"], found["head"] + found["embedding"], rtol=1e-6, atol=1e-6
    )
    rounded = (found["head"].bfloat16() + found["embedding"].bfloat16()).float()
    assert (rounded - found["both"]).abs().max() > 1e-3 * found["both"].abs().max()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("direct", [True, False])
def test_the_tied_gradient_has_the_digits_of_fp32(direct, kernels, config):
    """Against float64 from the same hidden states and gradients of the rows, which are bf16.

    Without a room, as before, autograd adds two rounded gradients in bf16.
    """
    model = build_model(config, dtype=torch.bfloat16, seed=3, kernels=kernels)
    optimizer, tokens, kept = FlatOptimizer(model, OptimConfig()), data(), {}
    if not direct:
        del model.embedding.weight.main_grad
    hidden, embed = model.hidden, model._embed

    def noting(x, name):
        kept[name] = x
        x.retain_grad()
        return x

    model.hidden = lambda *a, **k: noting(hidden(*a, **k), "states")
    model._embed = lambda *a, **k: noting(embed(*a, **k), "rows")
    for _ in range(2):  # two micro-batches, which are alike
        model(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    weight = model.embedding.weight.detach().double()
    states, drows = kept["states"].detach().flatten(0, 1), kept["rows"].grad

    wide = kernels == "reference" or widens(states.dtype, states.device)

    def as_computed(x):  # logits, and their gradient, are rounded once by products of bf16
        return x if wide else x.bfloat16().double()

    logits = as_computed(states.double() @ weight.t())
    classes = torch.nn.functional.one_hot(tokens[:, 1:].flatten(), 16)
    expected = as_computed(logits.softmax(1) - classes).t() @ states.double()
    expected.index_add_(0, tokens[:, :-1].flatten(), drows.flatten(0, 1).double())
    error = (optimizer.grad(NAME).double() - 2 * expected).norm() / (2 * expected).norm()
    chosen = dispatch.choose("add_weight_gradient_", "auto", states, x=states)
    assert (error < 1e-6) == (direct and (wide or chosen == "cpu"))
    assert error < 5e-3


class Both(Axis):
    """A tensor rank beside another, whose statistics are here already."""

    others: list = []

    def gather(self, x, tag):
        return torch.cat([x if r == self.rank else self.others[r][None] for r in range(2)])


def test_a_shard_of_the_vocabulary_adds_to_its_buffer():
    """To the fp32 sum that is there, the rows of the float64 gradient, without a rounding."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 24, generator=generator) for n in (70, 21))
    targets = torch.randint(21, (70,), generator=generator)
    targets[::5] = -100
    wide, whole = hidden.double(), weight.double().requires_grad_()
    logits = wide @ whole.t()
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    cuts, statistics = ((0, 10), (10, 21)), []
    for start, end in cuts:
        options = {"vocab_start": start, "vocab_size": 21}
        part = weight[start:end]
        statistics.append(linear_cross_entropy_statistics(hidden, part, targets, **options))
    for rank, (start, end) in enumerate(cuts):
        axis = Both("tp", rank, 2)
        object.__setattr__(axis, "others", statistics)
        part = torch.nn.Parameter(weight[start:end].clone())
        total = torch.full_like(part, 3.0)
        part.main_grad = lambda total=total: total
        states = hidden.clone().requires_grad_()
        losses = vocabulary_cross_entropy(states, part, targets, start, 21, axis)
        losses.sum().backward()
        assert part.grad is None and states.grad.any()
        torch.testing.assert_close(total.double() - 3.0, whole.grad[start:end], rtol=0, atol=2e-5)
        assert room_of(part) is not None
        with torch.no_grad():
            assert room_of(part) is None  # an evaluation needs no buffer


# Products, and who is told of a gradient.


@pytest.fixture
def adding(monkeypatch):
    """Every product adds its weight gradient by itself, as on a GPU; in fp32, by the formula."""
    count = []

    def add(dy, x, impl, room):
        assert room is not None, "every weight of a model in training has a buffer"
        count.append(None)
        with torch.no_grad():
            room().add_(dy.t().to(room().dtype) @ x.to(room().dtype))

    for module in (KERNELS, MLP, sys.modules[Deferred.__module__], products):
        monkeypatch.setattr(module, "gradient_or_add", add)
    return count


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tie", [True, False])
def test_products_that_add_by_themselves_make_the_same_gradients(
    tie, recompute, adding, tiny_config
):
    """In float64; two micro-batches. Every weight of a product goes that way, and only once."""
    config, tokens = dataclasses.replace(tiny_config.model, tie_embeddings=tie), data()
    plain = build_model(config, dtype=torch.float64, seed=3)
    model = build_model(config, dtype=torch.float64, seed=3, recompute=recompute)
    optimizer = FlatOptimizer(model, OptimConfig())
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    assert len(adding) == 2 * 4 * config.num_layers
    KERNELS.gradient_or_add = MLP.gradient_or_add = gradient_or_add
    for _ in range(2):
        plain(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    for name, parameter in plain.named_parameters():
        found = optimizer.grad(name)
        torch.testing.assert_close(found, parameter.grad, rtol=1e-11, atol=1e-11)


class Silent(Axis):
    """Another rank that is not there; no sum is needed to see when one begins."""

    def begin_sum_(self, x):
        return torch.futures.Future()

    def begin_scatter_sum_(self, x):
        return torch.futures.Future()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_buckets_begin_when_ops_have_added_their_gradients(stage, dtype, adding, config):
    """Each once, in a fixed order, the tied embedding's after both uses; nothing is left over."""
    model = build_model(config, dtype=dtype, seed=3)
    ranks = DataParallel(Silent("dp", 0, 2), stage, bucket_bytes=4000)
    optimizer = FlatOptimizer(model, OptimConfig(), data=ranks)
    begun = []

    def begin(bucket):
        begun.append(bucket.names)
        grads = {name: bucket.view(bucket.full_grads, name) for name in bucket.names}
        assert all(grad.any() for grad in grads.values())

    for bucket in optimizer.buckets:
        bucket.begin_reduce, bucket.end_reduce = partial(begin, bucket), lambda: None
    tokens, names = data(), [bucket.names for bucket in optimizer.buckets]
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.last_micro_batch():
            model(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    # The two weights of an MLP are made together. The embedding is the first parameter, its bucket
    # the last.
    assert begun[: len(names)] == begun[len(names) :]
    begun = begun[: len(names)]
    assert len(begun) > 4 and sorted(begun) == sorted(names) and begun[-1] == names[-1]
    gone = weakref.ref(optimizer.reducer)
    del optimizer, model, bucket
    gc.collect()
    assert gone() is None  # nodes with hooks do not keep each other


@pytest.mark.parametrize("name", [NAME, "layers.1.mlp.down.weight"])
def test_hooks_of_a_parameter_see_and_change_its_gradient(name, config):
    """As autograd promises, also where an op would add by itself."""
    model, tokens = build_model(config, dtype=torch.bfloat16, seed=3), data()
    optimizer = FlatOptimizer(model, OptimConfig())
    seen = []
    parameter = dict(model.named_parameters())[name]
    parameter.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    model(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    assert len(seen) == 1 and torch.equal(optimizer.grad(name), 2 * seen[0].float())


def test_deferred_gradients_are_added_without_a_rounding(adding):
    dy, x = (torch.randn(9, n, dtype=torch.float64) for n in (4, 5))
    weight, total = (
        torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.float64)),
        torch.ones(4, 5).double(),
    )
    weight.main_grad = lambda: total
    deferred = Deferred()
    deferred.key = 1
    deferred.add(weight, dy, Rows(lambda: x))
    deferred.run(1)
    torch.testing.assert_close(total, 1 + dy.T @ x)
    assert len(adding) == 1


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (torch.zeros(4, 5, dtype=torch.bfloat16), "what room gives with dtype in"),
        (torch.zeros(5, 4), r"what room gives \(out, in\)"),
        (torch.zeros(5, 4).t(), "a contiguous room"),
    ],
)
def test_a_room_that_does_not_fit_is_refused(monkeypatch, total, message):
    """Before a kernel, which reads no shapes, would write there."""
    monkeypatch.setattr(KERNELS, "choose", lambda *_, **__: "cpu")
    dy, x = torch.ones(9, 4), torch.ones(9, 5)
    with pytest.raises(ValueError, match=message):
        gradient_or_add(dy, x, "auto", lambda: total)
