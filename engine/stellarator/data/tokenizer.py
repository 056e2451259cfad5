"""Byte-level BPE as StarCoder and StarCoder2 use it, trained or loaded.

defines: Tokenizer, TokenizerError, check_vocab_size, SPECIAL_TOKENS_STARCODER,
    SPECIAL_TOKENS_STARCODER2

Digits are split singly, then the regular expression of GPT-2 cuts words, then bytes are merged. All
256 bytes are in the vocabulary, so any text and any slice of a text decode exactly. Special
tokens have the first ids, in the order of the generation.

Text never becomes a special token. `encode`, `encode_batch` and the `str` pieces of
`encode_pieces` read `<fim_prefix>` as the ten-odd ordinary tokens that spell it; only a `Special`
piece gives the special id. The library forgets that setting when a tokenizer is saved or pickled,
so it is set here at every birth. Training cuts its text at such strings and leaves them out (the
sample that StarCoder's tokenizer was trained on had them stripped); no merge could span one
anyway, as words end between letters and signs.

Long texts: the library needs 360 bytes of memory per character, so a text is cut into chunks of
32 Ki characters at places where a word ends whatever surrounds it (see `_SAFE_CUT`). The ids are
the same as without the cut. Only a run of 32 Ki characters without such a place, which is no
source code, is cut anywhere: it still decodes exactly.

Source: bigcode-project/bigcode-tokenizer; the tokenizer files of bigcode/starcoder and starcoder2.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from stellarator.data.formats import Piece, Special
from stellarator.data.tokenizer_json import (
    REPAIR,
    SHARED,
    TokenizerError,
    bytes_of_ids,
    check_json,
    hugging_face_files,
)
from stellarator.files import replace_text

SPECIAL_TOKENS_STARCODER = (
    "<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>",
    "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<commit_before>",
    "<commit_msg>", "<commit_after>", "<reponame>",
)  # fmt: skip
SPECIAL_TOKENS_STARCODER2 = (
    "<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>",
    "<file_sep>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>",
    "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
    "<code_to_intermediate>", "<intermediate_to_code>", "<pr>", "<pr_status>", "<pr_is_merged>",
    "<pr_base>", "<pr_file>", "<pr_base_code>", "<pr_diff>", "<pr_diff_hunk>", "<pr_comment>",
    "<pr_event_id>", "<pr_review>", "<pr_review_state>", "<pr_review_comment>",
    "<pr_in_reply_to_review_id>", "<pr_in_reply_to_comment_id>", "<pr_diff_hunk_comment_line>",
    "<NAME>", "<EMAIL>", "<KEY>", "<PASSWORD>",
)  # fmt: skip
SPECIAL_TOKENS = {
    "starcoder": SPECIAL_TOKENS_STARCODER,
    "starcoder2": SPECIAL_TOKENS_STARCODER2,
}

MAX_VOCAB_SIZE = 49_152
MAX_FILE_BYTES = 64 << 20  # a tokenizer.json of 49,152 tokens has 3 MB
CHUNK_CHARACTERS = 1 << 15
BATCH_CHARACTERS = 1 << 19  # per call of the library: at most 190 MB, also for hexadecimal text

# Places where a word always ends, so that encode(a) + encode(b) == encode(a + b): before white
# space after a visible character, on both sides of a digit, between a letter and a sign. ASCII
# only: there all regular expression engines agree on what a letter or white space is.
_SAFE_CUT = re.compile(r"(?<=[!-~])(?=[ \n])|(?<=[0-9])|(?=[0-9])|(?<=[A-Za-z])(?=[!-/:-@\[-`{-~])")


class Tokenizer:
    """Made by `Tokenizer.train` or `Tokenizer.load`. Can be pickled and used after a fork.

    Attributes:
        generation: "starcoder" or "starcoder2".
        special: ids by string; special_ids: (n,) int64, sorted.
        vocab_size: ids are in [0, vocab_size).
        eod, fim_prefix, fim_middle, fim_suffix, fim_pad: ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer, generation: str):
        backend.encode_special_tokens = True  # text stays text; see the top of this file
        backend.no_truncation()
        backend.no_padding()
        self.generation = generation
        self._backend = backend
        self._owner = os.getpid()
        added = backend.get_added_tokens_decoder()
        self.special = {t.content: i for i, t in sorted(added.items()) if t.special}
        self.special_ids = np.array(sorted(self.special.values()), dtype=np.int64)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eod, self.fim_prefix, self.fim_middle, self.fim_suffix, self.fim_pad = (
            self.special[token] for token in SHARED
        )
        self._bytes = bytes_of_ids(backend, self.special, self.vocab_size)
        self._encode_many = getattr(backend, "encode_batch_fast", backend.encode_batch)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, generation: str = "starcoder2"
    ) -> "Tokenizer":
        """A tokenizer whose merges are learned from `texts`; the same texts give the same merges.

        Args:
            texts: read once, in order.
            vocab_size: with the special tokens, from 256 plus those to 49,152. A small corpus may
                not have that many merges: then `Tokenizer.vocab_size` is smaller.
            generation: "starcoder" or "starcoder2".
        Raises:
            ValueError: unknown generation, or a size out of range.
        Cost: 5 MB/s on two cores; memory for the distinct words of the corpus.
        """
        check_vocab_size(vocab_size, generation)
        special = SPECIAL_TOKENS[generation]
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        sentinels = re.compile("|".join(re.escape(token) for token in special))
        pieces = (chunk for text in texts for part in sentinels.split(text) for chunk in _cut(part))
        backend.train_from_iterator(pieces, trainer)
        return cls(backend, generation)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """A tokenizer from a folder with `tokenizer.json`, or from such a file.

        The generation is recognised by the special tokens.

        Raises:
            TokenizerError: missing, too large or damaged file; another kind of tokenizer; sentinels
                missing. One line, with the file name.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            size = file.stat().st_size
            if size > MAX_FILE_BYTES:
                raise TokenizerError(
                    f"{file}: expected at most {MAX_FILE_BYTES} bytes, got {size}. "
                    "This is not a tokenizer of this family."
                )
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            inside = path / "tokenizer" / "tokenizer.json"
            example = f", such as {inside.parent}" if inside.exists() else ""
            raise TokenizerError(
                f"{file}: cannot be read: {error.strerror}. "
                f"Give a folder with tokenizer.json{example}."
            ) from None
        except UnicodeDecodeError:
            raise TokenizerError(
                f"{file}: expected JSON in UTF-8, got other bytes. {REPAIR}"
            ) from None
        return cls._from_json(text, str(file))

    @classmethod
    def _from_json(cls, text: str, name: str) -> "Tokenizer":
        generation = check_json(text, name)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(
                f"{name}: expected a tokenizer, got an error: {error}. {REPAIR}"
            ) from None
        return cls(backend, generation)

    def __reduce__(self):
        return Tokenizer._from_json, (self.to_json(), "pickled tokenizer")

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._backend.to_str(pretty=True)

    @property
    def sha256(self) -> str:
        """Hash of `to_json()`: two tokenizers with one hash give the same ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Write a folder that transformers 4 and 5 load: three files, each replaced whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "tokenizer.json", self.to_json())
        for name, content in hugging_face_files(self.special, self.vocab_size).items():
            replace_text(folder / name, json.dumps(content, indent=2) + "\n")

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never special ones.

        Raises:
            ValueError: the text holds a lone surrogate, so it has no bytes.
        """
        return self.encode_batch([text])[0] if len(text) > CHUNK_CHARACTERS else self._one(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on the library's threads."""
        ids: list[list[int]] = [[] for _ in texts]
        for owner, part in self._encode_chunks(texts):
            ids[owner] += part
        return ids

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of pieces: text as text, `Special` as its id. Texts side by side are joined first.

        Raises:
            ValueError: a special token that this tokenizer does not have.
        """
        return self.encode_pieces_batch([pieces])[0].tolist()

    def encode_pieces_batch(self, batch: Sequence[Sequence[Piece]]) -> list[np.ndarray]:
        """`encode_pieces` of each list, on the library's threads, as int32 arrays.

        Memory is four bytes per token of the result and a constant.
        """
        texts: list[str] = []
        layouts = []  # of each list: ids of special tokens, and -1 - k for the text number k
        for pieces in batch:
            layout = []
            for piece in _joined(pieces):
                if isinstance(piece, Special):
                    layout.append(self._special_id(piece))
                else:
                    layout.append(-1 - len(texts))
                    texts.append(piece)
            layouts.append(layout)
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for owner, part in self._encode_chunks(texts):
            parts[owner].append(np.array(part, dtype=np.int32))
        arrays = []
        for layout in layouts:
            row = [np.empty(0, dtype=np.int32)]
            for item in layout:
                row += [np.array([item], dtype=np.int32)] if item >= 0 else parts[-1 - item]
            arrays.append(np.concatenate(row))
        return arrays

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of any ids; special tokens as their string.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        ids = np.asarray(ids if isinstance(ids, (list, tuple, np.ndarray)) else list(ids), np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise IndexError(
                f"tokenizer: expected ids in [0, {self.vocab_size}), got {ids.min()} to "
                f"{ids.max()}."
            )
        return b"".join([self._bytes[i] for i in ids.tolist()])

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8, as in half a character, become U+FFFD."""
        if skip_special:
            special = set(self.special.values())
            ids = [i for i in ids if i not in special]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _special_id(self, piece: Special) -> int:
        if piece.token not in self.special:
            raise ValueError(
                f"tokenizer: expected a special token of {self.generation}, got {piece.token!r}. "
                "Use the format that belongs to this tokenizer."
            )
        return self.special[piece.token]

    def _one(self, text: str) -> list[int]:
        """Ids of a text of at most one chunk, on this thread."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # which one depends on the version of the library
            at = re.search("[\ud800-\udfff]", text)
            raise ValueError(
                f"tokenizer: expected text that has UTF-8 bytes, got a lone surrogate at character "
                f"{at.start()}. Drop the text or replace the surrogate."
            ) from None

    def _encode_chunks(self, texts: Sequence[str]) -> Iterator[tuple[int, list[int]]]:
        """(index of the text, ids of its next chunk), in order, with bounded memory."""
        chunks = ((index, chunk) for index, text in enumerate(texts) for chunk in _cut(text))
        if os.getpid() != self._owner:
            # In a forked child the library's threads do not exist, and waiting for them never ends.
            for index, chunk in chunks:
                yield index, self._one(chunk)
            return
        for group in _grouped(chunks):
            try:
                found = self._encode_many([chunk for _, chunk in group], add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                yield from ((index, self._one(chunk)) for index, chunk in group)  # raises for one
                continue
            for (index, _), encoding in zip(group, found, strict=True):
                yield index, encoding.ids


def check_vocab_size(vocab_size: int, generation: str) -> None:
    """Raises ValueError for what `Tokenizer.train` would refuse."""
    if generation not in SPECIAL_TOKENS:
        raise ValueError(
            f"tokenizer: expected generation in {sorted(SPECIAL_TOKENS)}, got {generation!r}."
        )
    num_special = len(SPECIAL_TOKENS[generation])
    smallest = 256 + num_special
    if not smallest <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"tokenizer: expected vocab_size in [{smallest}, {MAX_VOCAB_SIZE}] (256 bytes and "
            f"{num_special} special tokens of {generation}), got {vocab_size}."
        )


def _cut(text: str) -> Iterator[str]:
    """`text` in chunks of at most CHUNK_CHARACTERS, cut where encoding does not notice it."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        window = text[start : start + CHUNK_CHARACTERS + 1]
        end = CHUNK_CHARACTERS
        for width in (64, CHUNK_CHARACTERS):  # a safe place is nearly always close to the end
            cuts = [m.end() for m in _SAFE_CUT.finditer(window, CHUNK_CHARACTERS - width, end + 1)]
            cuts = [cut for cut in cuts if 0 < cut <= CHUNK_CHARACTERS]
            if cuts:
                end = cuts[-1]
                break
        yield window[:end]
        start += end
    yield text[start:] if start else text


def _grouped(chunks: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Chunks in lists of about BATCH_CHARACTERS characters."""
    group, size = [], 0
    for index, chunk in chunks:
        group.append((index, chunk))
        size += len(chunk) + 64  # what an empty text costs
        if size >= BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces with texts side by side made one, so that words are found across their border."""
    texts: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            texts.append(piece)
            continue
        if texts:
            yield "".join(texts)
            texts = []
        yield piece
    if texts:
        yield "".join(texts)
