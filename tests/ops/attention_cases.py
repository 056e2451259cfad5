"""Cases of flash attention, and how one implementation is held to the float64 reference.

defines: Case, CASES, EXTRAS, run, plain, check, random_case, BF16, FP16, FP32, FP64
"""

import dataclasses
import math
import random

import numpy as np
import torch
from grid import generator

from stellarator_kernels import flash_attention
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

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
