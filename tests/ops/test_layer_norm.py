"""layer_norm against F.layer_norm and autograd in float64, on float64 copies of the inputs.

Tolerance: testing.assert_close_to_reference, with F.layer_norm in the tested dtype as the peer.
Where Triton runs: grid.py.
"""

import grid
import pytest
import torch
import torch.nn.functional as F
from grid import CASES, CPU_CASES, TRITON, generator

from stellarator_kernels import cost, explain, extension, layer_norm
from stellarator_kernels.layer_norm import _layer_norm_backward, _layer_norm_forward
from stellarator_kernels.norm_kernels import num_partials, tiles
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

IMPLS = [grid.CPU, *grid.IMPLS, *grid.CUDA]
KERNELS = [grid.CPU, *grid.KERNELS, *grid.CUDA]
SHAPES = {
    "one_value": (1, 1),
    "odd": (7, 13),
    "several_blocks_and_rests": (150, 37),
    "demo_width": (9, 384),
    "3b": (3, 3072),
    "7b": (5, 4608),
    "15b": (2, 6144),
}


def make(N, C, dtype, seed=0, residual=True, bias=True):
    """Inputs (x, weight, bias, residual) with a mean and a scale that are not 0 and 1."""
    g = generator(seed)
    x = torch.randn(N, C, generator=g) * 1.5 + 0.5
    weight, b = 1 + 0.3 * torch.randn(C, generator=g), torch.randn(C, generator=g)
    r = torch.randn(N, C, generator=g)
    inputs = (x, weight, b if bias else None, r if residual else None)
    return [None if t is None else t.to(dtype).requires_grad_() for t in inputs]


def narrow(impl):
    """A 16-bit dtype that it takes; the interpreter's casts to bf16 truncate."""
    return torch.bfloat16 if impl in ("cpu", "cuda") else torch.float16


def eager(x, weight, bias, residual):
    """What a model would write without this package."""
    summed = x if residual is None else x + residual
    return F.layer_norm(summed, x.shape[-1:], weight, bias, 1e-5), summed


def ours(x, weight, bias, residual, impl):
    """The op under test; the same two results."""
    result = layer_norm(x, weight, bias, 1e-5, residual, impl=impl)
    return result if residual is not None else (result, x)


def results_and_gradients(function, inputs, dy, dsummed):
    """y, summed, then the gradients of all inputs that there are; dy and dsummed may be None."""
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y, summed = function(*inputs)
    outputs, grads = [], []
    for output, grad in ((y, dy), (summed, dsummed)):
        if grad is not None:
            outputs.append(output)
            grads.append(grad.to(output.dtype))
    given = [t for t in inputs if t is not None]
    gradients = torch.autograd.grad(outputs, given, grads, allow_unused=True)
    return [y.detach(), summed.detach(), *gradients]


def compare(impl, dtype, N, C, *, residual=True, bias=True, with_dy=True, with_dsummed=True):
    """All results and gradients of one case against float64."""
    inputs = make(N, C, dtype, residual=residual, bias=bias)
    g = generator(9)
    dy = torch.randn(N, C, generator=g).to(dtype) if with_dy else None
    dsummed = torch.randn(N, C, generator=g).to(dtype) if with_dsummed and residual else None
    with poison_empty():
        actual = results_and_gradients(lambda *a: ours(*a, impl), inputs, dy, dsummed)
    wide = [None if t is None else t.double() for t in inputs]
    exact = results_and_gradients(eager, wide, dy, dsummed)
    peer = results_and_gradients(eager, inputs, dy, dsummed)
    names = ["y", "summed", "dx", "dweight", "dbias", "dresidual"]
    if not bias:
        names.remove("dbias")
    for name, a, e, p in zip(names, actual, exact, peer, strict=False):
        if e is None:
            assert a is None, name
            continue
        assert a.dtype == dtype and a.is_contiguous(), name
        length = N if name in ("dweight", "dbias") else C
        assert_close_to_reference(a, e, p, reduction_length=length, name=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("impl", "dtype"), [("torch", torch.float16), *CASES, *CPU_CASES, *grid.CUDA_CASES]
)
def test_results_and_every_gradient(impl, dtype, shape):
    compare(impl, dtype, *SHAPES[shape])


@pytest.mark.parametrize("level", grid.levels())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_on_every_instruction_set(dtype, level, monkeypatch):
    monkeypatch.setenv(extension.ISA_VARIABLE, level)
    compare("cpu", dtype, *SHAPES["several_blocks_and_rests"])
    compare("cpu", dtype, *SHAPES["3b"], residual=False, bias=False)


@grid.EXTENSION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_is_the_same_to_the_bit_on_any_number_of_threads(dtype):
    inputs, dy = make(1000, 48, dtype), torch.randn(1000, 48)
    results = []
    for count in (1, 2, 5):
        with grid.threads(count):
            results.append(results_and_gradients(lambda *a: ours(*a, "cpu"), inputs, dy, dy))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case",
    [
        {"residual": False},
        {"bias": False},
        {"residual": False, "bias": False},
        {"with_dy": False},
        {"with_dsummed": False},
    ],
    ids=str,
)
def test_without_residual_bias_or_one_of_the_gradients(impl, case):
    compare(impl, torch.float32, 6, 40, **case)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_parameters_get_no_gradient(impl):
    x, weight, bias, residual = make(4, 24, torch.float32)
    weight, bias = weight.detach(), bias.detach()
    y, summed = layer_norm(x, weight, bias, 1e-5, residual, impl=impl)
    (y.sum() + summed.sum()).backward()
    assert weight.grad is None and bias.grad is None
    wide, ones = [t.double() for t in (x, weight, bias, residual)], torch.ones(4, 24)
    exact = results_and_gradients(eager, wide, ones, ones)
    assert_close_to_reference(x.grad, exact[2], reduction_length=24, name="dx")


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_are_those_of_the_rounded_sum(impl):
    # 512 + 0.2 rounds to 512 in 16 bits: rows of x are constant after the sum, so y is the bias.
    dtype = narrow(impl)
    x = torch.full((2, 8), 512.0, dtype=dtype)
    residual = torch.linspace(0.0, 0.2, 8, dtype=dtype).expand(2, 8)
    weight, bias = torch.ones(8, dtype=dtype), torch.arange(8.0).to(dtype)
    y, summed = layer_norm(x, weight, bias, 1e-5, residual, impl=impl)
    assert torch.equal(summed, x)
    assert torch.equal(y, bias.expand(2, 8))


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_are_kept_in_fp32(impl):
    x, weight, bias, residual = (t.detach() for t in make(5, 384, narrow(impl)))
    y, summed, mean, rstd = _layer_norm_forward(x, residual, weight, bias, 1e-5, impl)
    variance, exact = torch.var_mean(summed.double(), -1, correction=0, keepdim=True)
    assert mean.dtype == rstd.dtype == torch.float32
    assert (mean - exact).abs().max() < 1e-6
    assert (rstd * (variance + 1e-5).sqrt() - 1).abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_a_large_mean_does_not_cancel_the_variance(impl):
    g = generator(3)
    x = (torch.randn(3, 512, generator=g) + 3000.0).requires_grad_()
    weight, bias = torch.ones(512), torch.zeros(512)
    y = layer_norm(x, weight, bias, 1e-5, impl=impl)
    exact = F.layer_norm(x.double(), (512,), weight.double(), bias.double(), 1e-5)
    # One unit in the last place of 3000 is 2.4e-4.
    assert (y - exact).abs().max() < 5e-4


LAYOUTS = {
    "columns_of_a_wider_tensor": lambda: torch.randn(2, 3, 32)[..., :16],
    "every_other_column": lambda: torch.randn(2, 3, 32)[..., ::2],
    "transposed": lambda: torch.randn(16, 6).t(),
    "one_row": lambda: torch.randn(16),
}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_strided_transposed_and_other_ranks(impl, layout, residual):
    torch.manual_seed(1)
    x, weight, bias = LAYOUTS[layout](), *(torch.randn(16) for _ in range(2))
    inputs = (x, weight, bias, LAYOUTS[layout]() if residual else None)
    # Gradients: expanded from one value, as sum() gives it, and with its dimensions reversed.
    for dy in (torch.ones(()).expand(x.shape), torch.randn(x.shape[::-1]).permute(
        *reversed(range(x.dim()))
    )):  # fmt: skip
        results = []
        for function, dtype in (
            (lambda *a: ours(*a, impl), torch.float32),
            (eager, torch.float32),
            (eager, torch.float64),
        ):
            given = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
            outputs = function(*given)[: 1 + residual]
            leaves = [t for t in given if t is not None]
            grads = torch.autograd.grad(outputs, leaves, [dy.to(dtype)] * len(outputs))
            results.append([*outputs, *grads])
        actual, peer, exact = results
        for a, e, p in zip(actual, exact, peer, strict=True):
            assert_close_to_reference(a.detach(), e.detach(), p.detach(), reduction_length=16)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    x, weight, bias, residual = make(0, 8, torch.float32)
    y, summed = layer_norm(x, weight, bias, 1e-5, residual, impl=impl)
    assert y.shape == summed.shape == (0, 8)
    gradients = torch.autograd.grad(y.sum() + summed.sum(), (x, weight, bias, residual))
    assert [tuple(g.shape) for g in gradients] == [(0, 8), (8,), (8,), (0, 8)]
    assert not gradients[1].any() and not gradients[2].any()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck(impl, residual):
    inputs = make(4, 6, torch.float64, residual=residual)
    given = [t for t in inputs if t is not None]

    def function(x, weight, bias, residual=None):
        return layer_norm(x, weight, bias, 1e-5, residual, impl=impl)

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("impl", KERNELS)
def test_the_same_to_the_bit_on_every_run(impl):
    inputs, dy = make(21, 384, torch.float32), torch.randn(21, 384)
    first, second = (
        results_and_gradients(lambda *a: ours(*a, impl), inputs, dy, dy) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", [grid.CPU, "torch"])
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(residual, impl):
    x, weight, bias, r = make(4, 8, torch.float32, residual=residual)
    torch.library.opcheck(_layer_norm_forward, (x, r, weight, bias, 1e-5, impl))
    stats = torch.randn(4, 1), torch.rand(4, 1)
    dsummed = x.detach() if residual else None
    arguments = (x.detach(), dsummed, x.detach(), weight.detach(), *stats, True, residual, impl)
    torch.library.opcheck(_layer_norm_backward, arguments)


@pytest.mark.parametrize("impl", KERNELS)
def test_compiled_in_one_graph(impl):
    inputs, dy = make(6, 32, torch.float32), torch.randn(6, 32)

    def function(*arguments):
        return ours(*arguments, impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = results_and_gradients(function, inputs, dy, dy)
    actual = results_and_gradients(compiled, inputs, dy, dy)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_tiles_and_partials():
    assert [tiles(C) for C in (1, 384, 3072, 4608, 6144, 8192)] == [
        (1, 1, 1), (512, 1, 2), (1024, 3, 4), (1024, 5, 4), (2048, 3, 8), (2048, 4, 8)
    ]  # fmt: skip
    assert [num_partials(N, 3072, 132) for N in (0, 1, 100, 396, 10**6)] == [1, 1, 100, 396, 396]
    assert [num_partials(10**6, C, 100) for C in (64, 2048, 4608, 6144, 8192)] == [
        800, 500, 200, 100, 100
    ]  # fmt: skip


@pytest.mark.parametrize("impl", [grid.CPU, pytest.param("triton", marks=TRITON)])
def test_a_row_too_wide_for_the_kernels_is_refused_with_its_reason(impl):
    x, weight = torch.randn(2, 8193), torch.ones(8193)
    message = f"layer_norm: impl='{impl}' cannot run: .*at most 8192"
    with pytest.raises(RuntimeError, match=message):
        layer_norm(x, weight, None, impl=impl)
    exact = F.layer_norm(x.double(), (8193,))
    assert_close_to_reference(layer_norm(x, weight, None), exact, reduction_length=8193)
    assert "-> layer_norm: torch" in explain("layer_norm", x, weight, None)


def test_cost():
    # StarCoder2-3B, 8192 tokens, bf16, at 4.3 TB/s.
    for residual, forward, backward in ((False, 23.4, 35.1), (True, 46.8, 46.8)):
        found = cost.layer_norm(8192, 3072, 2, residual=residual)
        assert abs(found.forward_bytes / 4.3e6 - forward) < 0.1
        assert abs(found.backward_bytes / 4.3e6 - backward) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"expected x \(..., C\) with C >= 1, got \(\)"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "expected x with dtype in"),
        ({"weight": torch.zeros(7)}, r"expected weight \(C,\) = \(8,\), got \(7,\)"),
        ({"bias": torch.zeros(8, 1)}, r"expected bias \(C,\) = \(8,\), got \(8, 1\)"),
        ({"weight": torch.zeros(8).half()}, "expected weight with dtype in .*float32.*float16"),
        ({"residual": torch.zeros(3, 8)}, r"expected residual like x = \(2, 8\), got \(3, 8\)"),
        ({"residual": torch.zeros(2, 8).half()}, "expected residual with dtype in"),
        ({"weight": torch.zeros(8, device="meta")}, "expected all tensors on one device"),
    ],
    ids=str,
)
def test_messages(change, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "bias": torch.zeros(8)} | change
    with pytest.raises(ValueError, match="^layer_norm: " + message):
        layer_norm(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_over_many_rows_keep_their_digits(impl):
    """Not against eager code: ATen's own CPU kernel loses half of dbias here."""
    N = 512 if impl in ("triton", "cuda") else 4096  # those that are interpreted, or emulated
    inputs = make(N, 40, torch.bfloat16, seed=3)
    dy = (1 + torch.randn(N, 40, generator=generator(4))).bfloat16()
    *_, dweight, dbias, _ = results_and_gradients(lambda *a: ours(*a, impl), inputs, dy, None)
    wide = [t.double() for t in inputs]
    *_, exact_dweight, exact_dbias, _ = results_and_gradients(eager, wide, dy, None)
    for actual, exact in ((dweight, exact_dweight), (dbias, exact_dbias)):
        assert (actual - exact).abs().max() < 0.008 * exact.abs().max()
