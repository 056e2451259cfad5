"""Two processes train the same model as one: gloo, float64, started by torchrun's own module.

The reference is the unbroken run of one process: its losses and its weights. Not covered: NCCL.
"""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
from runs import assert_same_state, losses, torchrun

from stellarator.config import ParallelConfig
from stellarator.train.loop import Trainer


@pytest.fixture
def one(tiny_config, tmp_path):
    """The configuration of a run of one process, which is done."""
    train = dataclasses.replace(tiny_config.train, precision="fp64", steps=6, micro_batch_size=2)
    config = dataclasses.replace(tiny_config, train=train, folder=str(tmp_path / "one"))
    Trainer(config).run()
    return config


def test_two_ranks_follow_one(one, tmp_path):
    two = dataclasses.replace(one, folder=str(tmp_path / "two"))
    done = torchrun(two, tmp_path, 2)
    assert done.returncode == 0, done.stderr[-6000:]
    expected, got = losses(one.folder), losses(two.folder)
    assert len(expected) == 8 and len(got) == 8  # 6 steps and 2 evaluations
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=1e-12)
    assert_same_state(one.folder, two.folder, 6)


def test_two_ranks_and_other_micro_batches_drop_what_one_drops(tiny_config, tmp_path):
    """Masks are those of global tokens, whoever computes them; evaluations drop nothing."""
    rates = {"residual_dropout": 0.2, "embedding_dropout": 0.1, "attention_dropout": 0.1}
    model = dataclasses.replace(tiny_config.model, **rates)
    train = dataclasses.replace(tiny_config.train, precision="fp64", steps=3, micro_batch_size=2)
    one = dataclasses.replace(tiny_config, model=model, train=train, folder=str(tmp_path / "one"))
    Trainer(one).run()
    train = dataclasses.replace(train, micro_batch_size=1, recompute="full")
    two = dataclasses.replace(one, train=train, folder=str(tmp_path / "two"))
    done = torchrun(two, tmp_path, 2)
    assert done.returncode == 0, done.stderr[-6000:]
    assert losses(two.folder) == pytest.approx(losses(one.folder), rel=1e-12)
    assert_same_state(one.folder, two.folder, 3)
    off = dataclasses.replace(one, model=tiny_config.model, folder=str(tmp_path / "off"))
    Trainer(off).run()
    assert losses(off.folder)[0] == losses(one.folder)[0]  # before the first step
    assert abs(losses(off.folder)[1] / losses(one.folder)[1] - 1) > 1e-6


# A thread of gloo that still holds a tensor when Python ends aborts its process.
LEAVES = """
import pathlib, sys
from stellarator import settings
from stellarator.config import RunConfig
from stellarator.train.loop import Trainer

def threads():
    return [p.read_text().strip() for p in pathlib.Path("/proc/self/task").glob("*/comm")]

class Looking(Trainer):
    def _one_step(self):
        assert any("gloo" in name for name in threads()), threads()
        return super()._one_step()

trainer = Looking(settings.resolve(RunConfig(), sys.argv[2]))
assert trainer.run()["status"] == "done"
assert not any("gloo" in name for name in threads()), threads()
"""


def test_no_thread_of_the_group_outlives_the_run(tiny_config, tmp_path):
    """Context ranks have two groups, and make more of what refers to them."""
    program = tmp_path / "leaves.py"
    program.write_text(LEAVES)
    config = dataclasses.replace(tiny_config, parallel=ParallelConfig(cp=2))
    done = torchrun(config, tmp_path, 2, [str(program)])
    assert done.returncode == 0, done.stderr[-6000:]


# Rank 1 alone is told to stop, after step 3; then rank 0 must stop and save there, too.
STOPPED = """
import os, signal, sys, time
from stellarator import settings
from stellarator.config import RunConfig
from stellarator.train.loop import Trainer

class Stopped(Trainer):
    def _one_step(self):
        done = super()._one_step()
        if done.step == 3 and self.mesh.dp.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return done

result = Stopped(settings.resolve(RunConfig(), sys.argv[2])).run()
assert (result["status"], result["step"]) == ("preempted", 3), result
"""


def test_two_ranks_stopped_and_resumed_by_one(one, tmp_path):
    two = dataclasses.replace(one, folder=str(tmp_path / "two"))
    program = tmp_path / "stopped.py"
    program.write_text(STOPPED)
    done = torchrun(two, tmp_path, 2, [str(program)])
    assert done.returncode == 0, done.stderr[-6000:]
    assert json.loads(Path(two.folder, "status.json").read_text())["status"] == "preempted"
    assert len(losses(two.folder)) == 4  # an evaluation and 3 steps
    assert Trainer(two).run()["status"] == "done"
    expected, got = losses(one.folder), losses(two.folder)
    assert got == pytest.approx(expected, rel=1e-12, abs=0)
    assert_same_state(one.folder, two.folder, 6)


def test_a_batch_that_two_ranks_cannot_share_is_refused(tiny_config, tmp_path):
    train = dataclasses.replace(tiny_config.train, global_batch_size=3, micro_batch_size=1)
    config = dataclasses.replace(tiny_config, train=train)
    done = torchrun(config, tmp_path, 2, traceback=False)
    assert done.returncode != 0
    assert errors(done) == ["error: configuration: 1 problem"]
    assert (
        "train.global_batch_size: expected a multiple of micro_batch_size * dp = 1 * 2, got 3. "
        "Pass 4." in done.stderr
    )


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """The lines of ours among those of torchrun."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


LATE = """
import os, sys, time
from stellarator.cli import main

time.sleep(1.5 * (os.environ["RANK"] == "0"))
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_what_all_ranks_refuse_alike_is_said_once(tiny_config, tmp_path):
    """Before there is a process group, too, and by rank 0 although it starts late."""
    program = tmp_path / "late.py"
    program.write_text(LATE)
    for section, change in (("optim", {"lr": -1.0}), ("train", {"micro_batch_size": 8})):
        part = dataclasses.replace(getattr(tiny_config, section), **change)
        config = dataclasses.replace(tiny_config, **{section: part})
        done = torchrun(config, tmp_path, 2, [str(program)], traceback=False)
        assert len(errors(done)) == 1 and "another rank" not in done.stderr, section


def test_what_one_rank_refuses_is_said_and_the_other_stops(tiny_config, tmp_path):
    program = tmp_path / "one_fails.py"
    program.write_text(ONE_FAILS)
    done = torchrun(tiny_config, tmp_path, 2, [str(program)], traceback=False)
    assert sorted(errors(done)) == [
        "error: rank 0 stops, as another rank failed.",
        "error: this machine lacks the shard",
    ]


def test_what_differs_between_ranks_is_named(tiny_config, tmp_path):
    """Another configuration or other shards on one of them: each would train something else."""
    program = tmp_path / "differs.py"
    program.write_text(DIFFERS)
    for kind, expected in (
        ("optim.lr=0.5", ["optim.lr", "0.5 on rank 1 (1 in all). Start all processes"]),
        ("data", ["data.train: expected the same token shards and tokenizer on every rank"]),
    ):
        words = [str(program), kind]
        done = torchrun(tiny_config, tmp_path, 2, words, traceback=False)
        (line,) = errors(done)
        assert done.returncode != 0 and all(part in line for part in expected), line


DIFFERS = """
import os, sys
from stellarator.cli import main
from stellarator.train import resume

_, kind, *words = sys.argv
if os.environ["RANK"] == "1":
    if kind == "data":
        resume.fingerprint = lambda shards, tokenizer: "0" * 64
    else:
        words.append(kind)
sys.exit(main(["train", *words, "train.micro_batch_size=2"]))
"""

ONE_FAILS = """
import sys
from stellarator.cli import main
from stellarator.train.loop import Trainer

class Fails(Trainer):
    def _open_data(self):
        super()._open_data()
        if self.mesh.dp.rank == 1:
            raise RuntimeError("this machine lacks the shard")

import stellarator.train.loop
stellarator.train.loop.Trainer = Fails
sys.exit(main(["train", *sys.argv[1:], "train.micro_batch_size=2"]))
"""
