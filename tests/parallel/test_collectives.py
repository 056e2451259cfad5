"""Tagged collectives and the journal that others read: gloo processes, closed forms."""

import os
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from stellarator.parallel.collectives import Group, Message
from stellarator.parallel.journal import NOWHERE, Entry, Journal, Tag, file_of, read

pytestmark = pytest.mark.dist


def every_call(rank, size, folder):
    """What each call gives, with and without waiting, for tensors that tell ranks apart."""
    group = Group(dist.group.WORLD, "tp", Journal(folder, rank))
    x = torch.arange(6.0).view(2, 3) + 100 * rank
    all_of = [torch.arange(6.0).view(2, 3) + 100 * r for r in range(size)]
    total = sum(all_of)
    assert torch.equal(group.all_reduce(x.clone(), "sum"), total)
    assert torch.equal(group.all_reduce(x.clone(), "max", maximum=True), all_of[-1])
    pending = group.all_reduce(x.clone(), "sum", wait=False)
    assert group.journal.oldest() is None  # it is only begun
    assert torch.equal(pending.wait(), total)
    for dim in (0, 1):
        assert torch.equal(group.all_gather(x, "gather", dim=dim), torch.cat(all_of, dim))
        wide = torch.cat([x + 1000 * n for n in range(size)], dim)
        part = group.reduce_scatter(wide, "scatter", dim=dim)
        assert torch.equal(part, total + 1000 * size * rank)
    assert torch.equal(group.all_gather(x, "gather", wait=False).wait(), torch.cat(all_of))
    wide = group.reduce_scatter(torch.cat([x] * size), "scatter", wait=False).wait()
    assert torch.equal(wide, total)
    assert torch.equal(group.broadcast(x.clone(), size - 1, "first"), all_of[-1])
    above, below = (rank + 1) % size, (rank - 1) % size
    got = [torch.empty(2, 3), torch.empty(1)]
    sends = [Message(x, above), Message(torch.full((1,), float(rank)), below)]
    group.exchange(sends, [Message(got[0], below), Message(got[1], above)], "ring").wait()
    assert torch.equal(got[0], all_of[below]) and got[1].item() == above
    if rank == 0:
        group.send(x, 1, "one")
    elif rank == 1:
        assert torch.equal(group.recv(torch.empty(2, 3), 0, "one"), all_of[0])
    with pytest.raises(ValueError, match=f"that the {size} ranks of tp divide, got \\({size + 1},"):
        group.reduce_scatter(torch.zeros(size + 1), "scatter")
    assert group.journal.oldest() is None, group.journal.open


@pytest.mark.parametrize("size", [2, 3])
def test_every_collective(size, tmp_path):
    on_ranks(every_call, size, size, str(tmp_path))
    records = [read(tmp_path, rank) for rank in range(size)]
    assert {record.count("tp") for record in records} == {10}
    assert {record.groups["tp"] for record in records} == {tuple(range(size))}
    assert records[0].find("tp:0>1", 2 if size > 2 else 3).tag.op == "one"


def test_a_group_of_one_gives_back_what_it_got(tmp_path):
    journal = Journal(tmp_path, 0)
    group = Group(None, "tp", journal)
    x = torch.zeros(4)
    for call in (group.all_reduce, group.all_gather, group.reduce_scatter):
        assert call(x, "a") is x and call(x, "a", wait=False).wait() is x
    assert group.broadcast(x, 0, "a") is x and group.exchange([], [], "a").wait() is None
    assert read(tmp_path, 0).last is None


def test_a_journal_says_where_its_rank_is(tmp_path):
    journal = Journal(tmp_path, 3)
    journal.register("tp", (3, 7))
    journal.at(step=12, micro_batch=2)
    before = time.time()
    first = journal.enter("tp", "all_reduce", Tag("mlp", layer=5), 4096)
    second = journal.enter("tp:3>7", "send", "kv", 7)
    record = read(tmp_path, 3)
    assert (record.rank, record.pid, record.closed) == (3, os.getpid(), False)
    assert before <= record.waits.entered <= time.time()
    assert record.waits == first == journal.oldest() and record.last == second
    assert str(first) == "all_reduce `mlp` (step 12, micro-batch 2, layer 5), number 1 of tp"
    assert record.members("tp") == (3, 7) and record.members("tp:3>7") == (3, 7)
    journal.leave(first)
    assert read(tmp_path, 3).waits == second and read(tmp_path, 3).find("tp", 1).left
    journal.leave(second)
    journal.leave(second)
    assert read(tmp_path, 3).waits is None and journal.oldest() is None
    for n in range(50):
        journal.leave(journal.enter("tp", "all_reduce", "x" * 300, n))
    record = read(tmp_path, 3)
    assert record.count("tp") == 51 and record.last.elements == 49
    assert len(record.entries) == 8 + 1  # the newest of each channel
    journal.close()
    assert read(tmp_path, 3).closed and read(tmp_path, 4) is None
    with pytest.raises(ValueError, match="expected one group named 'tp'"):
        journal.register("tp", (1, 2))


def test_an_old_entry_does_not_overwrite_a_newer_one(tmp_path):
    """Sixteen started and left in order: the first ones have lost their slots by then."""
    journal = Journal(tmp_path, 0)
    entries = [journal.enter("dp", "all_reduce", "bucket", n) for n in range(16)]
    assert read(tmp_path, 0).waits.sequence == 9
    for entry in entries[:8]:
        journal.leave(entry)
    assert [e.sequence for e in read(tmp_path, 0).entries if e.left is None] == [16, *range(9, 16)]
    assert journal.oldest().sequence == 9


def test_a_heartbeat_beside_new_channels_loses_none(tmp_path):
    """The watchdog's thread writes into the header that this one writes, too."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for turn in range(20):
            journal, stop = Journal(tmp_path / str(turn), 0), threading.Event()

            def beat(journal=journal, stop=stop):
                while not stop.is_set():
                    journal.beat()

            thread = threading.Thread(target=beat)
            thread.start()
            for n in range(60):
                journal.leave(journal.enter(f"c{n}", "all_reduce", "x", 1))
            stop.set()
            thread.join()
            found = {entry.channel for entry in read(journal.folder, 0).entries}
            assert len(found) == 60, turn
    finally:
        sys.setswitchinterval(before)


def test_what_is_begun_is_asked_in_its_order(tmp_path):
    """Of a channel whose first is not done no other is asked: the cost does not grow."""

    class Work:
        done, asked = False, 0

        def is_completed(self):
            Work.asked += 1
            return self.done

    journal, works = Journal(tmp_path, 0), [Work() for _ in range(100)]
    for n, work in enumerate(works):
        journal.leave_later(journal.enter("dp", "all_reduce", str(n), 1, waits=False), work)
    assert Work.asked <= 100  # not 1 + 2 + ... + 99
    works[0].done = works[1].done = works[3].done = True
    journal.settle()
    assert len(journal.open) == 98
    works[2].done = True
    journal.settle()
    assert len(journal.open) == 96


def test_half_an_entry_is_not_believed(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.leave(journal.enter("dp", "all_reduce", "a", 1))
    journal.enter("dp", "all_reduce", "half written", 2)
    data = bytearray(file_of(tmp_path, 0).read_bytes())
    at = data.index(b"half written")
    data[at : at + 3] = b"xxx"
    file_of(tmp_path, 0).write_bytes(bytes(data))
    assert [e.tag.op for e in read(tmp_path, 0).entries] == ["a"]


class Work:
    """Of a GPU: wait() returns at once."""

    done = False

    def is_completed(self):
        return self.done

    def wait(self):
        pass


class Event:
    """Of a GPU, which comes to it later; elapsed_time is in ms."""

    done = False

    def __init__(self, seconds):
        self.seconds = seconds

    def query(self):
        return self.done

    def elapsed_time(self, other):
        return 1e3 * (other.seconds - self.seconds)


def test_what_a_gpu_has_only_queued_is_left_when_it_is_done(tmp_path):
    journal = Journal(tmp_path, 0)
    group = Group(None, "dp", journal)
    group._now = iter([Event(0.5), Event(2.5)]).__next__
    works = [Work(), Work()]
    entries = [journal.enter("dp", "all_reduce", str(n), 1) for n in range(2)]
    group._finish(works, entries)
    assert journal.oldest() == entries[0] and journal.waited_seconds == 0.0
    Event.done = True
    assert journal.waited_seconds == 2.0
    works[0].done = True
    third = journal.enter("dp", "all_reduce", "c", 1)  # looks after the earlier ones
    assert journal.oldest() == entries[1] and isinstance(third, Entry)
    works[1].done = True
    journal.settle()
    assert journal.oldest() == third


def test_what_is_only_begun_is_not_waited_for(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.at(step=4, layer=3)
    begun = journal.enter("pp:0>1", "send", Tag("kv", NOWHERE, 2), 1, waits=False)
    assert str(begun.tag) == "`kv` (step 4, micro-batch 2)"
    assert journal.oldest() is None and read(tmp_path, 0).waits is None
    second = journal.enter("pp", "all_reduce", "b", 1)
    journal.wait(begun)
    assert read(tmp_path, 0).waits == second == journal.oldest()  # for longer
    journal.leave(second)
    waits = read(tmp_path, 0).waits
    assert waits == journal.oldest() and waits.sequence == 1 and waits.waits > waits.entered
