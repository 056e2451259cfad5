"""Training of two processes that goes wrong: who is told what, and how the run ends.

Ranks that sleep, are stopped, are killed, or enter another collective, all at once in runs of their
own; what is expected follows from what they do. Not covered: several machines, NCCL.
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
from stellarator.parallel.journal import read
from stellarator.train import loop

pytestmark = pytest.mark.dist
TIMEOUT, GRACE = 5.0, 5.0
WAYS = ("sleeps", "stopped", "dies", "other")


def sleeps_in_a_function_of_its_own():
    time.sleep(60)


class Misbehaving(loop.Trainer):
    """Rank 1 does not come to the gradients of step 2."""

    how = ""

    def _dropout(self, batch):  # at the begin of a micro-batch
        if self.step == 1 and self.mesh.world.rank == 1:
            Path(self.folder, "misbehaves").touch()
            if self.how == "sleeps":
                sleeps_in_a_function_of_its_own()
            elif self.how == "other":
                self.mesh.dp.gather(torch.ones(3), "something else")
            else:
                os.kill(os.getpid(), signal.SIGSTOP if self.how == "stopped" else signal.SIGKILL)
        return super()._dropout(batch)


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
    """{way: (folder, processes, journal of rank 1, seconds from the fault to the report)}."""
    config = changed(tiny_config, parallel={"timeout_seconds": TIMEOUT}, checkpoint={"interval": 1})
    config = changed(config, train={"micro_batch_size": 2, "eval_interval": None})
    started = {}
    for how in WAYS:
        folder = tmp_path / how
        folder.mkdir()
        config = dataclasses.replace(config, folder=str(folder / "run"))
        (folder / "run.toml").write_text(settings.to_toml(config))
        started[how] = start(train, 2, how, str(folder / "run.toml"))
    found = {}
    for how, ranks in started.items():
        processes, folder = [process for process, _ in ranks], tmp_path / how
        processes[0].join(timeout=60)
        (journals,) = (folder / "run" / "journals").iterdir()
        late = read(journals, 1)
        if how == "stopped":
            processes[1].kill()
        processes[1].join(timeout=20)
        (report,) = (folder / "run" / "watchdog").glob("*.txt")
        begun = (folder / "run" / "misbehaves").stat().st_mtime
        found[how] = folder, processes, late, report.stat().st_mtime - begun
    return found


def test_a_run_that_is_stuck_says_why_and_ends(runs):
    here = "all_reduce `gradients of "
    for how, (folder, processes, late, seconds) in runs.items():
        said = [(folder / f"said_{rank}").read_text() for rank in range(2)]
        print(how, f"{seconds:.1f}", *said, sep="\n", file=sys.stderr)
        (report,) = (folder / "run" / "watchdog").glob("*.txt")
        text = report.read_text()
        assert (how == "dies" or seconds >= TIMEOUT - 0.1) and seconds <= TIMEOUT + GRACE, how
        # Who waits where, for how long; who is late, and how its process is.
        assert ("watchdog: rank 0 has waited " in text) or how == "other"
        assert " s in all_" in text and "(step 2" in text
        process = {"stopped": "it is stopped (state T)", "dies": "it is dead"}.get(how, "it runs")
        if how == "other":
            assert "all_gather `something else` (step 2, micro-batch 0)" in text
            assert here in text and "instead: it runs" in text
        else:
            assert here in text and f"rank 1 is missing: {process}" in text
            assert f"pid {late.pid} on {late.host}. It last left all_reduce `" in text
        assert ("in sleeps_in_a_function_of_its_own" in text) == (how == "sleeps")
        # Everywhere the same: on the terminal, in status.json, in the error of every rank.
        assert sum(text.strip() in each for each in said) == 1
        status = json.loads((folder / "run" / "status.json").read_text())
        assert status["status"] == "failed" and status["step"] == 1
        for rank in range(1 if how in ("stopped", "dies") else 2):
            (error,) = [line for line in said[rank].splitlines() if line.startswith("error: ")]
            line = error.partition("stops: ")[2] or error.removeprefix("error: ")
            assert line in status["reason"] and ("rank 1" in line), error
        codes = [process.exitcode for process in processes]
        assert codes == [1, -signal.SIGKILL if how in ("stopped", "dies") else 1], how
    # The journal of the rank that was stopped has what it did before.
    entries = runs["stopped"][2].entries
    ops = {entry.tag.op.split()[0]: entry.tag for entry in entries}
    assert {"totals", "gradients", "stop", "checkpoint"} <= set(ops)
    assert ops["totals"].step == 1 and ops["totals"].layer is None
    assert all(entry.left is not None for entry in entries)
