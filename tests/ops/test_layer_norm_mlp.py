"""layer_norm_mlp against layer_norm and mlp one after the other, to the bit.

test_layer_norm.py and test_mlp.py hold these against float64. And it keeps what it says it keeps.
"""

import functools
import sys

import grid
import pytest
import torch
import torch.nn.functional as F
from grid import generator

from stellarator_kernels import explain, layer_norm, layer_norm_mlp, mlp, random
from stellarator_kernels.linear import gradient_or_add
from stellarator_kernels.testing import poison_empty

N, C, WIDTH = 35, 24, 56
NAMES = ("x", "residual", "scale", "shift", "up", "up_bias", "down", "down_bias")
BY_IMPL = [("cpu", torch.bfloat16), ("cpu", torch.float32), ("torch", torch.bfloat16)]
BY_IMPL += [("torch", torch.float32), ("reference", torch.float64)]


def make(dtype=torch.float32):
    """The inputs by name, and gradients of the two results."""
    g = generator(N)
    shapes = ((N, C), (N, C), (C,), (C,), (WIDTH, C), (WIDTH,), (C, WIDTH), (C,), (N, C), (N, C))
    *inputs, dy, dsummed = (torch.randn(*shape, generator=g).to(dtype) for shape in shapes)
    return dict(zip(NAMES, inputs, strict=True)), (dy, dsummed)


def together(x, residual, scale, shift, up, up_bias, down, down_bias, norm=(), **options):
    """norm: what only the norm takes."""
    products = (up, up_bias, down, down_bias)
    return layer_norm_mlp(x, scale, shift, *products, 1e-5, residual, **options, **dict(norm))


def apart(x, residual, scale, shift, up, up_bias, down, down_bias, norm=(), **options):
    y = layer_norm(x, scale, shift, 1e-5, residual, impl=options.get("impl", "auto"), **dict(norm))
    y, *summed = (y,) if residual is None else y
    y = mlp(y, up, up_bias, down, down_bias, **options)
    return (y, *summed) if summed else y


def run(function, inputs, dys, frozen=(), used=(0, 1)):
    """Results and gradients by name; of a None none."""
    leaves = {
        n: t if t is None else t.detach().clone().requires_grad_(n not in frozen)
        for n, t in inputs.items()
    }
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward([outputs[i] for i in used], [dys[i] for i in used])
    found = {n: None if t is None else t.grad for n, t in leaves.items()}
    return found | {f"output {i}": o.detach() for i, o in enumerate(outputs)}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        e = expected[name]
        assert (a is None) == (e is None), name
        assert a is None or torch.equal(a, e), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("missing", [(), ("residual",), ("shift", "up_bias", "down_bias")])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize(("impl", "dtype"), [*BY_IMPL, *grid.CASES])
def test_the_bits_are_those_of_two_ops(impl, dtype, approximate, missing, recompute):
    inputs, dys = make(dtype)
    inputs |= dict.fromkeys(missing)
    used = (0,) if "residual" in missing else (0, 1)
    options = {"approximate": approximate, "recompute": recompute, "impl": impl}
    with poison_empty():
        actual = run(functools.partial(together, **options), inputs, dys, used=used)
    assert_same(actual, run(functools.partial(apart, **options), inputs, dys, used=used))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("used", [(0,), (1,)])
@pytest.mark.parametrize(
    "frozen", [(), NAMES[:2], NAMES[2:4], NAMES[4:], NAMES[:6], NAMES[:7], NAMES[:4]]
)
def test_gradients_that_are_not_wanted(frozen, used, recompute):
    inputs, dys = make()
    if used == (1,) and frozen == NAMES[:2]:
        frozen = NAMES[1:2]  # the sum alone gives gradients to nothing else
    if used == (1,) and set(NAMES[:2]) <= set(frozen):
        return
    options = {"recompute": recompute}
    found = [
        run(functools.partial(f, **options), inputs, dys, frozen, used) for f in (together, apart)
    ]
    assert_same(*found)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("impl", [grid.CPU, *grid.IMPLS])
def test_dropout(impl, used, recompute):
    keys = random.matrix_keys(5, N, C, "cpu", (9, 0))
    options = {"norm": {"dropout_p": 0.4, "dropout_keys": keys}, "impl": impl}
    options["recompute"] = recompute
    inputs, dys = make()
    found, expected = (
        run(functools.partial(f, **options), inputs, dys, used=used) for f in (together, apart)
    )
    if used == (1,):  # zeros may stand for the gradient of what was not used
        for name in NAMES[2:]:
            for results in (expected, found):
                given = results.pop(name)
                assert given is None or not given.any()
    assert_same(found, expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept(recompute):
    """The sum, which is a result; mean and rstd; what goes into the gelu."""
    inputs, _ = make(torch.bfloat16)
    seen, leaves = {}, {n: t.requires_grad_() for n, t in inputs.items()}

    def note(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outputs = together(**leaves, recompute=recompute)
    for t in (*leaves.values(), *outputs):
        seen.pop(t.untyped_storage().data_ptr(), None)
    assert sum(seen.values()) == 2 * 4 * N + (0 if recompute else 2 * N * WIDTH)


def test_autocast_as_in_torch_cpu():
    inputs, _ = make()

    def torchs(x, residual, scale, shift, up, up_bias, down, down_bias):
        y = F.layer_norm(x + residual, scale.shape, scale, shift)
        return F.linear(F.gelu(F.linear(y, up, up_bias), approximate="tanh"), down, down_bias)

    found = []
    for function in (lambda **t: together(**t)[0], torchs):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16):
            y = function(**leaves)
        assert y.dtype == torch.bfloat16
        found.append([y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))])
    for a, e in zip(*found, strict=True):
        assert a.dtype == e.dtype
        assert (a.double() - e.double()).norm() <= 0.01 * e.double().norm()


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_in_one_graph(recompute):
    inputs, dys = make()
    function = functools.partial(together, recompute=recompute)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, inputs, dys), run(function, inputs, dys))


@pytest.mark.parametrize("recompute", [False, True])
def test_rooms_get_the_weight_gradients(recompute, monkeypatch):
    """The kernel that adds runs in the interpreter."""
    module = sys.modules[gradient_or_add.__module__]
    choose = module.choose
    monkeypatch.setattr(
        module,
        "choose",
        lambda op, *a, **k: "triton" if op == "add_weight_gradient_" else choose(op, *a, **k),
    )
    inputs, dys = make()
    expected = run(functools.partial(together, recompute=recompute), inputs, dys)
    rooms = torch.ones(WIDTH, C), torch.ones(C, WIDTH)
    given = {"recompute": recompute, "rooms": tuple(lambda room=room: room for room in rooms)}
    found = run(functools.partial(together, **given), inputs, dys)
    for name, room in zip(("up", "down"), rooms, strict=True):
        assert found.pop(name) is None
        torch.testing.assert_close(room, 1 + expected.pop(name), rtol=1e-5, atol=1e-4)
    assert_same(found, expected)


def test_the_choice_is_explained():
    inputs, _ = make()
    x, _, scale, shift, up, up_bias, down, down_bias = inputs.values()
    norm, products = (x, scale, shift), (up, up_bias, down, down_bias)
    lines = explain("layer_norm_mlp", *norm, *products).splitlines()
    assert "-> layer_norm: cpu" in lines and "-> mlp: cpu" in lines
    options = {"dropout_p": 0.1, "dropout_keys": random.matrix_keys(5, N, C, "cpu", (9, 0))}
    lines = explain("layer_norm_mlp", *norm, *products, residual=x, **options).splitlines()
    assert "-> layer_norm: cpu" in lines and "-> mlp: cpu" in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"approximate": "fast"}, "expected approximate in .*got 'fast'"),
        ({"scale": torch.ones(23)}, "expected norm_weight"),
        ({"shift": torch.ones(C).double()}, "expected norm_bias with dtype in"),
        ({"residual": torch.ones(N, C - 1)}, "expected residual"),
        ({"down": torch.ones(C, 23)}, r"expected down_weight \(C, F\)"),
    ],
    ids=str,
)
def test_messages(change, message):
    inputs, _ = make()
    with pytest.raises(ValueError, match="^layer_norm_mlp: " + message):
        together(**(inputs | change))
