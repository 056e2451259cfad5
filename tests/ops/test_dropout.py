"""dropout, and dropout in front of the norms, against masks made element by element in Python.

The mask is derived here from the keys with Python's integers; results and gradients are autograd's
in float64 on that mask. Where Triton runs: grid.py. Rates and independence: test_random.py.
"""

import pytest
import torch
import torch.nn.functional as F
from grid import CASES, TRITON, generator

from stellarator_kernels import cost, dropout, layer_norm, random, rms_norm
from stellarator_kernels.dropout import _dropout
from stellarator_kernels.layer_norm import _layer_norm_backward, _layer_norm_forward
from stellarator_kernels.rms_norm import _rms_norm_backward, _rms_norm_forward
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

IMPLS = ["reference", pytest.param("triton", marks=TRITON)]
OF_DROPOUT = [case for case in CASES if not isinstance(case, tuple) or case[0] != "torch"]
OPS = [(op, *case) for op in ("dropout", "rms_norm") for case in OF_DROPOUT[:2]]
OPS += [("layer_norm", *case) for case in CASES[:4]]
OPS += [
    pytest.param(op, "triton", dtype, marks=TRITON)
    for op in ("dropout", "layer_norm", "rms_norm")
    for dtype in (torch.float16, torch.float32)
]
SEED = -8_000_000_000_000_000_123


def factors(keys, p):
    """0 or 1/(1 - p) in float64, from the published mixer in Python's integers."""

    def mixed(x):
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        return (x ^ (x >> 15)) * 0x735A2D97 % 2**32

    rows, columns = ([int(k) % 2**32 for k in part] for part in keys)
    kept = [[(mixed(r ^ c) >> 1) / 2**31 >= p for c in columns] for r in rows]
    return torch.tensor(kept).double() / (1 - p)


def call(op, impl, keys, p):
    """function(x, residual, weight) -> y, summed; the plain op has neither of the latter."""

    def function(x, residual, weight):
        options = {"dropout_p": p, "dropout_keys": keys, "impl": impl}
        if op == "dropout":
            return dropout(x, p, keys, impl=impl), None
        if op == "rms_norm":
            return rms_norm(x, weight, 1e-5, residual, **options)
        return layer_norm(x, weight, None, 1e-5, residual, **options)

    return function


def plain(op, scale):
    """The same from torch's own ops, on given factors."""

    def function(x, residual, weight):
        dropped = x * scale.to(x.dtype)
        if op == "dropout":
            return dropped, None
        summed = dropped + residual
        norm = F.layer_norm if op == "layer_norm" else F.rms_norm
        more = (None,) if op == "layer_norm" else ()
        return norm(summed, x.shape[-1:], weight, *more, 1e-5), summed

    return function


def results_and_gradients(function, op, inputs, grads):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = [y for y in function(*leaves) if y is not None]
    leaves = leaves[:1] if op == "dropout" else leaves
    given = [g.to(y.dtype) for g, y in zip(grads, outputs, strict=False)]
    found = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    return [x.detach() for x in (*outputs, *found)]


def make(N, C, dtype):
    g = generator(N)
    x, residual, dy, dsummed = (torch.randn(N, C, generator=g).to(dtype) for _ in range(4))
    weight = (1 + 0.3 * torch.randn(C, generator=g)).to(dtype)
    return (x, residual, weight), (dy, dsummed)


@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize(("op", "impl", "dtype"), OPS)
def test_results_and_every_gradient(op, impl, dtype, p):
    N, C = 11, 1100  # two chunks of a row, and more rows than programs
    inputs, grads = make(N, C, dtype)
    keys = random.matrix_keys(SEED, N, C, inputs[0].device, (4096, 7))
    with poison_empty():
        actual = results_and_gradients(call(op, impl, keys, p), op, inputs, grads)
    scale = factors(keys, p).to(inputs[0].device)
    right = results_and_gradients(plain(op, scale), op, [t.double() for t in inputs], grads)
    peer = results_and_gradients(plain(op, scale), op, inputs, grads)
    names = ("y", "dx") if op == "dropout" else ("y", "summed", "dx", "dresidual", "dweight")
    for name, a, e, q in zip(names, actual, right, peer, strict=True):
        assert a.dtype == dtype and a.is_contiguous(), name
        assert_close_to_reference(a, e, q, reduction_length=C, name=name)
        if name == "dx":
            assert not a[scale == 0].any() and a[scale != 0].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_part_of_the_rows_and_columns_has_the_mask_of_the_whole(impl):
    x = torch.ones(12, 40)
    whole = dropout(x, 0.5, random.matrix_keys(3, 12, 40, x.device), impl=impl)
    for row, N, column, C in ((5, 4, 0, 40), (0, 12, 16, 8)):
        keys = random.matrix_keys(3, N, C, x.device, (row, column))
        part = dropout(x[:N, :C], 0.5, keys, impl=impl)
        assert torch.equal(part, whole[row : row + N, column : column + C])
    other = dropout(x, 0.5, random.matrix_keys(4, 12, 40, x.device), impl=impl)
    assert not torch.equal(other, whole)
    rows = dropout(x.view(3, 4, 40), 0.5, random.matrix_keys(3, 12, 40, x.device), impl=impl)
    assert torch.equal(rows.view(12, 40), whole)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("impl", IMPLS)
def test_one_of_the_gradients_missing(impl, op):
    inputs, (dy, dsummed) = make(5, 48, torch.float32)
    keys = random.matrix_keys(1, 5, 48, dy.device)
    scale = factors(keys, 0.3).to(dy.device)
    for index, grad in ((0, dy), (1, dsummed)):
        found = []
        for function, dtype in (
            (call(op, impl, keys, 0.3), torch.float32),
            (plain(op, scale), torch.float64),
        ):
            leaves = [t.to(dtype).requires_grad_() for t in inputs]
            given = (function(*leaves)[index], leaves[:2], grad.to(dtype))
            found.append(torch.autograd.grad(*given))
        for a, e in zip(*found, strict=True):
            assert_close_to_reference(a, e, reduction_length=48)


@pytest.mark.parametrize("impl", ["torch", *IMPLS])
def test_no_dropout_is_the_norm_without_it_to_the_bit(impl):
    (x, residual, weight), _ = make(5, 48, torch.float32)
    keys = random.matrix_keys(1, 5, 48, x.device)
    given = (x, weight, None, 1e-5, residual)
    results = (
        layer_norm(*given, impl=impl),
        layer_norm(*given, dropout_p=0.0, dropout_keys=keys, impl=impl),
    )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert dropout(x, 0.0, None) is x and dropout(x, 0.0, keys) is x


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_infinite_values(impl):
    x = torch.zeros(0, 8, requires_grad=True)
    y = dropout(x, 0.5, random.matrix_keys(1, 0, 8, x.device), impl=impl)
    assert y.shape == x.shape and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    ones = torch.ones(4, 64)
    keys = random.matrix_keys(1, 4, 64, ones.device)
    wide = dropout(ones.expand(4, 64)[:, ::1], 0.5, keys, impl=impl)
    assert set(wide.unique().tolist()) == {0.0, 2.0}


def test_opcheck():
    x = torch.randn(4, 8, requires_grad=True)
    keys = random.matrix_keys(1, 4, 8, "cpu")
    torch.library.opcheck(_dropout, (x, *keys, 0.5, "reference"))
    weight, residual, more = torch.ones(8), torch.randn(4, 8), (*keys, 0.5)
    norm = (x, residual, weight, None, 1e-5, "torch", *more)
    torch.library.opcheck(_layer_norm_forward, norm)
    torch.library.opcheck(_rms_norm_forward, (x, residual, weight, 1e-5, "reference", *more))
    rows, stat = x.detach(), torch.rand(4, 1)
    options = (False, True, "torch", *more)
    given = (rows, rows, rows, weight, stat, stat, *options)
    torch.library.opcheck(_layer_norm_backward, given)
    given = (rows, rows, rows, weight, stat, True, "reference", *more)
    torch.library.opcheck(_rms_norm_backward, given)


@pytest.mark.parametrize("op", ["dropout", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_in_one_graph(impl, op):
    inputs, grads = make(6, 32, torch.float32)
    function = call(op, impl, random.matrix_keys(1, 6, 32, inputs[0].device), 0.25)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = (results_and_gradients(f, op, inputs, grads) for f in (function, compiled))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_cost():
    assert cost.dropout(8, 4, 2).forward_bytes == cost.dropout(8, 4, 2).backward_bytes == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"expected x \(..., C\)"),
        ({"x": torch.zeros(2, 8).long()}, "expected x with dtype in"),
        ({"p": 1.0}, r"expected a dropout probability in \[0, 1\), got 1.0"),
        ({"p": -0.1}, r"expected a dropout probability in \[0, 1\), got -0.1"),
        ({"keys": None}, "expected keys with dropout, got None"),
        (
            {"keys": random.matrix_keys(1, 3, 8, "cpu")},
            r"keys of dropout .*\(2,\), got \(3,\)",
        ),
        ({"keys": (torch.zeros(2), torch.zeros(8))}, "expected keys of dropout with dtype in"),
    ],
    ids=str,
)
def test_messages(change, message):
    given = {"x": torch.zeros(2, 8), "p": 0.5, "keys": random.matrix_keys(1, 2, 8, "cpu")}
    with pytest.raises(ValueError, match="^dropout: .*" + message):
        dropout(**(given | change))
    with pytest.raises(ValueError, match="^layer_norm: expected a residual with dropout"):
        layer_norm(given["x"], torch.ones(8), None, dropout_p=0.5, dropout_keys=given["keys"])
