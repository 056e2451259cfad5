"""Training of two processes that goes wrong: who is told what, and how the run ends.

Ranks that sleep, are stopped, are killed, enter another collective or raise, each in a run of its
own, all at once; what is expected follows from what they do. Not covered: several machines, NCCL.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import start
from runs import changed

from stellarator import cli, settings
from stellarator.model import build_model
from stellarator.parallel.collectives import Group, Pending
from stellarator.parallel.journal import Journal, read
from stellarator.parallel.mesh import Axis
from stellarator.parallel.tensor import TensorParallel
from stellarator.train import loop

pytestmark = pytest.mark.dist
TIMEOUT, GRACE = 3.0, 5.0
WAYS = ("sleeps", "stopped", "dies", "other", "raises")


def sleeps_in_a_function_of_its_own():
    time.sleep(60)


class Misbehaving(loop.Trainer):
    """Rank 1 does not come to the gradients of step 2."""

    how = ""

    def _watched(self):
        self.dog = super()._watched()
        assert self.dog.timeout_seconds == 100.0
        return self.dog

    def _loss_sum(self, inputs):
        if self.step == 1:  # on a busy machine it may take long to come so far
            self.dog.timeout_seconds = TIMEOUT
        if self.step == 1 and self.mesh.world.rank == 1:
            Path(self.folder, "misbehaves").touch()
            if self.how == "sleeps":
                sleeps_in_a_function_of_its_own()
            elif self.how == "other":
                self.mesh.dp.gather(torch.ones(3), "something else")
            elif self.how == "raises":
                raise RuntimeError("an error of its own")
            else:
                os.kill(os.getpid(), signal.SIGSTOP if self.how == "stopped" else signal.SIGKILL)
        return super()._loss_sum(inputs)


def train(rank, how, path):
    """`stellarator train` as one of two ranks; its output goes to a file."""
    folder = Path(path).parent
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(folder / f"said_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                stream.fileno())  # fmt: skip
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    loop.Trainer, Misbehaving.how = Misbehaving, how
    os._exit(cli.main(["train", "--config", path]))


@pytest.fixture
def runs(tiny_config, tmp_path):
    """{way: (folder, exit codes, journal of rank 1)}."""
    config = changed(tiny_config, parallel={"timeout_seconds": 100.0}, checkpoint={"interval": 1})
    config = changed(config, train={"micro_batch_size": 2, "eval_interval": None})
    started = {}
    for how in WAYS:
        folder = tmp_path / how
        folder.mkdir()
        config = dataclasses.replace(config, folder=str(folder / "run"))
        (folder / "run.toml").write_text(settings.to_toml(config))
        started[how] = [p for p, _ in start(train, 2, how, str(folder / "run.toml"))]
    found = {}
    for how, processes in started.items():
        processes[0].join(timeout=100)
        (journals,) = (tmp_path / how / "run" / "journals").iterdir()
        late = read(journals, 1)
        if how == "stopped":
            processes[1].kill()
        processes[1].join(timeout=20)
        found[how] = tmp_path / how, [process.exitcode for process in processes], late
    return found


def test_a_run_that_cannot_go_on_says_why_and_ends(runs):
    for how, (folder, codes, late) in runs.items():
        said = [(folder / f"said_{rank}").read_text() for rank in range(2)]
        print(how, *said, sep="\n", file=sys.stderr)
        killed = how in ("stopped", "dies")
        assert codes == [1, -signal.SIGKILL if killed else 1], how
        reports = list((folder / "run" / "watchdog").glob("*.txt"))
        assert len(reports) == (how != "raises")
        for report in reports:
            check_report(how, report.read_text(), late)
            assert sum(report.read_text().strip() in text for text in said) == 1
            seconds = report.stat().st_mtime - (folder / "run" / "misbehaves").stat().st_mtime
            assert seconds <= TIMEOUT + GRACE and (how == "dies" or seconds >= TIMEOUT - 0.1)
        # The same line in status.json and as the error of every rank.
        status = json.loads((folder / "run" / "status.json").read_text())
        assert (status["status"], status["step"]) == ("failed", 1)
        for rank in range(1 if killed else 2):
            (error,) = [text for text in said[rank].splitlines() if text.startswith("error: ")]
            line = error.partition(" stops: ")[2] or error.removeprefix("error: ")
            assert line in status["reason"] and "rank 1" in status["reason"], error
        if how == "raises":
            assert status["reason"] == "rank 1 failed: an error of its own"
        else:
            assert f"See {reports[0]}." in status["reason"]
    # The journal of the rank that was stopped has what it did before.
    entries = runs["stopped"][2].entries
    ops = {entry.tag.op.split()[0]: entry.tag for entry in entries}
    assert {"totals", "gradients", "stop", "checkpoint"} <= set(ops)
    assert ops["totals"].step == 1 and ops["totals"].layer is None
    assert all(entry.left is not None for entry in entries)


def check_report(how, text, late):
    """Who waits where, who is late, and how its process is."""
    here = "all_reduce `gradients of layers.1.mlp.down.weight ...` (step 2, micro-batch 1)"
    assert here in text
    if how == "other":
        assert "all_gather `something else` (step 2, micro-batch 0)" in text
        assert "instead: it runs" in text
    else:
        assert text.startswith("watchdog: rank 0 has waited ") and f" s in {here}" in text
        process = {"stopped": "it is stopped (state T)", "dies": "it is dead"}.get(how, "it runs")
        assert f"rank 1 is missing: {process}" in text
        assert f"pid {late.pid} on {late.host}. It last left all_reduce `" in text
    assert ("in sleeps_in_a_function_of_its_own" in text) == (how == "sleeps")


class Recording(Axis):
    """Rank 0 of 2, where the other one has the same."""

    tags = []

    def gather(self, x, tag):
        self.tags.append(self.group.journal.complete(tag))
        return torch.cat([x, x])

    def scatter_sum(self, x, tag):
        self.tags.append(self.group.journal.complete(tag))
        return 2 * x.chunk(2)[0]

    def begin_gather(self, x, part, tag):
        x.copy_(self.gather(part, tag))
        return Pending()

    def begin_scatter_sum_(self, x, tag):
        x.view(2, -1)[self.rank].copy_(self.scatter_sum(x, tag))
        return Pending()


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_collectives_of_layers_say_which(tiny_config, tmp_path, recompute, watched):
    """Also those of the backward pass, in which layers are computed again."""
    journal = Journal(tmp_path, 0)
    axis = Recording("tp", 0, 2, Group(None, "tp", journal))
    axis.tags.clear()
    tp = TensorParallel(axis, sp=True)
    model = build_model(tiny_config.model, tp=tp, recompute=recompute)
    if watched:
        model.layers[1].mlp.up.register_forward_hook(lambda *_: None)
    journal.at(step=5, micro_batch=1)
    tokens = torch.arange(34).view(2, 17)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    forward, axis.tags[:] = list(axis.tags), []
    journal.at(layer=7)  # where somebody else was last
    loss.backward()
    pairs = [("enter", layer) for layer in (0, 0, 1, 1)]
    expected = [each for pair in pairs for each in (pair, ("leave", pair[1]))]
    expected = [("leave", None), *expected, ("enter", None)]
    assert [(tag.op, tag.layer) for tag in forward] == [*expected, ("loss", None)]
    backward = [(tag.op, tag.layer) for tag in axis.tags if "backward" in tag.op]
    assert backward == [(f"{op}, backward", layer) for op, layer in reversed(expected)]
    again = [(tag.op, tag.layer) for tag in axis.tags if "backward" not in tag.op]
    # The last product of a layer is nothing that the backward pass needs.
    for layer in (1, 0):
        ops = {"none": [], "selective": ["enter, again"], "full": ["enter", "leave", "enter"]}
        if watched and layer == 1:
            ops["selective"] = ["enter"]
        expected = [(op, layer) for op in ops[recompute] + ["enter, again"] * 2]
        assert [each for each in again if each[1] == layer] == expected
    assert [layer for _, layer in again] == sorted((layer for _, layer in again), reverse=True)
    assert {tag[2:] for tag in forward + axis.tags} == {(1, 5)}
