"""Learning rates against values worked out by hand. Not covered: ramps by samples."""

import math

import pytest

from stellarator.config import OptimConfig
from stellarator.train.schedule import learning_rate

COSINE = OptimConfig(lr=3e-4, min_lr=3e-5, schedule="cosine", warmup_steps=2000)


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert learning_rate(1, COSINE, 250_000) == pytest.approx(3e-4 / 2000, rel=1e-12)
    assert learning_rate(1000, COSINE, 250_000) == pytest.approx(1.5e-4, rel=1e-12)
    assert learning_rate(2000, COSINE, 250_000) == 3e-4


def test_cosine_is_halfway_in_the_middle_and_minimal_at_the_end_and_after():
    middle = 2000 + (250_000 - 2000) // 2
    assert learning_rate(middle, COSINE, 250_000) == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-12)
    assert learning_rate(250_000, COSINE, 250_000) == 3e-5
    assert learning_rate(300_000, COSINE, 250_000) == 3e-5
    quarter = 2000 + (250_000 - 2000) // 4
    expected = 3e-5 + 0.5 * (1 + math.sqrt(0.5)) * 2.7e-4
    assert learning_rate(quarter, COSINE, 250_000) == pytest.approx(expected, rel=1e-12)


def test_decay_steps_end_the_cosine_before_the_run():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10, decay_steps=110)
    assert learning_rate(60, config, 10_000) == pytest.approx(0.55, rel=1e-12)
    assert learning_rate(110, config, 10_000) == 0.1


@pytest.mark.parametrize(
    ("shape", "quarter"), [("linear", 0.75), ("cosine", 0.5 + 0.5 * math.sqrt(0.5)), ("sqrt", 0.5)]
)
def test_wsd_is_flat_then_falls_to_the_minimum(shape, quarter):
    config = OptimConfig(
        lr=1.0, min_lr=0.0, schedule="wsd", warmup_steps=10, decay_steps=400, wsd_shape=shape
    )
    assert learning_rate(11, config, 1000) == 1.0
    assert learning_rate(600, config, 1000) == 1.0
    assert learning_rate(700, config, 1000) == pytest.approx(quarter, rel=1e-12)
    assert learning_rate(1000, config, 1000) == pytest.approx(0.0, abs=1e-12)


def test_no_warm_up_and_constant():
    config = OptimConfig(lr=2.0, schedule="constant", warmup_steps=0)
    assert [learning_rate(s, config, 5) for s in (1, 5, 9)] == [2.0, 2.0, 2.0]
