"""Rows: every token once per epoch, targets never cut, pure in (seed, index), blending.

References: the documents themselves, put together again from the rows of an epoch; for blending the
greedy rule in exact fractions. Shards here are real files written by `ShardWriter`, and lists. Not
covered: corpora too large for this machine's memory (offsets are int64 throughout).
"""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from stellarator.config import DataConfig, FimConfig
from stellarator.data.fim import inverse
from stellarator.data.packing import PackedDataset, padding_fraction
from stellarator.data.permutation import BLEND_PERIOD, Blend, generator, permutation
from stellarator.data.shards import Shard, ShardWriter
from stellarator.data.tokenizer import Tokenizer

ALWAYS = FimConfig(rate=1.0, fragment_rate=1.0)
OPEN = replace(ALWAYS, end_cut_middles=False)
MIXED = "\u65e5\u672c\u8a9e \U0001f642\u00e9\u00e9\u00e9\u03b1\u03b2 = 1  # \u2014 caf\u00e9\n"


class Listed:
    """Documents in memory, with the three members of a shard that packing uses."""

    def __init__(self, documents):
        self.documents = [np.array(ids, dtype=np.uint16) for ids in documents]
        self.lengths = np.array([len(ids) for ids in self.documents], dtype=np.int64)
        self.tokens = np.concatenate([np.empty(0, dtype=np.uint16), *self.documents])

    def __getitem__(self, index):
        return self.documents[index]


def python_sources() -> list[str]:
    modules = (json, dataclasses, textwrap, subprocess)
    return [Path(m.__file__).read_text(encoding="utf-8") for m in modules]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train([*python_sources(), MIXED * 5], 1000, "starcoder2")


def functions(tokenizer) -> list[list[int]]:
    """Some 200 distinct real documents: the library's sources cut at `def`, and mixed text."""
    texts = [part for text in python_sources() for part in re.split("\n *def ", text)]
    texts += [f"{k} {MIXED * k}" for k in range(1, 12)]
    texts = [f"# {k}\n{text}" for k, text in enumerate(texts)]
    return [[*tokenizer.encode(text), tokenizer.eod] for text in texts]


def repositories(tokenizer, num: int, seed: int = 0) -> list[list[int]]:
    """StarCoder2 documents with 1 to 12 files of 0 to 60 tokens, half with names."""
    rng, special = np.random.default_rng(seed), tokenizer.special
    source = tokenizer.encode(python_sources()[1])
    documents = []
    for k in range(num):
        ids = [special["<repo_name>"], *tokenizer.encode(f"organisation/n\u00e4me-{k}")] * (k % 2)
        for _ in range(rng.integers(1, 13)):
            at = rng.integers(0, len(source) - 60)
            ids += [special["<file_sep>"], *source[at : at + rng.integers(0, 61)]]
        documents.append([*ids, *tokenizer.encode(f"# {k}"), tokenizer.eod])
    return documents


def tiny(tokenizer, num: int = 300) -> list[list[int]]:
    """Documents of 0 to 9 tokens; the one of 0 tokens has not even an end."""
    rng = np.random.default_rng(1)
    ids = rng.integers(len(tokenizer.special), tokenizer.vocab_size, size=(num, 9))
    documents = [[*ids[k, : rng.integers(0, 9)], tokenizer.eod] for k in range(num)]
    return [[], *documents, []]


def some_functions(tokenizer) -> list[list[int]]:
    return functions(tokenizer)[-60:]


def some_repositories(tokenizer) -> list[list[int]]:
    return repositories(tokenizer, 50)


def digest(dataset: PackedDataset, indices) -> list[str]:
    """A hash of each row."""
    rows = [dataset.row(k) for k in indices]
    data = [r.tokens.tobytes() + r.starts.tobytes() + bytes([r.length % 251]) for r in rows]
    return [hashlib.sha256(item).hexdigest() for item in data]


def epoch_in_order(dataset: PackedDataset, epoch: int) -> list[int]:
    """Sample indices of one epoch in the order of the virtual stream."""
    n = dataset.rows_per_epoch
    found = sorted((dataset.locate(k)[1:], k) for k in range(epoch * n, (epoch + 1) * n))
    assert [at for at, _ in found] == [(epoch, window) for window in range(n)]
    return [k for _, k in found]


def unended(piece, ids, t):
    """A piece without the `<|endoftext|>` that ends a middle where the row cuts a document."""
    return piece[:-1] if piece[-1] == t.eod != ids[-1] else piece


def split_documents(stream, eod: int) -> Counter:
    """How often each document occurs in a stream that ends with one."""
    ends = np.flatnonzero(np.array(stream) == eod) + 1
    assert ends[-1] == len(stream)
    return Counter(tuple(stream[a:b]) for a, b in zip([0, *ends[:-1]], ends))


@pytest.mark.parametrize("fim", [None, FimConfig(), ALWAYS, FimConfig(split_at_files=False)])
@pytest.mark.parametrize("make", [some_functions, some_repositories, tiny])
@pytest.mark.parametrize("seq_length", [16, 67, 1024])
def test_every_token_once_per_epoch(words, make, fim, seq_length):
    """Raw tokens reassemble to the documents; rows hold exactly the bytes of their raw tokens."""
    documents = make(words)
    shards = [Listed(documents[:7]), Listed(documents[7:])]
    dataset = PackedDataset(shards, (), words, seq_length, fim, seed=5)
    split = fim is not None and fim.split_at_files
    orders = []
    for epoch in range(2):
        stream = []
        for k in epoch_in_order(dataset, epoch):
            raw, row = dataset.raw_pieces(k), dataset.row(k)
            stream += [token for piece in raw for token in piece.tolist()]
            assert (row.tokens[row.length :] == words.fim_pad).all()
            bounds = [*row.starts, row.length]
            pieces = [row.tokens[a:b] for a, b in zip(bounds[:-1], bounds[1:])]
            assert bounds[0] == 0 and len(pieces) == len(raw)
            for piece, ids in zip(pieces, raw):
                restored = inverse(unended(piece, ids, words), words, split_at_files=split)
                assert restored == words.decode_bytes(ids)
            if fim is None:
                assert row.tokens[: row.length].tolist() == stream[len(stream) - row.length :]
        assert split_documents(stream, words.eod) == Counter(map(tuple, filter(None, documents)))
        orders.append(stream)
    assert orders[0] != orders[1]
    assert dataset.num_tokens == len(orders[0])


def test_cut_middles_are_left_open_on_request(words):
    documents = [*functions(words), *repositories(words, 20)]
    both = [
        PackedDataset([Listed(documents)], (), words, 64, replace(ALWAYS, end_cut_middles=end))
        for end in (False, True)
    ]
    ends = [[d.row(k).tokens[d.row(k).length - 1] for k in range(200)] for d in both]
    raw = sum(d == words.eod for d in (both[0].raw_pieces(k)[-1][-1] for k in range(200)))
    assert sum(end == words.eod for end in ends[0]) == raw < 100
    assert sum(end == words.eod for end in ends[1]) > 180


def test_the_target_is_never_cut(words):
    """2,000 random rows, tiny and long texts, all to be transformed: each one is, and is whole."""
    documents = [*functions(words), *repositories(words, 80), *tiny(words)]
    checked = Counter()
    rng = np.random.default_rng(2)
    for seq_length in (16, 48, 256, 1024):
        dataset = PackedDataset([Listed(documents)], (), words, seq_length, ALWAYS, seed=1)
        for k in rng.integers(0, 10**9, size=500).tolist():
            row, raw = dataset.row(k), dataset.raw_pieces(k)
            assert row.length <= seq_length + 1
            bounds = [*row.starts, row.length]
            for piece, ids in zip((row.tokens[a:b] for a, b in zip(bounds, bounds[1:])), raw):
                last = piece[np.flatnonzero(piece == words.special["<file_sep>"])[-1:].sum() :]
                transformed = words.fim_prefix in last[:2]
                assert (piece[-1] == words.eod) == (ids[-1] == words.eod or transformed)
                checked["ended"] += piece[-1] == words.eod != ids[-1]
                piece = unended(piece, ids, words)
                assert inverse(piece, words) == words.decode_bytes(ids)
                checked[_texts_transformed(piece, ids, words)] += 1
    assert checked["ended"] > 500
    assert checked["left alone"] == 0 and checked["all"] > 3000 and checked["metadata"] > 50


def _texts_transformed(piece, ids, t) -> str:
    """What happened to the texts between separators, which the sentinels of each must agree on."""
    separator = t.special["<file_sep>"]

    def texts(x):
        x = x[:-1] if x[-1] == t.eod else x
        bounds = np.concatenate([[-1], np.flatnonzero(x == separator), [len(x)]])
        return [x[a + 1 : b] for a, b in zip(bounds[:-1], bounds[1:])]

    new, old = texts(piece), texts(ids)
    assert len(new) == len(old)
    metadata = False
    for k, (a, b) in enumerate(zip(new, old)):
        sentinels = [int((a == s).sum()) for s in (t.fim_prefix, t.fim_suffix, t.fim_middle)]
        if sentinels == [1, 1, 1]:
            assert a[0] == t.fim_prefix
        elif len(b) and not (k == 0 and a.tolist() == b.tolist()):
            return "left alone"
        elif len(b):  # only a name, or the rest of one, may stay
            text = t.decode_bytes(b.tolist()).decode("utf-8", "ignore").removeprefix("<repo_name>")
            if not any(text in f"organisation/n\u00e4me-{n}" for n in range(80)):
                return "left alone"
            metadata = True
    return "metadata" if metadata else "all"


def pieces_of(row) -> list[np.ndarray]:
    bounds = [*row.starts, row.length]
    return [row.tokens[a:b] for a, b in zip(bounds[:-1], bounds[1:])]


@pytest.mark.parametrize("max_text", [None, 32])
def test_names_of_repositories_are_never_transformed(words, max_text):
    """Also where a row, or a part of a divided text, begins inside the name: its tokens alone do
    not show it.
    """
    name = "organisation/" + "a-very-long-repository-name-" * 3
    separator = words.special["<file_sep>"]
    body = [separator, *words.encode("f.py\nx = 1\n")]
    document = [words.special["<repo_name>"], *words.encode(name), *body, *body, words.eod]
    fim = replace(ALWAYS, max_text_tokens=max_text)
    dataset = PackedDataset([Listed([document] * 40)], (), words, 512 if max_text else 32, fim)
    inside = files = 0
    for k in range(dataset.rows_per_epoch):
        for new, raw in zip(pieces_of(dataset.row(k)), dataset.raw_pieces(k)):
            first = raw[: np.flatnonzero(np.append(raw, separator) == separator)[0]]
            text = words.decode(first.tolist())
            if text and text in f"<repo_name>{name}":
                assert new[: len(first)].tolist() == first.tolist()
                inside += not text.startswith("<repo_name>")
            files += words.fim_prefix in new
    assert inside > 20 and files > 20  # and files after the name are transformed


def test_padding_is_below_two_percent(words):
    """At T = 1024, on functions of 400 tokens; without FIM only the last row of an epoch."""
    documents = Listed(functions(words) * 4)
    assert 200 < documents.lengths.mean() < 600
    plain = PackedDataset([documents], (), words, 1024)
    rows = plain.rows_per_epoch
    assert [k for k in range(rows) if plain.row(k).length < 1025] == [
        k for k in range(rows) if plain.locate(k)[2] == rows - 1
    ]
    for fim in (FimConfig(), FimConfig(rate=0.9, split_at_files=False), ALWAYS):
        dataset = PackedDataset([documents], (), words, 1024, fim)
        assert 0.0 < padding_fraction(dataset, range(dataset.rows_per_epoch)) < 0.02


def test_rates_hold_in_packed_rows(words):
    """Margins and budgets do not change how often a text is transformed, nor the mode."""
    dataset = PackedDataset([Listed(functions(words))], (), words, 256, FimConfig())
    pieces = [new for k in range(1500) for new in pieces_of(dataset.row(k)) if len(new) > 8]
    changed = [new for new in pieces if new[0] == words.fim_prefix]
    assert abs(len(changed) - len(pieces) / 2) < 3 * np.sqrt(len(pieces) / 4)
    spm = sum(int(new[1] == words.fim_suffix) for new in changed)
    assert abs(spm - len(changed) / 2) < 3 * np.sqrt(len(changed) / 4) + 0.02 * len(changed)


# A program that prints the digests of some rows, last to first: its own process, another order.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_packing as t
from stellarator.data.tokenizer import Tokenizer
dataset = t.purity_dataset(Tokenizer.load(sys.argv[2]))
print("\\n".join(reversed(t.digest(dataset, range(59, -1, -1)))))
"""


def purity_dataset(tokenizer) -> PackedDataset:
    documents = [*functions(tokenizer), *repositories(tokenizer, 30)]
    shards = [Listed(documents[:50]), Listed(documents[50:])]
    return PackedDataset(shards, (0.7, 0.3), tokenizer, 128, FimConfig(), seed=11)


def test_rows_depend_on_seed_and_index_alone(words, tmp_path):
    words.save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    dataset = purity_dataset(tokenizer)
    expected = digest(dataset, range(60))
    assert digest(dataset, range(59, -1, -1))[::-1] == expected
    far = 3 * 10**9  # a row of a much later epoch, in between, changes nothing
    assert digest(dataset, [far, 7, far, 8])[1::2] == expected[7:9]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path)],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == expected
    other = purity_dataset(tokenizer)
    other.seed = 12  # only the cuts: the order of documents was made with seed 11
    assert digest(other, range(60)) != expected
    assert len(set(expected)) == 60


def test_another_seed_is_another_order(words):
    documents = Listed(functions(words))
    a, b = (PackedDataset([documents], (), words, 128, None, seed) for seed in (1, 2))
    a, b = (digest(dataset, range(dataset.rows_per_epoch)) for dataset in (a, b))
    assert len(set(a) & set(b)) < len(a) / 10  # some, where long documents happen to be cut alike


def test_rows_of_an_epoch_are_shuffled(words):
    dataset = PackedDataset([Listed(functions(words))], (), words, 64)
    n = dataset.rows_per_epoch
    first, second = ([dataset.locate(e * n + k)[2] for k in range(n)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second and first != list(range(n))


def test_golden_permutation():
    """The order of every run rests on these values, whatever the version of NumPy."""
    assert permutation(8, 1234, 1).tolist() == [0, 5, 6, 4, 2, 1, 7, 3]
    assert permutation(8, 1234, 1, 0, 1).tolist() != permutation(8, 1234, 1).tolist()
    assert generator(7, 3, 5).random(2).tolist() == [0.9432429371033727, 0.9657140482348491]
    assert sorted(permutation(10_000, 3, 2).tolist()) == list(range(10_000))


def test_streams_of_different_keys_differ():
    keys = [(s, p, i, j) for s in (0, 2**64 - 1) for p in (1, 2) for i in (0, 1) for j in (0, 9)]
    words = [generator(*key).bit_generator.random_raw(4).tolist() for key in keys]
    assert len({word for row in words for word in row}) == 4 * len(keys)
    with pytest.raises(ValueError, match=r"expected 0 <= seed < 2\*\*64, got -1"):
        generator(-1, 1)


def greedy(shares: list[int], total: int, count: int) -> list[tuple[int, int]]:
    """The blending rule, sample by sample, in exact fractions."""
    weights = [Fraction(share, total) for share in shares]
    drawn, result = [0] * len(shares), []
    for i in range(1, count + 1):
        owed = [weight * i - d for weight, d in zip(weights, drawn)]
        chosen = owed.index(max(owed))
        result.append((chosen, drawn[chosen]))
        drawn[chosen] += 1
    return result


@pytest.mark.parametrize("weights", [[3, 1], [1, 1, 1, 1], [0.25, 0.5, 0.125, 0.125], [5]])
def test_blend_is_the_greedy_rule(weights):
    blend = Blend(weights)
    shares = blend.shares.tolist()
    assert sum(shares) == BLEND_PERIOD
    assert [blend(i) for i in range(500)] == greedy(shares, BLEND_PERIOD, 500)


def test_blend_goes_on_across_its_period():
    blend = Blend([0.6, 0.3, 0.1])
    expected = Counter()
    for i in range(2 * BLEND_PERIOD + 1000):
        corpus, rank = blend(i)
        assert rank == expected[corpus]  # each corpus is read in order, nothing left out
        expected[corpus] += 1
        assert BLEND_PERIOD * (expected[corpus] - 1) < blend.shares[corpus] * (i + 1)
    assert blend(10**12)[1] == pytest.approx(10**12 * [0.6, 0.3, 0.1][blend(10**12)[0]], rel=1e-3)


@pytest.mark.parametrize(
    "weights, message",
    [
        ([], "expected one weight per corpus"),
        ([1.0, 0.0], "expected positive finite weights"),
        ([1.0, float("inf")], "expected positive finite weights"),
        ([1.0, -1.0], "expected positive finite weights"),
        ([1.0, 1e-9], "expected every weight to be at least 1/65536"),
    ],
)
def test_blend_errors(weights, message):
    with pytest.raises(ValueError, match=message):
        Blend(weights)


def test_weights_give_each_shard_its_own_epochs(words):
    documents = functions(words)
    shards = [Listed(documents[:20]), Listed(documents[20:])]
    dataset = PackedDataset(shards, (3.0, 1.0), words, 64)
    single = [PackedDataset([shard], (), words, 64) for shard in shards]
    drawn = Counter()
    for k in range(800):
        corpus, epoch, _ = dataset.locate(k)
        assert epoch == drawn[corpus] // single[corpus].rows_per_epoch
        drawn[corpus] += 1
    assert drawn[0] == 600
    first = [k for k in range(800) if dataset.locate(k)[:2] == (0, 0)]
    stream = [
        token
        for k in sorted(first, key=dataset.locate)
        for token in dataset.row(k).tokens[: dataset.row(k).length].tolist()
    ]
    assert split_documents(stream, words.eod) == Counter(map(tuple, documents[:20]))


@pytest.mark.parametrize("fim", [None, OPEN])
@pytest.mark.parametrize(
    "documents", [[[100]], [[100, 0]], [[0]], [[0]] * 5, [[]] * 40 + [[100, 101, 0]]]
)
def test_tiny_corpora(words, documents, fim):
    """Less than one row: every row is an epoch, mostly padding."""
    assert words.eod == 0
    dataset = PackedDataset([Listed(documents)], (), words, 64, fim)
    assert dataset.rows_per_epoch == 1
    for k in range(4):
        assert dataset.locate(k) == (0, k, 0)
        row = dataset.row(k)
        raw = np.concatenate(dataset.raw_pieces(k)).tolist()
        assert inverse(row.tokens, words) == words.decode_bytes(raw)
        assert sorted(raw) == sorted(sum(documents, []))
        assert row.tokens.shape == (65,) and len(row.starts) == len([d for d in documents if d])


def test_a_document_longer_than_many_rows(words):
    text = words.encode("".join(python_sources()))
    dataset = PackedDataset([Listed([[*text, words.eod]])], (), words, 32, FimConfig())
    assert dataset.rows_per_epoch > len(text) / 33
    stream = [t for k in epoch_in_order(dataset, 3) for t in dataset.raw_pieces(k)[0].tolist()]
    assert stream == [*text, words.eod]


def test_documents_with_ends_inside(words):
    """A foreign shard can hold several texts in one document: they are told apart in rows."""
    one = [*words.encode("x = 1\n"), words.eod]
    dataset = PackedDataset([Listed([one * 30])], (), words, 64, OPEN)
    for k in range(dataset.rows_per_epoch):
        row = dataset.row(k)
        raw = dataset.raw_pieces(k)
        assert all(words.eod not in ids[:-1] for ids in raw)
        assert row.length <= 65 and len(row.starts) == len(raw)
        assert inverse(row.tokens, words) == words.decode_bytes(np.concatenate(raw).tolist())


def test_files_on_disk_and_a_configuration(words, tmp_path):
    documents = functions(words)
    for name, part in (("a", documents[:40]), ("b", documents[40:])):
        with ShardWriter(tmp_path / name, np.uint16) as writer:
            for ids in part:
                writer.add_document(ids)
    shards = [Shard(tmp_path / "a"), Shard(tmp_path / "b")]
    config = DataConfig(weights=(2.0, 1.0), seq_length=128, seed=9)
    dataset = PackedDataset.from_config(config, shards, words)
    listed = [Listed(documents[:40]), Listed(documents[40:])]
    same = PackedDataset(listed, (2.0, 1.0), words, 128, FimConfig(), 9)
    assert digest(dataset, range(50)) == digest(same, range(50))
    plain = PackedDataset.from_config(config, shards, words, validation=True, fim=False)
    stream = [t for k in range(plain.rows_per_epoch) for t in plain.raw_pieces(k)]
    assert np.concatenate(stream).tolist() == sum(documents, [])  # in order, not shuffled
    filled = PackedDataset.from_config(config, shards, words, validation=True)
    n = filled.rows_per_epoch
    assert any(words.fim_middle in filled.row(k).tokens for k in range(n))
    assert [filled.locate(k) for k in (0, n - 1, n)] == [(0, 0, 0), (0, 0, n - 1), (0, 1, 0)]


def test_errors(words):
    one = Listed([[100, 0]])
    for arguments, message in (
        (([], ()), "expected at least one shard"),
        (([one], (1.0, 2.0)), "got 2 weights for 1 shards"),
        (([Listed([])], ()), "expected at least one token, got 0 documents"),
        (([Listed([[], []])], ()), "expected at least one token, got 2 documents"),
        (([one, Listed([[]])], (1.0, 1.0)), "expected at least one token"),
    ):
        for fim in (None, ALWAYS):
            with pytest.raises(ValueError, match=message):
                PackedDataset(*arguments, words, 64, fim)
    with pytest.raises(ValueError, match="expected seq_length >= 16, got 15"):
        PackedDataset([one], (), words, 15)
    with pytest.raises(ValueError, match="expected a sample index >= 0, got -1"):
        PackedDataset([one], (), words, 64).row(-1)
    with pytest.raises(ValueError, match=r"expected tokens in \[0, 1000\), got 0 .. 1000"):
        PackedDataset([Listed([[1000, 0]])], (), words, 64).row(0)


@pytest.mark.parametrize("fim", [ALWAYS, FimConfig()])
def test_long_texts_are_divided_at_random(words, fim):
    """Every token once, parts of at most 48 tokens of many sizes, each middle with its end."""
    documents = [words.encode("".join(python_sources())) + [words.eod]]
    config = replace(fim, max_text_tokens=48)
    dataset = PackedDataset([Listed(documents)], (), words, 256, config, seed=3)
    stream, sizes, ended = [], Counter(), 0
    for k in epoch_in_order(dataset, 0):
        raw, row = dataset.raw_pieces(k), dataset.row(k)
        assert row.length <= 257 and len(row.starts) == len(raw)
        bounds = [*row.starts, row.length]
        pieces = [row.tokens[a:b] for a, b in zip(bounds, bounds[1:])]
        for piece, ids in zip(pieces, raw):
            assert len(ids) <= 48
            sizes[len(ids)] += 1
            ended += piece[-1] == words.eod
            assert (piece[0] == words.fim_prefix) <= (piece[-1] == words.eod)
            assert inverse(unended(piece, ids, words), words) == words.decode_bytes(ids.tolist())
            stream += ids.tolist()
    assert stream == documents[0]
    assert len(sizes) > 20 and ended > 0.3 * sum(sizes.values())
    assert dataset.row(5).tokens.tolist() == dataset.row(5).tokens.tolist()
