"""The watchdog on real gloo processes: one late, stopped, dead, or in another collective.

Not covered: processes on several machines (their files are imitated), NCCL.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, start

from stellarator.parallel import watchdog
from stellarator.parallel.collectives import Group
from stellarator.parallel.journal import Journal, Tag, file_of, process_state, read
from stellarator.parallel.watchdog import Watchdog, report

pytestmark = pytest.mark.dist
TIMEOUT, GRACE = 2.0, 5.0
LATE = 2  # the rank at fault


def misbehaves(rank, folder, how):
    """Three ranks; two steps, in the second of which rank 2 does not come along."""
    journal = Journal(folder, rank)
    texts = Path(folder, f"said_{rank}")

    def say(text):
        with open(texts, "a") as file:
            file.write(f"{time.time():.3f} {text}\n")

    dog = Watchdog(journal, TIMEOUT, say, look_seconds=0.25)
    group = Group(dist.group.WORLD, "dp", journal)
    x = torch.ones(4)
    with dog:
        journal.at(step=811)
        group.all_reduce(x, "loss")
        journal.at(step=812, micro_batch=3)
        Path(folder, f"ready_{rank}").write_text(repr(time.time()))
        if rank == LATE:
            how_it_fails(how, group, x)
        try:
            group.all_reduce(x, Tag("grad_norm", layer=17))
        except RuntimeError as error:
            say(f"raised: {error}")
        # A rank that leaves early would look dead to those who still write.
        deadline = time.time() + TIMEOUT + GRACE
        while rank != LATE and time.time() < deadline and not _all_said(folder):
            time.sleep(0.1)
    os._exit(0)  # gloo's threads may be inside a collective


def _all_said(folder):
    return all(Path(folder, f"said_{r}").exists() for r in range(2))


def sleeps_in_a_function_of_its_own():
    time.sleep(60)


def how_it_fails(how, group, x):
    if how == "sleeps":
        sleeps_in_a_function_of_its_own()
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "other":
        group.recv(x, 0, "kv")


def said(folder, how):
    """{rank: (seconds after the ranks went into step 812, text)} of the ranks that behave."""
    started = start(misbehaves, 3, str(folder), how)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _all_said(folder):
        time.sleep(0.1)
    time.sleep(0.2)  # a file may be there before its text
    late = read(folder, LATE)
    for process, _ in started:
        process.kill()
    begun = max(float(Path(folder, f"ready_{r}").read_text()) for r in range(2))
    found = {}
    for r in range(2):
        when, _, text = Path(folder, f"said_{r}").read_text().partition(" ")
        found[r] = float(when) - begun, text
    print(found[0][1], file=sys.stderr)
    return found, late


HERE = "all_reduce `grad_norm` (step 812, micro-batch 3, layer 17), number 2 of dp, 4 elements"
BEFORE = "It last left all_reduce `loss` (step 811), number 1 of dp, "


@pytest.mark.parametrize("how", ["sleeps", "stopped", "other"])
def test_a_rank_that_does_not_come_is_named_by_all_others(how, tmp_path):
    found, late = said(tmp_path, how)
    for rank, (seconds, text) in found.items():
        assert TIMEOUT - 0.1 <= seconds <= TIMEOUT + GRACE, text
        assert f"watchdog: rank {rank} has waited " in text and f" s in {HERE}." in text
        assert "rank 2 is missing: " in text
        assert f", pid {late.pid} on {late.host}." in text
        assert f"waiting as well: rank {1 - rank} (" in text
        if how == "other":
            assert (
                "It waits in recv `kv` (step 812, micro-batch 3), number 1 of dp:0>2, for" in text
            )
            lines = text.splitlines()
            assert lines[3].startswith("    rank 0 is missing") or rank == 1, text
            assert ("which waits as said above: a circle" in lines[3]) == (rank == 0)
        else:
            assert BEFORE in text
        assert ("it is stopped (state T)" in text) == (how == "stopped")
    assert ("stack of rank 2:" in found[0][1]) == (how != "stopped")
    assert ("in sleeps_in_a_function_of_its_own" in found[0][1]) == (how == "sleeps")
    assert ("in how_it_fails" in found[0][1]) == (how != "stopped")
    assert "stack of" not in found[1][1]  # one asks, not all


def test_a_rank_that_dies_is_named_at_once(tmp_path):
    """gloo fails on the others; the error says why."""
    found, late = said(tmp_path, "dies")
    for seconds, text in found.values():
        assert seconds <= TIMEOUT + GRACE
        assert f"s in {HERE}." in text, text
        assert f"rank 2 is missing: it is dead, pid {late.pid} on {late.host}. {BEFORE}" in text
    assert any(
        text.startswith("raised: ") and "what failed: " in text for _, text in found.values()
    )


def two_groups(rank, folder):
    """Ranks 0 and 1 share a group, 1 and 2 another: 0 waits for 1, which waits for 2."""
    journal, texts = Journal(folder, rank), []
    first, second = dist.new_group([0, 1]), dist.new_group([1, 2])
    with Watchdog(journal, 1.0, texts.append, look_seconds=0.2):
        if rank == 0:
            Group(first, "tp", journal).all_reduce(torch.ones(2), "mlp")
        if rank == 1:
            Group(second, "pp", journal).all_reduce(torch.ones(1), "tied")
            Group(first, "tp", journal).all_reduce(torch.ones(2), "mlp")
        if rank == 2:
            Group(second, "pp", journal)
            time.sleep(3)
            Group(second, "pp", journal).all_reduce(torch.ones(1), "tied")
    return texts


def test_a_chain_of_waiting_ranks_is_followed(tmp_path):
    texts = on_ranks(two_groups, 3, str(tmp_path))
    assert [len(said) for said in texts] == [1, 1, 0]  # once for each collective
    lines = texts[0][0].splitlines()
    assert lines[1].startswith("  rank 1 is missing: it runs")
    assert lines[2].startswith("    It waits in all_reduce `tied`, number 1 of pp, for ")
    assert lines[3].startswith("    rank 2 is missing: it runs")
    stack = texts[0][0].partition("stack of rank 2:")[2]
    assert "in two_groups" in stack and "in _watch" not in stack


def wrong_kind(rank, folder):
    """Rank 1 enters all_gather where the others enter all_reduce; gloo fails or hangs."""
    journal, texts = Journal(folder, rank), []
    dog = Watchdog(journal, TIMEOUT, texts.append, look_seconds=0.2)
    group = Group(dist.group.WORLD, "tp", journal)

    def enters():
        try:
            if rank == 1:
                group.all_gather(torch.ones(3), "a")
            else:
                group.all_reduce(torch.ones(64), "b", wait=False).wait()
        except RuntimeError as error:
            texts.append(str(error))

    with dog:
        threading.Thread(target=enters, daemon=True).start()
        deadline = time.time() + TIMEOUT + GRACE
        while time.time() < deadline and not texts:
            time.sleep(0.1)
    Path(folder, f"said_{rank}").write_text(texts[0] if texts else "nothing")
    while not all(Path(folder, f"said_{r}").exists() for r in range(3)):
        time.sleep(0.05)
    os._exit(0)


def test_a_rank_in_another_collective_is_named(tmp_path):
    started = start(wrong_kind, 3, str(tmp_path))
    for process, _ in started:
        process.join(timeout=60)
    texts = [Path(tmp_path, f"said_{r}").read_text() for r in range(3)]
    for rank in (0, 2):
        assert "rank 1 entered all_gather `a`, number 1 of tp, 3 elements, instead" in texts[rank]
    assert "rank 0 entered all_reduce `b`, number 1 of tp, 64 elements, instead" in texts[1]


@pytest.fixture
def two(tmp_path):
    """The journal of rank 0, which waits in a collective, and of rank 1, which is elsewhere."""
    mine, other = Journal(tmp_path, 0), Journal(tmp_path, 1)
    mine.register("tp", (0, 1))
    return mine, other, mine.enter("tp", "all_reduce", "x", 4)


def test_nobody_is_missing(two, tmp_path):
    mine, other, entry = two
    other.enter("tp", "all_reduce", "x", 4)
    text, running = report(tmp_path, 0, entry, (0, 1))
    assert "nobody is missing: all have entered it" in text and running == []


def test_a_rank_without_a_journal(two, tmp_path):
    text, running = report(tmp_path, 0, two[2], (0, 1, 2))
    assert "rank 2 is missing: it has no journal: it never came so far." in text
    assert "rank 1 is missing: it runs" in text and "It has entered no collective." in text
    assert running == [1]


def test_a_rank_that_has_ended_or_whose_number_another_process_has(two, tmp_path, monkeypatch):
    mine, other, entry = two
    monkeypatch.setattr(watchdog, "process_state", lambda pid: ("S", 1))
    assert "rank 1 is missing: it is dead" in report(tmp_path, 0, entry, (0, 1))[0]
    other.close()
    assert "it has ended as it should" in report(tmp_path, 0, entry, (0, 1))[0]


def test_a_process_that_nobody_has_reaped_is_dead(two, tmp_path, monkeypatch):
    """torchrun takes a while to look after its children."""
    process = subprocess.Popen(["sleep", "60"])
    while (state := process_state(process.pid)) is None:
        time.sleep(0.01)
    record = dataclasses.replace(read(tmp_path, 1), pid=process.pid, started=state[1])
    monkeypatch.setattr(watchdog, "read", lambda folder, rank: record)
    assert "rank 1 is missing: it runs" in report(tmp_path, 0, two[2], (0, 1))[0]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_state(process.pid)[0] == "Z"
    assert "rank 1 is missing: it is dead" in report(tmp_path, 0, two[2], (0, 1))[0]
    process.wait()


def test_a_rank_of_another_machine(two, tmp_path, monkeypatch):
    """Only its heartbeat is believed; it is asked for its stack through a file."""
    mine, other, entry = two
    elsewhere = iter(range(1000))
    monkeypatch.setattr(watchdog, "machine", lambda: f"machine {next(elsewhere)}")
    assert "whether it runs is not known" in report(tmp_path, 0, entry, (0, 1))[0]
    dog = Watchdog(mine, 60.0, look_seconds=0.05)
    assert dog._stacks([1]) == {1: ["it has no watchdog, so it cannot be asked."]}
    with Watchdog(other, 60.0, look_seconds=0.05):
        text, running = report(tmp_path, 0, entry, (0, 1))
        assert "rank 1 is missing: it runs" in text and running == [1]
        stack = dog._stacks([1])[1]
        assert any("test_a_rank_of_another_machine" in line for line in stack)
        assert not file_of(tmp_path, 1, "asked").exists()
    old = dataclasses.replace(read(tmp_path, 1), heartbeat=time.time() - 31.0)
    monkeypatch.setattr(watchdog, "read", lambda folder, rank: old)
    text, running = report(tmp_path, 0, entry, (0, 1))
    assert "no sign of life for 31.0 s: it is stopped or dead, or its machine is" in text
    assert running == []
