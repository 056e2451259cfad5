"""Attention to a cache: every row of a batch against F.scaled_dot_product_attention in float64.

The reference sees, for each row and each new token, just the keys that the token may see, cut out
by index; no mask takes part. test_flash_attention_code.py compiles the kernels. Not covered: speed.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from grid import IMPLS, TRITON

from stellarator_kernels import decode_attention, flash_attention
from stellarator_kernels.attention import decode, decode_kernel
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# (T, S, H, G, D, lengths, window)
CASES = {
    "one token": (1, 9, 4, 2, 16, [9, 4, 1], None),
    "one token, group 9": (1, 20, 9, 1, 24, [20, 13], None),
    "one token, group 48, window": (1, 40, 48, 1, 16, [40, 3, 20], 7),
    "window 1": (1, 12, 2, 2, 16, [12, 5], 1),
    "window longer than the cache": (1, 12, 2, 1, 16, [12, 5], 100),
    "several tokens": (5, 23, 6, 2, 32, [23, 5, 17], None),
    "several tokens, group 12, window": (4, 30, 12, 1, 16, [30, 4, 19], 6),
    "all of the cache is new": (8, 8, 2, 1, 16, [8, 8], None),
    "fewer tokens than queries": (4, 10, 2, 1, 16, [10, 2, 1, 0], None),
}


def inputs(case, dtype, seed=0):
    """q, both caches with finite rubbish behind each row, lengths."""
    T, S, H, G, D, lengths, _ = case
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(len(lengths), T, H, D, generator=g, dtype=FP64)
    k, v = (torch.randn(len(lengths), S, G, D, generator=g, dtype=FP64) for _ in range(2))
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = 1e4, -1e4
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.tensor(lengths)


def expected(case, q, k, v, dtype=FP64):
    """Token by token, with the keys cut out."""
    T, _, H, G, _, lengths, window = case
    out = torch.zeros(q.shape, dtype=dtype)
    for row, length in enumerate(lengths):
        for t in range(T):
            stop = length - T + t + 1  # its own key is the last one it sees
            start = 0 if window is None else max(0, stop - window)
            if stop <= 0:
                continue
            keys, values = (
                x[row, start:stop].to(dtype).repeat_interleave(H // G, 1).transpose(0, 1)
                for x in (k, v)
            )
            query = q[row, t].to(dtype)[:, None]
            out[row, t] = F.scaled_dot_product_attention(query, keys, values)[:, 0]
    return out


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("path", ["torch", "reference", "products"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_sdpa(case, path, dtype, monkeypatch):
    if path == "products":  # the path of other devices
        monkeypatch.setattr(decode, "_flash", decode._products)
    check(case, dtype, "reference" if path == "reference" else "torch")


# Several parts of keys, some of them empty; several blocks of rows; widths that are filled up.
LONG = {
    "parts": (1, 1500, 12, 1, 64, [1500, 700, 3], None),
    "parts, window": (2, 1500, 9, 1, 40, [1500, 301, 1], 290),
    "parts, blocks of rows": (3, 600, 48, 1, 16, [600, 2], None),
    "width 128, group 12": (1, 700, 24, 2, 128, [700, 513], 512),
}


@TRITON
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("case", (CASES | LONG).values(), ids=CASES | LONG)
def test_triton(case, dtype):
    check(case, dtype, "triton", rubbish=torch.nan)


@TRITON
def test_triton_is_the_same_to_the_bit_every_time():
    case = LONG["parts, window"]
    q, k, v, lengths = inputs(case, FP32)
    first, again = (
        decode_attention(q, k, v, lengths, window=case[-1], impl="triton") for _ in range(2)
    )
    assert torch.equal(first, again)


def test_the_work_is_shared_out():
    """StarCoder2 and StarCoder on 132 multiprocessors; few tokens and many."""
    plan = decode_kernel.plan
    assert plan(64, 1, 8192, 48, 1, None, 132) == {"ROWS": 64, "row_blocks": 1, "splits": 9}
    assert plan(1, 1, 16384, 24, 2, None, 132) == {"ROWS": 16, "row_blocks": 1, "splits": 64}
    assert plan(1, 1, 16384, 24, 2, 4096, 132)["splits"] == 16  # 256 keys each at least
    assert plan(256, 1, 8192, 24, 2, None, 132)["splits"] == 2
    assert plan(1, 40, 300, 12, 1, None, 132) == {"ROWS": 64, "row_blocks": 8, "splits": 2}


def check(case, dtype, impl, rubbish=None):
    """One implementation against SDPA. rubbish: what slots hold that no row has filled."""
    q, k, v, lengths = inputs(case, dtype)
    exact, eager = expected(case, q, k, v), expected(case, q, k, v, dtype)
    for row, length in enumerate(case[5]):
        if rubbish is not None:
            k[row, length:], v[row, length:] = rubbish, rubbish
    with poison_empty():
        out = decode_attention(q, k, v, lengths, window=case[-1], impl=impl)
    assert out.dtype == dtype and out.is_contiguous()
    # Scores rounded to 16 bits (products) are off by up to 2^-9 of themselves, as in plain code.
    assert_close_to_reference(out, exact, eager, reduction_length=2 * case[4])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_generation_equals_one_pass(dtype):
    """Tokens that arrive in pieces get what they get in one causal pass."""
    T, H, G, D, window = 40, 6, 2, 16, 11
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, T, h, D, generator=g).to(dtype) for h in (H, G, G))
    whole = flash_attention(q, k, v, window=window)
    start = 0
    for stop in (1, 7, 8, 9, 30, 40):
        lengths = torch.full((2,), stop)
        out = decode_attention(q[:, start:stop], k, v, lengths, window=window)
        error = (out - whole[:, start:stop]).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps
        start = stop


@pytest.mark.parametrize("T", [1, 3])
def test_cache_of_a_larger_buffer(T):
    """A layer of a (L, B, S, G, D) buffer, rows of a fused projection; the scale is used."""
    buffer = torch.randn(3, 2, 2, 14, 2, 8, dtype=FP64)
    k, v = buffer[1, 0], buffer[2, 0]
    fused = torch.randn(2, T, 9 * 8, dtype=FP64)
    q = fused[..., : 4 * 8].unflatten(-1, (4, 8))
    lengths = torch.tensor([14, 6])
    out = decode_attention(q, k, v, lengths, scale=0.7)
    case = (T, 14, 4, 2, 8, [14, 6], None)
    torch.testing.assert_close(
        out, expected(case, q * 0.7 * math.sqrt(8), k, v), rtol=0, atol=1e-12
    )


def test_caches_are_not_changed_and_no_gradient_flows():
    q, k, v, lengths = inputs(CASES["several tokens"], FP32)
    before = k.clone(), v.clone()
    out = decode_attention(q.requires_grad_(), k, v, lengths)
    assert not out.requires_grad
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("B,T,S", [(0, 1, 4), (2, 0, 4), (2, 1, 0)])
def test_nothing_to_do(impl, B, T, S):
    caches = [torch.ones(B, S, 1, 16)] * 2
    lengths = torch.full((B,), min(S, T))
    out = decode_attention(torch.ones(B, T, 2, 16), *caches, lengths, impl=impl)
    assert out.shape == (B, T, 2, 16) and not out.any()


Q, K, N = torch.zeros(2, 1, 4, 8), torch.zeros(2, 6, 2, 8), torch.tensor([3, 6])
ERRORS = {
    "dims": ((Q[0], K, K, N), {}, r"expected q \(B, T, H, D\) and k_cache \(B, S, G, D\)"),
    "rows": ((Q[:1], K, K, N), {}, "expected q .* and k_cache"),
    "width": ((Q[..., :4], K, K, N), {}, "expected q .* and k_cache"),
    "group": ((Q[:, :, :3], K, K, N), {}, "with H a multiple of G"),
    "v_cache": ((Q, K, K[:, :5], N), {}, r"expected v_cache \(B, S, G, D\) = \(2, 6, 2, 8\), got"),
    "lengths": ((Q, K, K, N[:1]), {}, r"expected lengths \(B,\) = \(2,\), got \(1,\)"),
    "lengths dtype": ((Q, K, K, N.int()), {}, "expected lengths with dtype in"),
    "q dtype": ((Q.int(), K, K, N), {}, "expected q with dtype in"),
    "cache dtype": ((Q, K.half(), K, N), {}, "expected k_cache with dtype in"),
    "v dtype": ((Q, K, K.half(), N), {}, "expected v_cache with dtype in"),
    "device": ((Q, K.to("meta"), K.to("meta"), N), {}, "expected all tensors on one device"),
    "window": ((Q, K, K, N), {"window": 0}, "expected window, a number of keys >= 1"),
    "scale": ((Q, K, K, N), {"scale": -1.0}, "expected a finite scale above 0, got -1.0"),
    "too long": ((Q, K, K, N + 1), {}, "expected lengths of at most S = 6 tokens, got 7"),
    "impl": ((Q, K, K, N), {"impl": "fast"}, "expected impl in"),
}


@pytest.mark.parametrize("arguments,options,message", ERRORS.values(), ids=ERRORS)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match="^decode_attention: .*" + message):
        decode_attention(*arguments, **options)


def test_triton_refuses_what_it_has_no_tiles_for():
    narrow = torch.zeros(2, 6, 2, 8)
    with pytest.raises(RuntimeError, match="head width is 8, not a multiple of 8 from 16|CPU and"):
        decode_attention(Q, narrow, narrow, N, impl="triton")
