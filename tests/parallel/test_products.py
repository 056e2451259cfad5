"""Products that ranks share, whose communication travels beside them.

The reference is `TensorParallel.enter`, a product, and `leave`, one after the other: gradients
equal to the bit, on gloo processes. What overlaps is read off a clock of the test's own, on which
products and messages take a given time. Not covered: NCCL; layouts of the model, which are in
test_parity_matrix.py; what is kept, which is in test_sizes.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from stellarator.config import ModelConfig
from stellarator.model import build_model, layers, mlp
from stellarator.model.dropout import Dropout
from stellarator.model.transformer import RECOMPUTE
from stellarator.parallel import products
from stellarator.parallel.collectives import Group
from stellarator.parallel.mesh import Axis
from stellarator.parallel.pipeline.deferred import Deferred
from stellarator.parallel.products import Again, column_product, row_product
from stellarator.parallel.tensor import TensorParallel
from stellarator_kernels import bias_gelu, linear
from stellarator_kernels.linear import gradient_or_add

pytestmark = pytest.mark.dist
B, T, C, OUT = 2, 6, 24, 10


def tensors(rank: int, tp: TensorParallel, dtype):
    """x, weight, bias and dy of a rank; x is the same on all, or with sp each rank's own."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(B, T, C)
    x = x.view(tp.axis.size, -1, C)[rank : rank + 1] if tp.sp else x
    shapes = (OUT, C), (OUT,), (B, T, OUT)
    return x, *([draw(*shape) for _ in range(tp.axis.size)][rank] for shape in shapes)


def gradients(product, needs, x, weight, bias, dy):
    """What a product gives, and the gradients of what needs one."""
    inputs = [
        t.clone().requires_grad_(bool(n)) for t, n in zip((x, weight, bias), needs, strict=True)
    ]
    y = product(*inputs)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in inputs)]


def every_form(rank: int, size: int):
    """Both ways in every form, and the products whose weight gradient is made apart."""
    axis = Axis("tp", rank, size, Group(dist.group.WORLD, "tp"))
    for sp in (False, True):
        tp = TensorParallel(axis, sp)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            given = tensors(rank, tp, dtype)
            shape = torch.Size((B, T))

            def apart(x, weight, bias, tp=tp, shape=shape):
                return column_apart(x, weight, bias, shape, tp)

            def beside(x, weight, bias, tp=tp, shape=shape):
                return column_product(x, weight, bias, shape, tp)

            frozen = ((1, 0, 0), (0, 1, 0), (1, 1, 0)) if dtype == torch.float64 else ()
            for needs in ((1, 1, 1), *frozen):
                expected, got = (gradients(f, needs, *given) for f in (apart, beside))
                for a, b in zip(expected, got, strict=True):
                    assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), needs
        later(tp, shape, *tensors(rank, tp, torch.float64))
        whole_models(rank, tp)


def whole_models(rank: int, tp: TensorParallel) -> None:
    """Gradients of a model with dropout, under recomputation, and with a norm that is watched."""
    rates = {f"{name}_dropout": 0.1 for name in ("residual", "embedding", "attention")}
    config = ModelConfig(
        vocab_size=50, num_layers=2, width=24, num_heads=6, num_kv_heads=6, ffn_width=36, **rates
    )
    tokens = torch.arange(B * 2 * T).view(B, 2 * T) % 50

    def gradients(recompute: str, watched: bool) -> list[torch.Tensor]:
        model = build_model(config, dtype=torch.float64, recompute=recompute, tp=tp)
        if watched:
            model.layers[1].mlp_norm.register_forward_hook(lambda m, x, y: (2 * y[0], y[1]))
        model(tokens, tokens, reduction="sum", dropout=Dropout(3, 0)).backward()
        return [p.grad for p in model.parameters()]

    for watched in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "column_product", column_apart)
            patch.setattr(layers, "row_product", row_apart)
            patch.setattr(mlp, "row_product", row_apart)
            expected = gradients("none", watched)
        for recompute in RECOMPUTE:
            for a, b in zip(expected, gradients(recompute, watched), strict=True):
                assert torch.equal(a, b), (rank, tp.sp, recompute, watched)


def column_apart(x, weight, bias, shape, tp, deferred=None, again=None):
    return linear(tp.enter(x, shape), weight, bias)


def row_apart(x, weight, bias, tp, deferred=None, gelu=None, again=None):
    if gelu is not None:
        x = bias_gelu(x, None, approximate=gelu.approximate, impl=gelu.impl)
    return tp.leave(linear(x, weight)) + bias


def later(tp, shape, x, weight, bias, dy):
    """Weight gradients of three products and two micro-batches, made when they are asked for."""
    deferred = Deferred()
    weights = [(weight + n).requires_grad_() for n in range(3)]
    expected = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    totals = [torch.zeros_like(total) for total in expected]
    for w, total in zip(weights, totals, strict=True):
        w.main_grad = lambda total=total: total
    for key in (0, 1):
        deferred.key = key
        for w, total in zip(weights, expected, strict=True):
            x = x + key
            given = x.clone().requires_grad_()
            column_product(given, w, bias, shape, tp, deferred).backward(dy)
            assert w.grad is None and not w.main_grad().any() and given.grad is not None
            whole = tp.axis.gather(x.flatten(0, 1), "test") if tp.sp else x.flatten(0, 1)
            total.add_(dy.flatten(0, 1).T @ whole)
    for key in (0, 1):
        deferred.run(key)
    nothing = torch.zeros(len(weight.T), dtype=weight.dtype)
    u, at_once = dy.detach().requires_grad_(), weight.T.clone().requires_grad_()
    apart = at_once.detach().clone().requires_grad_()
    total = torch.zeros_like(apart)
    apart.main_grad = lambda: total
    for key, w in ((None, at_once), ("row", apart)):
        deferred.key = key
        again = Again(torch.exp, (u.flatten(0, 1),))
        row_product(u.exp(), w, nothing, tp, deferred, again=again).sum().backward()
    assert apart.grad is None and not total.any()
    deferred.run("row")
    assert torch.equal(total, at_once.grad) and deferred.empty
    for found, total in zip(totals, expected, strict=True):
        assert torch.equal(found, total)


@pytest.mark.parametrize("size", [2, 3])
def test_the_bits_are_those_of_one_after_the_other(size):
    on_ranks(every_form, size, size)


@pytest.mark.parametrize("sp", [False, True])
def test_the_bits_of_one_rank_are_those_of_a_product(sp):
    """Nothing is sent: the axis has no group."""
    tp, shape = TensorParallel(Axis("tp"), sp), torch.Size((B, T))
    for dtype in (torch.float64, torch.bfloat16):
        given = tensors(0, tp, dtype)
        for needs in ((1, 1, 1), (1, 0, 0), (0, 1, 0)):
            expected = gradients(lambda x, w, b: linear(x.view(*shape, C), w, b), needs, *given)
            got = gradients(lambda x, w, b: column_product(x, w, b, shape, tp), needs, *given)
            for a, b in zip(expected, got, strict=True):
                assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), needs


class Clock:
    """Seconds that only products and messages take."""

    def __init__(self):
        self.now = 0.0
        self.events = []

    def spend(self, what: str, seconds: float) -> None:
        self.events.append(what)
        self.now += seconds


class Message:
    """Of a link that carries one after the other."""

    free = 0.0

    def __init__(self, clock: Clock, what: str, seconds: float):
        Message.free = max(Message.free, clock.now) + seconds
        self.clock, self.what, self.end = clock, what, Message.free
        clock.events.append(f"begin {what}")

    def wait(self):
        self.clock.events.append(f"wait {self.what}")
        self.clock.now = max(self.clock.now, self.end)


class Timed(Axis):
    """Of ranks that are all like this one; a sum takes 2 s, a part of one or a gather 1 s."""

    def gather(self, x, tag):
        return torch.cat([x] * self.size)

    def begin_sum_(self, x, tag):
        return Message(CLOCK, "sum", 2.0)

    def begin_scatter_sum_(self, x, tag):
        return Message(CLOCK, "part", 1.0)

    def begin_gather(self, x, part, tag):
        x.copy_(torch.cat([part] * self.size))
        return Message(CLOCK, "gather", 1.0)


CLOCK = Clock()


def spending(name: str, function):
    """The same, which takes 1.5 s of the clock."""

    def call(*arguments):
        CLOCK.spend(name, 1.5)
        return function(*arguments)

    return call


@pytest.fixture
def clock(monkeypatch):
    """Products of both gradients that take their time."""

    def begin():
        product = spending("product", torch.ops.stellarator.product)
        monkeypatch.setattr(products, "_ops", SimpleNamespace(product=product))
        weight_gradient = spending("weight_gradient", gradient_or_add)
        monkeypatch.setattr(products, "gradient_or_add", weight_gradient)
        CLOCK.__init__()
        Message.free = 0.0

    return begin


def test_the_input_of_a_product_by_rows_is_made_while_its_gradient_travels(monkeypatch, clock):
    tp = TensorParallel(Timed("tp", 1, 2), sp=True)
    x, weight, _, _ = tensors(1, tp, torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    made = Again(lambda x: CLOCK.spend("make", 0.75) or x.exp(), (x,))
    part = lambda self, x, tag: x[: len(x) // self.size].clone()  # noqa: E731
    monkeypatch.setattr(Timed, "scatter_sum", part)
    y = row_product(x.exp(), weight, torch.zeros(OUT, dtype=x.dtype), tp, again=made)
    clock()
    y.sum().backward()
    order = ["begin gather", "make", "wait gather", "product", "weight_gradient"]
    assert CLOCK.events == order and CLOCK.now == 1.0 + 2 * 1.5
    ones = torch.ones(1, T, OUT, dtype=torch.float64)
    assert torch.equal(weight.grad, (ones.flatten(0, 1).T @ x.detach().exp().flatten(0, 1)))
    assert torch.equal(x.grad, ones @ weight.detach() * x.detach().exp())


@pytest.mark.parametrize("sp", [False, True])
def test_messages_travel_beside_products(sp, clock):
    """The longer of both, not their sum: two products take 3 s, and their messages 2 s."""
    tp = TensorParallel(Timed("tp", 1, 2), sp)
    x, weight, bias, dy = tensors(1, tp, torch.float64)
    y = column_product(x.requires_grad_(), weight.requires_grad_(), bias, torch.Size((B, T)), tp)
    clock()
    y.backward(dy)
    if sp:
        order = ["begin gather", "product", "begin part", "wait gather", "weight_gradient"]
        assert CLOCK.events == [*order, "wait part"] and CLOCK.now == 3.0
    else:
        assert CLOCK.events == ["product", "begin sum", "weight_gradient", "wait sum"]
        assert CLOCK.now == 3.5  # the sum is longer than the product beside it


def test_deferred_gradients_gather_ahead():
    tp = TensorParallel(Timed("tp", 1, 2), sp=True)
    x, weight, bias, dy = tensors(1, tp, torch.float64)
    total = torch.zeros_like(weight)
    add = total.add_
    total.add_ = lambda product: (CLOCK.spend("product", 1.5), add(product))
    weight.requires_grad_().main_grad = lambda: total
    deferred = Deferred()
    deferred.key = "W"
    for _ in range(3):
        y = column_product(x.requires_grad_(), weight, bias, torch.Size((B, T)), tp, deferred)
        y.backward(dy)
    CLOCK.__init__()
    Message.free = 0.0
    deferred.run("W")
    ahead = ["wait gather", "begin gather", "product"]
    assert CLOCK.events == ["begin gather", *ahead, *ahead, "wait gather", "product"]
    assert CLOCK.now == 1.0 + 3 * 1.5


def test_a_layer_that_is_computed_again_stops_before_its_last_sum(tiny_config, monkeypatch):
    sums, config = [], tiny_config.model

    def scatter_sum(self, x, tag):
        sums.append(x.shape)
        return x[: len(x) // self.size].clone()

    monkeypatch.setattr(Timed, "scatter_sum", scatter_sum)
    begin = lambda self, x, tag: Message(CLOCK, "part", 0.0)  # noqa: E731
    monkeypatch.setattr(Timed, "begin_scatter_sum_", begin)
    tp = TensorParallel(Timed("tp", 0, 2), sp=True)
    model = build_model(config, dtype=torch.float64, recompute="full", tp=tp)
    tokens = torch.arange(40).view(2, 20)
    loss = model(tokens, tokens, reduction="sum")
    assert len(sums) == 1 + 2 * config.num_layers  # of the embedding, and two a layer
    sums.clear()
    loss.backward()
    # One a layer again, and that behind the head's gradient.
    assert len(sums) == config.num_layers + 1
