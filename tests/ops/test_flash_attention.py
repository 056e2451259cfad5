"""Flash attention: out, lse and all gradients, in every implementation.

The independent reference is F.scaled_dot_product_attention in float64 with keys and values expanded
and a mask made here by a loop over (query, key); `impl="reference"` is held to it, and then holds
the others to itself in float64. Errors are bounded by twice those of plain code in the same dtype.

Where Triton runs: grid.py; in the interpreter bf16 is computed in fp32 and stored truncated.
test_flash_attention_code.py compiles the kernels. Not covered: speed.
"""

import dataclasses
import math
import random
import sys

import grid
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grid import EXTENSION, INTERPRETED, NATIVE, TRITON, generator, levels

from stellarator_kernels import cost, extension, flash_attention, tuned
from stellarator_kernels._triton import tl, triton
from stellarator_kernels.attention import aten, tiles
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

IMPLS, KERNELS = [grid.CPU, *grid.IMPLS], [grid.CPU, *grid.KERNELS]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SEED = -8_000_000_000_000_000_123  # of dropout


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one call. `documents`: their lengths, packed; T and S are then N."""

    T: int
    S: int = 0  # 0: as T
    B: int = 1
    H: int = 2
    G: int = 1
    D: int = 16
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] = ()
    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    origin: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def keys(self):
        """S, resolved."""
        return self.S or self.T

    def visible(self):
        """(T, S) bool, by the words of the docstring, one pair at a time."""
        document = [number for number, n in enumerate(self.documents) for _ in range(n)]

        def sees(i, j):
            own = i + self.keys - self.T  # the key at the place of query i
            return (
                (not self.causal or j <= own)
                and (self.window is None or own - j < self.window)
                and (not document or document[i] == document[j])
            )

        rows = [[sees(i, j) for j in range(self.keys)] for i in range(self.T)]
        return torch.tensor(rows, dtype=torch.bool).view(self.T, self.keys)

    def options(self):
        """Keyword arguments of the call."""
        cu_seqlens = None
        if self.documents:
            cu_seqlens = torch.tensor([0, *self.documents]).cumsum(0).to(torch.int32)
        return {
            "causal": self.causal,
            "window": self.window,
            "cu_seqlens": cu_seqlens,
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
            "dropout_seed": SEED,
            "dropout_origin": self.origin,
        }

    def factors(self):
        """Of the weights (B, H, T, S): 0 or 1/(1 - p), by the words of random.py, in numpy."""
        if not self.dropout_p:
            return 1.0
        word = np.uint64

        def mix(x):
            x = x + word(0x9E3779B97F4A7C15)
            x = (x ^ (x >> word(30))) * word(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> word(27))) * word(0x94D049BB133111EB)
            return x ^ (x >> word(31))

        with np.errstate(over="ignore"):
            b, h, i, j = (
                np.arange(start, start + size, dtype=word)
                for start, size in zip(
                    self.origin, (self.B, self.H, self.T, self.keys), strict=True
                )
            )
            start = mix(np.array(SEED % 2**64, dtype=word))
            rows = mix(mix(mix(mix(start) + b)[:, None] + h)[..., None] + i) >> word(32)
            columns = mix(mix(mix(start + word(1)) + b)[:, None] + j) >> word(32)
            x = (rows[..., None] ^ columns[:, None, None]).astype(np.uint32)
            x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
            x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
        kept = x.astype(np.float64) / 2**32 >= self.dropout_p
        return torch.from_numpy(kept / (1.0 - self.dropout_p))

    def inputs(self, dtype, seed=0):
        """q, k, v, dout and dlse."""
        g = generator(seed)
        shapes = [(self.B, n, h, self.D) for n, h in self.sizes()] + [
            (self.B, self.T, self.H, self.D),
            (self.B, self.H, self.T),
        ]
        made = [torch.randn(s, generator=g, dtype=FP64).to(dtype) for s in shapes]
        return [x[0] for x in made] if self.documents else made

    def sizes(self):
        """(rows, heads) of q, k and v."""
        return (self.T, self.H), (self.keys, self.G), (self.keys, self.G)


CASES = {
    "whole tiles": Case(64, B=2),
    "odd length, padded width, group 3": Case(67, H=3, D=40),
    "one row": Case(1, H=4, G=2),
    "one query, many keys": Case(1, S=50, B=2),
    "more keys": Case(33, S=70),
    "more queries: some see nothing": Case(70, S=33, H=2, G=2),
    "more queries, window": Case(70, S=33, window=5),
    "more keys, window": Case(40, S=97, window=30),
    "window 1": Case(50, window=1),
    "window 13": Case(90, window=13),
    "window longer than the row": Case(40, window=1000),
    "group 9": Case(35, H=18, G=2, D=24),
    "group 12": Case(35, H=12),
    "group 48": Case(20, H=48),
    "bidirectional": Case(50, causal=False, B=2),
    "bidirectional, fewer keys": Case(50, S=31, causal=False),
    "documents, some of one token, one empty": Case(101, documents=(1, 1, 40, 0, 37, 22)),
    "documents of equal length": Case(96, documents=(32, 32, 32)),
    "one document": Case(40, documents=(40,)),
    "documents, window": Case(120, documents=(70, 3, 47), window=9, H=3),
    "documents, bidirectional": Case(75, documents=(20, 1, 54), causal=False),
    "own scale": Case(40, scale=0.5),
    "width 128": Case(40, D=128),
}


EXTRAS = {
    "softcap": Case(50, H=4, G=2, softcap=1.5),
    "softcap, window, more keys": Case(40, S=97, window=30, softcap=0.7, scale=1.0),
    "dropout": Case(50, B=2, H=4, G=2, dropout_p=0.3),
    "most dropped": Case(60, S=33, dropout_p=0.9, causal=False),
    "dropout of a part": Case(40, B=2, H=3, dropout_p=0.1, origin=(3, 12, 4096, 1000)),
    "documents, window, both": Case(
        120, documents=(70, 3, 47), window=9, H=3, softcap=2.0, dropout_p=0.2
    ),
}


def run(case, tensors, impl):
    """out, lse (0 for -inf), dq, dk, dv, and where lse is -inf."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[:3])
    with poison_empty():
        out, lse = flash_attention(q, k, v, **case.options(), return_lse=True, impl=impl)
        blind = lse == -math.inf
        lse = torch.where(blind, 0.0, lse)
        loss = (out * tensors[3]).sum(dtype=FP64) + (lse * tensors[4]).sum(dtype=FP64)
        gradients = torch.autograd.grad(loss, (q, k, v))
    return [out.detach(), lse.detach(), *gradients], blind


def plain(case, tensors):
    """The same by matrices, in the dtype of the tensors; rows that see nothing give 0."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[:3])
    views = [x[None] if case.documents else x for x in (q, k, v)]
    views = [x.repeat_interleave(case.H // x.shape[2], 2).transpose(1, 2) for x in views]
    visible = case.visible()
    scale = case.D**-0.5 if case.scale is None else case.scale
    scores = views[0] @ views[1].mT * scale
    if case.softcap:
        scores = case.softcap * (scores / case.softcap).tanh()
    scores = scores.masked_fill(~visible, -1e4)
    factors = case.factors()
    factors = factors if isinstance(factors, float) else factors.to(scores.dtype)
    out = ((scores.softmax(-1) * visible * factors) @ views[2]).transpose(1, 2)
    lse = scores.logsumexp(-1).masked_fill(~visible.any(1), 0.0)
    if case.documents:
        out, lse = out[0], lse[0]
    loss = (out * tensors[3]).sum(dtype=FP64) + (lse * tensors[4]).sum(dtype=FP64)
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))]


def check(case, dtype, impl, seed=0):
    """One implementation against the float64 reference.

    The floor of fp32 and fp64 also counts the terms of dout v^T - delta, two sums over D: they may
    cancel (one visible key), and leave their rounding where autograd has exactly 0.
    """
    tensors = case.inputs(dtype, seed)
    exact, blind64 = run(case, [x.double() for x in tensors], "reference")
    actual, blind = run(case, tensors, impl)
    assert torch.equal(blind, blind64)
    eager = plain(case, tensors)
    width = 1 if dtype.itemsize == 2 else 2 * case.D
    terms = [width * n for n in (*[case.keys] * 3, *[case.T * case.H // case.G] * 2)]
    names = ("out", "lse", "dq", "dk", "dv")
    for name, a, e, p, n in zip(names, actual, exact, eager, terms, strict=True):
        expected = torch.promote_types(dtype, FP32) if name == "lse" else dtype
        assert a.dtype == expected and a.is_contiguous(), name
        assert_close_to_reference(a, e, p, reduction_length=n, name=name)


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


@TRITON
@pytest.mark.parametrize("case", (CASES | EXTRAS).values(), ids=CASES | EXTRAS)
def test_triton(case):
    check(case, FP32, "triton")


@TRITON
@pytest.mark.parametrize("design", ["ordered", "atomic"])
@pytest.mark.parametrize("case", (CASES | EXTRAS).values(), ids=CASES | EXTRAS)
def test_triton_in_five_products(case, design, monkeypatch):
    monkeypatch.setattr(tiles, "backward_design", lambda *_: design)
    check(case, FP32, "triton")


@TRITON
@pytest.mark.parametrize("seed", range(200, 210))
def test_triton_takes_turns_whatever_the_masks_are(seed, monkeypatch):
    """A turn that nobody takes would hang, one taken twice would be lost: it ends, and is right."""
    monkeypatch.setattr(tiles, "backward_design", lambda *_: "ordered")
    case = random_case(seed, 80)
    print(case)
    check(case, FP32, "triton", seed)


def test_the_designs_of_the_backward():
    assert tiles.backward_design(True, 128, "") == "split"
    assert tiles.backward_design(False, 128, "") == "atomic"
    with tuned.use({"flash_attention backward 128": {"design": "ordered"}}):
        assert (
            tiles.backward_design(True, 128, "") == tiles.backward_design(True, 72, "") == "ordered"
        )
        assert tiles.backward_design(True, 64, "") == "split"


@TRITON
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "name", CASES if NATIVE else ["odd length, padded width, group 3", "documents, window"]
)
def test_triton_16_bit(name, dtype):
    check(CASES[name], dtype, "triton")


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


def random_case(seed, longest):
    """Any combination; the seed is the name of the test."""
    rng = random.Random(seed)
    G, group = rng.choice([(1, 1), (2, 3), (1, 9), (1, 12), (3, 1)])
    case = Case(
        rng.randint(1, longest),
        B=rng.randint(1, 2),
        H=G * group,
        G=G,
        D=rng.choice([16, 24, 32, 48]),
    )
    if rng.random() < 0.4:
        cuts = sorted(rng.randint(0, case.T) for _ in range(rng.randint(0, 6)))
        ends = [0, *cuts, case.T]
        documents = tuple(b - a for a, b in zip(ends, ends[1:], strict=False))
        case = dataclasses.replace(case, B=1, documents=documents)
    elif rng.random() < 0.5:
        case = dataclasses.replace(case, S=rng.randint(1, longest))
    if rng.random() < 0.3:
        return dataclasses.replace(case, causal=False)
    return dataclasses.replace(case, window=rng.choice([None, 1, 2, rng.randint(1, longest)]))


@pytest.mark.parametrize("seed", range(24))
def test_torch_random(seed):
    case = random_case(seed, 330)
    print(case)
    check(case, (FP32, BF16)[seed % 2], "torch", seed)


@TRITON
@pytest.mark.parametrize("seed", range(100, 110))
def test_triton_random(seed):
    case = random_case(seed, 80)
    print(case)
    check(case, FP32, "triton", seed)


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


@triton.jit
def _sees_one_more(scores, first, last, others):
    visible = (others[None, :] >= first[:, None]) & (others[None, :] <= last[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _window_one_short(scores, first, last, others):
    visible = (others[None, :] > first[:, None]) & (others[None, :] < last[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _natural_units(products, scale, softcap, SOFTCAP: tl.constexpr):
    return products * (scale * 1.4426)


@triton.jit
def _without_the_last_block(first, last, STEP: tl.constexpr):
    begin = tl.min(first) // STEP * STEP
    end = tl.max(last)
    return begin, begin + (end - begin) // STEP * STEP, tl.max(first), tl.min(last)


@triton.jit
def _mask_too_rarely(first, last, STEP: tl.constexpr):
    begin = tl.min(first) // STEP * STEP
    return begin, tl.max(last), tl.min(first), tl.max(last)


BUGS = {
    "mask, last": ("mask_scores", _sees_one_more),
    "mask, first": ("mask_scores", _window_one_short),
    "scale": ("scores_of", _natural_units),
    "last block": ("walk", _without_the_last_block),
    "inside": ("walk", _mask_too_rarely),
}


@INTERPRETED
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("name", BUGS)
def test_the_random_cases_find_planted_bugs(name, phase, monkeypatch):
    """Each in one pass only, so that the two do not agree on the wrong thing."""
    function, wrong = BUGS[name]
    module = sys.modules[f"stellarator_kernels.attention.{phase}"]
    monkeypatch.setattr(module, function, wrong)
    found = 0
    for seed in range(100, 110):
        try:
            check(random_case(seed, 80), FP32, "triton", seed)
        except AssertionError:
            found += 1
    assert found >= 3, f"{found} of 10 random cases see it"
