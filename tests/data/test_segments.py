"""Where files begin inside documents, found and kept.

References: a plain loop over documents; the rows of a data set that keeps nothing. Not covered:
corpora too large for this machine's memory.
"""

import os

import numpy as np
import pytest

from stellarator.config import FimConfig
from stellarator.data import segments as module
from stellarator.data.packing import PackedDataset
from stellarator.data.segments import kept_path, segments
from stellarator.data.shards import Shard, ShardWriter
from stellarator.data.tokenizer import Tokenizer

SEP = 6


def plain(shards, separator: int) -> tuple[list[int], list[int]]:
    """The definition: a segment begins with its document or with a separator inside it."""
    sizes, first = [], [0]
    for shard in shards:
        for document in shard:
            begins = [0, *(k for k, t in enumerate(document.tolist()) if k and t == separator)]
            sizes += np.diff([*begins, len(document)]).tolist()
            first.append(len(sizes))
    return sizes, first


def write(prefix, documents) -> Shard:
    with ShardWriter(prefix, np.uint16) as writer:
        for ids in documents:
            writer.add_document(np.array(ids, dtype=np.int64))
    return Shard(prefix)


ODD = [
    [], [SEP], [SEP, SEP], [], [], [SEP, 9, 9, 0], [9, SEP, 9, SEP, SEP, 0], [9], [9, SEP], [],
]  # fmt: skip


def random_documents(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(SEP, SEP + 4, size=rng.integers(0, 30)).tolist() for _ in range(200)]


@pytest.mark.parametrize("step", [1, 7, 1 << 24])
def test_the_same_as_a_loop_over_documents(tmp_path, monkeypatch, step):
    monkeypatch.setattr(module, "_STEP", step)
    shards = [
        write(tmp_path / str(k), documents)
        for k, documents in enumerate([ODD, random_documents(), [[]], [[9] * 5], ODD[::-1]])
    ]
    for chosen in (shards, shards[:1], shards[2:3]):
        sizes, first = segments(chosen, SEP)
        assert (sizes.tolist(), first.tolist()) == plain(chosen, SEP)
        assert sizes.dtype == first.dtype == np.int64
    sizes, first = segments(shards, 70_000)  # more than the dtype of the tokens can hold
    assert sizes.tolist() == np.concatenate([s.lengths for s in shards]).tolist()


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "train", random_documents())


@pytest.fixture
def searched(monkeypatch):
    """How often tokens were looked through."""
    calls, find = [], module._find
    monkeypatch.setattr(module, "_find", lambda *a: calls.append(a) or find(*a))
    return calls


def test_kept_places_are_used_and_are_the_same(shard, searched):
    expected = plain([shard], SEP)
    segments([shard], SEP)
    assert not kept_path(shard.prefix).exists()  # nothing is written unasked
    for _ in range(3):
        sizes, first = segments([shard], SEP, keep=True)
        assert (sizes.tolist(), first.tolist()) == expected
    assert len(searched) == 2
    names = sorted(os.listdir(os.path.dirname(shard.prefix)))
    assert names == ["train.bin", "train.idx", "train.segments"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_damaged_file_is_ignored_and_made_again_if_asked(shard, searched, keep):
    expected = plain([shard], SEP)
    segments([shard], SEP, keep=True)
    path = kept_path(shard.prefix)
    whole = path.read_bytes()
    damaged = [b"", b"x", whole[:-1], whole[:-8], whole + bytes(8), whole[:72], bytes(len(whole))]
    for at in (0, 9, 41, 73, len(whole) - 1):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for content in damaged:
        searched.clear()
        path.write_bytes(content)
        sizes, first = segments([shard], SEP, keep)
        assert (sizes.tolist(), first.tolist()) == expected and len(searched) == 1
        assert path.read_bytes() == (whole if keep else content)


def test_a_file_of_another_shard_or_separator_is_ignored(shard, tmp_path, searched):
    segments([shard], SEP, keep=True)
    kept = kept_path(shard.prefix).read_bytes()
    tokens = np.fromfile(shard.prefix + ".bin", dtype=np.uint16)
    swapped = np.where(tokens == SEP, SEP + 1, np.where(tokens == SEP + 1, SEP, tokens))
    others = [
        (write(tmp_path / "other", random_documents(1)), SEP),
        (shard, SEP + 1),
    ]
    (tmp_path / "same").mkdir()  # the same index, other tokens
    same = write(tmp_path / "same" / "train", [d.tolist() for d in shard])
    swapped.astype("<u2").tofile(same.prefix + ".bin")
    others.append((Shard(same.prefix), SEP))
    for other, separator in others:
        searched.clear()
        kept_path(other.prefix).write_bytes(kept)
        sizes, first = segments([other], separator)
        assert (sizes.tolist(), first.tolist()) == plain([other], separator)
        assert len(searched) == 1


def test_a_folder_that_cannot_be_written_to_is_no_error(shard, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "replace_bytes", refused)
    sizes, first = segments([shard], SEP, keep=True)
    assert (sizes.tolist(), first.tolist()) == plain([shard], SEP)
    assert not kept_path(shard.prefix).exists()


def test_rows_are_the_same_with_and_without_the_file(tmp_path, searched):
    words = Tokenizer.train(["def f(x):\n    return x + 1\n"] * 9, 320, "starcoder2")
    text, separator = words.encode("def f(x):\n    return x + 1\n"), words.special["<file_sep>"]
    documents = [[*[separator, *text[k % 5 :]] * (1 + k % 4), words.eod] for k in range(60)]
    shards = [write(tmp_path / "a", documents[:25]), write(tmp_path / "b", documents[25:])]

    def rows(weights, **options):
        dataset = PackedDataset(shards, weights, words, 64, FimConfig(), 5, **options)
        found = [dataset.row(k) for k in range(2 * dataset.rows_per_epoch)]
        return [(r.tokens.tolist(), r.starts.tolist(), r.length) for r in found]

    for weights in ((), (0.5, 0.5)):
        expected = rows(weights)
        assert rows(weights, keep_segments=True) == expected
        searched.clear()
        assert rows(weights) == expected and not searched
        for shard in shards:
            kept_path(shard.prefix).unlink()
