"""add_weight_gradient_ against total + dy^T @ x in float64.

Tolerance: testing.assert_close_to_reference, with the fp32 product of the upcast operands as the
peer: products of 16-bit numbers are exact in fp32, so only the order of the sum is left. The C++
has more tests in test_linear.py, the compiled code in test_matmul_code.py.
"""

import re
import sys

import grid
import pytest
import torch
from grid import CASES, generator

from stellarator_kernels import (
    add_weight_gradient_,
    cost,
    explain,
    linear_cross_entropy,
    tuned,
    widened,
)
from stellarator_kernels._triton import tl, triton
from stellarator_kernels.matmul import Tiles, tile_at, tile_product
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

MODULE = sys.modules["stellarator_kernels.weight_gradient"]
AMX = pytest.mark.skipif("amx" not in grid.levels(), reason="the C++ is for AMX")
SHAPES = {  # N, M, K
    "smallest": (1, 8, 8),
    "rests_on_every_side": (77, 40, 104),
    "long": (300, 24, 16),
    "3b_narrow": (40, 384, 96),
    "7b_narrow": (30, 144, 576),
}
DESIGNS = {
    "parts_of_4": Tiles(16, 64, 32, 4, 1, 4, 3),
    "persistent": Tiles(32, 32, 16, 4, 1, 2, 8, 0, 1),
    "descriptors": Tiles(32, 16, 16, 4, 1, 1, 2, 1, 0),
    "descriptors_persistent": Tiles(16, 32, 16, 4, 1, 8, 2, 1, 1),
    "flattened": Tiles(32, 16, 16, 4, 1, 1, 2, 1, 1, 1),
}


def make(N, M, K, dtype):
    """total (M, K) that holds gradients already, dy (N, M), x (N, K)."""
    g = generator(N + M + K)
    total, dy, x = (torch.randn(*shape, generator=g) for shape in ((M, K), (N, M), (N, K)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return total.to(wide), dy.to(dtype), x.to(dtype)


def compare(total, dy, x, **options):
    """One addition against float64."""
    exact = total.double() + dy.double().t() @ x.double()
    peer = total + dy.to(total.dtype).t() @ x.to(total.dtype)
    actual = total.clone()
    with poison_empty():
        assert add_weight_gradient_(actual, dy, x, **options) is actual
    assert_close_to_reference(actual, exact, peer, reduction_length=dy.shape[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("impl", "dtype"), [*CASES, pytest.param("cpu", torch.bfloat16, marks=AMX)]
)
def test_the_sum(impl, dtype, shape):
    compare(*make(*SHAPES[shape], dtype), impl=impl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_in_float64(impl):
    compare(*make(9, 5, 7, torch.float64), impl=impl)


@grid.TRITON
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design(design):
    """Tables may choose them; random shapes, with as many tiles as programs or more."""
    draw = torch.Generator().manual_seed(len(design))
    for _ in range(6):
        N = int(torch.randint(1, 150, (), generator=draw))
        M, K = (8 * int(torch.randint(1, 12, (), generator=draw)) for _ in range(2))
        with tuned.use({"matmul weight gradient": vars(DESIGNS[design])}):
            compare(*make(N, M, K, torch.float32), impl="triton")


@triton.jit
def _without_the_last_token(
    a, b, row, col, M, N, K, a_stride_row, b_stride_row,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    return tile_product(
        a, b, row, col, M, N, K - 1, a_stride_row, b_stride_row,
        A_TURNED, B_TURNED, EVEN_K, ROWS, COLS, DEPTH, TMA, UPCAST,
    )  # fmt: skip


@triton.jit
def _last_row_of_tiles_missing(
    number, M, N, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr
):
    row, col = tile_at(number, M, N, ROWS, COLS, GROUP)
    return tl.where(row + ROWS >= M, M, row), col


@triton.jit
def _overwrites(
    acc, total_ptr, row, col, M, K, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr
):
    rows, cols = row + tl.arange(0, ROWS)[:, None], col + tl.arange(0, COLS)[None, :]
    tl.store(total_ptr + rows * K + cols, acc, mask=(rows < M) & (cols < K))


BUGS = {
    "last token": ("tile_product", _without_the_last_token),
    "last row of tiles": ("tile_at", _last_row_of_tiles_missing),
    "sum": ("_add", _overwrites),
}


@grid.INTERPRETED
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name, monkeypatch):
    given = make(*SHAPES["rests_on_every_side"], torch.float32)
    compare(*given, impl="triton")
    monkeypatch.setattr(MODULE, *BUGS[name])
    with pytest.raises(AssertionError):
        compare(*given, impl="triton")


@pytest.mark.parametrize("impl", grid.IMPLS)
def test_the_same_to_the_bit_on_every_run(impl):
    total, dy, x = make(200, 40, 24, torch.float32)
    first, second = (add_weight_gradient_(total.clone(), dy, x, impl=impl) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", grid.IMPLS)
def test_a_view_of_a_flat_buffer_strided_rows_and_more_dimensions(impl):
    _, dy, x = make(12, 16, 24, torch.float32)
    flat = torch.ones(3 + 16 * 24 + 5)
    dy, x = torch.cat((x, dy), 1)[:, 24:].unflatten(0, (3, 4)), x.t().contiguous().t()
    add_weight_gradient_(flat[3:-5].view(16, 24), dy, x.unflatten(0, (3, 4)), impl=impl)
    expected = 1 + dy.flatten(0, 1).t() @ x
    torch.testing.assert_close(flat[3:-5].view(16, 24), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(flat[:3], torch.ones(3)) and torch.equal(flat[-5:], torch.ones(5))


@pytest.mark.parametrize("impl", grid.IMPLS)
def test_no_rows(impl):
    total = torch.ones(8, 16)
    add_weight_gradient_(total, torch.ones(0, 8), torch.ones(0, 16), impl=impl)
    assert torch.equal(total, torch.ones(8, 16))


@pytest.mark.parametrize("impl", grid.KERNELS)
def test_opcheck_and_one_graph(impl):
    total, dy, x = make(10, 16, 24, torch.float16)
    torch.library.opcheck(torch.ops.stellarator.add_weight_gradient_, (total, dy, x, impl))

    def twice(total, dy, x):
        add_weight_gradient_(total, dy, x, impl=impl)
        return add_weight_gradient_(total, dy, x, impl=impl) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    one, other = total.clone(), total.clone()
    assert torch.equal(twice(one, dy, x), compiled(other, dy, x)) and torch.equal(one, other)


@pytest.mark.interpret
def test_linear_cross_entropy_adds_its_chunks_with_it(monkeypatch):
    """Where it can run: asked here for the interpreter, which nothing takes by itself."""
    seen, real = [], MODULE._add_triton

    def recorded(total, dy, x):
        seen.append(tuple(dy.shape))
        return real(total, dy, x)

    losses = sys.modules["stellarator_kernels.linear_cross_entropy"]
    choose = losses.choose

    def on_a_gpu(op, impl, given, **options):
        impl = "triton" if op == "add_weight_gradient_" else impl
        return choose(op, impl, given, **options)

    monkeypatch.setattr(MODULE, "_add_triton", recorded)
    monkeypatch.setattr(losses, "choose", on_a_gpu)
    monkeypatch.setattr(widened, "widens", lambda *given: False)
    monkeypatch.setattr(losses, "chunk_rows", lambda *sizes: 128)
    g = generator(5)
    hidden = torch.randn(300, 24, generator=g).half().requires_grad_()
    weight = torch.randn(40, 24, generator=g).half().requires_grad_()
    targets = torch.randint(40, (300,), generator=g)
    found = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, reduction="sum"), weight
    )[0]
    assert seen == [(128, 40), (128, 40), (44, 40)]
    logits = hidden.double() @ weight.double().t()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    exact = torch.autograd.grad(loss, weight)[0].double()
    assert (found.double() - exact).norm() <= 2e-3 * exact.norm()


def test_widths_that_the_kernel_cannot_load():
    total, dy, x = make(3, 12, 16, torch.float32)
    line = explain("add_weight_gradient_", total, dy, x).splitlines()[0]
    assert line == "   add_weight_gradient_: triton: the widths are multiples of 8, not 12"
    with pytest.raises(RuntimeError, match="the widths are multiples of 8, not 12"):
        add_weight_gradient_(total, dy, x, impl="triton")


def test_cost():
    found = cost.add_weight_gradient(8192, 12288, 3072, 2)
    assert found.forward_flops == 2 * 8192 * 12288 * 3072
    assert found.forward_bytes == 2 * 8192 * (12288 + 3072) + 8 * 12288 * 3072


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 16)}, "expected dy (..., M) and x (..., K), got ((3, 8), (4, 16))"),
        ({"dy": torch.ones(3, 8).int()}, "expected dy with dtype in"),
        ({"x": torch.ones(3, 16).half()}, "expected x with dtype in (torch.float32,)"),
        ({"total": torch.ones(8, 16).bfloat16()}, "expected total with dtype in (torch.float32,)"),
        ({"total": torch.ones(16, 8)}, "expected total (M, K) = (8, 16), got (16, 8)"),
        ({"total": torch.ones(16, 8).t()}, "expected total contiguous, got (1, 8)"),
        ({"x": torch.ones(3, 16, device="meta")}, "expected all tensors on one device"),
    ],
    ids=str,
)
def test_messages(change, message):
    given = {"total": torch.ones(8, 16), "dy": torch.ones(3, 8), "x": torch.ones(3, 16)} | change
    with pytest.raises(ValueError, match="^add_weight_gradient_: " + re.escape(message)):
        add_weight_gradient_(**given)
