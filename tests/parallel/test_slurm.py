"""The Slurm template on two "nodes" of this machine: a worker is killed, then the job's time is up.

srun and scontrol are imitated; torchrun, its rendezvous and its restarts are real. The reference is
a run of two processes that nothing disturbs, but that one is slow: its losses, to the bit. Not
covered: Slurm itself.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import start
from runs import changed, losses

from stellarator import cli, settings
from stellarator.train import loop

pytestmark = pytest.mark.dist
ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "slurm" / "train.sbatch"
# As Slurm does, a signal to srun goes to all processes of the step.
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=0 ] || exit 90
shift
for node in 0 1; do
    SLURM_NODEID=$node setsid "$@" &
    nodes+=" $!"
done
trap 'for node in $nodes; do kill -USR1 -- -$node; done' USR1
for node in $nodes; do
    while kill -0 $node 2>/dev/null; do wait $node; done
    wait $node || code=$?
done
exit ${code:-0}
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf 'localhost\\nlocalhost\\n' ;;
    "requeue 4711") touch requeued ;;
    *) exit 91 ;;
esac
"""
TORCHRUN = f"""#!/usr/bin/env bash
exec {sys.executable} -m torch.distributed.run "${{@/#stellarator.train/disturbed}}"
"""
# In the first start rank 1 is killed in step 4. In step 8 the job is told that its time is up, and
# steps take longer until that has come.
DISTURBED = """
import os, signal, sys, time
from stellarator.cli import main
from stellarator.train import loop

class Disturbed(loop.Trainer):
    def _one_step(self):
        rank, first = self.mesh.world.rank, os.environ["SLURM_RESTART_COUNT"] == "0"
        killed = self.folder / "killed"
        if first and self.step == 3 and rank == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if first and self.step == 7 and rank == 0:
            os.kill(int(os.environ["BATCH_PID"]), signal.SIGUSR1)
        if first and self.step >= 7:
            time.sleep(1.0)
        return super()._one_step()

loop.Trainer = Disturbed
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
"""


class Slow(loop.Trainer):
    """Rank 1 works longer, which is said and changes nothing."""

    def _dropout(self, batch):
        time.sleep(0.3 * self.mesh.world.rank)
        return super()._dropout(batch)


def undisturbed(rank, path):
    loop.Trainer = Slow
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os._exit(cli.main(["train", "--config", path]))


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def finished(command, environment, folder):
    """(exit code, output) of a program; none of its processes is left."""
    path = folder / f"output_{environment['SLURM_RESTART_COUNT']}.txt"
    with open(path, "wb") as output:
        options = {"cwd": folder, "stdout": output, "stderr": output}
        process = subprocess.Popen(command, env=environment, **options)
        try:
            return process.wait(timeout=240), path.read_text()
        except subprocess.TimeoutExpired:
            raise AssertionError(path.read_text()) from None
        finally:
            for entry in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if f"RUN={folder}/run\0".encode() in (entry / "environ").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)


def test_a_job_that_is_disturbed_trains_the_same_model(tiny_config, tmp_path, monkeypatch):
    assert subprocess.run(["bash", "-n", TEMPLATE]).returncode == 0
    programs = {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "bin" / "disturbed.py").write_text(DISTURBED)
    config = changed(tiny_config, checkpoint={"interval": 1}, train={"eval_interval": 5})
    paths = {}
    for name in ("undisturbed", "run"):
        config = dataclasses.replace(config, folder=str(tmp_path / name))
        paths[name] = tmp_path / f"{name}.toml"
        paths[name].write_text(settings.to_toml(config))
    others = [process for process, _ in start(undisturbed, 2, str(paths["undisturbed"]))]

    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{tmp_path / 'bin'}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "RUN": str(tmp_path / "run"),
        "PROCESSES": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    script = ["bash", "-c", 'export BATCH_PID=$$; exec bash "$@"', "batch", TEMPLATE]
    for count, status in enumerate(("preempted", "done")):
        environment |= {"SLURM_RESTART_COUNT": str(count), "PORT": str(free_port())}
        code, output = finished([*script, "--config", paths["run"]], environment, tmp_path)
        told = json.loads((tmp_path / "run" / "status.json").read_text())
        assert told["status"] == status, output
        assert (tmp_path / "requeued").exists() == (status == "preempted")
        (tmp_path / "requeued").unlink(missing_ok=True)
        if status == "preempted":
            assert "rank 1 is missing: it is dead" in output
            assert "resumed " in output and 7 <= told["step"] <= 10
            assert list((tmp_path / "run" / "logs" / "4711.0").iterdir())
            # One restart: nobody found addresses of the first start.
            assert output.count("resumed ") == 1 and "refused" not in output
        else:
            assert code == 0, output
    for process in others:
        process.join(timeout=60)
        assert process.exitcode == 0
    expected = losses(tmp_path / "undisturbed")
    assert losses(tmp_path / "run") == expected and len(expected) == 12 + 4
    assert not (tmp_path / "run" / "journals").exists()
    assert "warning: rank 1 is slow: 0." in (tmp_path / "undisturbed" / "log.txt").read_text()
    lines = (tmp_path / "undisturbed" / "metrics.jsonl").read_text().splitlines()
    slow = [r["slow"] for r in map(json.loads, lines) if r["kind"] == "ranks"]
    # Of most steps: on a busy machine the other one may be held up, too.
    assert len(slow) == 12 and sum(found.get("1", 0.0) >= 0.3 for found in slow) >= 6
