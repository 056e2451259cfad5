"""projected_attention against rope and flash_attention on the parts of the projection, to the bit.

Those ops are held to float64 in their own tests; here the results and the gradient, written in one
piece, must be theirs.
"""

import grid
import pytest
import torch
from grid import generator

from stellarator_kernels import flash_attention, projected_attention, rope
from stellarator_kernels.attention.projected import adds_bias
from stellarator_kernels.rope import rope_table
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

CASES = [("cpu", torch.bfloat16), ("cpu", torch.float32), ("torch", torch.float32)]
CASES += [("reference", torch.float64), *grid.CASES]
# B, T, H, G, D, window, lengths of documents
SHAPES = {
    "one_token": (1, 1, 1, 1, 16, None, None),
    "groups": (2, 70, 6, 2, 32, None, None),
    "mqa_window": (2, 33, 3, 1, 16, 7, None),
    "packed": (2, 40, 4, 2, 16, None, [3, 1, 50, 26]),
    "packed_window": (1, 90, 2, 2, 64, 20, [64, 1, 25]),
}


def make(shape, dtype):
    B, T, H, G, D, window, lengths = SHAPES[shape]
    g = generator(T + H)
    qkv = torch.randn(B, T, (H + 2 * G) * D, generator=g).to(dtype)
    dout = torch.randn(B, T, H, D, generator=g).to(dtype)
    positions = torch.arange(T).expand(B, T) + 5
    cu_seqlens = None
    if lengths is not None:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        cu_seqlens = ends.int()
    return qkv, dout, positions, window, cu_seqlens


def op_by_op(qkv, H, G, positions, table, window, cu_seqlens, impl):
    """The same from the public ops; autograd puts the gradient together."""
    D = qkv.shape[-1] // (H + 2 * G)
    q, k, v = qkv.unflatten(-1, (-1, D)).split([H, G, G], dim=2)
    if table is not None:
        q, k = rope(q, k, positions, 1e4, table=table, impl=impl)
    if cu_seqlens is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attention(q, k, v, window=window, cu_seqlens=cu_seqlens, impl=impl)
    return out.reshape(*qkv.shape[:2], H, D)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_the_bits_are_those_of_the_ops(impl, dtype, rotated, shape):
    qkv, dout, positions, window, cu_seqlens = make(shape, dtype)
    _, _, H, G, D, _, _ = SHAPES[shape]
    table = rope_table(positions, D, 1e4) if rotated else None
    given = qkv.clone().requires_grad_()
    with poison_empty():
        out = projected_attention(
            given, H, G, table, window=window, cu_seqlens=cu_seqlens, impl=impl
        )
        (dqkv,) = torch.autograd.grad(out, given, dout)
    leaf = qkv.clone().requires_grad_()
    expected = op_by_op(leaf, H, G, positions, table, window, cu_seqlens, impl)
    (dexpected,) = torch.autograd.grad(expected, leaf, dout)
    assert torch.equal(out, expected) and torch.equal(dqkv, dexpected)
    assert torch.equal(given, qkv)  # the projection is as it was
    assert dqkv.is_contiguous() and out.shape == dout.shape


SHAPES_WITH_BIAS = {"mqa_window": True, "packed": False}  # rotated or not


@pytest.mark.parametrize(("shape", "rotated"), SHAPES_WITH_BIAS.items())
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_a_bias_of_the_projection(impl, dtype, rotated, shape):
    """Against float64 and the sum made before, in eager code of the same dtype as the peer."""
    qkv, dout, positions, window, cu_seqlens = make(shape, dtype)
    _, _, H, G, D, _, _ = SHAPES[shape]
    bias = torch.randn(qkv.shape[-1], generator=generator(3)).to(dtype)
    table = rope_table(positions, D, 1e4) if rotated else None
    options = {"window": window, "cu_seqlens": cu_seqlens}

    def run(kind, impl, together):
        leaves = [x.to(kind).requires_grad_() for x in (qkv.clone(), bias.clone())]
        given, added = leaves
        if together:
            out = projected_attention(given, H, G, table, bias=added, **options, impl=impl)
        else:
            out = projected_attention(given + added, H, G, table, **options, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(kind))]

    with poison_empty():
        found = run(dtype, impl, True)
    exact, peers = run(torch.float64, "reference", False), run(dtype, "reference", False)
    for actual, reference, peer in zip(found, exact, peers, strict=True):
        assert_close_to_reference(actual, reference, peer)


@pytest.mark.parametrize("impl,expected", [("cpu", False), ("torch", False), ("reference", False)])
def test_where_a_bias_is_left_to_attention_cpu(impl, expected):
    """On a CPU nowhere by itself: the product adds it at no cost."""
    x = torch.ones(2, 3, 32)
    assert adds_bias(x, impl) == expected and not adds_bias(x, "auto")
    assert not adds_bias(x.double(), "auto")


@pytest.mark.parametrize("shape", [(0, 3, 32), (2, 0, 32)])
def test_no_tokens_cpu(shape):
    qkv = torch.ones(shape).requires_grad_()
    table = tuple(torch.ones(shape[0] * shape[1], 4) for _ in range(2))
    out = projected_attention(qkv, 2, 1, table)
    out.sum().backward()
    assert out.shape == (*shape[:2], 2, 8) and qkv.grad.shape == shape


def test_gradient_of_a_strided_result_twice_cpu():
    qkv, dout, positions, _, _ = make("groups", torch.float32)
    _, _, H, G, D, _, _ = SHAPES["groups"]
    given = qkv.requires_grad_()
    out = projected_attention(given, H, G, rope_table(positions, D, 1e4))
    strided = dout.transpose(1, 2).contiguous().transpose(1, 2)
    first, second = (
        torch.autograd.grad(out, given, d, retain_graph=True)[0] for d in (strided, dout)
    )
    assert torch.equal(first, second)


def test_the_registered_backward_cpu():
    qkv, dout, positions, _, _ = make("groups", torch.float32)
    _, _, H, G, D, _, _ = SHAPES["groups"]
    q, k, _ = (x.contiguous() for x in qkv.unflatten(-1, (-1, D)).split([H, G, G], dim=2))
    out, lse = torch.ops.stellarator.flash_attention_forward(
        q, k, k, None, None, None, True, None, 0.2, None, 0.0, False, True, "auto"
    )
    cos, sin = rope_table(positions, D, 1e4)
    given = (dout, q, k, qkv, out, lse, cos, sin, None, None, 0.2, "auto")
    torch.library.opcheck(torch.ops.stellarator.projected_attention_backward, given)


def test_one_graph_under_torch_compile_cpu():
    qkv, dout, positions, window, _ = make("mqa_window", torch.float32)
    _, _, H, G, D, _, _ = SHAPES["mqa_window"]
    table = rope_table(positions, D, 1e4)

    def call(x):
        return projected_attention(x * 2, H, G, table, window=window)

    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = qkv.clone().requires_grad_()
        out = function(leaf)
        found.append((out.detach(), *torch.autograd.grad(out, leaf, dout)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "qkv"),
        ({"num_kv_heads": 0}, "qkv"),
        ({"qkv": torch.ones(2, 70, 321)}, "qkv"),
        ({"qkv": torch.ones(70, 320)}, "qkv"),
        ({"table": (torch.ones(140, 16), torch.ones(70, 16))}, "sin"),
        ({"table": (torch.ones(140, 16).double(), torch.ones(140, 16))}, "cos"),
        ({"window": 0}, "window"),
        ({"bias": torch.ones(319)}, "bias"),
        ({"bias": torch.ones(320).double()}, "bias"),
        ({"qkv": torch.ones(2, 70, 70), "table": (torch.ones(140, 3),) * 2}, "even head width"),
        ({"cu_seqlens": torch.tensor([0, 140])}, "cu_seqlens"),
    ],
)
def test_arguments_that_do_not_fit_cpu(change, message):
    given = {
        "qkv": torch.ones(2, 70, 320), "num_heads": 6, "num_kv_heads": 2,
        "table": (torch.ones(140, 16), torch.ones(140, 16)),
    }  # fmt: skip
    projected_attention(**given)
    with pytest.raises(ValueError, match=f"expected .*{message}"):
        projected_attention(**(given | change))
