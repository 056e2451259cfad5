"""cross_entropy against F.cross_entropy and autograd in float64, on float64 copies of the logits.

Tolerance: testing.assert_close_to_reference; the peer is F.cross_entropy of fp32 copies, as
trainers write it. Where Triton runs: grid.py. Not covered: the assertion with which torch answers a
target that is no class on a GPU.
"""

import sys

import grid
import pytest
import torch
import torch.nn.functional as F
from grid import TRITON, generator, levels

from stellarator_kernels import cost, cross_entropy, extension
from stellarator_kernels.cross_entropy import (
    _cross_entropy_backward,
    _cross_entropy_forward,
    forward_cpu,
    forward_torch,
    launch_forward,
    tiles,
)
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

IMPLS, KERNELS = [grid.CPU, *grid.IMPLS], [grid.CPU, *grid.KERNELS]
IMPLS_ON_CPU = [grid.CPU, *grid.IMPLS_ON_CPU]
CASES = [
    pytest.param("cpu", dtype, marks=grid.EXTENSION) for dtype in (torch.bfloat16, torch.float32)
] + grid.CASES


SHAPES = {
    "one_class": (2, 1),
    "odd": (7, 13),
    "one_row": (1, 420),
    "two_blocks_and_a_rest": (3, 2 * 4096 + 5),
    "starcoder": (2, 49152),
}


def make(N, V, dtype, ignored=True):
    """logits (N, V), targets with every third ignored, dloss (N,)."""
    g = generator(N + V)
    logits = (3 * torch.randn(N, V, generator=g)).to(dtype)
    targets = torch.randint(0, V, (N,), generator=g)
    if ignored:
        targets[1::3] = -100
    return logits, targets, torch.randn(N, generator=g)


def eager(logits, targets, ignore_index, z_loss):
    """Losses of fp32 (or fp64) logits by torch alone."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(x, targets, ignore_index=ignore_index, reduction="none")
    penalty = z_loss * torch.logsumexp(x, 1).square()
    return loss + torch.where(targets == ignore_index, 0.0, penalty)


def run(function, logits, dloss):
    """Losses and dlogits."""
    logits = logits.detach().requires_grad_()
    loss = function(logits)
    return loss.detach(), torch.autograd.grad(loss, logits, dloss.to(loss.dtype))[0]


def compare(impl, logits, targets, dloss, ignore_index=-100, z_loss=0.0):
    """Losses and gradient of one case against float64."""
    options = {"ignore_index": ignore_index, "z_loss": z_loss}
    before = logits.clone()
    with poison_empty():
        actual = run(lambda x: cross_entropy(x, targets, impl=impl, **options), logits, dloss)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num()), "the logits were overwritten"
    exact = run(lambda x: eager(x, targets, **options), logits.double(), dloss)
    peer = run(lambda x: eager(x, targets, **options), logits, dloss)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == logits.dtype
    for name, a, e, p in zip(("loss", "dlogits"), actual, exact, peer, strict=True):
        length = logits.shape[1] if name == "loss" else 1
        assert_close_to_reference(a, e, p, reduction_length=length, name=name)
    return actual


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_losses_and_gradient(impl, dtype, shape):
    compare(impl, *make(*SHAPES[shape], dtype), z_loss=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_z_loss_and_with_a_class_as_ignore_index(impl):
    logits, targets, dloss = make(9, 12, torch.float32, ignored=False)
    compare(impl, logits, targets, dloss)
    targets[:3] = 5
    loss, dlogits = compare(impl, logits, targets, dloss, ignore_index=5)
    assert not loss[:3].any() and not dlogits[:3].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_are_zero_whatever_they_hold(impl):
    logits, targets, dloss = make(4, 30, torch.float32)
    logits[1] = torch.tensor([float("nan"), float("inf"), -float("inf")] * 10)
    loss, dlogits = run(lambda x: cross_entropy(x, targets, z_loss=0.1, impl=impl), logits, dloss)
    assert targets[1] == -100 and loss[1] == 0 and not dlogits[1].any()
    assert torch.isfinite(loss).all() and torch.isfinite(dlogits).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_and_masked_classes(impl):
    logits, targets, dloss = make(5, 5000, torch.float32, ignored=False)
    logits[0] += 3e4  # exp overflows without the maximum
    logits[1] -= 3e4
    logits[2, :4500] = -float("inf")  # a whole block of classes switched off
    targets[2] = 4600
    loss, dlogits = run(lambda x: cross_entropy(x, targets, impl=impl), logits, dloss)
    exact_loss, exact = run(lambda x: eager(x, targets, -100, 0.0), logits.double(), dloss)
    assert_close_to_reference(loss, exact_loss, reduction_length=5000)
    # The backward knows the largest logit and the sum by lse alone, which is rounded at 3e4.
    allowed = exact.abs().amax(1) * 2**-23 * torch.logsumexp(logits.double(), 1).abs() + 1e-7
    assert ((dlogits - exact).abs().amax(1) <= allowed).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["columns", "every_other", "transposed", "every_other_row"])
def test_strided_logits_and_targets(impl, layout):
    torch.manual_seed(0)
    logits = {
        "columns": torch.randn(6, 40)[:, 3:23],
        "every_other": torch.randn(6, 40)[:, ::2],
        "transposed": torch.randn(20, 6).t(),
        "every_other_row": torch.randn(12, 20)[::2],
    }[layout]
    targets = torch.randint(0, 20, (12,))[::2]
    compare(impl, logits, targets, torch.ones(()).expand(6))
    compare(impl, logits, targets, torch.randn(12)[::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_of_rows_join(monkeypatch, dtype):
    monkeypatch.setattr(sys.modules["stellarator_kernels.cross_entropy"], "_BLOCK_ELEMENTS", 50)
    compare("torch", *make(11, 20, dtype), z_loss=1e-2)


IN_PLACE = [
    *((forward_torch, dtype) for dtype in (torch.float16, torch.float32)),
    *(pytest.param(launch_forward, x, marks=TRITON) for x in (torch.float16, torch.float32)),
    *(pytest.param(forward_cpu, x, marks=grid.EXTENSION) for x in (torch.bfloat16, torch.float32)),
]


@pytest.mark.parametrize(("launch", "dtype"), IN_PLACE)
def test_the_gradient_written_in_place_of_the_logits(dtype, launch):
    logits, targets, dloss = make(4, 5000, dtype)
    exact_loss, exact = run(lambda x: eager(x, targets, -100, 0.1), logits.double(), dloss)
    _, peer = run(lambda x: eager(x, targets, -100, 0.1), logits, dloss)
    loss, _ = launch(logits, targets, dloss, -100, 0.1)
    assert_close_to_reference(loss, exact_loss, reduction_length=5000)
    assert_close_to_reference(logits, exact, peer)


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(launch_forward, marks=TRITON),
        forward_torch,
        pytest.param(forward_cpu, marks=grid.EXTENSION),
    ],
)
def test_the_gradient_in_place_of_large_logits_keeps_its_digits(launch):
    # Unlike the backward, which has only lse, this knows the largest logit and the sum.
    logits, targets, dloss = make(6, 1000, torch.float32, ignored=False)
    logits += 3e4
    _, exact = run(lambda x: eager(x, targets, -100, 0.0), logits.double(), dloss)
    launch(logits, targets, dloss, -100, 0.0)
    assert (logits - exact).abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    logits = torch.zeros(0, 8, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.int64), impl=impl)
    assert loss.shape == (0,)
    assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 8)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl):
    logits, targets, _ = make(5, 7, torch.float64)

    def function(x):
        return cross_entropy(x, targets, z_loss=0.1, impl=impl)

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


def test_opcheck():
    logits, targets, dloss = make(4, 8, torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(_cross_entropy_forward, (leaf, targets, -100, 0.1, "torch"))
    lse = torch.logsumexp(logits.float(), 1)
    arguments = (dloss, logits, targets, lse, -100, 0.1, "torch")
    torch.library.opcheck(_cross_entropy_backward, arguments)


@pytest.mark.parametrize("impl", KERNELS)
def test_compiled_in_one_graph(impl):
    logits, targets, dloss = make(6, 32, torch.float32)

    def function(x):
        return cross_entropy(x, targets, z_loss=0.1, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = (run(f, logits, dloss) for f in (function, compiled))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_tiles():
    assert [tiles(V) for V in (1, 420, 16384, 49152)] == [(1, 1), (512, 1), (4096, 8), (4096, 8)]


@pytest.mark.parametrize("impl", IMPLS_ON_CPU)  # elsewhere looking would wait for the device
@pytest.mark.parametrize("target", [8, -1, -101])
def test_a_target_that_is_no_class(impl, target):
    targets = torch.tensor([0, target, -100])
    message = rf"^cross_entropy: expected targets in \[0, 8\) or -100, got {target}\. "
    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.zeros(3, 8), targets, impl=impl)


@TRITON
def test_the_kernel_gives_nan_for_a_target_that_is_no_class():
    # As on a GPU, where the check of the values is left out.
    targets = torch.tensor([0, 8, -1, -100])
    loss, _ = launch_forward(torch.zeros(4, 8), targets, None, -100, 0.0)
    assert torch.isnan(loss).tolist() == [False, True, True, False]


def test_cost():
    # StarCoder2, 8192 tokens, bf16 logits, at 4.3 TB/s.
    found = cost.cross_entropy(8192, 49152, 2)
    assert abs(found.forward_bytes / 4.3e6 - 187) < 1
    assert abs(found.backward_bytes / 4.3e6 - 375) < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 8)}, r"logits \(N, V\) with V >= 1, got \(2, 3, 8\)"),
        ({"logits": torch.zeros(3, 0)}, r"expected logits \(N, V\) with V >= 1, got \(3, 0\)"),
        ({"logits": torch.zeros(3, 8, dtype=torch.int64)}, "expected logits with dtype in"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets \(N,\) = \(3,\), got \(4,\)"),
        ({"targets": torch.zeros(3)}, "expected targets with dtype in .*int64.*float32"),
        ({"logits": torch.zeros(3, 8, device="meta")}, "expected all tensors on one device"),
    ],
    ids=str,
)
def test_messages(change, message):
    arguments = {
        "logits": torch.zeros(3, 8),
        "targets": torch.zeros(3, dtype=torch.int64),
    } | change
    with pytest.raises(ValueError, match="^cross_entropy: .*" + message):
        cross_entropy(**arguments)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("V", [1, 37, 64, 1000])
def test_cpu_on_every_instruction_set(V, dtype, level, monkeypatch):
    monkeypatch.setenv(extension.ISA_VARIABLE, level)
    compare("cpu", *make(5, V, dtype), z_loss=1e-2)


@grid.EXTENSION
def test_cpu_has_the_same_bits_with_any_number_of_threads():
    logits, targets, dloss = make(600, 1000, torch.bfloat16)  # several tasks
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(lambda x: cross_entropy(x, targets, impl="cpu"), logits, dloss))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
