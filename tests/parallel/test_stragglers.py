"""Slow ranks are named: the rule by hand, and times measured on gloo processes."""

import os
import time
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from stellarator.parallel.layout import Layout
from stellarator.parallel.mesh import Axis, Mesh, start
from stellarator.parallel.stragglers import Straggler, WorkTimes, stragglers
from stellarator.train.watch import SlowRanks


@pytest.mark.parametrize(
    "seconds,slow",
    [
        ([1.0, 1.0, 1.0, 1.0], []),
        ([1.0, 1.0, 1.19, 1.0], []),
        ([1.0, 1.0, 1.21, 1.0], [2]),
        ([1.0, 3.0], [1]),  # of two, too
        ([3.0, 1.0], [0]),
        ([1.0, 2.0, 1.0, 5.0, 1.1], [3, 1]),  # the slowest first
        ([0.1, 1.0, 1.0, 1.0], []),  # a fast one makes nobody slow
        ([2.0], []),
        ([0.01, 0.015], []),  # of which nobody would know
    ],
)
def test_the_rule(seconds, slow):
    assert [found.rank for found in stragglers(seconds)] == slow


def test_names_and_words():
    (found,) = stragglers([1.0, 1.5, 1.0], ranks=[4, 9, 14])
    assert str(found) == "rank 9 is slow: 1.5 s a step, 50% more than the median of 1 s"
    assert stragglers([1.0, 1.5, 1.0], tolerance=0.6) == []


def measured(rank, folder):
    """Two steps of 0.1 s; rank 1 works on for half a second, while the others wait for it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
    mesh = start("cpu", journals=Path(folder))
    times = WorkTimes(mesh)
    for _ in range(2):
        times.begin()
        time.sleep(0.6 if rank == 1 else 0.1)
        mesh.barrier()
        times.end()
    seconds = times.gather()
    return seconds, times.slow(seconds), times.gather()


@pytest.mark.dist
def test_waiting_is_not_work(tmp_path):
    found = on_ranks(measured, 3, str(tmp_path))
    seconds, slow, after = found[0]
    assert all(each == found[0] for each in found) and after == [0.0, 0.0, 0.0]
    assert seconds[1] >= 0.6 and all(0.1 <= seconds[rank] < 0.5 for rank in (0, 2))
    assert [each.rank for each in slow] == [1]


def test_ranks_are_compared_with_those_of_the_same_stages():
    """The last stage has the output matrix as well."""
    layout = Layout(dp=2, pp=2)
    seconds = [0.0] * 4
    for rank in range(4):
        seconds[rank] = 1.0 + layout.place(rank)["pp"]
    times = WorkTimes(Mesh(torch.device("cpu"), layout))
    assert times.slow(seconds) == []
    seconds[3] += 0.5
    assert times.slow(seconds) == [Straggler(3, 2.5, 2.0)]


class Log:
    def __init__(self):
        self.said, self.records = [], []

    def warn(self, text):
        self.said.append(text)

    def record(self, kind, values):
        self.records.append((kind, values))


def test_who_is_slow_twice_is_named_once():
    log = Log()
    ranks = SlowRanks(Mesh(torch.device("cpu"), Layout(dp=3), Axis("world", 0, 3)), log)
    for step, slow in enumerate((1.5, 1.0, 1.5, 1.5, 1.5, 1.0, 1.5, 1.5)):
        ranks.times.gather = lambda slow=slow: [1.0, 1.0, slow]
        ranks.look(step)
        assert len(log.said) == (0 if step < 3 else 1 if step < 7 else 2), step
    assert log.said[0].startswith("rank 2 is slow: 1.5 s a step, 50% more than the median of 1 s")
    assert log.records[0] == (
        "ranks",
        {"step": 0, "median_seconds": 1.0, "max_seconds": 1.5, "slow": {"2": 1.5}},
    )
