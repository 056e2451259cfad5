"""linear_cross_entropy against F.linear + F.cross_entropy and autograd in float64.

Tolerance: testing.assert_close_to_reference; the peer is the eager code in the tested dtype with
fp32 losses. Where Triton runs: grid.py. Memory is measured on the CPU with torch's profiler, which
sees every allocation of ATen. Not covered: memory on a GPU and the waiting there for the count.
"""

import sys

import grid
import pytest
import torch
import torch.nn.functional as F
from grid import INTERPRETED, TRITON, generator
from torch.profiler import ProfilerActivity, profile

from stellarator_kernels import cost, linear_cross_entropy
from stellarator_kernels.linear_cross_entropy import (
    _linear_cross_entropy_backward,
    _linear_cross_entropy_forward,
    _times,
    chunk_rows,
    counted,
)
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

IMPLS, KERNELS = [grid.CPU, *grid.IMPLS], [grid.CPU, *grid.KERNELS]
IMPLS_ON_CPU = [grid.CPU, *grid.IMPLS_ON_CPU]
CASES = [
    pytest.param("cpu", dtype, marks=grid.EXTENSION) for dtype in (torch.bfloat16, torch.float32)
] + grid.CASES


SHAPES = {
    "one_token": (1, 8, 5),
    "odd": (7, 13, 11),
    "wide": (20, 24, 300),
    "vocabulary_of_the_demo": (12, 16, 4099),
}
REDUCTIONS = ["mean", "sum", "none"]


def make(N, C, V, dtype, bias=True, ignored=True):
    """hidden, weight, bias, targets with every third ignored, dloss (N,)."""
    g = generator(N + C + V)
    hidden, weight = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g) / C**0.5
    targets = torch.randint(0, V, (N,), generator=g)
    if ignored:
        targets[1::3] = -100
    b = torch.randn(V, generator=g).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), b, targets, torch.randn(N, generator=g)


def eager(hidden, weight, bias, targets, reduction, z_loss):
    """What a model would write without this package."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    valid = targets != -100
    losses = F.cross_entropy(logits, targets, reduction="none")
    losses = losses + torch.where(valid, z_loss * torch.logsumexp(logits, 1).square(), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / valid.sum()


def run(function, hidden, weight, bias, dloss):
    """The loss and the gradients of hidden, weight and bias (if there is one)."""
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    loss = function(*leaves, *([None] if bias is None else []))
    dloss = dloss if loss.dim() else dloss.flatten()[0].abs() + 0.5
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))]


def compare(impl, reduction, hidden, weight, bias, targets, dloss, z_loss=0.0, chunk_size=None):
    """Loss and gradients of one case against float64."""

    def ours(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, targets, bias, z_loss=z_loss, reduction=reduction,
            chunk_size=chunk_size, impl=impl,
        )  # fmt: skip

    def theirs(hidden, weight, bias):
        return eager(hidden, weight, bias, targets, reduction, z_loss)

    with poison_empty():
        actual = run(ours, hidden, weight, bias, dloss)
    peer = run(theirs, hidden, weight, bias, dloss)
    wide = [None if t is None else t.double() for t in (hidden, weight, bias)]
    exact = run(theirs, *wide, dloss)
    assert actual[0].dtype == torch.float32
    lengths = {"loss": weight.shape[0], "dhidden": weight.shape[0]}
    names = ("loss", "dhidden", "dweight", "dbias")
    for name, a, e, p in zip(names, actual, exact, peer, strict=False):
        assert name == "loss" or (a.dtype == hidden.dtype and a.is_contiguous()), name
        length = lengths.get(name, hidden.shape[0])
        assert_close_to_reference(a, e, p, reduction_length=length, name=name)
    return actual


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_loss_and_every_gradient(impl, dtype, shape, reduction):
    compare(impl, reduction, *make(*SHAPES[shape], dtype), z_loss=1e-2, chunk_size=5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_without_bias_without_ignored_tokens_in_one_chunk(impl, reduction):
    compare(impl, reduction, *make(9, 8, 20, torch.float32, bias=False, ignored=False))


@pytest.mark.parametrize("chunk_size", [1, 4, 6, 7, 100])
def test_every_chunk_size_gives_the_same(chunk_size):
    arguments = make(9, 8, 20, torch.bfloat16)
    compare("torch", "mean", *arguments, chunk_size=chunk_size)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_all_tokens_ignored(impl, reduction):
    hidden, weight, bias, targets, dloss = make(4, 8, 10, torch.float32)
    targets[:] = -100

    def function(*leaves):
        return linear_cross_entropy(
            leaves[0], leaves[1], targets, leaves[2], reduction=reduction, impl=impl
        )

    for result in run(function, hidden, weight, bias, dloss):
        assert not result.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl):
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.zeros(5, 8, requires_grad=True)
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(
            hidden, weight, torch.zeros(0, dtype=torch.int64), reduction=reduction, impl=impl
        )
        dhidden, dweight = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert dhidden.shape == (0, 8) and not dweight.any() and loss.sum() == 0


@pytest.mark.parametrize("impl", KERNELS)  # the formula multiplies by zero
def test_ignored_tokens_may_hold_anything(impl):
    hidden, weight, bias, targets, dloss = make(6, 8, 10, torch.float32)
    hidden[1] = float("nan")
    hidden[4] = float("inf")

    def function(*leaves):
        return linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2], impl=impl)

    results = run(function, hidden, weight, bias, dloss)
    assert all(torch.isfinite(r).all() for r in results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen, reduction):
    hidden, weight, bias, targets, dloss = make(7, 8, 10, torch.float32)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    wanted = [t.requires_grad_() for name, t in leaves.items() if name != frozen]
    for wide in (False, True):
        loss = (
            eager(hidden.double(), weight.double(), bias.double(), targets, reduction, 0.0)
            if wide
            else linear_cross_entropy(**leaves, targets=targets, reduction=reduction, chunk_size=2)
        )
        gradients = torch.autograd.grad(loss.sum(), wanted)
        if not wide:
            actual = gradients
    for a, e in zip(actual, gradients, strict=True):
        assert_close_to_reference(a, e.double(), reduction_length=10)
    assert leaves[frozen].grad is None


def test_gradients_are_computed_in_the_forward_only_when_wanted():
    hidden, weight, _, targets, _ = make(8, 8, 10, torch.float32)
    hidden.requires_grad_()

    def products(**options):
        events, _ = record(lambda: linear_cross_entropy(hidden, weight, targets, **options))
        return sum(name in ("aten::mm", "aten::addmm") for name in events)

    assert products() == 2  # logits and dhidden; weight is frozen
    assert products(reduction="none") == 1
    with torch.no_grad():
        assert products() == 1


def record(function):
    """Names of the operators that run in `function`, and the bytes of each (de)allocation."""
    # The profiler, because a TorchDispatchMode does not see inside a custom operator.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    memory = [event.nbytes() for event in events if event.name() == "[memory]"]
    return [event.name() for event in events], memory


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=INTERPRETED)])
def test_the_logits_are_never_whole(impl, reduction):
    N, C, V, rows = 64, 4, 96, 16
    hidden, weight, bias, targets, dloss = make(N, C, V, torch.float32, ignored=False)

    def function(*leaves):
        return linear_cross_entropy(
            leaves[0], leaves[1], targets, leaves[2],
            reduction=reduction, chunk_size=rows, impl=impl,
        )  # fmt: skip

    def plain(*leaves):
        return eager(*leaves, targets, reduction, 0.0)

    def largest_bytes(f):
        return max(record(lambda: run(f, hidden, weight, bias, dloss))[1])

    assert largest_bytes(function) == rows * V * 4
    assert largest_bytes(plain) == N * V * 4


def peak_bytes(function) -> int:
    """Most bytes that lie allocated at one time during `function`, beyond those before it."""
    present = peak = 0
    for size in record(function)[1]:
        present += size
        peak = max(peak, present)
    return peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peak_memory_is_a_chunk_of_logits_and_the_gradients(dtype):
    N, C, V, rows = 1024, 32, 2048, 128
    hidden, weight, _, targets, _ = make(N, C, V, dtype, bias=False, ignored=False)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    size = hidden.element_size()
    step = lambda: linear_cross_entropy(hidden, weight, targets, chunk_size=rows)  # noqa: E731
    step()
    allowed = rows * V * size + (N + V) * C * size  # logits of a chunk, dhidden, dweight
    if dtype == torch.bfloat16:
        # The fp32 sum of dweight, and the fp32 copy of a block of logits.
        allowed += V * C * 4 + rows * V * 4
    assert peak_bytes(step) <= allowed + N * 64
    assert peak_bytes(lambda: eager(hidden, weight, None, targets, "mean", 0.0)) > 2 * allowed


def test_the_weight_gradient_is_summed_in_fp32():
    # 300 chunks, each of which adds less than half a unit in the last place of a bf16 sum.
    N, V = 300, 2
    hidden, weight = torch.ones(N, 1).bfloat16(), torch.zeros(V, 1).bfloat16().requires_grad_()
    targets = torch.zeros(N, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", chunk_size=1)
    (dweight,) = torch.autograd.grad(loss, weight)
    assert dweight.tolist() == [[-150.0], [150.0]]
    # In bf16 the sum stops growing at 128 or rounds at every step beyond it.
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(N):
        total += 0.5
    assert total != 150


def test_the_incoming_gradient_is_not_rounded_to_16_bits():
    gradient = torch.linspace(1, 2, 129).bfloat16()
    dloss = torch.tensor(1 / 3)
    wanted = (gradient.float() * dloss).bfloat16()
    assert torch.equal(_times(gradient, dloss), wanted)
    assert not torch.equal((gradient.float() * dloss.bfloat16()).bfloat16(), wanted)


def test_the_backward_allocates_the_gradients_and_nothing_else():
    hidden, weight, _, targets, _ = make(16, 32, 200, torch.float32)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    _, sizes = record(lambda: torch.autograd.grad(loss, (hidden, weight), retain_graph=True))
    # Autograd would also make zeros like dhidden and dweight, which are outputs of the operator.
    assert sum(size for size in sizes if size > 0) <= (16 + 200) * 32 * 4 + 1024


def test_twice_through_the_same_graph():
    hidden, weight, _, targets, _ = make(6, 8, 10, torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, 2 * b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strided_inputs(impl, reduction):
    torch.manual_seed(0)
    hidden, weight = torch.randn(18, 7)[::2, :6], torch.randn(6, 20).t()
    targets = torch.randint(0, 20, (18,))[::2]
    bias, dloss = torch.randn(40)[::2], torch.randn(18)[::2]
    compare(impl, reduction, hidden, weight, bias, targets, dloss, chunk_size=4)
    compare(impl, reduction, hidden, weight, bias, targets, torch.ones(()).expand(9))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl, reduction):
    hidden, weight, bias, targets, _ = make(5, 3, 6, torch.float64)

    def function(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, targets, bias, z_loss=0.1, reduction=reduction, chunk_size=2, impl=impl
        )

    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    hidden, weight, bias, targets, dloss = make(5, 4, 8, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    needs = [reduction != "none"] * 3
    arguments = (*leaves, targets, None, -100, 0.1, reduction, 2, *needs, "torch")
    torch.library.opcheck(_linear_cross_entropy_forward, arguments)
    for need_weight, wide in ((False, False), (True, False), (True, True)):
        need = (True, need_weight, True, wide)
        arguments = (dloss, hidden, weight, bias, targets, -100, 0.1, 2, *need, "torch")
        torch.library.opcheck(_linear_cross_entropy_backward, arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_the_weight_gradient_added_to_memory_of_the_caller(impl, dtype, reduction):
    """Twice, as of two micro-batches; against float64, and the peer is eager code in fp32."""
    hidden, weight, bias, targets, dloss = make(12, 8, 20, dtype)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    before = torch.randn(20, 8, generator=generator(8))
    dweight = before.clone()
    factor = dloss if reduction == "none" else dloss[0].abs() + 0.5  # as in `run`
    for _ in range(2):
        loss = linear_cross_entropy(
            hidden, weight, targets, bias, z_loss=0.1, reduction=reduction, dweight=dweight,
            chunk_size=5, impl=impl,
        )  # fmt: skip
        dhidden, none, dbias = torch.autograd.grad(loss, leaves, factor, allow_unused=True)
        assert none is None and dhidden.dtype == dbias.dtype == dtype
    theirs = lambda *x: eager(*x, targets, reduction, 0.1)  # noqa: E731
    exact = run(theirs, *(t.double() for t in (hidden, weight, bias)), dloss)
    peer = run(theirs, hidden, weight, bias, dloss)
    wanted = before.double() + 2 * exact[2]
    allowed = before.double() + 2 * peer[2].double()
    assert dweight.dtype == torch.float32
    assert_close_to_reference(dweight, wanted, allowed, reduction_length=24)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("chunk_size", [1, None])
def test_memory_of_the_caller_gets_digits_that_bf16_has_not(chunk_size, reduction):
    """301 halves are 150.5, which bf16 rounds to 150 or 151."""
    hidden, weight = torch.ones(301, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    targets, total = torch.zeros(301, dtype=torch.int64), torch.zeros(2, 1)
    targets[300] = -100
    for tokens in (slice(0, 300), slice(299, 301)):
        linear_cross_entropy(
            hidden[tokens], weight, targets[tokens], reduction=reduction, dweight=total,
            chunk_size=chunk_size,
        ).sum().backward()  # fmt: skip
    assert total.tolist() == [[-150.5], [150.5]]
    total.zero_()
    targets[300] = 0
    linear_cross_entropy(
        hidden, weight, targets, reduction=reduction, dweight=total, chunk_size=1
    ).sum().backward()
    assert total.tolist() == [[-150.5], [150.5]]


def test_a_tied_embedding_adds_to_the_same_memory():
    """In bf16, as the engine's hook adds what autograd has of the other uses of the weight.

    512 steps in which both gradients are far below the last place of a bf16 sum of them.
    """
    weight = torch.zeros(2, 1).bfloat16().requires_grad_()
    total = torch.zeros(2, 1)

    def add(p):
        total.add_(p.grad)
        p.grad = None

    weight.register_post_accumulate_grad_hook(add)
    for _ in range(512):
        hidden = F.embedding(torch.tensor([0]), weight) + 1
        loss = linear_cross_entropy(hidden, weight, torch.tensor([1]), dweight=total)
        (loss + hidden.sum() * 2**-9).backward()
    # d/dhidden = (p0 - 1/2, ...) of equal rows is 0, so the embedding gets 2^-9 alone.
    assert total.tolist() == [[512 * (0.5 + 2**-9)], [-256.0]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_tokens_take_part_in_no_product(monkeypatch, reduction):
    """1,000 tokens of which 200 count: 256 rows, a multiple of the granule, go through products."""
    hidden, weight, _, targets, dloss = make(1000, 4, 8, torch.float32, bias=False, ignored=False)
    targets[200:] = -100
    shapes, real = [], torch.mm

    def counting(left, right, **kwargs):
        shapes.append((*left.shape, right.shape[1]))
        return real(left, right, **kwargs)

    monkeypatch.setattr(torch, "mm", counting)
    ours = lambda h, w, b: linear_cross_entropy(  # noqa: E731
        h, w, targets, reduction=reduction, chunk_size=100, impl="torch"
    )
    run(ours, hidden, weight, None, dloss)
    computed = 2 if reduction == "none" else 1  # the logits, again in the backward
    assert sum(n for n, k, m in shapes if (k, m) == (4, 8)) == 256 * computed
    assert sum(n for n, k, m in shapes if (k, m) == (8, 4)) == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(dtype, reduction):
    """Products in autocast's dtype, the loss in fp32, gradients in the dtypes of the inputs."""
    hidden, weight, bias, targets, dloss = make(9, 8, 20, torch.float32)
    hidden = hidden.to(dtype)
    kind = torch.get_default_device().type

    def ours(h, w, b):
        with torch.autocast(kind, dtype=torch.bfloat16):
            return linear_cross_entropy(h, w, targets, b, reduction=reduction)

    def cast(h, w, b):
        bf16 = (x.bfloat16() for x in (h, w, b))
        h, w, b = bf16
        return linear_cross_entropy(h, w, targets, b, reduction=reduction)

    actual, wanted = (run(f, hidden, weight, bias, dloss) for f in (ours, cast))
    assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
    assert [x.dtype for x in actual] == [torch.float32, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", KERNELS)
def test_compiled_in_one_graph_with_the_memory_of_the_caller(impl, reduction):
    hidden, weight, bias, targets, dloss = make(6, 8, 10, torch.float32)

    def function(hidden, weight, bias, dweight):
        return linear_cross_entropy(
            hidden, weight, targets, bias, reduction=reduction, dweight=dweight, chunk_size=2,
            impl=impl,
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = []
    for f in (function, compiled):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        total = torch.ones(10, 8)
        f(*leaves, total).backward(dloss if reduction == "none" else dloss[0])
        assert leaves[1].grad is None
        found.append((total, leaves[0].grad, leaves[2].grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not (found[0][0] == 1).any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", KERNELS)
def test_compiled_in_one_graph(impl, reduction):
    hidden, weight, bias, targets, dloss = make(6, 8, 10, torch.float32)

    def function(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, targets, bias, reduction=reduction, chunk_size=2, impl=impl
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = (run(f, hidden, weight, bias, dloss) for f in (function, compiled))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_like_the_function_of_torch():
    hidden, weight, bias, targets, dloss = make(9, 8, 20, torch.float32)
    theirs = run(
        lambda h, w, b: F.linear_cross_entropy(h, w, targets, linear_bias=b),
        hidden, weight, bias, dloss,
    )  # fmt: skip
    ours = run(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, chunk_size=4),
        hidden, weight, bias, dloss,
    )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        assert_close_to_reference(a, b.double(), reduction_length=20)


def test_chunk_rows():
    assert chunk_rows(0, 384, 16384, 2) == 1
    assert chunk_rows(100, 384, 420, 2) == 100
    # The demo: 64 MiB of bf16 logits are 2048 tokens. One token more: five even chunks, not a rest.
    assert chunk_rows(8192, 384, 16384, 2) == 2048
    assert chunk_rows(8193, 384, 16384, 2) == 1664
    # StarCoder2-3B and 15B: no more logits than gradients.
    assert chunk_rows(8192, 3072, 49152, 2) == 2816
    assert chunk_rows(16384, 6144, 49152, 2) == 8192
    for N, C, V, size in [(7, 64, 10**6, 4), (10**6, 1, 10**6, 2), (5000, 4608, 49152, 4)]:
        rows = chunk_rows(N, C, V, size)
        budget = max(64 << 20, (N + V) * C * size)
        assert 1 <= rows <= N
        assert rows * V * size <= budget or rows == min(N, 128)


@pytest.mark.parametrize("impl", IMPLS_ON_CPU)  # elsewhere looking would wait for the device
def test_a_target_that_is_no_class(impl):
    hidden, weight, _, targets, _ = make(4, 8, 10, torch.float32)
    targets[2] = 10
    message = r"^linear_cross_entropy: expected targets in \[0, 10\) or -100, got 10\. "
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets, impl=impl)


@TRITON
def test_the_kernel_gives_nan_for_a_target_that_is_no_class(monkeypatch):
    # As on a GPU, where the check of the values is left out; -1 is a usual mistake for -100.
    module = sys.modules["stellarator_kernels.linear_cross_entropy"]
    monkeypatch.setattr(module, "check_targets", lambda *_: None)
    targets = torch.tensor([0, -1, -100, 8])
    for reduction, wanted in (("none", [False, True, False, True]), ("mean", True)):
        loss = linear_cross_entropy(
            torch.ones(4, 2), torch.ones(8, 2), targets, reduction=reduction, impl="triton"
        )
        assert torch.isnan(loss).tolist() == wanted


def test_cost():
    # StarCoder2-3B, 8192 tokens, at 790 TFLOP/s: 3.13 ms forward, 9.40 ms in all.
    found = cost.linear_cross_entropy(8192, 3072, 49152, 2, chunks=3)
    assert abs(found.forward_flops / 790e9 - 3.13) < 0.01
    assert abs((found.forward_flops + found.backward_flops) / 790e9 - 9.40) < 0.01
    assert found.forward_bytes == 2 * (8192 * 3072 + 3 * 49152 * 3072 + 2 * 8192 * 49152)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"expected hidden \(N, C\), got \(2, 3, 4\)"),
        ({"weight": torch.zeros(4, 8)}, r"weight \(V, C\) with C = 4 and V >= 1, got \(4, 8\)"),
        ({"weight": torch.zeros(0, 4)}, r"weight \(V, C\) with C = 4 and V >= 1, got \(0, 4\)"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets \(N,\) = \(3,\), got \(2,\)"),
        ({"targets": torch.zeros(3)}, "expected targets with dtype in"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int8)}, "expected hidden with dtype in"),
        ({"weight": torch.zeros(8, 4).half()}, "expected weight with dtype in .*float32.*float16"),
        ({"bias": torch.zeros(4)}, r"expected bias \(V,\) = \(8,\), got \(4,\)"),
        ({"bias": torch.zeros(8).half()}, "expected bias with dtype in"),
        ({"weight": torch.zeros(8, 4, device="meta")}, "expected all tensors on one device"),
        ({"dweight": torch.zeros(4, 8)}, r"dweight like weight = \(8, 4\), got \(4, 8\)"),
        ({"dweight": torch.zeros(8, 4).half()}, "expected dweight with dtype in"),
        ({"dweight": torch.zeros(8, 4, device="meta")}, "expected all tensors on one device"),
        ({"reduction": "average"}, r"reduction in \('mean', 'sum', 'none'\), got 'average'"),
        ({"chunk_size": 0}, "expected chunk_size >= 1 or None, got 0"),
    ],
    ids=str,
)
def test_messages(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(8, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    } | change
    with pytest.raises(ValueError, match="^linear_cross_entropy: .*" + message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("N", "count", "K"),
    [(1000, 1000, 1000), (1000, 600, 768), (1000, 999, 1000), (300, 0, 0), (40, 3, 40)],
)
def test_few_sizes_of_products(N, count, K):
    """The rows of the products are a multiple of 256 or N; all that count come first, once each."""
    targets = torch.full((N,), -100)
    chosen = torch.randperm(N, generator=generator(count))[:count].sort()[0]
    targets[chosen] = 5
    kept, found = counted(targets, -100)
    assert found == count and kept.numel() == K
    assert torch.equal(kept[:count], chosen) and kept.unique().numel() == K


def test_backward_twice_and_a_changed_gradient_cpu():
    """With a factor of 1 the saved gradient itself goes out."""
    g = generator(3)
    hidden = torch.randn(6, 8, generator=g).requires_grad_()
    weight = torch.randn(11, 8, generator=g).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.arange(6))
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    expected = first.clone()
    (scaled,) = torch.autograd.grad(3 * loss, weight, retain_graph=True)
    torch.testing.assert_close(scaled, 3 * expected)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(weight.grad, times * expected)
    first.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
