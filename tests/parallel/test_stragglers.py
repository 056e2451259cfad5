"""Slow ranks are named: the rule by hand, and times measured on gloo processes."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from stellarator.parallel.collectives import Group
from stellarator.parallel.stragglers import rank_seconds, stragglers


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
    ],
)
def test_the_rule(seconds, slow):
    assert [found.rank for found in stragglers(seconds)] == slow


def test_names_and_words():
    (found,) = stragglers([1.0, 1.5, 1.0], ranks=[4, 9, 14])
    assert str(found) == "rank 9 is slow: 1.5 s a step, 50% more than the median of 1 s"
    assert stragglers([1.0, 1.5, 1.0], tolerance=0.6) == []


def measured(rank):
    begun = time.perf_counter()
    time.sleep(0.6 if rank == 1 else 0.1)
    group = Group(dist.group.WORLD, "world")
    return rank_seconds(time.perf_counter() - begun, group, torch.device("cpu"))


@pytest.mark.dist
def test_every_rank_gets_the_times_of_all():
    lists = on_ranks(measured, 3)
    assert lists[0] == lists[1] == lists[2] and lists[0][1] >= 0.6
    assert [found.rank for found in stragglers(lists[0])] == [1]


def test_one_rank():
    assert rank_seconds(2.5, Group(None, "world"), torch.device("cpu")) == [2.5]
