"""bias_gelu against F.gelu(x + bias) and autograd in float64, on float64 copies of the inputs.

Tolerance: testing.assert_close_to_reference, with the eager code in the tested dtype as the peer.
Where Triton runs: grid.py.
"""

import math

import grid
import pytest
import torch
import torch.nn.functional as F
from grid import CASES, CPU_CASES, generator

from stellarator_kernels import bias_gelu, cost, extension
from stellarator_kernels.bias_gelu import (
    _bias_gelu_backward,
    _bias_gelu_forward,
    num_partials,
    tiles,
)
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

IMPLS, KERNELS = [grid.CPU, *grid.IMPLS], [grid.CPU, *grid.KERNELS]
SHAPES = {
    "one_value": (1, 1),
    "odd": (7, 13),
    "several_blocks_and_rests": (150, 4133),
    "demo_width": (9, 1536),
    "two_partial_sums": (70, 24),
    "3b": (2, 12288),
    "7b": (3, 18432),
}


def make(N, C, dtype, bias=True):
    """x (N, C), bias (C,) and dy; x reaches into both tails."""
    g = generator(N + C)
    x, b, dy = (torch.randn(*shape, generator=g) for shape in ((N, C), (C,), (N, C)))
    return (2 * x).to(dtype), b.to(dtype) if bias else None, dy.to(dtype)


def eager(x, bias, approximate):
    """What a model would write without this package."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def run(function, x, bias, dy, dtype):
    """y, dx and dbias (if there is a bias) in `dtype`."""
    leaves = [t.to(dtype).requires_grad_() for t in (x, bias) if t is not None]
    y = function(leaves[0], leaves[1] if bias is not None else None)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def compare(impl, approximate, x, bias, dy):
    """All results of one case against float64."""
    with poison_empty():
        actual = run(
            lambda *a: bias_gelu(*a, approximate=approximate, impl=impl), x, bias, dy, x.dtype
        )
    peer, exact = (
        run(lambda *a: eager(*a, approximate), x, bias, dy, dtype)
        for dtype in (x.dtype, torch.float64)
    )
    for name, a, e, p in zip(("y", "dx", "dbias"), actual, exact, peer, strict=False):
        assert a.dtype == x.dtype and a.is_contiguous(), name
        length = x.shape[0] if name == "dbias" else 1
        assert_close_to_reference(a, e, p, reduction_length=length, name=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize(("impl", "dtype"), [*CASES, *CPU_CASES])
def test_results_and_every_gradient(impl, dtype, approximate, shape):
    compare(impl, approximate, *make(*SHAPES[shape], dtype))


@pytest.mark.parametrize("level", grid.levels())
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_on_every_instruction_set(dtype, approximate, level, monkeypatch):
    monkeypatch.setenv(extension.ISA_VARIABLE, level)
    compare("cpu", approximate, *make(150, 77, dtype))


@grid.EXTENSION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_is_the_same_to_the_bit_on_any_number_of_threads(dtype):
    x, bias, dy = make(1000, 48, dtype)
    results = []
    for count in (1, 2, 5):
        with grid.threads(count):
            results.append(run(lambda *a: bias_gelu(*a, impl="cpu"), x, bias, dy, dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", grid.levels())
def test_cpu_approximates_tanh_and_erf_to_a_millionth(level, monkeypatch):
    monkeypatch.setenv(extension.ISA_VARIABLE, level)
    u = torch.linspace(-14, 14, 400_000)[None]  # an even number: without 0
    for approximate in ("tanh", "none"):
        cdf = bias_gelu(u, None, approximate=approximate, impl="cpu").double() / u.double()
        exact = F.gelu(u.double(), approximate=approximate) / u.double()
        assert (2 * (cdf - exact)).abs().max() < 1e-6, approximate  # 2 * Phi - 1 is tanh or erf


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_bias(impl, approximate):
    compare(impl, approximate, *make(6, 40, torch.float32, bias=False))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_tails_are_finite(impl, approximate):
    x = torch.tensor([[-1e4, -60.0, -12.0, 0.0, 12.0, 60.0, 1e4]], requires_grad=True)
    y = bias_gelu(x, None, approximate=approximate, impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(y, x.clamp(min=0.0), atol=1e-6, rtol=0)
    assert abs(dx[0, 3] - 0.5) < 1e-6
    dx[0, 3] = 0.5
    slope = torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]])
    assert torch.allclose(dx, slope, atol=1e-30, rtol=0)


def test_the_tanh_form_is_that_of_the_training_code():
    # The formula and its derivative as Megatron-LM's fused bias-GELU states them.
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)[None].requires_grad_()
    y = bias_gelu(x, None)
    (dx,) = torch.autograd.grad(y.sum(), x)
    t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    ff = 0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)
    assert torch.allclose(y, x * 0.5 * (1 + t), atol=1e-7)
    assert torch.allclose(dx, ff, atol=1e-7)
    assert math.isclose(0.1070322243, 3 * 0.044715 * math.sqrt(2 / math.pi), rel_tol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["columns", "every_other", "transposed", "rank_3", "rank_1"])
def test_strided_transposed_and_other_ranks(impl, layout):
    torch.manual_seed(0)
    x = {
        "columns": torch.randn(5, 40)[:, 8:24],
        "every_other": torch.randn(5, 32)[:, ::2],
        "transposed": torch.randn(16, 5).t(),
        "rank_3": torch.randn(3, 2, 16).transpose(0, 1),
        "rank_1": torch.randn(16),
    }[layout]
    for dy in (torch.ones(()).expand(x.shape), torch.randn(x.shape[::-1]).permute(
        *reversed(range(x.dim()))
    )):  # fmt: skip
        compare(impl, "tanh", x, torch.randn(16), dy)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    x, bias = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = bias_gelu(x, bias, impl=impl)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert y.shape == dx.shape == (0, 8)
    assert torch.equal(dbias, torch.zeros(8))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gradcheck(impl, approximate):
    x, bias, _ = make(4, 5, torch.float64)

    def function(x, bias):
        return bias_gelu(x, bias, approximate=approximate, impl=impl)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("impl", KERNELS)
def test_the_same_to_the_bit_on_every_run(impl):
    x, bias, dy = make(300, 24, torch.float32)
    first, second = (
        run(lambda *a: bias_gelu(*a, impl=impl), x, bias, dy, torch.float32) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", [grid.CPU, "torch"])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias, impl):
    x, b, dy = make(4, 8, torch.bfloat16, bias=bias)
    leaves = (x.clone().requires_grad_(), b.clone().requires_grad_() if bias else None)
    torch.library.opcheck(_bias_gelu_forward, (*leaves, "tanh", impl))
    torch.library.opcheck(_bias_gelu_backward, (dy, x, b, "tanh", impl))


@pytest.mark.parametrize("impl", KERNELS)
def test_compiled_in_one_graph(impl):
    x, bias, dy = make(6, 32, torch.float32)

    def function(x, bias):
        return bias_gelu(x, bias, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = (run(f, x, bias, dy, torch.float32) for f in (function, compiled))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_tiles_and_partials():
    assert [tiles(C) for C in (1, 384, 12288)] == [(4, 1, 1), (4, 512, 4), (4, 512, 4)]
    assert [num_partials(N) for N in (0, 1, 65, 4096, 10**6)] == [1, 1, 2, 64, 64]


def test_cost():
    # StarCoder2-3B, 8192 tokens, bf16, at 4.3 TB/s.
    found = cost.bias_gelu(8192, 12288, 2)
    assert abs(found.forward_bytes / 4.3e6 - 93.6) < 0.1
    assert abs(found.backward_bytes / 4.3e6 - 140.5) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"approximate": "fast"}, "expected approximate 'tanh' or 'none', got 'fast'"),
        ({"x": torch.tensor(1.0)}, r"expected x \(..., F\) with F >= 1, got \(\)"),
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, "expected x with dtype in"),
        ({"bias": torch.zeros(7)}, r"expected bias \(F,\) = \(8,\), got \(7,\)"),
        ({"bias": torch.zeros(8).half()}, "expected bias with dtype in .*float32.*float16"),
        ({"bias": torch.zeros(8, device="meta")}, "expected all tensors on one device"),
    ],
    ids=str,
)
def test_messages(change, message):
    arguments = {"x": torch.zeros(2, 8), "bias": torch.zeros(8)} | change
    with pytest.raises(ValueError, match="^bias_gelu: " + message):
        bias_gelu(**arguments)
