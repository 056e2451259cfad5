"""Initial weights: statistics, independence of the order and the slice, golden values.

Independent references: the standard library's NormalDist for the inverse distribution function,
moments and tail shares of the normal distribution, and values written down once. Not covered: large
models (their time is a figure, not a test).
"""

import statistics
import time

import numpy as np
import pytest
import torch

from stellarator.config import ModelConfig
from stellarator.model import build_model
from stellarator.model.init import _BLOCK, _inverse_normal, normal

CONFIG = ModelConfig(
    vocab_size=300, num_layers=3, width=64, num_heads=4, num_kv_heads=2, ffn_width=96,
    max_positions=40, positions="learned", window=None, tie_embeddings=False, init_std=0.05,
)  # fmt: skip
SIZE = 3 * _BLOCK + 77


@pytest.fixture(scope="module")
def whole():
    return normal("layers.0.mlp.up.weight", 1234, 1.0, 0, SIZE)


def test_golden_values(whole):
    """A change here changes every run that starts from fresh weights."""
    expected = [
        "-0x1.33e2580000000p-1", "0x1.e78df00000000p-5", "0x1.0272620000000p-2",
        "-0x1.655f360000000p-3", "-0x1.8f2e900000000p-1", "0x1.177ca40000000p-2",
        "-0x1.72a5540000000p-13",
    ]  # fmt: skip
    assert [float(x).hex() for x in whole[:6]] == expected[:6]
    assert float(normal("embedding.weight", 7, 0.02, 10**12, 1)[0]).hex() == expected[6]


def test_moments_and_tails(whole):
    x = normal("a", 0, 1.0, 0, 2_000_000).astype(np.float64)
    n = len(x)
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for level in (0.5, 1.0, 2.0, 3.0, 4.0):
        share = 2 * statistics.NormalDist().cdf(-level)
        assert abs((abs(x) > level).mean() - share) < 5 * (share / n) ** 0.5
    neighbours = (x[:-1] * x[1:]).mean()
    assert abs(neighbours) < 5 / n**0.5


@pytest.mark.parametrize(
    "start, count",
    [(0, 1), (1, 1), (2, 9), (3, 5), (_BLOCK - 1, 2), (_BLOCK, _BLOCK), (777, 2 * _BLOCK + 5),
     (SIZE - 1, 1), (5, 0)],
)  # fmt: skip
def test_any_slice_equals_the_whole(whole, start, count):
    part = normal("layers.0.mlp.up.weight", 1234, 1.0, start, count)
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, whole[start : start + count])


def test_seed_name_and_std_all_matter(whole):
    name = "layers.0.mlp.up.weight"
    assert not (normal(name, 1235, 1.0, 0, 100) == whole[:100]).any()
    assert not (normal("layers.1.mlp.up.weight", 1234, 1.0, 0, 100) == whole[:100]).any()
    half = normal(name, 1234, 0.5, 0, 100)
    np.testing.assert_array_equal(half, whole[:100] * np.float32(0.5))


def test_inverse_normal_is_that_of_the_standard_library():
    rng = np.random.default_rng(0)
    grid = [0.02425, 1 - 0.02425, 2.0**-53, 1 - 2.0**-53, 2.0**-30, 0.5 - 2.0**-20]
    p = np.array([*rng.random(3000), *(2.0 ** -rng.uniform(1, 30, 1000)), *grid])
    p = (np.floor(p * 2**52) + 0.5) * 2.0**-52  # what `normal` passes in
    expected = np.array([statistics.NormalDist().inv_cdf(float(x)) for x in p])
    np.testing.assert_allclose(_inverse_normal(p), expected, rtol=2e-9)


def test_model_follows_the_rule():
    model = build_model(CONFIG, seed=3)
    narrow = 0.05 / (2 * 3) ** 0.5
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            std = narrow if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.05
            expected = normal(name, 3, std, 0, p.numel())
            assert torch.equal(p.detach().flatten(), torch.from_numpy(expected)), name
            assert abs(float(p.detach().std()) / std - 1) < 5 / (2 * p.numel()) ** 0.5, name


def test_weights_depend_on_the_seed_only():
    torch.manual_seed(1)
    a = build_model(CONFIG, seed=3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    b = build_model(CONFIG, seed=3, recompute="full", kernels="reference")
    torch.set_num_threads(threads)
    c = build_model(CONFIG, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's numbers are used up
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert name.endswith("bias") or "norm" in name or not torch.equal(p, r)


def test_a_layer_does_not_depend_on_how_many_follow():
    deeper = build_model(ModelConfig(**{**vars(CONFIG), "num_layers": 5}), seed=3)
    shallow = dict(build_model(CONFIG, seed=3).named_parameters())
    for name, p in deeper.named_parameters():
        if name in shallow and "out.weight" not in name and "down.weight" not in name:
            assert torch.equal(p, shallow[name]), name


def test_dtypes_and_meta():
    half, full = (build_model(CONFIG, dtype=d) for d in (torch.bfloat16, None))
    for p, q in zip(half.parameters(), full.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q.bfloat16())
    assert all(p.is_meta for p in build_model(CONFIG, device="meta").parameters())


def test_twelve_million_weights_in_a_second():
    started = time.process_time()
    normal("a", 0, 0.02, 0, 12_000_000)
    assert time.process_time() - started < 2  # 0.2 to 0.4 s of one core where it was measured
