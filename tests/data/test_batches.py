"""Batches: targets, positions and bounds; the same samples for any number of ranks; prefetching.

Reference: `by_hand`, loops over single tokens of the rows. Not covered: copies to a GPU from pinned
memory (`to` is tested on the CPU and on the meta device).
"""

import dataclasses
import itertools
import json
import re
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from stellarator.config import FimConfig
from stellarator.data.batches import IGNORED, Batches, collate
from stellarator.data.packing import PackedDataset, Row
from stellarator.data.tokenizer import Tokenizer

FIELDS = ("tokens", "targets", "positions", "cu_seqlens")


class Listed:
    """Documents in memory, with the three members of a shard that packing uses."""

    def __init__(self, documents):
        self.documents = [np.array(ids, dtype=np.uint16) for ids in documents]
        self.lengths = np.array([len(ids) for ids in self.documents], dtype=np.int64)
        self.tokens = np.concatenate([np.empty(0, dtype=np.uint16), *self.documents])

    def __getitem__(self, index):
        return self.documents[index]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(sources(), 700, "starcoder2")


def sources() -> list[str]:
    return [Path(m.__file__).read_text(encoding="utf-8") for m in (json, textwrap)]


def make_dataset(tokenizer, seq_length=48, fim=None, **options) -> PackedDataset:
    texts = [part for text in sources() for part in text.split("\n\n")]
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    return PackedDataset([Listed(documents)], (), tokenizer, seq_length, fim, 3, **options)


def equal(a, b) -> bool:
    return a.num_targets == b.num_targets and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS
    )


def by_hand(rows: list[Row], across: bool):
    """(tokens, targets, positions, cu_seqlens) as lists, one token at a time."""
    all_tokens, all_targets, all_positions, bounds, at = [], [], [], [], 0
    for row in rows:
        T = len(row.tokens) - 1
        owner = [-1 if t >= row.length else sum(t >= s for s in row.starts) for t in range(T + 1)]
        position = 0
        for t in range(T):
            if t == 0 or (owner[t] not in (owner[t - 1], -1) and not across):
                position = 0
                bounds.append(at)
            learn = owner[t + 1] != -1 and (across or owner[t + 1] == owner[t])
            all_tokens.append(int(row.tokens[t]))
            all_targets.append(int(row.tokens[t + 1]) if learn else IGNORED)
            all_positions.append(position)
            position += 1
            at += 1
    return all_tokens, all_targets, all_positions, [*bounds, at]


def check(batch, rows, across):
    tokens, targets, positions, bounds = by_hand(rows, across)
    assert batch.tokens.flatten().tolist() == tokens
    assert batch.targets.flatten().tolist() == targets
    assert batch.positions.flatten().tolist() == positions
    assert batch.cu_seqlens.tolist() == bounds
    assert batch.num_targets == sum(target != IGNORED for target in targets)
    assert [getattr(batch, name).dtype for name in FIELDS] == [torch.int64] * 3 + [torch.int32]
    assert batch.tokens.shape == batch.targets.shape == batch.positions.shape
    assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("fim", [None, FimConfig()])
def test_batches_of_packed_rows(tokenizer, fim, across):
    dataset = make_dataset(tokenizer, fim=fim, attend_across_documents=across)
    batches = Batches(dataset, 6, 3)
    for step in range(20):
        for micro_index in range(2):
            first = step * 6 + micro_index * 3
            rows = [dataset.row(k) for k in range(first, first + 3)]
            check(batches.batch(step, micro_index), rows, across)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    "starts, length",
    [
        ([], 0),  # nothing but padding
        ([0], 1),
        ([0], 8),  # the last token of the row is padding: its target only
        ([0], 9),
        ([0, 8], 9),  # a document begins with the last token, which is a target only
        ([0, 7], 8),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], 9),
        ([0, 4], 5),
    ],
)
def test_bounds_at_the_edges_of_a_row(starts, length, across):
    def row(starts, length):
        tokens = np.arange(10, 19)
        tokens[length:] = 4
        return Row(tokens, np.array(starts, dtype=np.int64), length)

    rows = [row(starts, length), row([0, 3], 9), row(starts, length)]
    check(collate(rows, across), rows, across)


def test_attention_never_crosses_a_document(tokenizer):
    """`<|endoftext|>` stands only at the end of a document, with nothing but padding behind it."""
    batch = Batches(make_dataset(tokenizer, fim=FimConfig()), 16, 16).batch(1)
    flat, bounds = batch.tokens.flatten().tolist(), batch.cu_seqlens.tolist()
    padded = 0
    for a, b in pairwise(bounds):
        tokens = flat[a:b]
        while tokens[-1] == tokenizer.fim_pad:
            tokens.pop()
            padded += 1
        assert tokenizer.eod not in tokens[:-1] and tokenizer.fim_pad not in tokens
    assert padded  # so that the rule for padding was tried
    assert set(range(0, 16 * 48, 48)) <= set(bounds)


def test_every_layout_gives_the_same_global_batches(tokenizer):
    """Rows in the order (micro-batch, rank) are the samples of the step, one after another."""
    dataset = make_dataset(tokenizer, fim=FimConfig())
    for step in (0, 5):
        expected = torch.stack(
            [torch.from_numpy(dataset.row(step * 8 + k).tokens[:-1]) for k in range(8)]
        )
        for micro_batch_size, size in ((8, 1), (2, 1), (2, 2), (2, 4), (1, 4), (4, 2), (1, 8)):
            batches = Batches(dataset, 8, micro_batch_size)
            ranks = [list(batches.micro_batches(step, rank, size)) for rank in range(size)]
            tokens = [rank[m].tokens for m in range(len(ranks[0])) for rank in ranks]
            assert torch.equal(torch.cat(tokens), expected)
            total = sum(batch.num_targets for rank in ranks for batch in rank)
            assert total == Batches(dataset, 8, 8).batch(step).num_targets


class Ids:
    """A tokenizer with a word for every place of the corpus of `make_ids`."""

    vocab_size, eod, fim_pad = 65_000, 0, 4


def make_ids(seq_length) -> tuple[PackedDataset, list[int]]:
    """Documents of 1 to 150 tokens, and the number of each place in them."""
    lengths = np.random.default_rng(2).integers(1, 150, size=60)
    ends = 10 + np.cumsum(lengths)
    documents = [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    shards = [Listed(documents[:25]), Listed(documents[25:])]
    dataset = PackedDataset(shards, (), Ids(), seq_length, None, 3, attend_across_documents=True)
    return dataset, list(range(10, ends[-1]))


# Each: (first step, ranks, rows of a micro-batch), as a run that is resumed may have it; G = 12.
LAYOUTS = [
    [(0, 1, 12)],
    [(0, 3, 2)],
    [(0, 12, 1)],
    [(0, 2, 3), (1, 4, 1), (6, 1, 4), (7, 6, 2), (17, 3, 4)],
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("seq_length", [30, 47])
def test_every_token_once_an_epoch_at_any_size_and_after_resumes(layout, seq_length):
    """The multiset of (document, position) that all ranks see together, in three epochs."""
    dataset, everything = make_ids(seq_length)
    G, R = 12, dataset.rows_per_epoch
    assert R % G  # so that a step has rows of two epochs
    epochs: list[list[int]] = [[] for _ in range(3)]
    order: list[int] = []
    for step in range(-(-3 * R // G)):
        _, size, width = next(entry for entry in reversed(layout) if entry[0] <= step)
        batches = Batches(make_ids(seq_length)[0] if step in (6, 17) else dataset, G, width)
        rows = {}
        for micro_index, rank in itertools.product(range(G // width // size), range(size)):
            batch = batches.batch(step, micro_index, rank, size)
            for k, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True)):
                rows[batch.first_row + k] = [*tokens.tolist(), int(targets[-1])]
        order += rows
        for number in (n for n in rows if n < 3 * R):
            epochs[number // R] += [t for t in rows[number] if t not in (IGNORED, Ids.fim_pad)]
    assert order == list(range(len(order)))
    for seen in epochs:
        assert sorted(seen) == everything
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resuming_at_any_step_equals_never_stopping(tokenizer, prefetch):
    """Over three epochs, by a fresh dataset for every start, with and without the thread."""
    dataset = make_dataset(tokenizer, 64, FimConfig())
    num_steps = 3 * dataset.rows_per_epoch // 8 + 2
    unbroken = [list(Batches(dataset, 8, 4).micro_batches(step)) for step in range(num_steps)]
    for start in (0, 1, num_steps // 2, num_steps - 3):
        fresh = make_dataset(tokenizer, 64, FimConfig())
        with Batches(fresh, 8, 4).steps(start, prefetch=prefetch) as steps:
            for step in range(start, num_steps):
                assert steps.step == step
                found = next(steps)
                assert len(found) == 2 and all(map(equal, found, unbroken[step]))


class Slow:
    """A dataset whose rows take time, or fail at one index."""

    def __init__(self, dataset, seconds=0.0, fails_at=None):
        self.dataset, self.seconds, self.fails_at, self.made = dataset, seconds, fails_at, 0
        self.attend_across_documents = dataset.attend_across_documents

    def row(self, index):
        time.sleep(self.seconds)
        self.made += 1
        if index == self.fails_at:
            raise OSError("disk gone")
        return self.dataset.row(index)


def test_waiting_is_measured(tokenizer):
    slow = Slow(make_dataset(tokenizer), 0.05)
    with Batches(slow, 2, 2).steps(prefetch=0) as steps:
        next(steps), next(steps)
        assert steps.data_wait_seconds >= 0.2
    with Batches(slow, 2, 2).steps(prefetch=2) as steps:
        time.sleep(0.6)  # computing; the thread has both steps ready
        next(steps), next(steps)
        assert steps.data_wait_seconds < 0.1


def test_errors_of_the_thread_are_raised_at_their_step(tokenizer):
    for prefetch in (0, 2):
        failing = Slow(make_dataset(tokenizer), fails_at=5)
        with Batches(failing, 2, 1).steps(prefetch=prefetch) as steps:
            assert len(next(steps)) == len(next(steps)) == 2
            with pytest.raises(OSError, match="disk gone"):
                next(steps)
            assert steps.step == 3
            assert equal(next(steps)[0], Batches(failing, 2, 1).batch(3))


def test_closing_ends_the_thread(tokenizer):
    before = threading.active_count()
    slow = Slow(make_dataset(tokenizer), 0.05)
    steps = Batches(slow, 4, 4).steps(prefetch=8)
    next(steps)
    assert threading.active_count() == before + 1
    steps.close()
    steps.close()
    assert threading.active_count() == before
    assert slow.made < 4 * 9  # the step under way is finished, the others are not begun
    with pytest.raises(RuntimeError, match="expected open steps"):
        next(steps)


@pytest.mark.parametrize("fim", [None, FimConfig(rate=1.0)])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("max_rows", [None, 7, 1, 0])
def test_evaluation_visits_every_row_once(tokenizer, fim, size, max_rows):
    dataset = make_dataset(tokenizer, fim=fim, shuffle=False)
    rows = dataset.rows_per_epoch if max_rows is None else max_rows
    batches = Batches(dataset, 4, 4)
    ranks = [list(batches.evaluation(max_rows, rank, size)) for rank in range(size)]
    assert len({len(rank) for rank in ranks}) == 1  # as many forward passes on every rank
    found = torch.cat([b.tokens for rank in ranks for b in rank] + [torch.empty(0, 48).long()])
    empty = (found == tokenizer.fim_pad).all(dim=1)
    total = dataset.rows_per_epoch  # some of them are spread evenly over all
    chosen = [k * total // rows for k in range(rows)]
    expected = [dataset.row(k).tokens[:-1].tolist() for k in chosen]
    assert sorted(found[~empty].tolist()) == sorted(expected)
    assert int(empty.sum()) < 4 * size
    targets = sum(b.num_targets for rank in ranks for b in rank)
    reference = [by_hand([dataset.row(k)], False)[1] for k in chosen]
    assert targets == sum(t != IGNORED for row in reference for t in row)


def test_evaluation_of_a_blend_is_refused(tokenizer):
    shards = [Listed([[100, 0]]), Listed([[101, 0]])]
    blend = PackedDataset(shards, (1.0, 1.0), tokenizer, 16)
    with pytest.raises(ValueError, match="expected a dataset without weights"):
        next(Batches(blend, 1, 1).evaluation())


def test_moving(tokenizer):
    batch = Batches(make_dataset(tokenizer), 2, 2).batch(0)
    assert equal(batch.to("cpu"), batch)
    moved = batch.to(torch.device("meta"))
    assert all(getattr(moved, name).is_meta for name in FIELDS)
    assert moved.num_targets == batch.num_targets
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.num_targets = 0


def test_the_advice_for_ranks_that_cannot_share_a_step_works(tokenizer):
    dataset, refused = make_dataset(tokenizer), 0
    for rows, width, size in itertools.product((4, 6, 8, 12, 30), (1, 2, 3, 4, 6), range(1, 9)):
        if rows % width or rows // width % size == 0:
            continue
        with pytest.raises(ValueError) as error:
            Batches(dataset, rows, width).num_micro_batches(size)
        key, value = re.search(r"Pass train\.(\w+)=(\d+)\.$", str(error.value)).groups()
        sizes = {"global_batch_size": rows, "micro_batch_size": width} | {key: int(value)}
        assert Batches(dataset, **sizes).num_micro_batches(size) >= 1
        assert (key == "global_batch_size") == (rows % size > 0)  # the batch is kept if it can be
        refused += 1
    assert refused > 20


def test_errors(tokenizer):
    dataset = make_dataset(tokenizer)
    for sizes in ((6, 4), (0, 1), (4, 0), (-4, 2)):
        with pytest.raises(ValueError, match="train.global_batch_size to be a positive multiple"):
            Batches(dataset, *sizes)
    batches = Batches(dataset, 8, 2)
    for size in (3, 8, 0):
        with pytest.raises(ValueError, match=f"micro-batches that {size} ranks can share"):
            batches.batch(0, 0, 0, size)
        with pytest.raises(ValueError, match=f"micro-batches that {size} ranks can share"):
            batches.steps(0, 0, size)
    for arguments in ((-1, 0, 0, 1), (0, 4, 0, 1), (0, 2, 0, 2), (0, 0, 2, 2), (0, -1, 0, 1)):
        with pytest.raises(ValueError, match="batches: expected step >= 0, micro_index in"):
            batches.batch(*arguments)
