"""Rows of T+1 tokens cut from shuffled documents, each a pure function of (seed, sample index).

defines: Row, PackedDataset, padding_fraction

The documents of a corpus are shuffled by (seed, epoch) and joined into one virtual stream. A row is
a window of it, found by two binary searches, and the rows of an epoch are shuffled by (seed, epoch)
too. Nothing depends on how many samples will be drawn: a longer run continues a shorter one.

Room for fill-in-the-middle. A transformed text grows by 3 sentinels and by what the divided words
cost, and a row must hold it whole, or the target at its end is cut off. So the virtual stream is
longer than the real one: a margin of empty positions precedes every text that may be transformed
(every document; with `split_at_files` every file), and a window is one margin shorter than a row.
Whatever a window divides, its row then has 3 positions for each text: every text but the first has
its own margin in the window, and the first, which may have left it in the row before, has that of
the row. What one text leaves unused, another can use, so with the margins of `_margins` 1 draw of
cuts in 100 has to be repeated. Positions left over are `<fim_pad>` without a target: 0.8% of
T = 1024 for documents of 7,500 tokens, 1.8% for documents of 150. Without FIM margins are 0.

Where a row ends inside a document and the last text is transformed, its middle would end in
padding, and a model trained on long documents would never see where one ends. So one more position
is kept for `<|endoftext|>` after such a middle (`end_cut_middles`; the public loaders have nothing
there): the end of the target belongs to the target.

Where files are much longer than rows, every transformed text would still end at the end of its row,
and a model learns that place instead of the text. With `max_text_tokens` longer texts are divided
at random into documents of their own.

Every token of the corpus is in exactly one row of an epoch. Rows do not overlap, so the first
token of a row is nobody's target. The last window of an epoch is shorter, and its row has padding.

Several corpora: without weights all shards are one corpus, shuffled together, which draws from each
in proportion to its tokens and sees every token once per epoch. With weights each shard has its
own epochs, and `permutation.Blend` says which one a sample comes from.

A document begins where the index says so, after every `<|endoftext|>`, and with the row. One that
holds `<|endoftext|>` inside (foreign shards) brings the margin of one text only: where several
parts of it are transformed in one row, the room may not last, and some stay as they are.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from stellarator.config import DataConfig, FimConfig
from stellarator.data.fim import SENTINELS, Fim
from stellarator.data.permutation import DOCUMENTS, FIM, ROWS, TEXTS, Blend, generator, permutation
from stellarator.data.segments import segments

MIN_SEQ_LENGTH = 16  # then a window is longer than a margin, so that no row is empty


@dataclass(frozen=True)
class Row:
    """One sample.

    tokens: (T+1,) int64; those from `length` on are `<fim_pad>`.
    starts: (E,) int64, where documents begin, ascending from 0, padding left out.
    length: tokens that are not padding.
    """

    tokens: np.ndarray
    starts: np.ndarray
    length: int


class PackedDataset:
    """An endless sequence of rows: `row(index)` for any index >= 0, in any order, from any thread.

    Args:
        shards: of `stellarator.data.shards.Shard`, or anything with its `lengths`, `tokens`, `[i]`.
        weights: one per shard, any scale; empty: one corpus, in proportion to tokens.
        tokenizer: of the tokens in the shards.
        seq_length: T; a row has T+1 tokens.
        fim: None is the same as a rate of 0.
        seed: of both shuffles and of fill-in-the-middle.
        attend_across_documents: kept for `Batches`; rows do not depend on it.
        shuffle: False for evaluation: rows in the order of the shards, the same in every epoch.
        keep_segments: with `split_at_files`, write where files begin beside the shards, so that the
            next start need not look for it; rows do not depend on it.
    Raises:
        ValueError: no tokens, another number of weights than of shards, or seq_length too small.
    Cost: with `split_at_files`, construction reads every token once to find the files, unless an
        earlier one kept where they are (see `segments`). A row of T = 1024 takes 0.04 ms, with FIM
        0.12 ms (8.5 million tokens/s on one core). Memory: 16 bytes per text, and per document 8
        and 16 for each of the two epochs kept.
    """

    def __init__(
        self,
        shards: Sequence,
        weights: Sequence[float],
        tokenizer,
        seq_length: int,
        fim: FimConfig | None = None,
        seed: int = 1234,
        attend_across_documents: bool = False,
        *,
        shuffle: bool = True,
        keep_segments: bool = False,
    ):
        _check_arguments(shards, weights, seq_length)
        self.tokenizer = tokenizer
        self.seq_length = seq_length
        self.seed = seed
        self.attend_across_documents = attend_across_documents
        self._fim = Fim(tokenizer, fim) if fim is not None and fim.rate != 0 else None
        row_margin, margin = _margins(fim, seq_length) if self._fim else (0, 0)
        self._end_cut_middles = bool(self._fim and fim.end_cut_middles)
        self._max_text = fim.max_text_tokens if self._fim else None
        if self._max_text is not None:  # each further text needs the sentinels, an end and growth
            row_margin += (SENTINELS + 3) * (2 * seq_length // self._max_text + 1)
        separator = self._fim.file_sep if self._fim else None
        groups = [[shard] for shard in shards] if weights else [shards]
        window = seq_length + 1 - row_margin - int(self._end_cut_middles)
        if window < 1:
            raise ValueError(
                f"packing: expected room for text beside that for FIM, got rows of {seq_length} "
                f"with max_text_tokens {self._max_text}. Use longer rows or longer texts."
            )
        self._corpora = [
            _Corpus(group, window, margin, separator, seed, k, shuffle, keep_segments)
            for k, group in enumerate(groups)
        ]
        self._blend = Blend(weights or [1.0])

    @classmethod
    def from_config(
        cls, config: DataConfig, shards: Sequence, tokenizer, *, validation: bool = False,
        fim: bool = True, keep_segments: bool = False,
    ) -> "PackedDataset":  # fmt: skip
        """The training set of a configuration, or a fixed view of its validation set.

        Args:
            shards: opened from `config.train`, or from `config.validation`.
            fim: False leaves fill-in-the-middle out.
            keep_segments: as of the class.
        """
        return cls(
            shards,
            () if validation else config.weights,
            tokenizer,
            config.seq_length,
            config.fim if fim else None,
            config.seed,
            config.attend_across_documents,
            shuffle=not validation,
            keep_segments=keep_segments,
        )

    @property
    def num_corpora(self) -> int:
        """How many corpora are blended: 1 without weights."""
        return len(self._corpora)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(corpus.num_tokens for corpus in self._corpora)

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold every token of every shard once, whatever the weights."""
        return sum(corpus.num_rows for corpus in self._corpora)

    def locate(self, index: int) -> tuple[int, int, int]:
        """(corpus, epoch, window) of a sample: which part of the data it is."""
        if index < 0:
            raise ValueError(f"packing: expected a sample index >= 0, got {index}.")
        corpus, rank = self._blend(index)
        return corpus, *self._corpora[corpus].locate(rank)

    def raw_pieces(self, index: int) -> list[np.ndarray]:
        """The documents, or parts of them, in row `index`, before fill-in-the-middle."""
        return [ids for ids, _ in self._pieces(index)]

    def row(self, index: int) -> Row:
        """Sample `index`, counted from zero over the whole run.

        Raises:
            ValueError: negative index, or tokens that the tokenizer does not have.
        """
        pieces = self._pieces(index)
        if self._fim is None:
            pieces = [ids for ids, _ in pieces]
        else:
            eod = self.tokenizer.eod
            open_ends = sum(ids[-1] != eod for ids, _ in pieces) if self._end_cut_middles else 0
            room = self.seq_length + 1 - sum(len(ids) for ids, _ in pieces) - open_ends
            pieces = self._fim.transform_all(pieces, generator(self.seed, FIM, index), room)
            if open_ends:
                ends = map(self._fim.ends_in_middle, pieces)
                pieces = [np.append(p, eod) if e else p for p, e in zip(pieces, ends, strict=True)]
        lengths = np.array([len(ids) for ids in pieces], dtype=np.int64)
        length = int(lengths.sum())
        tokens = np.full(self.seq_length + 1, self.tokenizer.fim_pad, dtype=np.int64)
        assert length <= len(tokens), "margins leave room for every text, see the module docstring"
        np.concatenate(pieces, out=tokens[:length])
        return Row(tokens, np.cumsum(lengths) - lengths, length)

    def _pieces(self, index: int) -> list[tuple[np.ndarray, bool]]:
        """Texts of a row, each (ids, whether it begins inside `<repo_name>...`)."""
        corpus, epoch, window = self.locate(index)
        pieces = []
        for ids, first in self._corpora[corpus].documents(epoch, window):
            if ids.min() < 0 or ids.max() >= self.tokenizer.vocab_size:
                raise ValueError(
                    f"packing: expected tokens in [0, {self.tokenizer.vocab_size}), got "
                    f"{ids.min()} .. {ids.max()}. Use the tokenizer that made the shards."
                )
            in_metadata = first is not None and self._fim and first == self._fim.repo_name
            ends = np.flatnonzero(ids[:-1] == self.tokenizer.eod) + 1
            parts = np.split(ids, ends)
            pieces += [(part, bool(in_metadata and k == 0)) for k, part in enumerate(parts)]
        return pieces if self._max_text is None else self._divided(pieces, index)

    def _divided(self, pieces: list[tuple[np.ndarray, bool]], index: int):
        """Pieces longer than `max_text_tokens` in parts of half as many to as many."""
        rng, most, result = generator(self.seed, TEXTS, index), self._max_text, []
        for ids, in_metadata in pieces:
            while len(ids) > most:
                size = most // 2 + int(rng.random() * (most - most // 2 + 1))
                result.append((ids[:size], in_metadata))
                # The rest of a name is one until the first file begins.
                in_metadata = in_metadata and self._fim.file_sep not in ids[:size]
                ids = ids[size:]
            result.append((ids, in_metadata))
        return result


def padding_fraction(dataset: PackedDataset, indices: Iterable[int]) -> float:
    """The part of the positions of some rows that is padding: what the room for FIM costs."""
    used = [dataset.row(index).length for index in indices]
    return 1.0 - sum(used) / (len(used) * (dataset.seq_length + 1))


class _Corpus:
    """Shards whose documents are shuffled together, and the windows cut from them.

    A segment is a text that may be transformed on its own: a document, or one file of it. On the
    virtual stream a segment has `margin` empty positions and then its tokens. Arrays over segments
    are in the order of the shards; one epoch adds the order of documents and their places.
    """

    def __init__(
        self, shards, window: int, margin: int, separator, seed: int, key: int, shuffle, keep
    ):
        self.shards = shards
        self.window, self.margin = window, margin
        self.seed, self.key, self.shuffle = seed, key, shuffle
        lengths = [np.asarray(shard.lengths, dtype=np.int64) for shard in shards]
        self.first_document = np.cumsum([0, *map(len, lengths)])
        lengths = np.concatenate(lengths)
        if not lengths.sum():
            raise ValueError(
                f"packing: expected at least one token, got {len(lengths)} documents without any. "
                "Check the shards and the filters that made them."
            )
        if separator is None:
            sizes, self.first_segment = lengths, np.arange(len(lengths) + 1)
        else:
            sizes, self.first_segment = segments(shards, separator, keep)
        self.real = _offsets(sizes)  # tokens before each segment
        self.virtual = _offsets(sizes + margin * (sizes > 0))
        self.num_tokens = int(self.real[-1])
        self.num_rows = -(-int(self.virtual[-1]) // window)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def locate(self, rank: int) -> tuple[int, int]:
        """(epoch, window) of sample `rank` of this corpus."""
        epoch, k = divmod(rank, self.num_rows)
        return epoch, int(self._epoch(epoch)[2][k])

    def documents(self, epoch: int, window: int) -> list[tuple[np.ndarray, int | None]]:
        """The parts of documents in a window that have tokens, in order.

        Each as (ids, first token of the document) where `ids` begins in the first segment of the
        document, else as (ids, None).
        """
        order, places, _ = self._epoch(epoch)
        start = window * self.window
        end = start + self.window
        at = int(np.searchsorted(places, start, side="right")) - 1
        found = []
        while at < len(order) and places[at] < end:
            document, place = int(order[at]), int(places[at])
            at += 1
            begin = self._real_offset(document, max(start - place, 0))
            stop = self._real_offset(document, min(end, int(places[at])) - place)
            if begin == stop:
                continue  # a document without tokens, or nothing but its margin is in this window
            shard = int(np.searchsorted(self.first_document, document, side="right")) - 1
            tokens = self.shards[shard][document - int(self.first_document[shard])]
            ids = np.asarray(tokens[begin:stop], dtype=np.int64)
            first = self.first_segment[document]
            in_first = begin < self.real[first + 1] - self.real[first]
            found.append((ids, int(tokens[0]) if in_first else None))
        return found

    def _real_offset(self, document: int, virtual: int) -> int:
        """Tokens of a document before one of its virtual positions."""
        first, last = int(self.first_segment[document]), int(self.first_segment[document + 1])
        position = int(self.virtual[first]) + virtual
        segment = first + int(np.searchsorted(self.virtual[first:last], position, "right")) - 1
        inside = position - int(self.virtual[segment]) - self.margin
        return int(self.real[segment] - self.real[first]) + max(inside, 0)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order of documents, virtual place of each and the end, order of windows)."""
        plan = self._epochs.get(epoch)
        if plan is None:
            num_documents = len(self.first_segment) - 1
            if self.shuffle:
                order = permutation(num_documents, self.seed, DOCUMENTS, self.key, epoch)
                windows = permutation(self.num_rows, self.seed, ROWS, self.key, epoch)
            else:
                order, windows = np.arange(num_documents), np.arange(self.num_rows)
            sizes = np.diff(self.virtual[self.first_segment])
            plan = order, _offsets(sizes[order]), windows
            # The newest two are enough: a batch can touch the end of one epoch and the next one.
            # A new dict, not a changed one, so that another thread sees the old or the new.
            newest = dict(list(self._epochs.items())[-1:])
            self._epochs = {**newest, epoch: plan}
        return plan


def _offsets(sizes: np.ndarray) -> np.ndarray:
    """(n+1,) int64: 0 and the running sums."""
    result = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=result[1:])
    return result


def _margins(fim: FimConfig, seq_length: int) -> tuple[int, int]:
    """Positions kept free (per row, per text).

    A transformed text grows by 5 tokens on average and by 9 at most in 99 of 100 cases (measured on
    Python with a vocabulary of 4,096). With less room cuts are drawn again more often, which
    prefers those between words; with more there is more padding.
    """
    most = max(fim.rate, fim.fragment_rate if fim.split_at_files else 0.0)
    return SENTINELS + min(7, seq_length // 32), math.ceil(2 + 4 * most)


def _check_arguments(shards: Sequence, weights: Sequence[float], seq_length: int) -> None:
    """Raise ValueError for arguments that cannot be used together."""
    if not shards:
        raise ValueError("packing: expected at least one shard, got none. Name the training data.")
    if weights and len(weights) != len(shards):
        raise ValueError(
            f"packing: expected one weight per shard, got {len(weights)} weights for "
            f"{len(shards)} shards. Leave the weights out to draw in proportion to tokens."
        )
    if seq_length < MIN_SEQ_LENGTH:
        raise ValueError(
            f"packing: expected seq_length >= {MIN_SEQ_LENGTH}, got {seq_length}. Use longer rows."
        )
