"""Two processes train the same model as one: gloo, float64, started by torchrun's own module.

The reference is the run of one process. Not covered: NCCL.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stellarator import settings
from stellarator.train.loop import Trainer


def losses(folder) -> list[float]:
    records = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if r["kind"] in ("train", "eval")]


def torchrun(config, tmp_path, processes: int) -> subprocess.CompletedProcess:
    path = tmp_path / f"run{processes}.toml"
    path.write_text(settings.to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        "--nproc-per-node",
        str(processes),
        "-m",
        "stellarator.train",
        "--config",
        str(path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STELLARATOR_TRACEBACK": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def test_two_ranks_follow_one(tiny_config, tmp_path):
    train = dataclasses.replace(tiny_config.train, precision="fp64", steps=6, micro_batch_size=2)
    one = dataclasses.replace(tiny_config, train=train, folder=str(tmp_path / "one"))
    Trainer(one).run()
    two = dataclasses.replace(one, folder=str(tmp_path / "two"))
    done = torchrun(two, tmp_path, 2)
    assert done.returncode == 0, done.stderr[-6000:]
    expected, got = losses(one.folder), losses(two.folder)
    assert len(expected) == 8 and len(got) == 8  # 6 steps and 2 evaluations
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=1e-12)


def test_a_batch_that_two_ranks_cannot_share_is_refused(tiny_config, tmp_path):
    train = dataclasses.replace(tiny_config.train, global_batch_size=3, micro_batch_size=1)
    config = dataclasses.replace(tiny_config, train=train)
    done = torchrun(config, tmp_path, 2)
    assert done.returncode != 0
    assert "expected the 3 micro-batches of a step" in done.stderr
