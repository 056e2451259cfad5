"""Data parallelism in buckets and the stages of ZeRO: gloo processes, float64, through the loop.

The reference is the run of one process: its losses, weights and moments. Not covered: NCCL, and
how much time the overlap saves.
"""

import dataclasses

import pytest
from runs import assert_same_state, losses, torchrun

from stellarator import settings
from stellarator.config import ParallelConfig
from stellarator.train.loop import Trainer

BUCKET_MIB = 0.03  # five buckets of the tiny model in float64
# name: layout, recompute. Each of these groups is run by the same processes, one after the other.
TWO = {
    "zero 0": ({"zero": 0}, "none"),
    "zero 1": ({"zero": 1}, "none"),
    "zero 2": ({"zero": 2}, "none"),
    "zero 3": ({"zero": 3}, "none"),
    "zero 3 selective": ({"zero": 3}, "selective"),
    "zero 3 full": ({"zero": 3}, "full"),
}
FOUR = {
    "zero 0 sp": ({"zero": 0, "tp": 2, "sp": True}, "none"),
    "zero 1 sp": ({"zero": 1, "tp": 2, "sp": True}, "none"),
    "zero 2 sp": ({"zero": 2, "tp": 2, "sp": True}, "none"),
    "zero 3 sp": ({"zero": 3, "tp": 2, "sp": True}, "none"),
    "zero 3 of four": ({"zero": 3}, "none"),
}
# One process group for all runs: to make another one in the same processes may hang.
ONE_BY_ONE = """
import sys
from stellarator import settings
from stellarator.config import RunConfig
from stellarator.parallel import mesh
from stellarator.train.loop import Trainer

stop, mesh.stop = mesh.stop, lambda: None
for path in open(sys.argv[1]).read().splitlines():
    Trainer(settings.resolve(RunConfig(), path)).run()
stop()
"""


def changed(config, **sections):
    """The configuration with some fields of some sections changed."""
    new = {n: dataclasses.replace(getattr(config, n), **f) for n, f in sections.items()}
    return dataclasses.replace(config, **new)


@pytest.fixture
def small(tiny_config, tmp_path):
    """Three steps in float64; two micro-batches on each of two ranks."""
    config = changed(
        tiny_config,
        train={"precision": "fp64", "steps": 3, "micro_batch_size": 2, "eval_interval": 2},
        checkpoint={"interval": 2},
    )
    return dataclasses.replace(config, folder=str(tmp_path / "one"))


def run_all(cases, one, tmp_path, processes: int, program: str = ONE_BY_ONE) -> dict:
    """The configuration of each case, which so many processes have run."""
    found, paths = {}, []
    for name, (layout, recompute) in cases.items():
        config = changed(one, train={"recompute": recompute})
        parallel = ParallelConfig(bucket_mib=BUCKET_MIB, **layout)
        folder = str(tmp_path / name)
        found[name] = dataclasses.replace(config, parallel=parallel, folder=folder)
        paths.append(tmp_path / f"{name}.toml")
        paths[-1].write_text(settings.to_toml(found[name]))
    listed, script = tmp_path / "configs.txt", tmp_path / "program.py"
    listed.write_text("\n".join(map(str, paths)))
    script.write_text(program)
    done = torchrun(one, tmp_path, processes, [str(script), str(listed)])
    assert done.returncode == 0, done.stderr[:6000]
    return found


@pytest.mark.parametrize("processes,cases,model", [(2, TWO, {}), (4, FOUR, {"vocab_size": 421})])
def test_ranks_follow_one_process(processes, cases, model, small, tmp_path):
    one = changed(small, model=model)
    Trainer(one).run()
    for name, many in run_all(cases, one, tmp_path, processes).items():
        assert losses(many.folder) == pytest.approx(losses(one.folder), rel=1e-12, abs=0), name
        assert_same_state(one.folder, many.folder, 3)
