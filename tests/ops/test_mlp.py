"""mlp against F.linear, F.gelu, F.linear and autograd in float64, on float64 copies of the inputs.

Tolerance: testing.assert_close_to_reference, with the eager code in the tested dtype as the peer.
Where Triton runs: grid.py. Widths of the models a thirty-second as wide, which keeps their factors
of 3 and 9: the interpreter's tiles are smaller, too. Not covered: the code that is compiled
(test_matmul_code.py).
"""

import functools
import sys

import grid
import pytest
import torch
import torch.nn.functional as F
from grid import CASES, CPU_CASES, generator
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from stellarator_kernels import cost, explain, matmul, mlp, tuned
from stellarator_kernels._triton import tl, triton
from stellarator_kernels.bias_gelu import cdf_and_density
from stellarator_kernels.linear import gradient_or_add
from stellarator_kernels.matmul import (
    PHASES,
    Tiles,
    num_programs,
    tile_at,
    tile_product,
    tile_sizes,
    where_of,
)
from stellarator_kernels.mlp import _activate, _differentiate
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

MODULE = sys.modules["stellarator_kernels.mlp"]
IMPLS, KERNELS = [grid.CPU, *grid.IMPLS], [grid.CPU, *grid.KERNELS]
SHAPES = {  # N, C, F
    "smallest": (1, 8, 8),
    "one_tile_and_a_rest": (33, 24, 40),
    "rests_on_every_side": (70, 40, 104),
    "3b_narrow": (40, 96, 384),
    "7b_narrow": (31, 144, 576),
    "15b_narrow": (17, 192, 768),
}
DESIGNS = {
    "pointers": Tiles(32, 16, 16, 4, 1, 1, 1),
    "parts_of_4": Tiles(16, 64, 32, 4, 1, 4, 3),
    "persistent": Tiles(32, 32, 16, 4, 1, 2, 8, 0, 1),
    "descriptors": Tiles(32, 16, 16, 4, 1, 1, 2, 1, 0),
    "descriptors_persistent": Tiles(16, 32, 16, 4, 1, 8, 2, 1, 1),
    "flattened": Tiles(32, 16, 16, 4, 1, 1, 2, 1, 1, 1),
}
NAMES = ("out", "dx", "dup", "dup_bias", "ddown", "ddown_bias")


def make(N, C, width, dtype):
    """x (N, C), up and its bias, down and its bias, dout; gelu sees both tails."""
    g = generator(N + C + width)
    shapes = ((N, C), (width, C), (width,), (C, width), (C,), (N, C))
    scales = (2.0, C**-0.5, 1.0, width**-0.5, 1.0, 1.0)
    made = (torch.randn(*s, generator=g) * k for s, k in zip(shapes, scales, strict=True))
    return [t.to(dtype) for t in made]


def eager(x, up, up_bias, down, down_bias, approximate="tanh"):
    """What a model would write without this package."""
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate=approximate), down, down_bias)


def run(function, tensors, dout):
    """out and every gradient, None where there is no bias."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], dout))
    return [out.detach(), *(None if t is None else next(found) for t in leaves)]


def compare(tensors, dout, approximate="tanh", **options):
    """All results of one case against float64."""
    N, width = dout.shape[0], tensors[1].shape[0]
    with poison_empty():
        actual = run(lambda *t: mlp(*t, approximate=approximate, **options), tensors, dout)
    form = functools.partial(eager, approximate=approximate)
    peer = run(form, tensors, dout)
    exact = run(form, [t if t is None else t.double() for t in tensors], dout.double())
    lengths = (width, width, N, N, N, N)
    for name, length, a, e, p in zip(NAMES, lengths, actual, exact, peer, strict=True):
        if e is None:
            assert a is None, name
            continue
        assert a.dtype == tensors[0].dtype and a.is_contiguous(), name
        assert_close_to_reference(a, e, p, reduction_length=length, name=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize(("impl", "dtype"), [*CASES, *CPU_CASES])
def test_results_and_every_gradient(impl, dtype, approximate, shape):
    *tensors, dout = make(*SHAPES[shape], dtype)
    compare(tensors, dout, approximate, impl=impl)


@pytest.mark.parametrize("missing", ["up", "down", "both"])
@pytest.mark.parametrize("impl", IMPLS)
def test_without_biases(impl, missing):
    x, up, up_bias, down, down_bias, dout = make(40, 24, 40, torch.float32)
    up_bias = up_bias if missing == "down" else None
    down_bias = down_bias if missing == "up" else None
    compare([x, up, up_bias, down, down_bias], dout, impl=impl)


@grid.TRITON
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_every_design(design, approximate):
    """Tables may choose them; five random shapes each, with as many tiles as programs or more."""
    draw = torch.Generator().manual_seed(len(design))
    for _ in range(5):
        N = int(torch.randint(1, 150, (), generator=draw))
        C, width = (8 * int(torch.randint(1, 12, (), generator=draw)) for _ in range(2))
        *tensors, dout = make(N, C, width, torch.float32)
        with tuned.use({f"matmul {phase}": vars(DESIGNS[design]) for phase in PHASES}):
            compare(tensors, dout, approximate, impl="triton")


@triton.jit
def _one_column_off(row, col, M, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    offsets, inside = where_of(row, col, M, N, ROWS, COLS)
    return tl.maximum(offsets - 1, 0), inside


@triton.jit
def _last_row_of_tiles_twice(
    number, M, N, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr
):
    row, col = tile_at(number, M, N, ROWS, COLS, GROUP)
    return tl.minimum(row, tl.maximum(M - ROWS, 0) // ROWS * ROWS), col


@triton.jit
def _half_the_density(u, TANH: tl.constexpr):
    cdf, density = cdf_and_density(u, TANH)
    return cdf, 0.5 * density


@triton.jit
def _other_form(u, TANH: tl.constexpr):
    return cdf_and_density(u, not TANH)


@triton.jit
def _without_the_last_step(
    a, b, row, col, M, N, K, a_stride_row, b_stride_row,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    return tile_product(
        a, b, row, col, M, N, K - DEPTH, a_stride_row, b_stride_row,
        A_TURNED, B_TURNED, EVEN_K, ROWS, COLS, DEPTH, TMA, UPCAST,
    )  # fmt: skip


@triton.jit
def _bias_of_the_first_columns(
    pre, bias_ptr, y_ptr, pre_ptr, row, col, N, F,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, STORE_Y: tl.constexpr, STORE_PRE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    _activate(
        pre, bias_ptr - col, y_ptr, pre_ptr, row, col, N, F,
        HAS_BIAS, TANH, STORE_Y, STORE_PRE, ROWS, COLS, 1,
    )  # fmt: skip


@triton.jit
def _sums_to_the_first_columns(
    dy, pre_ptr, dpre_ptr, y_ptr, sums_ptr, row, col, N, F,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, STORE_Y: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    _differentiate(
        dy, pre_ptr, dpre_ptr, y_ptr, sums_ptr - col, row, col, N, F,
        HAS_BIAS, TANH, STORE_Y, ROWS, COLS, 1,
    )  # fmt: skip


BUGS = {
    "column": ("where_of", _one_column_off),
    "last row of tiles": ("tile_at", _last_row_of_tiles_twice),
    "last step": ("tile_product", _without_the_last_step),
    "derivative": ("cdf_and_density", _half_the_density),
    "form": ("cdf_and_density", _other_form),
    "bias": ("_activate", _bias_of_the_first_columns),
    "bias gradient": ("_differentiate", _sums_to_the_first_columns),
}


@grid.INTERPRETED
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name, monkeypatch):
    *tensors, dout = make(*SHAPES["rests_on_every_side"], torch.float32)
    compare(tensors, dout, impl="triton")
    monkeypatch.setattr(MODULE, *BUGS[name])
    with pytest.raises(AssertionError):
        compare(tensors, dout, impl="triton")


@grid.INTERPRETED
def test_a_rest_of_the_inner_width_that_is_not_masked_is_found(monkeypatch):
    real = matmul.constants
    monkeypatch.setattr(matmul, "constants", lambda *a: real(*a) | {"EVEN_K": True})
    *tensors, dout = make(*SHAPES["rests_on_every_side"], torch.float32)
    # Twice as long in memory, so that what is read past the end is there.
    doubled = [torch.cat((t, t))[: len(t)] for t in (*tensors, dout)]
    with pytest.raises(AssertionError):
        compare(doubled[:-1], doubled[-1], impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_computed_again_to_the_bit(impl):
    *tensors, dout = make(70, 40, 104, torch.float32)
    kept, again, once_more = (
        run(functools.partial(mlp, recompute=recompute, impl=impl), tensors, dout)
        for recompute in (False, True, True)
    )
    for a, b, c in zip(kept, again, once_more, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


@pytest.mark.parametrize("impl", KERNELS)
def test_the_backward_makes_the_activation_of_the_forward(impl):
    x, up, up_bias, down, _, dout = make(70, 40, 104, torch.float32)
    y, pre = MODULE._up(x, up, up_bias, "tanh", True, True, impl)
    *_, again = MODULE._down_gradient(dout, down, pre, up_bias, "tanh", True, True, impl)
    assert torch.equal(y, again)


def kept_bytes(tensors, **options) -> int:
    """Memory that the backward keeps beside the inputs and the result."""
    seen, leaves = {}, [t.detach().clone().requires_grad_() for t in tensors]

    def note(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = mlp(*leaves, **options)
    for t in (*leaves, out):
        seen.pop(t.untyped_storage().data_ptr(), None)
    return sum(seen.values())


def test_what_is_kept():
    N, C, width = 70, 40, 104
    *tensors, _ = make(N, C, width, torch.float32)
    assert kept_bytes(tensors) == 4 * N * width
    assert kept_bytes(tensors, recompute=True) == 0
    frozen = [t.detach() for t in tensors]
    with torch.no_grad():
        assert not mlp(*frozen).requires_grad


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("impl", IMPLS)
def test_one_gradient_alone(impl, wanted):
    *tensors, dout = make(20, 16, 24, torch.float32)
    expected = run(eager, tensors, dout)[1 + wanted]
    leaves = [t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    mlp(*leaves, impl=impl).backward(dout)
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(5)]
    torch.testing.assert_close(leaves[wanted].grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["columns", "odd_offset", "transposed", "rank_3", "expanded"])
def test_layouts(impl, layout):
    """Rows that lie apart, begin anywhere, are columns, or are one row many times."""
    x, up, up_bias, down, down_bias, dout = make(10, 16, 24, torch.float32)
    if layout == "columns":
        x, dout = torch.cat((x, x, dout), 1)[:, 16:32], torch.cat((x, dout), 1)[:, 16:]
        up = torch.cat((up, up), 1)[:, 16:]
    elif layout == "odd_offset":
        x, down = (torch.cat((t[:, :3], t), 1)[:, 3:] for t in (x, down))
    elif layout == "transposed":
        x, up, dout = (t.t().contiguous().t() for t in (x, up, dout))
    elif layout == "rank_3":
        x, dout = (t.view(2, 5, 16).transpose(0, 1) for t in (x, dout))
    else:
        dout = torch.ones(()).expand(dout.shape)
    tensors = (x, up, up_bias, down, down_bias)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = mlp(*leaves, impl=impl)
    assert out.is_contiguous() and out.shape == x.shape
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    for name, a, e in zip(NAMES, found, run(eager, tensors, dout), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    *tensors, dout = make(0, 8, 16, torch.float32)
    out, dx, *others = run(lambda *t: mlp(*t, impl=impl), tensors, dout)
    assert out.shape == dx.shape == (0, 8)
    assert not any(t.any() for t in others)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gradcheck(impl, approximate):
    *tensors, _ = make(3, 4, 5, torch.float64)

    def function(*leaves):
        return mlp(*leaves, approximate=approximate, impl=impl)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


def test_autocast_as_in_torch_cpu():
    *tensors, _ = make(9, 16, 24, torch.float32)
    found = []
    for function in (mlp, eager):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*leaves)
        assert out.dtype == torch.bfloat16
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for a, e in zip(*found, strict=True):
        assert a.dtype == e.dtype
        assert (a.double() - e.double()).norm() <= 0.01 * e.double().norm()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_in_one_graph(impl, recompute):
    *tensors, dout = make(10, 16, 24, torch.float32)
    options = {"recompute": recompute, "impl": impl}
    compiled = torch.compile(
        lambda *t: mlp(*t, **options).sin(), fullgraph=True, backend="aot_eager"
    )
    expected = run(lambda *t: mlp(*t, **options).sin(), tensors, dout)
    for a, e in zip(run(compiled, tensors, dout), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("need", [(True, True), (False, True), (True, False)])
def test_opcheck(impl, need):
    x, up, up_bias, down, _, dout = make(10, 16, 24, torch.float32)
    operators = torch.ops.stellarator
    torch.library.opcheck(operators.mlp_up, (x, up, up_bias, "tanh", *need, impl))
    pre = torch.randn(10, 24, generator=generator(0))
    given = (dout, down, pre, up_bias, "none", *need, impl)
    torch.library.opcheck(operators.mlp_down_gradient, given)


@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing(saved, monkeypatch):
    """What is computed again comes out to the bit, and nothing runs more often than it must."""
    runs, real = [], MODULE.reference.mlp_up_ref
    monkeypatch.setattr(MODULE.reference, "mlp_up_ref", lambda *a: runs.append(1) or real(*a))

    def policy(context, operator, *args, **kwargs):
        keep = saved and operator is torch.ops.stellarator.mlp_up.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.MUST_RECOMPUTE

    def block(*t):
        return mlp(t[0].sin(), *t[1:], impl="reference").sin()

    def with_checkpoint(*t):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, *t, use_reentrant=False, context_fn=contexts)

    *tensors, dout = make(10, 16, 24, torch.float32)
    expected = run(block, tensors, dout)
    runs.clear()
    found = run(with_checkpoint, tensors, dout)
    assert len(runs) == (1 if saved else 2)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_tiles_are_a_function_of_the_machine():
    bf16, fp32 = torch.bfloat16, torch.float32
    for phase in PHASES:
        parts = 4 if phase == "up" else 8
        for capability in ((9, 0), (10, 0), (11, 0)):
            found = tile_sizes(phase, bf16, capability)
            assert found == Tiles(128, 256, 64, 8, 4, parts)
        for capability in ((8, 0), (8, 6), (8, 9), (12, 0)):
            assert tile_sizes(phase, bf16, capability) == Tiles(128, 128, 32, 8, 4, 2)
        assert tile_sizes(phase, fp32, (9, 0)).num_stages == 2
        chosen = Tiles(64, 128, 64, 4, 3, 2, tma=1, persistent=1)
        with tuned.use({f"matmul {phase}": vars(chosen)}):
            assert tile_sizes(phase, bf16, (9, 0), "any") == chosen
            assert tile_sizes(phase, fp32, (9, 0), "any") != chosen
    tiles = Tiles(128, 256, 64, 8, 4, 4)
    assert num_programs(257, 513, tiles, 132) == 9
    persistent = Tiles(128, 256, 64, 8, 4, 4, persistent=1)
    assert num_programs(257, 513, persistent, 132) == 9
    assert num_programs(16384, 12288, persistent, 132) == 132


def test_cost():
    # StarCoder2-3B, 8192 tokens, bf16: three products each way at 790 TFLOP/s take 1.566 ms
    # forward without the elementwise part (facts of the roofline), twice that back.
    found = cost.mlp(8192, 3072, 12288, 2)
    assert abs(found.forward_flops / 790e9 - 1.566) < 0.002
    assert abs(found.backward_flops / 790e9 - 2 * 1.566) < 0.004
    again = cost.mlp(8192, 3072, 12288, 2, recompute=True)
    assert again.backward_flops - found.backward_flops == 2 * 8192 * 3072 * 12288
    assert again.forward_bytes == found.forward_bytes - 2 * 8192 * 12288


@pytest.mark.parametrize(("C", "width"), [(12, 16), (16, 20)])
@grid.TRITON
def test_widths_that_the_kernels_cannot_load(C, width):
    *tensors, _ = make(3, C, width, torch.float32)
    with pytest.raises(RuntimeError) as caught:
        mlp(*tensors, impl="triton")
    assert f"the widths are multiples of 8, not {C if C % 8 else width}" in str(caught.value)
    line = explain("mlp", *tensors).splitlines()[0]
    assert line.startswith("   mlp: triton: the widths are multiples of 8, not ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"approximate": "fast"}, "expected approximate in .*got 'fast'"),
        ({"up_weight": torch.ones(24, 9)}, r"expected x \(..., C\) and up_weight \(F, C\), got"),
        ({"x": torch.ones(3, 16).int()}, "expected x with dtype in"),
        ({"up_weight": torch.ones(24, 16).double()}, "expected up_weight with dtype in"),
        ({"down_weight": torch.ones(16, 23)}, r"expected down_weight \(C, F\) = \(16, 24\), got"),
        ({"up_bias": torch.ones(16)}, r"expected up_bias \(F,\) = \(24,\), got \(16,\)"),
        ({"down_bias": torch.ones(24)}, r"expected down_bias \(C,\) = \(16,\), got \(24,\)"),
        ({"down_bias": torch.ones(16, device="meta")}, "expected all tensors on one device"),
    ],
    ids=str,
)
def test_messages(change, message):
    given = {
        "x": torch.ones(3, 16), "up_weight": torch.ones(24, 16), "up_bias": None,
        "down_weight": torch.ones(16, 24), "down_bias": None,
    }  # fmt: skip
    mlp(**given)
    with pytest.raises(ValueError, match="^mlp: " + message):
        mlp(**(given | change))


@pytest.mark.parametrize("recompute", [False, True])
def test_rooms_get_the_weight_gradients(recompute, monkeypatch):
    """One of the two, or both; the kernel that adds runs in the interpreter."""
    module = sys.modules[gradient_or_add.__module__]
    choose = module.choose
    monkeypatch.setattr(
        module,
        "choose",
        lambda op, *a, **k: "triton" if op == "add_weight_gradient_" else choose(op, *a, **k),
    )
    g = torch.Generator().manual_seed(3)
    shapes = ((21, 16), (24, 16), (24,), (16, 24), (16,))
    given = [torch.randn(*shape, generator=g) for shape in shapes]

    def run(rooms):
        leaves = [t.clone().requires_grad_() for t in given]
        mlp(*leaves, recompute=recompute, rooms=rooms).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = run((None, None))
    for here in ((1, 0), (0, 1), (1, 1)):
        totals = [torch.ones(24, 16), torch.ones(16, 24)]
        rooms = [(lambda t=t: t) if k else None for t, k in zip(totals, here, strict=True)]
        found = run(tuple(rooms))
        for place, total, is_here in zip((1, 3), totals, here, strict=True):
            assert (found[place] is None) == bool(is_here)
            if is_here:
                found[place] = total - 1
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
