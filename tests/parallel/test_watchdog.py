"""The watchdog on real gloo processes: one late, stopped, dead, or in another collective.

Not covered: processes on several machines (their files are imitated), NCCL.
"""

import dataclasses
import json
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

from stellarator.parallel import findings, watchdog
from stellarator.parallel.collectives import Group
from stellarator.parallel.findings import report
from stellarator.parallel.journal import Journal, Tag, file_of, process_state, read
from stellarator.parallel.verdict import Verdict
from stellarator.parallel.watchdog import Watchdog
from stellarator.train.signals import StopRequest

pytestmark = pytest.mark.dist
TIMEOUT, GRACE = 2.0, 5.0
LATE = 2  # the rank at fault


def misbehaves(rank, folder, how):
    """Three ranks; two steps, in the second of which rank 2 does not come along."""
    journal = Journal(folder, rank)

    def tell(text, line):
        with open(Path(folder, "told"), "x") as file:  # by one rank only
            file.write(f"{rank} {text}")

    def leave(line):
        Path(folder, f"left_{rank}.new").write_text(f"{time.time():.3f} {line}")
        os.replace(Path(folder, f"left_{rank}.new"), Path(folder, f"left_{rank}"))

    group = Group(dist.group.WORLD, "dp", journal)
    x = torch.ones(4)
    with Watchdog(journal, TIMEOUT, tell, leave, look_seconds=0.25):
        journal.at(step=811)
        group.all_reduce(x, "loss")
        journal.at(step=812, micro_batch=3)
        Path(folder, f"ready_{rank}").write_text(repr(time.time()))
        if rank == LATE:
            how_it_fails(how, group, x)
        try:
            group.all_reduce(x, Tag("grad_norm", layer=17))
        except RuntimeError as error:
            leave(str(error))
        time.sleep(60)  # until it is killed


def _left(folder, how):
    """Whether all that can have left."""
    ranks = range(2 if how in ("stopped", "dies") else 3)
    return all(Path(folder, f"left_{r}").exists() for r in ranks)


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


def found_after(folder, how):
    """(report, {rank: (seconds after the ranks went into step 812, line)}, the late journal)."""
    started = start(misbehaves, 3, str(folder), how)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _left(folder, how):
        time.sleep(0.1)
    late = read(folder, LATE)
    for process, _ in started:
        process.kill()
    begun = max(float(Path(folder, f"ready_{r}").read_text()) for r in range(2))
    found = {}
    for path in folder.glob("left_?"):
        when, _, line = path.read_text().partition(" ")
        found[int(path.name[-1])] = float(when) - begun, line
    told = Path(folder, "told").read_text()
    print(told, found, file=sys.stderr)
    return told, found, late


HERE = "all_reduce `grad_norm` (step 812, micro-batch 3, layer 17), number 2 of dp"
BEFORE = "It last left all_reduce `loss` (step 811), number 1 of dp, "


@pytest.mark.parametrize("how", ["sleeps", "stopped", "other", "dies"])
def test_a_rank_that_does_not_come_is_named(how, tmp_path):
    """One report, and one line on which all ranks end that can."""
    told, found, late = found_after(tmp_path, how)
    rank, text = int(told[0]), told[2:]
    process = {"stopped": "it is stopped (state T), so that it cannot show its stack"}
    process = process.get(how, "it is dead" if how == "dies" else "it runs")
    process += f", pid {late.pid} on {late.host}."
    recv = "recv `kv` (step 812, micro-batch 3), number 1 of dp:0>2"
    head = text.splitlines()[0]
    assert head.startswith(f"watchdog: rank {rank} has waited ")
    assert head.endswith(f" s in {recv if rank == LATE else HERE}, 4 elements.")
    if how == "other" and rank == LATE:  # a circle can be told from any of its ends
        assert "rank 0 is missing: it runs" in text and f"It waits in {HERE}, for" in text
        assert "rank 2 is missing, which waits as said above: a circle." in text
        return
    assert f"rank 2 is missing: {process}" in text
    if how == "other":
        assert f"It waits in {recv}, for" in text
        where = "    rank 0 is missing"
        assert any(line.startswith(where) for line in text.splitlines())
        assert (f"{where}, which waits as said above: a circle." in text) == (rank == 0)
    else:
        assert f"{process} {BEFORE}" in text
        line = f"rank 2 holds up {HERE}: {process} {BEFORE}"
        assert all(said.startswith(line) and "\n" not in said for _, said in found.values())
    assert ("stack of rank 2:" in text) == (how in ("sleeps", "other"))
    assert ("in sleeps_in_a_function_of_its_own" in text) == (how == "sleeps")
    assert ("what failed: " in text) == (how == "dies")  # gloo fails on the others
    assert set(found) == set(range(2 if how in ("stopped", "dies") else 3))
    assert len({line for _, line in found.values()}) == 1
    for seconds, _ in found.values():
        assert (how == "dies" or seconds >= TIMEOUT - 0.1) and seconds <= TIMEOUT + GRACE


def two_groups(rank, folder):
    """Ranks 0 and 1 share a group, 1 and 2 another: 0 waits for 1, which waits for 2."""
    journal, texts = Journal(folder, rank), []
    first, second = dist.new_group([0, 1]), dist.new_group([1, 2])
    with Watchdog(journal, 1.0, lambda *told: texts.append(told), texts.append, 0.2):
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
    """By who waits longest or looks first, and by that one only."""
    texts = on_ranks(two_groups, 3, str(tmp_path))
    ((report, line),) = [said for texts in texts for said in texts if isinstance(said, tuple)]
    lines = report.splitlines()
    if "rank 0 has waited" in lines[0]:
        assert lines[1].startswith("  rank 1 is missing: it runs")
        assert lines[2].startswith("    It waits in all_reduce `tied`, number 1 of pp, for ")
        assert lines[3].startswith("    rank 2 is missing: it runs")
    else:
        assert lines[1].startswith("  rank 2 is missing: it runs")
    stack = report.partition("stack of rank 2:")[2]
    assert "in two_groups" in stack and "in _watch" not in stack
    assert line.startswith("rank 2 holds up all_reduce `")
    left = [said for texts in texts for said in texts if isinstance(said, str)]
    assert left.count(line) == len(left) == 3


def wrong_kind(rank, folder):
    """Rank 1 enters all_gather where the others enter all_reduce; gloo fails or hangs."""
    journal, texts = Journal(folder, rank), []
    group = Group(dist.group.WORLD, "tp", journal)

    def enters():
        try:
            if rank == 1:
                group.all_gather(torch.ones(3), "a")
            else:
                group.all_reduce(torch.ones(64), "b", wait=False).wait()
        except RuntimeError as error:
            texts.append(str(error))

    with Watchdog(journal, TIMEOUT, lambda *told: texts.append(told), texts.append, 0.2):
        threading.Thread(target=enters, daemon=True).start()
        deadline = time.time() + TIMEOUT + GRACE
        while time.time() < deadline and not any(isinstance(text, str) for text in texts):
            time.sleep(0.1)
    Path(folder, f"said_{rank}").write_text(json.dumps(texts))
    while not all(Path(folder, f"said_{r}").exists() for r in range(3)):
        time.sleep(0.05)
    os._exit(0)


def test_a_rank_in_another_collective_is_named(tmp_path):
    started = start(wrong_kind, 3, str(tmp_path))
    for process, _ in started:
        process.join(timeout=60)
    texts = [json.loads(Path(tmp_path, f"said_{r}").read_text()) for r in range(3)]
    ((report, line),) = [said for found in texts for said in found if isinstance(said, list)]
    assert all(line in found for found in texts)
    a, b = "all_gather `a`, number 1 of tp", "all_reduce `b`, number 1 of tp"
    if "rank 1 has waited" in report:
        assert f"rank 0 entered {b}, 64 elements, instead" in report
        assert line.startswith(f"rank 1 is in {a}, rank 0 in {b}.")
    else:
        assert f"rank 1 entered {a}, 3 elements, instead" in report
        assert f"is in {b}, rank 1 in {a}." in line


@pytest.fixture
def two(tmp_path):
    """The journal of rank 0, which waits in a collective, and of rank 1, which is elsewhere."""
    mine, other = Journal(tmp_path, 0), Journal(tmp_path, 1)
    mine.register("tp", (0, 1))
    return mine, other, mine.enter("tp", "all_reduce", "x", 4)


def test_nobody_is_missing(two, tmp_path):
    mine, other, entry = two
    other.enter("tp", "all_reduce", "x", 4)
    text, running, line = report(tmp_path, 0, entry, (0, 1))
    assert "nobody is missing: all have entered it" in text and running == []
    assert (
        line == f"all have entered {entry}, and it does not end: the network or a device is stuck"
    )


def test_a_rank_without_a_journal(two, tmp_path):
    text, running, _ = report(tmp_path, 0, two[2], (0, 1, 2))
    assert "rank 2 is missing: it has no journal: it never came so far." in text
    assert "rank 1 is missing: it runs" in text and "It has entered no collective." in text
    assert running == [1]


def test_a_rank_that_has_ended_or_whose_number_another_process_has(two, tmp_path, monkeypatch):
    mine, other, entry = two
    monkeypatch.setattr(findings, "process_state", lambda pid: ("S", 1))
    assert "rank 1 is missing: it is dead" in report(tmp_path, 0, entry, (0, 1))[0]
    other.close()
    assert "it has ended as it should" in report(tmp_path, 0, entry, (0, 1))[0]


def test_a_process_that_nobody_has_reaped_is_dead(two, tmp_path, monkeypatch):
    """torchrun takes a while to look after its children."""
    process = subprocess.Popen(["sleep", "60"])
    while (state := process_state(process.pid)) is None:
        time.sleep(0.01)
    record = dataclasses.replace(read(tmp_path, 1), pid=process.pid, started=state[1])
    monkeypatch.setattr(findings, "read", lambda folder, rank: record)
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
    for module in (findings, watchdog):
        monkeypatch.setattr(module, "machine", lambda: f"machine {next(elsewhere)}")
    assert "whether it runs is not known" in report(tmp_path, 0, entry, (0, 1))[0]
    dog = Watchdog(mine, 60.0, look_seconds=0.05)
    assert dog._stacks([1]) == {1: ["it has no watchdog, so it cannot be asked."]}
    with Watchdog(other, 60.0, look_seconds=0.05):
        text, running, _ = report(tmp_path, 0, entry, (0, 1))
        assert "rank 1 is missing: it runs" in text and running == [1]
        stack = dog._stacks([1])[1]
        assert any("test_a_rank_of_another_machine" in line for line in stack)
        assert not file_of(tmp_path, 1, "asked").exists()
    old = dataclasses.replace(read(tmp_path, 1), heartbeat=time.time() - 121.0)
    monkeypatch.setattr(findings, "read", lambda folder, rank: old)
    text, running, _ = report(tmp_path, 0, entry, (0, 1))
    assert "no sign of life for 121.0 s: it is stopped or dead, or its machine is" in text
    assert running == []


def test_stacks_do_not_take_the_signals_of_schedulers(tmp_path):
    with StopRequest() as stop, Watchdog(Journal(tmp_path, 0), 60.0, look_seconds=0.05):
        stop.defer()
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.05)
        assert stop.received == signal.SIGUSR2


def test_one_rank_speaks(tmp_path):
    """Others wait for its line, and not for ever."""
    first, second = Verdict(tmp_path), Verdict(tmp_path)
    assert first.claim() and not second.claim() and second.wait(0.1) is None
    threading.Timer(0.2, first.tell, ["why"]).start()
    assert second.wait(5.0) == first.line == "why"
