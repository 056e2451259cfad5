"""The verbs `collectives` and `overlap` in small; times are not looked at.

References: what the tensors of two ranks give; closed forms of bandwidths; a link on a clock that
only moves when somebody sleeps. Not covered: NCCL.
"""

import json
from types import SimpleNamespace

import pytest
from benchmark_helpers import ENVIRONMENT, run

from benchmarks import bench_collectives, link, overlap, results
from benchmarks.bench_collectives import BUS, KIB, SMALL
from benchmarks.link import Link, Span
from benchmarks.machine import Limits
from benchmarks.ranks import on_ranks
from stellarator.parallel.collectives import Group

pytestmark = pytest.mark.dist


def test_collectives_beside_bare_torch(tmp_path):
    output = tmp_path / "points.json"
    done = run("collectives", "--small", "--repeats", "1", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    points = results.read(str(output))
    found = [(p["op"], p["sizes"]["bytes"]) for p in points]
    assert found == [(kind, size) for kind in BUS for size in SMALL]
    assert {p["variant"] for p in points} == {"2 ranks"}
    figure = f"--link-gbps {bench_collectives.link_gbps(points):.3g}\n"
    assert figure in done.stdout and "copy in memory" in done.stdout
    assert len([line for line in done.stdout.splitlines() if ", 2 ranks" in line]) == len(points)


def faulty(rank, n):
    """A collective that is wrong on one rank."""
    exchange = Group.exchange

    def broken(self, sends, receives, tag):
        pending = exchange(self, sends, receives, tag)
        pending.wait()
        if rank == 1:
            for message in receives:
                message.tensor[-1] += 1
        return pending

    Group.exchange = broken
    found = bench_collectives.measure(rank, n, list(BUS), [4 * KIB], "cpu", 1)
    return [right for right, _ in found]


def test_a_wrong_collective_is_not_timed():
    of_ranks = on_ranks(faulty, 2, "cpu")
    assert of_ranks == [[True] * 6, [True] * 4 + [False, False]]  # send and exchange
    limits = Limits(10.0, 1.0)
    found = [[True, {"ours": [1.0], "torch": [1.0]}], [False, {"ours": [1.0], "torch": [1.0]}]]
    point = bench_collectives._point("send", 4096, 2, found, "cpu", limits, ENVIRONMENT)
    assert point["ms"] is None and "on ranks [1]" in point["wrong"]
    results.Writer()(point)


def test_bandwidths_are_those_of_the_slowest_rank():
    times = [
        {"ours": [1.0, 4.0, 2.0], "torch": [1.0] * 3},
        {"ours": [3.0, 2.0, 2.0], "torch": [1.0] * 3},
    ]
    found = [[True, each] for each in times]
    expected = {"all_reduce": 1.5, "all_gather": 0.75, "reduce_scatter": 0.75}
    points = []
    for kind in BUS:
        point = bench_collectives._point(
            kind, 3_000_000, 4, found, "cpu", Limits(10.0, 1.0), ENVIRONMENT
        )
        assert point["ms"]["p50"] == 3.0  # of 3, 4, 2
        gbps, bus = bench_collectives.bandwidths(point)
        assert gbps == pytest.approx(1.0) and bus == pytest.approx(expected.get(kind, 1.0))
        points.append(point)
    assert bench_collectives.link_gbps(points) == pytest.approx(0.75)


@pytest.fixture
def clock(monkeypatch):
    """Of `link`: time that passes when somebody sleeps."""
    now = SimpleNamespace(seconds=100.0)

    def sleep(seconds):
        now.seconds += seconds

    monkeypatch.setattr(
        link, "time", SimpleNamespace(perf_counter=lambda: now.seconds, sleep=sleep)
    )
    return now


def test_a_link_carries_one_message_after_the_other(clock):
    class Inner:
        def wait(self):
            return "result"

    def begin():
        messages = [slow.carry(name, Inner(), 1e6) for name in "ab"]
        clock.seconds += 0.25  # a computation
        assert [m.wait() for m in messages] == ["result"] * 2 and messages[0].wait() == "result"

    slow = Link(gbps=0.01, latency_us=1e5)  # 0.1 s for the bytes and 0.1 s each
    begin()
    assert clock.seconds == pytest.approx(100.4)  # the longer of 0.4 and 0.25
    assert [s[:2] for s in slow.spans] == [
        (k, m) for m in "ab" for k in ("communication", "waiting")
    ]
    times = [x for s in slow.spans for x in s[2:]]
    assert times == pytest.approx([100, 100.2, 100.25, 100.25, 100.2, 100.4, 100.25, 100.4])
    slow.at_once = True
    begin()
    assert clock.seconds == pytest.approx(100.4 + 0.4 + 0.25)


def test_a_slow_inner_message_is_waited_for(clock):
    class Inner:
        def wait(self):
            clock.seconds += 5.0

    fast = Link(gbps=1.0, latency_us=1.0)
    fast.carry("a", Inner(), 1e3).wait()
    assert fast.spans[0].end == pytest.approx(105.0) == clock.seconds


def test_seconds_under_computation():
    def spans(kind, *times):
        return [Span(kind, "", start, end) for start, end in times]

    travels = spans("communication", (0, 4), (2, 6), (10, 11))
    computes = spans("computation", (1, 2), (1, 3), (5, 7), (20, 30))
    others = spans("waiting", (0, 30))
    assert overlap.seconds(travels + computes + others) == (7, 3)
    assert overlap.seconds(computes) == (0, 0)


def test_messages_lie_under_computation(tmp_path):
    """In every case some of it; none where each is waited for at once."""
    output, trace = tmp_path / "points.json", tmp_path / "trace.json"
    words = "--scale 1 --repeats 1 --latency-us 2000 --trace"
    done = run("overlap", *words.split(), str(trace), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:5] for line in done.stdout.splitlines() if "%" in line][
        : len(overlap.CASES)
    ]
    assert [row[0].strip() for row in rows] == list(overlap.CASES)
    for name, travels, share, at_once in rows:
        assert float(travels) > 2, name
        assert int(share.strip(" %")) > 2 * int(at_once.strip(" %")) + 2, (name, share, at_once)
    assert [p["peer"] for p in results.read(str(output))] == ["wait at once"] * len(rows)
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {"rank 0", "rank 1"}
    for name in overlap.CASES:
        kinds = {e["tid"] for e in events if e["cat"] == name}
        assert kinds == {"communication", "computation", "waiting"}, name
    assert min(e["ts"] for e in events) == 0 and all(e["dur"] >= 0 for e in events)
