"""The step line, z-score and files of a run, against the statistics module and closed forms."""

import json
import math
import statistics

import pytest
import torch

from stellarator.config import ModelConfig
from stellarator.train import flops, metrics
from stellarator.train.metrics import StepMetrics, ZScore, duration, step_line


def step(**changes) -> StepMetrics:
    values = {
        "step": 1_199_999,
        "loss": 11.23456,
        "loss_z": -12.34,
        "grad_norm": 1234.5678,
        "lr": 3.14159e-4,
        "step_ms": 123456.7,
        "tokens": 4_194_304,
        "tokens_total": 10**12,
        "tokens_per_second": 12_345_678.9,
        "mfu": 0.6543,
        "data_wait": 0.1234,
        "time_ms": {"forward": 1.0},
        "memory_bytes": 139 * 2**30,
        "skipped": True,
    }
    return StepMetrics(**(values | changes))


def test_the_longest_line_fits_in_120_columns():
    line = step_line(step(skipped=False), 1_200_000, 40 * 3600)
    assert len(line) <= 120, line
    assert step_line(step(), 1_200_000, 40 * 3600).endswith("139 GiB SKIPPED")
    parts = ("step 1199999/1200000", "11.2346 -12.3z", "1.2e+03", "3.1e-04", "123 s",
             "12.3M tok/s", "mfu 65.4%", "data 12%", "139 GiB", "eta 40h00")  # fmt: skip
    for part in parts:
        assert part in line
    short = step_line(step(step_ms=812, tokens_per_second=10085.4, skipped=False), 20, 192)
    assert "812 ms 10,085 tok/s" in short and short.endswith("eta 0:03:12")


def test_a_z_score_that_is_not_known_is_not_shown_as_zero():
    assert "loss 11.2346 - norm" in step_line(step(loss_z=None), 10, 0)
    score = ZScore([2.0] * 20)
    assert score(3.0) is None and score(3.0) > 0


def test_not_finite_values_do_not_break_the_line():
    assert "loss nan" in step_line(step(loss=math.nan, tokens_per_second=math.inf, mfu=None), 10, 0)


def test_z_score_is_that_of_the_statistics_module():
    score = ZScore()
    values = [3.0 + math.sin(i) for i in range(200)]
    for i, value in enumerate(values):
        got = score(value)
        before = values[max(0, i - 128) : i]
        if i < 8:
            assert got is None
        else:
            expected = (value - statistics.fmean(before)) / statistics.pstdev(before)
            assert got == pytest.approx(expected, rel=1e-9)
    assert score(math.nan) != score(math.nan) and len(score.values) == 128


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (3661.4, "1:01:01"), (-3, "0:00:00"), (36000, "10h00"), (3 * 86400, "3d0h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": i}) for i in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"kind": "tra')
    with metrics.RunLog(tmp_path) as log:
        log.rewind(3)
        log.record("train", {"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_model_flops_match_a_count_of_every_product():
    model = ModelConfig(
        vocab_size=97, num_layers=2, width=48, num_heads=6, num_kv_heads=2, ffn_width=200, window=5
    )
    # forward: 2 * rows * columns per token and matrix; attention 2 products of 2 * D per pair and
    # head
    per_layer = 48 * (48 + 2 * 16) + 48 * 48 + 2 * 48 * 200
    pairs = sum(min(q + 1, 5) for q in range(9)) + sum(min(q + 1, 5) for q in range(3))
    forward = 2 * 12 * (2 * per_layer + 48 * 97) + 2 * 6 * 2 * 2 * 8 * pairs
    assert flops.batch_flops(model, [9, 3]) == 3 * forward


def test_peak_is_what_was_given_or_measured():
    cpu = torch.device("cpu")
    assert flops.peak_flops(cpu, torch.float32, 1.5) == (1.5e12, "given")
    peak, source = flops.peak_flops(cpu, torch.float32, None)
    assert 1e8 < peak < 1e14 and "measured" in source
