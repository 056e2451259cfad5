"""The Slurm template on two "nodes" of this machine: a worker is killed, then the job's time is up.

srun and scontrol are imitated; torchrun, its rendezvous and its restarts are real. The reference is
a run of two processes that nothing disturbs: its losses, to the bit. Not covered: Slurm itself.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import start
from runs import changed, losses

from stellarator import cli, settings

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
        if first and self.step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if rank == 1:
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


def undisturbed(rank, path):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os._exit(cli.main(["train", "--config", path]))


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
        done = subprocess.run(
            [*script, "--config", paths["run"]],
            env=environment | {"SLURM_RESTART_COUNT": str(count)},
            **{"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 200},
        )
        told = json.loads((tmp_path / "run" / "status.json").read_text())
        assert told["status"] == status, done.stdout + done.stderr
        assert (tmp_path / "requeued").exists() == (status == "preempted")
        (tmp_path / "requeued").unlink(missing_ok=True)
        output = done.stdout + done.stderr
        if status == "preempted":
            assert "rank 1 is missing: it is dead" in output
            assert "resumed " in output and 7 <= told["step"] <= 10
            assert list((tmp_path / "run" / "logs" / "4711.0").iterdir())
        else:
            assert done.returncode == 0, output
    for process in others:
        process.join(timeout=60)
        assert process.exitcode == 0
    expected = losses(tmp_path / "undisturbed")
    assert losses(tmp_path / "run") == expected and len(expected) == 12 + 4
    assert not (tmp_path / "run" / "journals").exists()
