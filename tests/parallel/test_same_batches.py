"""Every layout reads the same rows: what the ranks of a run were given, beside one process.

Tensor, pipeline and context ranks of a replica get the same micro-batches; those of the replicas
together are the rows of one process in their order; tokens are counted once. That every token of
the shards is in an epoch once is in tests/data/test_batches.py. Not covered: what parts of a row
context ranks then take.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from ranks import on_ranks
from runs import changed

from stellarator import settings
from stellarator.config import ParallelConfig, RunConfig
from stellarator.parallel import mesh
from stellarator.parallel.layout import layout_of
from stellarator.train.loop import Trainer

# name: layout, rows of a micro-batch; of four processes.
CASES = {
    "tp dp": (ParallelConfig(tp=2), 2),
    "pp dp": (ParallelConfig(pp=2), 1),
    "tp pp": (ParallelConfig(tp=2, sp=True, pp=2, schedule="zb_h1"), 4),
    "cp dp": (ParallelConfig(cp=2), 2),
    "dp": (ParallelConfig(zero=1), 1),
}


class Reading:
    """Steps, and what they were."""

    def __init__(self, steps):
        self.steps, self.seen = steps, []

    @property
    def data_wait_seconds(self) -> float:
        return self.steps.data_wait_seconds

    def __next__(self):
        found = next(self.steps)
        self.seen.append([(b.first_row, b.tokens.tolist(), b.targets.tolist()) for b in found])
        return found


class Noting(Trainer):
    """A run whose ranks write down what they read."""

    def _one_step(self):
        if not isinstance(self.source, Reading):
            self.source = Reading(self.source)
        done = super()._one_step()
        name = f"read {os.environ.get('RANK', 0)}.json"
        (self.folder / name).write_text(json.dumps(self.source.seen))
        return done


def train_all(rank: int, paths: list[str]) -> None:
    """Each run, in one process group."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
    mesh.Mesh.stop = lambda self: None  # to make another group in the same processes may hang
    for path in paths:
        assert Noting(settings.resolve(RunConfig(), path)).run()["status"] == "done"


def read(folder, rank: int) -> list:
    return json.loads(Path(folder, f"read {rank}.json").read_text())


def rows(steps: list) -> list:
    """(number, tokens, targets) of each row of each step, in the order they were read."""
    return [
        [row for first, *both in step for row in zip(range(first, first + 9), *both, strict=False)]
        for step in steps
    ]


@pytest.mark.dist
def test_ranks_read_what_one_process_reads(small, tmp_path):
    one = changed(
        small,
        train={"steps": 2, "micro_batch_size": 1, "global_batch_size": 4},
        optim={"warmup_steps": 1},
        data={"validation": ()},
        checkpoint={"interval": None},
    )
    Noting(one).run()
    expected, runs = rows(read(one.folder, 0)), {}
    for name, (parallel, width) in CASES.items():
        run = changed(one, train={"micro_batch_size": width})
        runs[name] = dataclasses.replace(run, parallel=parallel, folder=str(tmp_path / name))
        (tmp_path / f"{name}.toml").write_text(settings.to_toml(runs[name]))
    on_ranks(train_all, 4, [str(tmp_path / f"{name}.toml") for name in runs], timeout=120)
    for name, run in runs.items():
        layout = layout_of(run.parallel, 4)
        by_replica: dict[int, list] = {}
        for rank in range(4):
            found = read(run.folder, rank)
            assert by_replica.setdefault(layout.place(rank)["dp"], found) == found, (name, rank)
        replicas = [by_replica[index] for index in range(layout.dp)]
        together = [
            [each[micro] for micro in range(len(steps[0])) for each in steps]
            for steps in zip(*replicas, strict=True)
        ]
        assert rows(together) == expected, name
        assert tokens(run.folder) == tokens(one.folder)


def tokens(folder) -> list[int]:
    """Targets of each step, and of all so far."""
    records = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [(r["tokens"], r["tokens_total"]) for r in records if r["kind"] == "train"]
