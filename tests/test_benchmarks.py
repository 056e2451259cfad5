"""The benchmark verbs run in small, and refuse to time what is wrong. Timings are not looked at."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks import bench_ops
from stellarator_kernels.testing import assert_close_to_reference


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        capture_output=True, text=True, timeout=280, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip


def test_training_step_beside_transformers():
    sizes = "--layers 1 --width 64 --heads 2 --kv-heads 1 --vocab 300 --rows 2 --length 32"
    done = run("train", *sizes.split(), "--repeats", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| stellarator |" in done.stdout and "| transformers eager |" in done.stdout


@pytest.mark.parametrize("case", bench_ops.cases("cpu", True), ids=lambda case: case.name)
def test_each_op_passes_the_check_before_timing(case):
    bench_ops.check(case, "triton", "cpu", torch.float32)


def test_a_wrong_op_is_caught():
    right = bench_ops.cases("cpu", True)[4]
    wrong = bench_ops.Case(
        right.name,
        right.shapes,
        lambda impl, x, w, b, r: right.call(impl, x, w, b, r * (1.001 if impl == "torch" else 1)),
        right.reduction,
    )
    bench_ops.check(right, "torch", "cpu", torch.float32)
    with pytest.raises(AssertionError, match=r"layer_norm \+ residual result 0"):
        bench_ops.check(wrong, "torch", "cpu", torch.float32)


def test_the_rule_of_closeness():
    exact = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    close = exact.float()
    assert_close_to_reference(close, exact)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close_to_reference(close + 1e-5 * (torch.arange(1000) == 3), exact)
    with pytest.raises(AssertionError, match="root mean square"):
        assert_close_to_reference(close + 1e-7, exact, exact.float())
    with pytest.raises(AssertionError, match="not finite"):
        assert_close_to_reference(close.log(), exact)
