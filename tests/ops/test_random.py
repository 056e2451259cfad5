"""Random bits keyed by indices: rates, independence, and the kernel against the formula.

References: binomial and chi-square bounds of six standard deviations, published SplitMix64 values.
Not covered: a battery of statistical tests.
"""

import math

import pytest
import torch
from grid import TRITON

from stellarator_kernels import random
from stellarator_kernels._triton import tl, triton


def mask(p, seed=0, B=2, H=3, T=400, S=500):
    rows = random.element_keys(seed, 0, (0, 0, 0), (B, H, T), "cpu")
    columns = random.element_keys(seed, 1, (0, 0), (B, S), "cpu")
    return random.kept(rows[..., None], columns[:, None, None], p)


def test_the_mixer_is_splitmix64():
    """The first outputs for seed 0, as published with the Java and C versions of the generator."""
    state, outputs = 0, []
    for _ in range(3):
        outputs.append(int(random._mix(torch.tensor(state))) % 2**64)
        state = random._signed((state + 0x9E3779B97F4A7C15) % 2**64)
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rates_of_all_of_rows_and_of_columns(p):
    dropped = ~mask(p)
    for dims in ((0, 1, 2, 3), (3,), (2,)):
        n = math.prod(dropped.shape[d] for d in dims)
        z = (dropped.double().sum(dims) - n * p) / math.sqrt(n * p * (1 - p))
        assert z.abs().max() < 6, dims
        if z.numel() > 1:  # and they vary as much as chance does
            freedom = z.numel()
            assert abs(z.square().sum() - freedom) < 6 * math.sqrt(2 * freedom), dims


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_not_correlated(p):
    """Rows, columns, heads, batch rows and seeds, one apart and more."""
    x = (~mask(p)).double() - p
    pairs = [(x[..., d:], x[..., :-d]) for d in (1, 2, 7, 64)]
    pairs += [(x[..., d:, :], x[..., :-d, :]) for d in (1, 2, 7, 64)]
    pairs += [(x[:, 1], x[:, 2]), (x[0], x[1]), (x, (~mask(p, seed=1)).double() - p)]
    pairs += [(x[..., 1:, 1:], x[..., :-1, :-1])]
    for a, b in pairs:
        z = (a * b).sum() / (p * (1 - p) * math.sqrt(a.numel()))
        assert abs(z) < 6
    rows = x[0, 0]  # every pair of rows
    z = (rows @ rows.T).fill_diagonal_(0) / (p * (1 - p) * math.sqrt(rows.shape[1]))
    assert z.abs().max() < 7


def test_a_seed_in_a_tensor_and_every_64_bits_count():
    sizes, starts = (3, 50), (0, 0)
    base = random.element_keys(5, 0, starts, sizes, "cpu")
    assert torch.equal(base, random.element_keys(torch.tensor(5), 0, starts, sizes, "cpu"))
    for seed, stream in [(6, 0), (5, 1), (5 + 2**32, 0), (5 - 2**63, 0), (-5, 0)]:
        assert (
            random.element_keys(seed, stream, starts, sizes, "cpu") != base
        ).float().mean() > 0.9
    assert torch.equal(random.element_keys(5 + 2**64, 0, starts, sizes, "cpu"), base)
    assert torch.equal(random.element_keys(5, 0, (1, 20), (2, 30), "cpu"), base[1:, 20:])


@triton.jit
def _kernel(rows_ptr, columns_ptr, out_ptr, least, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    kept = random.kept_block(tl.load(rows_ptr + i), tl.load(columns_ptr + j), least)
    tl.store(out_ptr + i[:, None] * N + j[None, :], kept.to(tl.int32))


@TRITON
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.75, 1 - 1e-12])
def test_the_kernel_is_the_formula(p):
    g = torch.Generator().manual_seed(1)
    rows, columns = (torch.randint(-(2**31), 2**31, (n,), generator=g).int() for n in (64, 128))
    out = torch.empty(64, 128, dtype=torch.int32)
    _kernel[(1,)](rows, columns, out, random.threshold(p), 64, 128)
    assert torch.equal(out.bool(), random.kept(rows[:, None], columns[None], p))
