"""bias_rope against complex rotation and autograd in float64, with split + rope as the peer.

Where Triton runs: grid.py. Not covered: that the table is right (test_rope.py).
"""

import pytest
import torch
from grid import CASES, IMPLS, KERNELS, TRITON, generator

from stellarator_kernels import bias_rope, cost, rope
from stellarator_kernels.bias_rope import (
    _bias_rope_backward,
    _bias_rope_forward,
    tiles,
)
from stellarator_kernels.bias_rope import grid as grid_of
from stellarator_kernels.rope import rope_table
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

THETA_3B = 999999.4420358813
# B, T, H, G, D
SHAPES = {
    "one_pair": (1, 1, 1, 1, 2),
    "mqa_in_two_groups_of_heads": (2, 37, 9, 1, 16),
    "odd_heads_and_half_width_40": (3, 7, 6, 3, 80),
    "half_width_7": (1, 3, 2, 1, 14),
    "many_tokens": (2, 75, 3, 1, 32),
    "3b": (1, 9, 24, 2, 128),
    "7b": (1, 5, 36, 4, 128),
    "15b": (2, 3, 48, 4, 128),
}


def make(shape, dtype, bias=True, rotated=True):
    """qkv, bias, positions (of documents, from an offset) and the gradients of the three parts."""
    B, T, H, G, D = SHAPES[shape]
    g = generator(T + H)
    width = (H + 2 * G) * D
    qkv = torch.randn(B, T, width, generator=g).to(dtype)
    b = torch.randn(width, generator=g).to(dtype) if bias else None
    positions = torch.arange(T).repeat(B, 1) + 5000
    positions[:, T // 2 :] -= 5000 + T // 2  # a second document
    gradients = [torch.randn(B, T, n, D, generator=g).to(dtype) for n in (H, G, G)]
    return qkv, b, positions if rotated else None, gradients


def exact(qkv, bias, positions, H, G):
    """(first + i*second) * exp(i*angle) in complex128, angles from the fp32 table."""
    x = qkv if bias is None else qkv + bias
    q, k, v = x.unflatten(-1, (H + 2 * G, -1)).split((H, G, G), -2)
    if positions is None:
        return q, k, v
    cos, sin = rope_table(positions, q.shape[-1], THETA_3B)
    turn = torch.complex(cos.double(), sin.double()).view(*positions.shape, 1, -1)

    def turned(x):
        y = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((y.real, y.imag), -1)

    return turned(q), turned(k), v


def eager(qkv, bias, positions, H, G):
    """What a model writes: the sum, divided, and transformers' rotation."""
    x = qkv if bias is None else qkv + bias
    q, k, v = x.unflatten(-1, (H + 2 * G, -1)).split((H, G, G), -2)
    if positions is None:
        return q, k, v
    cos, sin = (
        torch.cat((t, t), -1).to(x.dtype).view(*positions.shape, 1, -1)
        for t in rope_table(positions, q.shape[-1], THETA_3B)
    )

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k), v


def ours(impl):
    def function(qkv, bias, positions, H, G):
        theta = None if positions is None else THETA_3B
        return bias_rope(qkv, bias, positions, theta, H, G, impl=impl)

    return function


def results_and_gradients(function, qkv, bias, positions, gradients, H, G):
    """q, k, v, dqkv and, with a bias, dbias."""
    leaves = [x.detach().clone().requires_grad_() for x in (qkv, bias) if x is not None]
    outputs = function(leaves[0], leaves[1] if bias is not None else None, positions, H, G)
    found = torch.autograd.grad(outputs, leaves, [g.to(qkv.dtype) for g in gradients])
    return [x.detach() for x in (*outputs, *found)]


def compare(impl, dtype, shape, **options):
    """Every result and gradient of one case against float64."""
    qkv, bias, positions, gradients = make(shape, dtype, **options)
    B, T, H, G, _ = SHAPES[shape]
    wide = qkv.double(), None if bias is None else bias.double()
    with poison_empty():
        actual = results_and_gradients(ours(impl), qkv, bias, positions, gradients, H, G)
    right = results_and_gradients(exact, *wide, positions, gradients, H, G)
    peer = results_and_gradients(eager, qkv, bias, positions, gradients, H, G)
    for name, a, e, p in zip(("q", "k", "v", "dqkv", "dbias"), actual, right, peer, strict=False):
        assert a.dtype == dtype and a.is_contiguous(), name
        length = B * T if name == "dbias" else 2
        assert_close_to_reference(a, e, p, reduction_length=length, name=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_results_and_every_gradient(impl, dtype, shape):
    compare(impl, dtype, shape)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"bias": False}, {"rotated": False}], ids=str)
def test_without_a_bias_or_without_positions(impl, options):
    compare(impl, torch.float32, "mqa_in_two_groups_of_heads", **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_bits_are_those_of_rope_on_slices(impl):
    """Without a bias: the same rotation in fp32, rounded once."""
    dtype = torch.float16
    B, T, H, G, D = SHAPES["many_tokens"]
    qkv, _, positions, gradients = make("many_tokens", dtype, bias=False)
    q, k, v = qkv.unflatten(-1, (H + 2 * G, D)).split((H, G, G), 2)
    expected = *rope(q, k, positions, THETA_3B, impl=impl), v
    actual = bias_rope(qkv, None, positions, THETA_3B, H, G, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=TRITON)])
def test_16_bit_values_are_rounded_once(impl):
    """The sum of 1024 and 0.4 is not 1024 before it is turned."""
    B, T, H, G, D = SHAPES["many_tokens"]
    qkv, bias, positions, _ = make("many_tokens", torch.float16)
    qkv, bias = torch.full_like(qkv, 1024.0), torch.full_like(bias, 0.4)
    actual = bias_rope(qkv, bias, positions, THETA_3B, H, G, impl=impl)
    wanted = exact(qkv.double(), bias.double(), positions, H, G)
    for a, e in zip(actual, wanted, strict=True):
        # Half a unit in the last place of fp16, and the last bits of fp32.
        assert ((a.double() - e).abs() <= e.abs() * 2**-11 * 1.001 + 2e-4).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_table_made_once_gives_the_same_bits_in_any_layout(impl):
    B, T, H, G, D = SHAPES["many_tokens"]
    qkv, bias, positions, gradients = make("many_tokens", torch.float32)
    arguments = (positions, gradients, H, G)
    plain = results_and_gradients(ours(impl), qkv, bias, *arguments)
    table = rope_table(positions, D, THETA_3B)

    def strided(qkv, bias, positions, H, G):
        wide = torch.cat((qkv, qkv), -1)[..., : qkv.shape[-1]]
        return bias_rope(wide, bias, positions, None, H, G, table=table, impl=impl)

    given = results_and_gradients(strided, qkv, bias, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))
    # One row without a batch, and gradients of it with heads before tokens.
    row, at = (qkv[1], bias, positions[1]), [g[1] for g in gradients]
    one = results_and_gradients(ours(impl), *row, at, H, G)
    assert all(torch.equal(a, b[1]) for a, b in zip(one[:4], plain[:4], strict=True))
    turned = [g.transpose(0, 1).contiguous().transpose(0, 1) for g in at]
    again = results_and_gradients(ours(impl), *row, turned, H, G)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_part_unused_and_a_frozen_bias(impl):
    B, T, H, G, D = SHAPES["many_tokens"]
    qkv, bias, positions, gradients = make("many_tokens", torch.float32)
    leaf = qkv.requires_grad_()
    q, _, v = bias_rope(leaf, bias, positions, THETA_3B, H, G, impl=impl)
    (actual,) = torch.autograd.grad((q, v), leaf, (gradients[0], gradients[2]))
    dk = torch.zeros_like(gradients[1])
    given = (positions, (gradients[0], dk, gradients[2]), H, G)
    right = results_and_gradients(exact, qkv.double(), bias.double(), *given)[3]
    peer = results_and_gradients(eager, qkv, bias, *given)[3]
    assert_close_to_reference(actual, right, peer, reduction_length=2)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl):
    qkv, bias = torch.zeros(2, 0, 32, requires_grad=True), torch.zeros(32, requires_grad=True)
    positions = torch.zeros(2, 0, dtype=torch.int64)
    q, k, v = bias_rope(qkv, bias, positions, 1e4, 2, 1, impl=impl)
    assert q.shape == (2, 0, 2, 8) and k.shape == v.shape == (2, 0, 1, 8)
    dqkv, dbias = torch.autograd.grad(q.sum() + k.sum() + v.sum(), (qkv, bias))
    assert dqkv.shape == qkv.shape and torch.equal(dbias, torch.zeros(32))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bias_gradient_of_many_tokens_keeps_its_digits(impl):
    """600 gradients of 1 and more for each value; the same to the bit on every run."""
    T, H, G, D = 600, 1, 1, 4
    gradients = [1 + torch.rand(1, T, n, D, generator=generator(1)).half() for n in (H, G, G)]
    leaf = torch.zeros(12, dtype=torch.float16, requires_grad=True)
    qkv, positions = torch.zeros(1, T, 12, dtype=torch.float16), torch.arange(T)[None]
    found = []
    for _ in range(2):
        parts = bias_rope(qkv, leaf, positions, 1e4, H, G, impl=impl)
        found.append(torch.autograd.grad(parts, leaf, gradients)[0])
    wide = leaf.detach().double().requires_grad_()
    cos, sin = rope_table(positions, D, 1e4)
    q, k, v = (wide + qkv.double()).unflatten(-1, (3, D)).split(1, -2)
    turn = torch.complex(cos.double(), sin.double()).view(1, T, 1, -1)
    turned = [torch.complex(*x.chunk(2, -1)) * turn for x in (q, k)]
    parts = [torch.cat((x.real, x.imag), -1) for x in turned]
    (right,) = torch.autograd.grad((*parts, v), wide, [g.double() for g in gradients])
    assert torch.equal(*found)
    assert (found[0] - right).abs().max() <= 0.001 * right.abs().max()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl):
    qkv, bias = (torch.randn(n, dtype=torch.float64).requires_grad_() for n in ((2, 24), (24,)))
    positions = torch.tensor([3, 900])

    def function(qkv, bias):
        return bias_rope(qkv, bias, positions, 1e4, 2, 1, impl=impl)

    assert torch.autograd.gradcheck(function, (qkv, bias))


def test_opcheck():
    qkv, bias, positions, gradients = make("half_width_7", torch.bfloat16)
    _, _, H, G, D = SHAPES["half_width_7"]
    table = rope_table(positions, D, 1e4)
    for cos, sin in (table, (None, None)):
        leaves = qkv[0].clone().requires_grad_(), bias.clone().requires_grad_()
        torch.library.opcheck(_bias_rope_forward, (*leaves, cos, sin, H, G, "torch"))
        parts = [g[0] for g in gradients]
        torch.library.opcheck(_bias_rope_backward, (*parts, cos, sin, cos is not None, "torch"))


@pytest.mark.parametrize("impl", KERNELS)
def test_compiled_in_one_graph(impl):
    qkv, bias, positions, gradients = make("many_tokens", torch.float32)
    _, _, H, G, _ = SHAPES["many_tokens"]
    function = ours(impl)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = (
        results_and_gradients(f, qkv, bias, positions, gradients, H, G)
        for f in (function, compiled)
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_tiles_and_grid():
    assert [tiles(D) for D in (2, 80, 128, 512)] == [
        (128, 8, 1, 4), (2, 8, 64, 4), (2, 8, 64, 4), (1, 8, 256, 4)
    ]  # fmt: skip
    # StarCoder2-3B: three groups of query heads, one of keys and one of values.
    assert grid_of(16384, 24, 2, 128, 132) == (212, 5) and grid_of(0, 24, 2, 128, 132) == (1, 5)
    assert grid_of(9, 48, 1, 128, 132) == (5, 8)


def test_cost():
    found = cost.bias_rope(8192, 24, 2, 128, 2)
    assert found.forward_bytes == 2 * 8192 * 3584 * 2 + 8192 * 512
    assert cost.bias_rope(8192, 24, 2, 128, 2, rotated=False).backward_bytes == 2 * 8192 * 3584 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(32)}, r"expected qkv \(..., T, \(H \+ 2G\) \* D\) with H = 2, G = 1"),
        ({"qkv": torch.zeros(3, 33)}, r"expected qkv .*got \(3, 33\)"),
        ({"num_kv_heads": 0}, "expected qkv .*G = 0"),
        ({"qkv": torch.zeros(3, 12)}, "expected an even head width D > 0, got 3"),
        ({"qkv": torch.zeros(3, 32, dtype=torch.int8)}, "expected qkv with dtype in"),
        ({"bias": torch.zeros(31)}, r"bias \(\(H \+ 2G\) \* D,\) = \(32,\), got \(31,\)"),
        ({"bias": torch.zeros(32).half()}, "expected bias with dtype in"),
        ({"positions": None}, "expected no theta and no table without positions"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, r"positions \(..., T\) = \(3,\)"),
        ({"positions": torch.zeros(3)}, "expected positions with dtype in"),
        ({"theta": None}, "expected theta or a table with positions"),
        ({"bias": torch.zeros(32, device="meta")}, "expected all tensors on one device"),
        ({"table": (torch.zeros(3, 4), torch.zeros(3, 8))}, r"sin \(N, D/2\) = \(3, 4\)"),
        ({"table": (torch.zeros(3, 4).half(), torch.zeros(3, 4))}, "cos with dtype in"),
    ],
    ids=str,
)
def test_messages(change, message):
    arguments = {
        "qkv": torch.zeros(3, 32),
        "bias": torch.zeros(32),
        "positions": torch.zeros(3, dtype=torch.int64),
        "theta": 1e4,
        "num_heads": 2,
        "num_kv_heads": 1,
    } | change
    with pytest.raises(ValueError, match="^bias_rope: .*" + message):
        bias_rope(**arguments)
