"""rms_norm against autograd in float64, on float64 copies of the inputs.

Tolerance: testing.assert_close_to_reference, with F.rms_norm in the tested dtype as the peer.
Where Triton runs: grid.py. Dropout in front of it: test_dropout.py.
"""

import pytest
import torch
import torch.nn.functional as F
from grid import CASES, TRITON, generator

from stellarator_kernels import cost, rms_norm
from stellarator_kernels.rms_norm import _rms_norm_backward, _rms_norm_forward
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

IMPLS = ["reference", pytest.param("triton", marks=TRITON)]
CASES = [case for case in CASES if not isinstance(case, tuple) or case[0] != "torch"]
SHAPES = {
    "one_value": (1, 1),
    "odd": (7, 13),
    "several_programs": (40, 37),
    "two_chunks": (3, 1100),
    "3b": (3, 3072),
    "7b": (2, 4608),
    "15b": (2, 6144),
}


def make(N, C, dtype, residual=True, weight=True):
    g = generator(N + C)
    x = torch.randn(N, C, generator=g) * 1.5 + 0.5
    w = 1 + 0.3 * torch.randn(C, generator=g)
    r = torch.randn(N, C, generator=g)
    inputs = (x, w if weight else None, r if residual else None)
    return [None if t is None else t.to(dtype) for t in inputs]


def eager(x, weight, residual):
    summed = x if residual is None else x + residual
    return F.rms_norm(summed, x.shape[-1:], weight, 1e-5), summed


def exact(x, weight, residual):
    """From the definition."""
    summed = x if residual is None else x + residual
    y = summed / (summed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y if weight is None else y * weight, summed


def ours(impl):
    def function(x, weight, residual):
        result = rms_norm(x, weight, 1e-5, residual, impl=impl)
        return result if residual is not None else (result, x)

    return function


def results_and_gradients(function, inputs, dy, dsummed):
    """y, summed, then the gradients of the inputs that there are."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y, summed = function(*leaves)
    pairs = [(o, g.to(o.dtype)) for o, g in ((y, dy), (summed, dsummed)) if g is not None]
    given = [t for t in leaves if t is not None]
    outputs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, given, grads, allow_unused=True)
    return [y.detach(), summed.detach(), *found]


def compare(impl, dtype, N, C, *, residual=True, weight=True, with_dy=True, with_dsummed=True):
    inputs = make(N, C, dtype, residual, weight)
    dy, dsummed = (torch.randn(N, C, generator=generator(s)).to(dtype) for s in (8, 9))
    grads = (dy if with_dy else None, dsummed if with_dsummed and residual else None)
    with poison_empty():
        actual = results_and_gradients(ours(impl), inputs, *grads)
    wide = [None if t is None else t.double() for t in inputs]
    right = results_and_gradients(exact, wide, *grads)
    peer = results_and_gradients(eager, inputs, *grads)
    names = ["y", "summed", "dx", *(["dweight"] if weight else []), "dresidual"]
    for name, a, e, p in zip(names, actual, right, peer, strict=False):
        if e is None:
            assert a is None, name
            continue
        assert a.dtype == dtype and a.is_contiguous(), name
        length = N if name == "dweight" else C
        assert_close_to_reference(a, e, p, reduction_length=length, name=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_results_and_every_gradient(impl, dtype, shape):
    compare(impl, dtype, *SHAPES[shape])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case",
    [
        {"residual": False},
        {"weight": False},
        {"residual": False, "weight": False},
        {"with_dy": False},
        {"with_dsummed": False},
    ],
    ids=str,
)
def test_without_residual_weight_or_one_of_the_gradients(impl, case):
    compare(impl, torch.float32, 6, 40, **case)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_frozen_weight_strided_rows_and_other_ranks(impl):
    weight = torch.randn(16)
    x, residual = (torch.randn(2, 3, 32)[..., ::2].requires_grad_() for _ in range(2))
    y, summed = rms_norm(x, weight, 1e-5, residual, impl=impl)
    dy = torch.randn(16, 3, 2).permute(2, 1, 0)
    dx, dresidual = torch.autograd.grad(y, (x, residual), dy)
    inputs = (x, weight, residual)
    right = results_and_gradients(exact, [t.double() for t in inputs], dy, None)
    peer = results_and_gradients(eager, inputs, dy, None)
    assert torch.equal(dx, dresidual) and torch.equal(summed, x + residual)
    assert_close_to_reference(y.detach(), right[0], peer[0], reduction_length=16)
    assert_close_to_reference(dx, right[2], peer[2], reduction_length=16)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    x, weight, residual = (t.requires_grad_() for t in make(0, 8, torch.float32))
    y, summed = rms_norm(x, weight, 1e-5, residual, impl=impl)
    gradients = torch.autograd.grad(y.sum() + summed.sum(), (x, weight, residual))
    assert [tuple(g.shape) for g in gradients] == [(0, 8), (8,), (0, 8)]
    assert not gradients[1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_to_the_bit_on_every_run(impl):
    inputs, dy = make(21, 384, torch.float32), torch.randn(21, 384)
    first, second = (results_and_gradients(ours(impl), inputs, dy, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck_and_opcheck():
    x, weight, residual = (t.requires_grad_() for t in make(4, 6, torch.float64))
    assert torch.autograd.gradcheck(ours("reference"), (x, weight, residual))
    torch.library.opcheck(_rms_norm_forward, (x, residual, weight, 1e-5, "reference"))
    torch.library.opcheck(_rms_norm_forward, (x, None, None, 1e-5, "reference"))
    x, weight, rstd = x.detach(), weight.detach(), torch.rand(4, 1, dtype=torch.float64)
    torch.library.opcheck(_rms_norm_backward, (x, x, x, weight, rstd, True, "reference"))
    torch.library.opcheck(_rms_norm_backward, (x, None, x, None, rstd, False, "reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_in_one_graph(impl):
    inputs, dy = make(6, 32, torch.float32), torch.randn(6, 32)
    compiled = torch.compile(ours(impl), fullgraph=True, backend="aot_eager")
    expected = results_and_gradients(ours(impl), inputs, dy, dy)
    actual = results_and_gradients(compiled, inputs, dy, dy)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_cost():
    moved, found = cost.layer_norm(8, 4, 2, residual=True), cost.rms_norm(8, 4, 2, residual=True)
    assert found.forward_bytes == moved.forward_bytes == 4 * 8 * 4 * 2
    assert found.backward_bytes == moved.backward_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"expected x \(..., C\) with C >= 1, got \(\)"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "expected x with dtype in"),
        ({"weight": torch.zeros(7)}, r"expected weight \(C,\) = \(8,\), got \(7,\)"),
        ({"weight": torch.zeros(8).half()}, "expected weight with dtype in"),
        ({"residual": torch.zeros(3, 8)}, r"expected residual like x = \(2, 8\), got \(3, 8\)"),
        ({"residual": torch.zeros(2, 8).half()}, "expected residual with dtype in"),
        ({"weight": torch.zeros(8, device="meta")}, "expected all tensors on one device"),
    ],
    ids=str,
)
def test_messages(change, message):
    with pytest.raises(ValueError, match="^rms_norm: " + message):
        rms_norm(**({"x": torch.zeros(2, 8), "weight": torch.zeros(8)} | change))


@TRITON
def test_a_row_too_wide_is_refused_with_its_reason():
    with pytest.raises(RuntimeError, match="rms_norm: impl='triton' cannot run: .*at most 8192"):
        rms_norm(torch.randn(2, 8193), None, impl="triton")
