"""Flash attention: out, lse and all gradients, in every implementation.

The independent reference is F.scaled_dot_product_attention in float64 with keys and values expanded
and a mask made here by a loop over (query, key); `impl="reference"` is held to it, and then holds
the others to itself in float64. Errors are bounded by twice those of plain code in the same dtype.

Where Triton runs: grid.py; in the interpreter bf16 is computed in fp32 and stored truncated.
attention_cases.py has the cases, test_flash_attention_triton.py more of the Triton kernels, and
test_flash_attention_code.py compiles them. Not covered: speed.
"""

import math

import grid
import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BF16,
    CASES,
    EXTRAS,
    FP16,
    FP32,
    FP64,
    Case,
    check,
    plain,
    random_case,
    run,
)
from grid import EXTENSION, INTERPRETED, TRITON, generator, levels

from stellarator_kernels import cost, extension, flash_attention
from stellarator_kernels.attention import aten
from stellarator_kernels.testing import assert_close_to_reference

IMPLS, KERNELS = [grid.CPU, *grid.IMPLS], [grid.CPU, *grid.KERNELS]


@pytest.mark.parametrize("case", (CASES | EXTRAS).values(), ids=CASES | EXTRAS)
def test_reference_is_sdpa_with_a_mask(case):
    tensors = case.inputs(FP64)
    actual, blind = run(case, tensors, "reference")
    visible = case.visible()
    expected = plain(case, tensors)
    assert torch.equal(blind, (~visible.any(1)).expand_as(blind))
    views = [x[None] if case.documents else x for x in tensors[:3]]
    views = [x.repeat_interleave(case.H // x.shape[2], 2).transpose(1, 2) for x in views]
    if case in CASES.values():  # SDPA has no softcap and no dropout that can be foretold
        sdpa = F.scaled_dot_product_attention(*views, attn_mask=visible, scale=case.scale)
        sdpa = torch.where(visible.any(1)[:, None], sdpa, 0.0).transpose(1, 2)
        torch.testing.assert_close(expected[0], sdpa.view_as(expected[0]), rtol=0, atol=1e-12)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch(case, dtype):
    check(case, dtype, "torch")


@pytest.mark.parametrize("name", ["more queries, window", "documents, window"])
def test_torch_on_other_devices(name, monkeypatch):
    """The path of a device for which ATen has no CPU flash kernels, taken here on the CPU."""
    monkeypatch.setattr(aten, "_has_kernels", lambda x: False)
    check(CASES[name], FP32, "torch")


@EXTENSION
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cpu(case, dtype):
    check(case, dtype, "cpu")


# Blocks are 64 queries by 128 keys: several of each, whole and cut, inside and at the edges.
LONGER = {
    "several blocks": Case(400, H=4, G=2, D=64),
    "several blocks, window": Case(390, S=500, H=3, D=40, window=150),
    "several blocks, bidirectional": Case(150, S=300, D=128, causal=False),
    "several blocks, documents": Case(500, H=4, documents=(300, 7, 193), window=129),
}


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", LONGER.values(), ids=LONGER)
def test_cpu_on_every_instruction_set(case, dtype, level, monkeypatch):
    monkeypatch.setenv(extension.ISA_VARIABLE, level)
    check(case, dtype, "cpu")


@EXTENSION
def test_cpu_adds_many_heads_as_exactly_as_plain_code():
    """dk and dv are sums over 12 heads of 512 queries; one term after the other: 1.85 times."""
    case = Case(512, H=12, D=64)
    tensors = case.inputs(FP32)
    exact, eager = plain(case, [x.double() for x in tensors]), plain(case, tensors)
    ours = run(case, tensors, "cpu")[0]
    for a, b, e in list(zip(ours, eager, exact, strict=True))[-2:]:
        error, bar = float((a.double() - e).norm()), float((b.double() - e).norm())
        assert error < 1.2 * bar


@EXTENSION
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_cpu_is_the_same_to_the_bit_on_every_run(threads):
    case, before = LONGER["several blocks, documents"], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *others = (run(case, case.inputs(BF16), "cpu")[0] for _ in range(4))
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    outside = run(case, case.inputs(BF16), "cpu")[0]  # sums of dk and dv may differ, nothing else
    assert all(torch.equal(a, b) for a, b in zip(first[:3], outside[:3], strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(300, H=48, D=64),  # 16-bit backward in calls of 12 heads
        Case(600, window=100, D=8),  # several blocks of 256 rows, some with one mask
        Case(300, S=700, H=3),
        Case(620, documents=(300, 20, 300), window=290),
        Case(257, S=300, window=40, D=20),  # a width that the Triton kernels do not have
    ],
    ids=str,
)
def test_torch_large(case, dtype):
    check(case, dtype, "torch")


@pytest.mark.parametrize("seed", range(24))
def test_torch_random(seed):
    case = random_case(seed, 330)
    print(case)
    check(case, (FP32, BF16)[seed % 2], "torch", seed)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_gradients(impl):
    """Views of one fused projection, a strided last dimension, an expanded gradient."""
    B, T, H, G, D = 2, 37, 4, 2, 16
    fused = torch.randn(B, T, (H + 2 * G) * D, generator=generator(0))
    q, k, v = (x.unflatten(-1, (-1, D)) for x in fused.split([H * D, G * D, G * D], -1))
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert not (q.is_contiguous() or k.is_contiguous()) and v.stride(-1) != 1

    def outputs(tensors, impl):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = flash_attention(*tensors, window=20, impl=impl)
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    exact = outputs([x.double().contiguous() for x in (q, k, v)], "reference")
    for a, e in zip(outputs((q, k, v), impl), exact, strict=True):
        assert_close_to_reference(a.detach(), e.detach(), reduction_length=T * D * H // G)


@pytest.mark.parametrize("impl", IMPLS)
def test_packing_changes_nothing(impl):
    """Each document gives what it gives alone: to the bit in ATen, which gets it alone anyway."""
    case = Case(60, documents=(25, 1, 34), H=3, window=20)
    q, k, v = case.inputs(FP32)[:3]
    packed = flash_attention(q, k, v, **case.options(), impl=impl)
    alone = [
        flash_attention(*(x[None] for x in piece), window=20, impl=impl)[0]
        for piece in zip(*(x.split(case.documents) for x in (q, k, v)), strict=True)
    ]
    error = (packed - torch.cat(alone)).abs().max()
    assert error == 0 if impl == "torch" else error < 1e-6


@pytest.mark.parametrize("impl", KERNELS)
def test_same_bits_every_time(impl):
    case = Case(50, H=6, G=2, window=23)
    tensors = case.inputs(BF16)
    first, _ = run(case, tensors, impl)
    for a, b in zip(first, run(case, tensors, impl)[0], strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("B,T,S", [(0, 4, 4), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_do(impl, B, T, S):
    q, k, v = (torch.ones(B, n, 2, 16, requires_grad=True) for n in (T, S, S))
    out, lse = flash_attention(q, k, v, return_lse=True, impl=impl)
    (out.sum() + lse.exp().sum()).backward()
    assert out.shape == q.shape and lse.shape == (B, 2, T)
    assert not out.any() and (lse == -math.inf).all()
    assert not any(x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize(
    "case",
    [
        Case(5, S=7, H=2, D=4, window=3),
        Case(6, documents=(2, 4), D=4),
        Case(6, D=4, softcap=0.8, dropout_p=0.3),
        Case(7, documents=(2, 5), H=4, G=2, D=4, window=3, softcap=0.8, dropout_p=0.3),
    ],
    ids=str,
)
def test_gradcheck(case):
    tensors = [x.requires_grad_() for x in case.inputs(FP64)[:3]]

    def function(q, k, v):
        return flash_attention(q, k, v, **case.options(), return_lse=True, impl="reference")

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    q, k, v, dout, dlse = Case(20, B=2, H=1).inputs(FP32)
    cu_seqlens = torch.tensor([0, 8, 20], dtype=torch.int32)
    ops = torch.ops.stellarator
    keys = torch.arange(40).view(2, 1, 20).int(), torch.arange(40).view(2, 20).int()
    for row, documents in ((slice(None), None), (slice(1), cu_seqlens)):
        tensors = [x[row].clone().requires_grad_() for x in (q, k, v)]
        extras = (2.0, 0.1) if impl in ("triton", "reference") else (None, 0.0)
        row_keys, column_keys = (x[row] for x in keys) if extras[0] else (None, None)
        options = (documents, row_keys, column_keys, True, 7, 0.25, *extras)
        torch.library.opcheck(ops.flash_attention_forward, (*tensors, *options, True, True, impl))
        out, lse = ops.flash_attention_forward(*tensors, *options, True, True, impl)
        saved = [x.detach() for x in (*tensors, out, lse)]
        for gradient in (dlse[row], None):
            arguments = (dout[row], gradient, *saved, *options, True, impl)
            torch.library.opcheck(ops.flash_attention_backward, arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_graph_break(packed):
    case = Case(40, H=4, G=2, documents=(13, 27) if packed else (), window=9)
    tensors = case.inputs(FP32)

    def function(q, k, v):
        out, lse = flash_attention(q * 2, k, v, **case.options(), return_lse=True)
        return (out * tensors[3]).sum() + (lse * tensors[4]).sum()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in tensors[:3]]
        results.append(torch.autograd.grad(call(*inputs), inputs))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


@TRITON
def test_a_part_drops_what_the_whole_drops():
    """Rows, heads, queries and keys cut out: the same weights are dropped as in one piece."""
    q, k, v, *_ = Case(48, B=2, H=4, G=2).inputs(FP32)
    for impl in ("reference", "triton"):
        form = {"dropout_p": 0.4, "dropout_seed": torch.tensor(7), "impl": impl}
        whole = flash_attention(q, k, v, **form)
        row = flash_attention(q[1:], k[1:], v[1:], dropout_origin=(1, 0, 0, 0), **form)
        assert torch.equal(row, whole[1:])
        heads = (q[:, :, 2:], k[:, :, 1:], v[:, :, 1:])
        assert torch.equal(
            flash_attention(*heads, dropout_origin=(0, 2, 0, 0), **form), whole[:, :, 2:]
        )
        last = flash_attention(q[:, 32:], k, v, dropout_origin=(0, 0, 32, 0), **form)
        torch.testing.assert_close(last, whole[:, 32:], rtol=0, atol=1e-6)
        other = flash_attention(q, k, v, **(form | {"dropout_seed": 8}))
        assert not torch.allclose(other, whole, atol=0.1)


def zeros(*shape, dtype=FP32):
    """A tensor of this shape."""
    return torch.zeros(shape, dtype=dtype)


def documents(*ends, dtype=torch.int32):
    """cu_seqlens."""
    return torch.tensor(ends, dtype=dtype)


Q, K = zeros(2, 8, 4, 16), zeros(2, 8, 2, 16)
P, PK = zeros(8, 4, 16), zeros(8, 2, 16)
ERRORS = {
    "q dims": ((P, K, K), {}, r"expected q \(B, T, H, D\), got \(8, 4, 16\)\."),
    "packed q dims": ((Q, PK, PK), {"cu_seqlens": documents(0, 8)}, r"expected q \(N, H, D\), got"),
    "k dims": ((Q, PK, PK), {}, r"expected k \(B, S, G, D\), got \(8, 2, 16\)\."),
    "width": ((Q, zeros(2, 8, 2, 8), K), {}, "expected q and k of one head width"),
    "rows": ((Q, zeros(3, 8, 2, 16), K), {}, "expected q and k with the same number of rows B"),
    "tokens": (
        (P, zeros(7, 2, 16), PK),
        {"cu_seqlens": documents(0, 8)},
        "expected q and k with the same number of tokens N",
    ),
    "group": ((Q, zeros(2, 8, 3, 16), K), {}, "expected a multiple of G query heads, got H=4, G=3"),
    "v shape": ((Q, K, K[:, 1:]), {}, r"expected v \(B, S, G, D\) = \(2, 8, 2, 16\), got \(2, 7, "),
    "q dtype": ((Q.int(), K, K), {}, "expected q with dtype in"),
    "k dtype": ((Q, K.half(), K), {}, "expected k with dtype in"),
    "v dtype": ((Q, K, K.half()), {}, "expected v with dtype in"),
    "device": ((Q, K.to("meta"), K.to("meta")), {}, "expected all tensors on one device"),
    "window 0": ((Q, K, K), {"window": 0}, "expected window, a number of keys >= 1, .* got 0"),
    "window half": ((Q, K, K), {"window": 2.5}, "expected window, a number of keys"),
    "window huge": ((Q, K, K), {"window": 2**70}, "expected window, a number of keys"),
    "window": ((Q, K, K), {"window": 3, "causal": False}, "without causal=True, got window=3"),
    "scale 0": ((Q, K, K), {"scale": 0.0}, "expected a finite scale above 0, got 0.0"),
    "scale negative": ((Q, K, K), {"scale": -0.5}, "expected a finite scale above 0"),
    "scale nan": ((Q, K, K), {"scale": float("nan")}, "expected a finite scale above 0"),
    "scale inf": ((Q, K, K), {"scale": float("inf")}, "expected a finite scale above 0"),
    "cu_seqlens dtype": (
        (P, PK, PK),
        {"cu_seqlens": documents(0, 8, dtype=torch.int64)},
        "expected cu_seqlens with dtype in",
    ),
    "cu_seqlens shape": ((P, PK, PK), {"cu_seqlens": documents(8)}, r"cu_seqlens \(E\+1,\) with"),
    "cu_seqlens start": ((P, PK, PK), {"cu_seqlens": documents(1, 8)}, "rises from 0 to N = 8"),
    "cu_seqlens end": ((P, PK, PK), {"cu_seqlens": documents(0, 9)}, "rises from 0 to N = 8"),
    "cu_seqlens order": ((P, PK, PK), {"cu_seqlens": documents(0, 5, 3, 8)}, "rises from 0 to N"),
    "softcap": ((Q, K, K), {"softcap": 0.0}, "expected a finite softcap above 0, or None, got 0.0"),
    "dropout": ((Q, K, K), {"dropout_p": 1.0}, r"expected dropout_p in \[0, 1\), got 1.0"),
    "origin": ((Q, K, K), {"dropout_p": 0.1, "dropout_origin": (0, 0, 0)}, "four indices >= 0"),
    "impl": ((Q, K, K), {"impl": "fast"}, "expected impl in"),
}


@pytest.mark.parametrize("arguments,options,message", ERRORS.values(), ids=ERRORS)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match="^flash_attention: .*" + message):
        flash_attention(*arguments, **options)


@INTERPRETED
def test_an_impl_that_cannot_run_is_refused():
    narrow = zeros(1, 4, 2, 12)
    with pytest.raises(RuntimeError, match="head width is 12, not a multiple of 8 from 16 to 256"):
        flash_attention(narrow, narrow, narrow, impl="triton")
    with pytest.raises(RuntimeError, match="not torch.float64"):
        flash_attention(Q.double(), K.double(), K.double(), impl="triton")
    assert flash_attention(narrow, narrow, narrow).shape == narrow.shape
    for impl in ("cpu", "torch"):
        with pytest.raises(RuntimeError, match="softcap is in triton and in the reference only"):
            flash_attention(Q, K, K, softcap=30.0, impl=impl)


@pytest.mark.parametrize(
    "case", [Case(9), Case(9, window=4), Case(9, window=20), Case(9, causal=False)]
)
def test_cost_counts_visible_pairs(case):
    pairs = cost.visible_pairs(case.T, causal=case.causal, window=case.window)
    assert pairs == int(case.visible().sum())
    counted = cost.flash_attention(pairs, case.T, case.T, case.H, case.G, case.D, 2)
    assert counted.forward_flops == 2 * 2 * case.D * case.H * pairs  # q k^T and P v
    assert counted.backward_flops == 5 * 2 * case.D * case.H * pairs
    assert counted.forward_bytes == 2 * (2 * 9 * 2 * 16 + 2 * 9 * 1 * 16) + 4 * 9 * 2
