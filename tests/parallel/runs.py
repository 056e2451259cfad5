"""Runs of several processes, and how they are compared with one process.

defines: losses, counts, assert_same_state, torchrun, changed, stopping
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from stellarator import settings


def losses(folder) -> list[float]:
    records = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if r["kind"] in ("train", "eval")]


def counts(folder, processes: int) -> list[float]:
    """Target tokens and model FLOPs of each step, over all ranks; peak_tflops is 1."""
    records = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    steps = [r for r in records if r["kind"] == "train"]
    flops = [1e9 * r["mfu"] * r["step_ms"] * processes for r in steps]
    return [r["tokens"] for r in steps] + flops


def assert_same_state(one, other, step: int) -> None:
    """Weights and moments of a step, whose gradients were summed in another order."""
    name = Path("checkpoints", f"step_{step:08d}", "tensors.safetensors")
    a, b = load_file(Path(one, name)), load_file(Path(other, name))
    assert a.keys() == b.keys() and {t.dtype for t in b.values()} == {torch.float64}
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-10, atol=1e-14)


def torchrun(
    config, tmp_path, processes: int, program=("-m", "stellarator.train"), traceback: bool = True
) -> subprocess.CompletedProcess:
    path = tmp_path / f"run{processes}.toml"
    path.write_text(settings.to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *program, "--config", str(path)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "STELLARATOR_TRACEBACK": str(int(traceback)),
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def changed(config, **sections):
    """The configuration with some fields of some sections changed."""
    new = {n: dataclasses.replace(getattr(config, n), **f) for n, f in sections.items()}
    return dataclasses.replace(config, **new)


def stopping(tmp_path, steps) -> Path:
    """A program that trains, and is asked to stop after so many steps."""
    program = tmp_path / f"until_{steps}.py"
    program.write_text(
        f"""
import signal, sys
from stellarator import settings
from stellarator.config import RunConfig
from stellarator.train.loop import Trainer

class Stopping(Trainer):
    def _one_step(self):
        done = super()._one_step()
        if done.step == {steps}:
            self.stop.received = signal.SIGTERM
        return done

if __name__ == "__main__":
    Stopping(settings.resolve(RunConfig(), sys.argv[sys.argv.index("--config") + 1])).run()
"""
    )
    return program
