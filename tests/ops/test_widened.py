"""Products of 16-bit operands in fp32, where the CPU has no instructions for them.

The instruction set is forced to the least, so a CPU that has them takes the same path. Products of
16-bit numbers are exact in fp32, so a float64 product and the bounds of fp32's sums and of one
rounding are all that the tolerances need.
"""

import pytest
import torch
import torch.nn.functional as F
from grid import EXTENSION, generator

from stellarator_kernels import (
    extension,
    linear,
    linear_cross_entropy,
    linear_cross_entropy_gradients,
    linear_cross_entropy_statistics,
    widened,
)
from stellarator_kernels.memory import arena, reset_peak
from stellarator_kernels.testing import poison_empty

pytestmark = EXTENSION
SHAPES = {  # N, K, M
    "most_rows": (300, 40, 50),
    "most_columns": (50, 40, 300),
    "deepest": (40, 300, 50),
    "least": (16, 1, 16),
    "nothing_to_sum": (16, 0, 20),
}


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch):
    monkeypatch.setenv(extension.ISA_VARIABLE, "portable")
    if not widened.widens(torch.bfloat16, torch.device("cpu")):
        pytest.skip("for x86-64")


def matrix(rows, columns, layout, g):
    """bf16 numbers whose rows, columns or neither are dense."""
    if layout == "turned":
        return matrix(columns, rows, "dense", g).t()
    wide = torch.randn(rows, columns + 3, generator=g).bfloat16()
    return wide[:, 2 : columns + 2] if layout == "strided" else wide[:, :columns].contiguous()


def assert_rounded_once(out, exact, terms):
    """`terms`: the sum of the magnitudes that were added."""
    bound = exact.abs() * torch.finfo(out.dtype).eps / 2 + terms * 2**-24 * 20 + 1e-30
    assert ((out.double() - exact).abs() <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", ["dense", "turned", "strided"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elements", [1, 1 << 22])
def test_a_product_is_rounded_once(elements, shape, layout, with_bias, monkeypatch):
    """In one chunk and in several, to a dense and to a strided result."""
    monkeypatch.setattr(widened, "_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(widened, "_LEAST_CHUNK", 37)
    N, K, M = SHAPES[shape]
    g = generator(N + M)
    left, right = matrix(N, K, layout, g), matrix(K, M, layout, g)
    bias = torch.randn(M, generator=g).bfloat16() if with_bias else None
    added = torch.zeros(M) if bias is None else bias
    exact = left.double() @ right.double() + added.double()
    terms = left.double().abs() @ right.double().abs() + added.double().abs()
    for out in (torch.empty(N, M), torch.empty(M, N).t(), torch.empty(N, M + 5)[:, 2 : M + 2]):
        out = out.bfloat16()
        with poison_empty():
            assert widened.multiply(left, right, bias, out=out) is out
        assert_rounded_once(out, exact, terms)


def test_which_products_are_widened(monkeypatch):
    """By what the instruction set multiplies, whatever this machine has."""
    levels, cpu = extension.load().Isa.__members__, torch.device("cpu")
    few = {name for name in levels if name not in ("avx512_bf16", "amx")}
    assert few and few < set(levels)
    for name, isa in levels.items():
        monkeypatch.setattr(extension, "isa", lambda isa=isa: isa)
        assert widened.widens(torch.bfloat16, cpu) == (name in few)
        assert widened.widens(torch.float16, cpu) == (name != "amx")
        assert not widened.widens(torch.float32, cpu)
        assert not widened.widens(torch.bfloat16, torch.device("meta"))


def test_few_rows_are_multiplied_as_they_are(monkeypatch):
    """Tokens one by one: the weight is read once, as it is."""
    g = generator(3)
    x, weight = (torch.randn(*s, generator=g).bfloat16() for s in ((16, 64), (2048, 64)))
    seen, real = [], widened._multiply_widened
    monkeypatch.setattr(widened, "_multiply_widened", lambda *a: seen.append(a[0]) or real(*a))
    for rows in (15, 16):
        out = torch.empty(rows, 2048, dtype=torch.bfloat16)
        widened.multiply(x[:rows], weight.t(), out=out)
        assert_rounded_once(out, x[:rows].double() @ weight.double().t(), 64.0)
    assert [len(left) for left in seen] == [16]
    # And so of the loss, whose weight is the largest of all.
    found = []
    monkeypatch.setattr(widened, "operands", lambda *given: found.append(given) or given)
    for rows in (15, 16):
        linear_cross_entropy(x[:rows], weight, torch.zeros(rows, dtype=torch.int64))
    assert [len(given[0]) for given in found] == [16]


def test_operands_of_different_dtypes_are_refused():
    """As where nothing is widened."""
    left, right = torch.ones(20, 30).bfloat16(), torch.ones(30, 40)
    with pytest.raises(RuntimeError, match="dtype"):
        widened.multiply(left, right, out=torch.empty(20, 40).bfloat16())


def test_the_loss_is_compiled_in_one_graph():
    """With the default chunk, which depends on whether the products are widened."""
    g = generator(11)
    hidden, weight = (torch.randn(*s, generator=g).bfloat16() for s in ((32, 24), (40, 24)))
    targets = torch.randint(40, (32,), generator=g)

    def function(hidden, weight):
        shard = {"vocab_start": 0, "vocab_size": 40}
        statistics = linear_cross_entropy_statistics(hidden.detach(), weight, targets, **shard)
        return linear_cross_entropy(hidden, weight, targets), statistics

    found = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = hidden.clone().requires_grad_()
        loss, statistics = f(leaf, weight)
        loss.backward()
        found.append((loss.detach(), statistics, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(not arena()["reserved"], reason="the arena is off")
@pytest.mark.parametrize(
    ("shape", "wide"),
    [((9000, 512, 256), 512 * 256), ((256, 512, 9000), 512 * 256), ((256, 9000, 512), 256 * 512)],
)
def test_memory_is_the_small_operand_and_a_chunk(shape, wide):
    """In fp32 the large operand alone would take 18 MiB, the result or the other as much again."""
    N, K, M = shape
    left, right = torch.ones(N, K).bfloat16(), torch.ones(K, M).bfloat16()
    out = torch.empty(N, M, dtype=torch.bfloat16)
    reset_peak()
    before = arena()["used"]
    widened.multiply(left, right, out=out)
    most = 4 * (wide + widened._CHUNK_ELEMENTS)
    assert 0 < arena()["peak"] - before <= most + (1 << 16)
    assert (out == K).all()


def test_a_room_gets_an_unrounded_weight_gradient():
    """Twice, as two micro-batches; autograd hands on none, and dx is the product's."""
    N, K, M = 70, 48, 32
    g = generator(5)
    weight = torch.randn(M, K, generator=g).bfloat16().requires_grad_()
    total, exact, terms = torch.zeros(M, K), 0.0, 0.0
    for _ in range(2):
        x = torch.randn(N, K, generator=g).bfloat16().requires_grad_()
        dy = torch.randn(N, M, generator=g).bfloat16()
        linear(x, weight, room=lambda: total).backward(dy)
        exact += dy.double().t() @ x.detach().double()
        terms += dy.double().abs().t() @ x.detach().double().abs()
        dx, size = dy.double() @ weight.detach().double(), dy.double().abs() @ weight.double().abs()
        assert_rounded_once(x.grad, dx, size.detach())
    assert weight.grad is None
    assert_rounded_once(total, exact, terms)


def test_the_loss_rounds_its_results_only():
    """In three chunks of tokens; the logits of eager code, and the gradients of each, are bf16."""
    N, C, V = 96, 24, 40
    g = generator(7)
    given = [torch.randn(*s, generator=g).bfloat16() for s in ((N, C), (V, C), (V,))]
    targets = torch.randint(V, (N,), generator=g)
    leaves = [t.clone().requires_grad_() for t in given]
    total = torch.zeros(V, C)
    loss = linear_cross_entropy(*leaves[:2], targets, leaves[2], dweight=total, chunk_size=32)
    loss.backward()
    exact = [t.double().requires_grad_() for t in given]
    expected = F.cross_entropy(F.linear(*exact), targets)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(total.double(), exact[1].grad, rtol=1e-5, atol=1e-7)
    assert leaves[1].grad is None
    for leaf, wide in zip(leaves[::2], exact[::2], strict=True):
        assert_rounded_once(leaf.grad, wide.grad, wide.grad.abs().max())
    each = linear_cross_entropy(given[0], leaves[1], targets, reduction="none", chunk_size=32)
    each.sum().backward()
    wide = exact[1].detach().requires_grad_()
    F.cross_entropy(given[0].double() @ wide.t(), targets, reduction="sum").backward()
    assert_rounded_once(leaves[1].grad, wide.grad, wide.grad.abs().max())


def test_the_loss_of_a_shard_rounds_its_results_only():
    """All classes in one shard; statistics and gradients are unrounded, but for dhidden."""
    N, C, V = 96, 24, 40
    g = generator(9)
    hidden, weight, bias = (torch.randn(*s, generator=g).bfloat16() for s in ((N, C), (V, C), (V,)))
    targets = torch.randint(V, (N,), generator=g)
    shard = {"vocab_start": 0, "vocab_size": V, "chunk_size": 32}
    found = linear_cross_entropy_statistics(hidden, weight, targets, bias, **shard)
    exact = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    logits = F.linear(*exact)
    lse = logits.logsumexp(1)
    torch.testing.assert_close(
        (found[0] + found[1].log()).double(), lse.detach(), rtol=1e-6, atol=0
    )
    F.cross_entropy(logits, targets, reduction="sum").backward()
    dweight, dbias = torch.zeros(V, C), torch.zeros(V)
    shard |= {"dweight": dweight, "dbias": dbias}
    given = (torch.ones(N), hidden, weight, targets, lse.detach().float(), bias)
    dhidden, *_ = linear_cross_entropy_gradients(*given, **shard)
    for sums, wide in ((dweight, exact[1]), (dbias, exact[2])):
        torch.testing.assert_close(sums.double(), wide.grad, rtol=1e-5, atol=1e-5)
    assert_rounded_once(dhidden, exact[0].grad, exact[0].grad.abs().max())
