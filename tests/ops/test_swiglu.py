"""swiglu against act(gate) * up and autograd in float64, on float64 copies of the inputs.

Tolerance: testing.assert_close_to_reference, with the eager code in the tested dtype as the peer.
Where Triton runs: grid.py. The compiled code: test_compile.py.
"""

import sys

import grid
import pytest
import torch
import torch.nn.functional as F
from grid import CASES, IMPLS, KERNELS, generator

from stellarator_kernels import cost, swiglu
from stellarator_kernels._triton import tl, triton
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

MODULE = sys.modules["stellarator_kernels.swiglu"]
ACTS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
}
SHAPES = {"one": (1, 1), "odd": (61, 43), "several_blocks_and_rests": (9, 1100), "7b": (2, 18432)}


def make(N, width, dtype, packed):
    """(gate,) of (N, 2F) or (gate, up), and dy; gate reaches into both tails."""
    g = generator(N + width)
    both, dy = torch.randn(N, 2 * width, generator=g) * 2, torch.randn(N, width, generator=g)
    both, dy = both.to(dtype), dy.to(dtype)
    return ((both,) if packed else (both[:, :width], both[:, width:])), dy


def eager(*given, activation="silu"):
    """What a model would write without this package."""
    gate, up = given if len(given) == 2 else given[0].chunk(2, -1)
    return ACTS[activation](gate) * up


def run(function, given, dy):
    """y and the gradients."""
    leaves = [t.detach().requires_grad_() for t in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def compare(given, dy, activation="silu", **options):
    """All results of one case against float64."""
    with poison_empty():
        actual = run(lambda *t: swiglu(*t, activation=activation, **options), given, dy)
    peer = run(lambda *t: eager(*t, activation=activation), given, dy)
    exact = run(
        lambda *t: eager(*t, activation=activation), [t.double() for t in given], dy.double()
    )
    for name, a, e, p in zip(("y", "dgate", "dup"), actual, exact, peer, strict=False):
        assert a.dtype == dy.dtype and a.is_contiguous(), name
        # Not a sum, but a product of four factors, each of them rounded.
        assert_close_to_reference(a, e, p, reduction_length=4, name=name)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_results_and_every_gradient(impl, dtype, activation, shape, packed):
    given, dy = make(*SHAPES[shape], dtype, packed)
    compare(given, dy, activation, impl=impl)


@triton.jit
def _slope_without_a_term(x, ACTIVATION: tl.constexpr):
    sigmoid = tl.sigmoid(x)
    return x * sigmoid, sigmoid


@triton.jit
def _gelu_for_silu(x, ACTIVATION: tl.constexpr):
    sigmoid = tl.sigmoid(1.702 * x)
    return x * sigmoid, sigmoid * (1.0 + 1.702 * x * tl.sigmoid(-1.702 * x))


@grid.INTERPRETED
@pytest.mark.parametrize("wrong", [_slope_without_a_term, _gelu_for_silu])
def test_planted_bugs_are_found(wrong, monkeypatch):
    given, dy = make(61, 43, torch.float32, True)
    compare(given, dy, impl="triton")
    monkeypatch.setattr(MODULE, "_value_and_slope", wrong)
    with pytest.raises(AssertionError):
        compare(given, dy, impl="triton")


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_tails_are_finite(impl, activation):
    gate = torch.tensor([[-1e4, -60.0, 0.0, 60.0, 1e4]], requires_grad=True)
    y = swiglu(gate, torch.full((1, 5), 2.0), activation=activation, impl=impl)
    (dgate,) = torch.autograd.grad(y.sum(), gate)
    assert torch.allclose(y, 2.0 * gate.clamp(min=0.0), atol=1e-6, rtol=0)
    assert torch.allclose(dgate, torch.tensor([[0.0, 0.0, 1.0, 2.0, 2.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["every_other", "transposed", "rank_3", "rank_1", "expanded"])
def test_strided_transposed_and_other_ranks(impl, layout):
    g = generator(3)
    shape = {"rank_3": (3, 2, 16), "rank_1": (16,)}.get(layout, (6, 16))
    gate, up, dy = (torch.randn(*shape, generator=g) for _ in range(3))
    if layout == "every_other":
        gate, dy = (torch.stack((t, t), -1).flatten(-2)[..., ::2] for t in (gate, dy))
    elif layout == "transposed":
        gate, dy = (t.t().contiguous().t() for t in (gate, dy))
    elif layout == "rank_3":
        gate, up, dy = (t.transpose(0, 1) for t in (gate, up, dy))
    elif layout == "expanded":
        dy = torch.ones(()).expand(shape)
    compare_values(run(lambda *t: swiglu(*t, impl=impl), (gate, up), dy), (gate, up), dy)
    both = torch.cat((gate, up), -1)
    compare_values(run(lambda *t: swiglu(*t, impl=impl), (both,), dy), (both,), dy)


def compare_values(found, given, dy):
    """Within fp32 of eager code."""
    for a, e in zip(found, run(eager, given, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl, packed):
    given, dy = make(0, 8, torch.float32, packed)
    found = run(lambda *t: swiglu(*t, impl=impl), given, dy)
    assert [t.shape for t in found] == [(0, 8), *(t.shape for t in given)]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("activation", ACTS)
def test_gradcheck(impl, activation):
    given, _ = make(3, 4, torch.float64, False)

    def function(*t):
        return swiglu(*t, activation=activation, impl=impl)

    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in given])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("impl", KERNELS)
def test_opcheck_and_one_graph(impl, packed):
    given, dy = make(6, 16, torch.float32, packed)
    leaves = [t.clone().requires_grad_() for t in given] + [None] * packed
    torch.library.opcheck(torch.ops.stellarator.swiglu_forward, (*leaves, "silu", impl))
    rows = [t.contiguous() for t in given] + [None] * packed
    torch.library.opcheck(torch.ops.stellarator.swiglu_backward, (dy, *rows, "silu", impl))

    def function(*t):
        return swiglu(*t, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, e in zip(run(compiled, given, dy), run(function, given, dy), strict=True):
        assert torch.equal(a, e)


def test_cost():
    found = cost.swiglu(8192, 12288, 2)
    assert found.forward_bytes == 6 * 8192 * 12288 and found.backward_bytes == 10 * 8192 * 12288


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "expected activation in .*got 'relu'"),
        ({"gate": torch.ones(2, 8).int()}, "expected gate with dtype in"),
        ({"gate": torch.tensor(1.0)}, r"expected gate \(..., F\) with F >= 1, got \(\)"),
        ({"gate": torch.ones(2, 7), "up": None}, r"expected gate \(..., 2F\), got \(2, 7\)"),
        ({"up": torch.ones(2, 7)}, r"expected up like gate = \(2, 8\), got \(2, 7\)"),
        ({"up": torch.ones(2, 8).half()}, "expected up with dtype in .*float32.*float16"),
        ({"up": torch.ones(2, 8, device="meta")}, "expected all tensors on one device"),
    ],
    ids=str,
)
def test_messages(change, message):
    given = {"gate": torch.ones(2, 8), "up": torch.ones(2, 8)} | change
    with pytest.raises(ValueError, match="^swiglu: " + message):
        swiglu(**given)
