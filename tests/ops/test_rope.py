"""rope against transformers' Starcoder2RotaryEmbedding (table, to the bit) and float64 rotations.

The reference of the rotation is a product of complex numbers in float64, with the fp32 table.
Tolerance: testing.assert_close_to_reference, with transformers' rotate-half code as the peer.
Where Triton runs: grid.py.
"""

import sys

import grid
import pytest
import torch
from grid import CASES, CPU_CASES, generator

from stellarator_kernels import cost, extension, rope
from stellarator_kernels.rope import _rope_backward, _rope_forward, rope_table, tiles
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

IMPLS, KERNELS = [grid.CPU, *grid.IMPLS], [grid.CPU, *grid.KERNELS]
THETA_3B = 999999.4420358813
SHAPES = {
    "mqa": (2, 5, 4, 1, 64),
    "one_pair": (1, 1, 1, 1, 2),
    "odd_heads_and_half_width_40": (3, 7, 5, 3, 80),
    "half_width_7": (1, 3, 2, 1, 14),
    "3b": (1, 3, 24, 2, 128),
    "7b": (1, 2, 36, 4, 128),
    "15b": (2, 2, 48, 4, 128),
}


def make(B, T, H, G, D, dtype):
    """q, k, positions and two gradients."""
    g = generator(T + H)
    q, k, dq, dk = (torch.randn(B, T, heads, D, generator=g).to(dtype) for heads in (H, G, H, G))
    positions = torch.randint(0, 16384, (B, T), generator=g)
    return q, k, positions, dq, dk


def exact(x, positions, theta, sign=1):
    """(first + i*second) * exp(i*angle) in complex128, angles from the fp32 table."""
    cos, sin = rope_table(positions, x.shape[-1], theta)
    turn = torch.complex(cos.double(), sign * sin.double()).view(*positions.shape, 1, -1)
    turned = torch.complex(*x.double().chunk(2, -1)) * turn
    return torch.cat((turned.real, turned.imag), -1)


def eager(x, positions, theta, sign=1):
    """transformers' apply_rotary_pos_emb: table and arithmetic in the dtype of x."""
    cos, sin = (
        torch.cat((t, t), -1).to(x.dtype).view(*positions.shape, 1, -1)
        for t in rope_table(positions, x.shape[-1], theta)
    )
    first, second = x.chunk(2, -1)
    return x * cos + sign * torch.cat((-second, first), -1) * sin


@pytest.mark.parametrize("theta", [1e4, 1e5, THETA_3B])
def test_table_equals_that_of_transformers_to_the_bit(theta):
    configuration = pytest.importorskip("transformers.models.starcoder2")
    modeling = pytest.importorskip("transformers.models.starcoder2.modeling_starcoder2")
    config = configuration.Starcoder2Config(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    positions = torch.cat((torch.arange(9), torch.arange(16000, 16384)))[None]
    cos, sin = modeling.Starcoder2RotaryEmbedding(config)(torch.zeros(1), positions)
    ours = rope_table(positions, 128, theta)
    for theirs, table in zip((cos, sin), ours, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(torch.cat((table, table), -1)[None], theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), [*CASES, *CPU_CASES])
def test_results_and_every_gradient(impl, dtype, shape):
    compare(impl, dtype, shape)


def compare(impl, dtype, shape):
    """Results and gradients of one case against float64."""
    q, k, positions, dq, dk = make(*SHAPES[shape], dtype)
    q, k = q.requires_grad_(), k.requires_grad_()
    with poison_empty():
        results = rope(q, k, positions, THETA_3B, impl=impl)
        gradients = torch.autograd.grad(results, (q, k), (dq, dk))
    for name, x, actual, sign in (
        ("q", q, results[0], 1),
        ("k", k, results[1], 1),
        ("dq", dq, gradients[0], -1),
        ("dk", dk, gradients[1], -1),
    ):
        assert actual.dtype == dtype and actual.is_contiguous(), name
        x, arguments = x.detach(), (positions, THETA_3B, sign)
        peer = eager(x, *arguments)
        assert_close_to_reference(actual.detach(), exact(x, *arguments), peer, name=name)


@pytest.mark.parametrize("level", grid.levels())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", ["odd_heads_and_half_width_40", "half_width_7", "3b"])
def test_cpu_on_every_instruction_set(shape, dtype, level, monkeypatch):
    monkeypatch.setenv(extension.ISA_VARIABLE, level)
    compare("cpu", dtype, shape)


@grid.EXTENSION
def test_cpu_is_the_same_to_the_bit_on_any_number_of_threads():
    q, k, positions, _, _ = make(2, 700, 6, 2, 32, torch.bfloat16)
    results = []
    for count in (1, 2, 5):
        with grid.threads(count), poison_empty():
            results.append(rope(q, k, positions, 1e4, impl="cpu"))
    for x, actual in zip((q, k), results[0], strict=True):
        assert_close_to_reference(actual, exact(x, positions, 1e4), eager(x, positions, 1e4))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", [grid.CPU, "torch", "reference"])
def test_16_bit_values_are_rounded_once(impl):
    q, k, positions, _, _ = make(2, 3, 2, 1, 16, torch.bfloat16)
    for x, actual in zip((q, k), rope(q, k, positions, 1e4, impl=impl), strict=True):
        wanted = exact(x, positions, 1e4)
        # Half a unit in the last place, and the last bit of fp32 where the value is near a tie.
        assert ((actual.double() - wanted).abs() <= wanted.abs() * 2**-8 * 1.001 + 1e-6).all()


def test_blocks_of_tokens_join(monkeypatch):
    monkeypatch.setattr(sys.modules["stellarator_kernels.rope"], "_BLOCK_ELEMENTS", 64)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, positions, _, _ = make(1, 11, 2, 1, 16, dtype)
        for x, actual in zip((q, k), rope(q, k, positions, 1e4, impl="torch"), strict=True):
            peer = eager(x, positions, 1e4)
            assert_close_to_reference(actual, exact(x, positions, 1e4), peer)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_table_made_once_gives_the_same_bits(impl):
    q, k, positions, _, _ = make(2, 3, 2, 1, 16, torch.float32)
    table = rope_table(positions, 16, 1e4)
    plain = rope(q, k, positions, 1e4, impl=impl)
    given = rope(q, k, positions, 1e4, table=table, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_slices_of_a_fused_projection(impl):
    torch.manual_seed(0)
    B, T, H, G, D = 2, 5, 6, 2, 16
    positions = torch.arange(T).expand(B, T)
    qkv = torch.randn(B, T, (H + 2 * G) * D)
    q, k, _ = qkv.split((H * D, G * D, G * D), -1)
    q, k = q.unflatten(-1, (H, D)), k.unflatten(-1, (G, D))
    # Strided heads; strided elements; heads before tokens, as transformers has them; no batch.
    layouts = [
        (q, k),
        (torch.randn(B, T, H, 2 * D)[..., ::2], torch.randn(B, T, G, 2 * D)[..., ::2]),
        (torch.randn(B, H, T, D).transpose(1, 2), torch.randn(B, G, T, D).transpose(1, 2)),
        (q[0], k[0]),
    ]
    for q, k in layouts:
        p = positions[: q.shape[0]] if q.dim() == 4 else positions[0]
        for x, actual in zip((q, k), rope(q, k, p, 1e4, impl=impl), strict=True):
            assert actual.shape == x.shape and actual.is_contiguous()
            assert_close_to_reference(actual, exact(x, p, 1e4), eager(x, p, 1e4))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_of_the_results_unused(impl):
    q, k, positions, dq, dk = make(2, 3, 4, 2, 16, torch.float32)
    q, k = q.requires_grad_(), k.requires_grad_()
    for x, other, index, dx in ((q, k, 0, dq), (k, q, 1, dk)):
        result = rope(q, k, positions, 1e4, impl=impl)[index]
        gradient, none = torch.autograd.grad(result, (x, other), dx, allow_unused=True)
        assert none is None
        assert_close_to_reference(gradient, exact(dx, positions, 1e4, -1), reduction_length=4)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl):
    q, k = torch.zeros(2, 0, 4, 8, requires_grad=True), torch.zeros(2, 0, 1, 8)
    rotated, _ = rope(q, k, torch.zeros(2, 0, dtype=torch.int64), 1e4, impl=impl)
    assert rotated.shape == q.shape
    assert torch.autograd.grad(rotated.sum(), q)[0].shape == q.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_depend_on_the_distance_alone(impl):
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(i, j):
        first, _ = rope(q, k, torch.tensor([[i]]), 1e4, impl=impl)
        _, second = rope(q, k, torch.tensor([[j]]), 1e4, impl=impl)
        return (first * second).sum()

    assert torch.isclose(score(100, 60), score(40, 0), atol=1e-4)
    assert not torch.isclose(score(100, 60), score(60, 100), atol=1e-2)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl):
    q, k, positions, _, _ = make(2, 3, 2, 1, 6, torch.float64)

    def function(q, k):
        return rope(q, k, positions, 1e4, impl=impl)

    assert torch.autograd.gradcheck(function, (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.parametrize("impl", [grid.CPU, "torch"])
def test_opcheck(impl):
    q, k, positions, dq, dk = make(1, 3, 2, 1, 8, torch.bfloat16)
    table = rope_table(positions, 8, 1e4)
    leaves = q[0].clone().requires_grad_(), k[0].clone().requires_grad_()
    torch.library.opcheck(_rope_forward, (*leaves, *table, impl))
    torch.library.opcheck(_rope_backward, (dq[0], dk[0], *table, impl))


@pytest.mark.parametrize("impl", KERNELS)
def test_compiled_in_one_graph(impl):
    q, k, positions, dq, dk = make(2, 3, 2, 1, 16, torch.float32)
    q, k = q.requires_grad_(), k.requires_grad_()

    def function(q, k, positions):
        return rope(q, k, positions, 1e4, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = (
        [*(outputs := f(q, k, positions)), *torch.autograd.grad(outputs, (q, k), (dq, dk))]
        for f in (function, compiled)
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_tiles():
    assert [tiles(H, D) for H, D in ((1, 2), (4, 80), (24, 128), (48, 128))] == [
        (1, 1, 1), (4, 64, 1), (16, 64, 4), (16, 64, 4)
    ]  # fmt: skip


def test_cost():
    # StarCoder2-3B, 8192 tokens, bf16: 25.4 us at 4.3 TB/s without the table.
    found = cost.rope(8192, 24, 2, 128, 2)
    assert found.forward_bytes == 2 * 8192 * 26 * 128 * 2 + 8192 * 64 * 4 * 2
    assert abs(found.backward_bytes / 4.3e12 * 1e6 - 26.4) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 7)}, r"expected q \(..., T, H, D\) with even D"),
        ({"q": torch.zeros(4, 8)}, r"expected q \(..., T, H, D\) with even D, got \(4, 8\)"),
        ({"k": torch.zeros(2, 4, 1, 8)}, r"expected k \(..., T, G, D\) .*got \(2, 4, 1, 8\)"),
        ({"k": torch.zeros(2, 3, 1, 6)}, r"expected k \(..., T, G, D\) .*got \(2, 3, 1, 6\)"),
        ({"k": torch.zeros(8)}, r"expected k \(..., T, G, D\) .*got \(8,\)"),
        ({"k": torch.zeros(2, 3, 1, 8).half()}, "expected k with dtype in .*float16"),
        ({"q": torch.zeros(2, 3, 4, 8, dtype=torch.int8)}, "expected q with dtype in"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions \(..., T\) = \(2, 3\)"),
        ({"positions": torch.zeros(2, 3)}, "expected positions with dtype in"),
        ({"k": torch.zeros(2, 3, 1, 8, device="meta")}, "expected all tensors on one device"),
        ({"table": (torch.zeros(6, 4), torch.zeros(6, 8))}, r"sin \(M, D/2\) = \(6, 4\)"),
        ({"table": (torch.zeros(6, 4).half(), torch.zeros(6, 4))}, "cos with dtype in"),
    ],
    ids=str,
)
def test_messages(change, message):
    arguments = {
        "q": torch.zeros(2, 3, 4, 8),
        "k": torch.zeros(2, 3, 1, 8),
        "positions": torch.zeros(2, 3, dtype=torch.int64),
        "theta": 1e4,
    } | change
    with pytest.raises(ValueError, match="^rope: .*" + message):
        rope(**arguments)
