"""Token shards in the indexed format of Megatron (MMIDIDX, version 1), read and written.

defines: Shard, ShardWriter, ShardError, best_dtype, check_tokenizer, hash_shard

`prefix.bin` holds the tokens of all sequences one after another. `prefix.idx` holds, little-endian:

    9 bytes      "MMIDIDX\\0\\0"
    uint64       version, 1
    uint8        dtype: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6, 7 are floats)
    uint64       number of sequences, N
    uint64       number of entries of the document index, D + 1
    int32  [N]   tokens of each sequence
    int64  [N]   byte offset of each sequence in prefix.bin
    int64  [D+1] number of the first sequence of each document, and N

A document is one or more sequences; ShardWriter makes it one. The tokens of a document lie side by
side, so reading one is a view of the mapped file.

Source: megatron/core/datasets/indexed_dataset.py of NVIDIA/Megatron-LM; the format is fairseq's.
"""

import contextlib
import hashlib
import json
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
CODES = {
    1: np.dtype("uint8"), 2: np.dtype("int8"), 3: np.dtype("<i2"), 4: np.dtype("<i4"),
    5: np.dtype("<i8"), 8: np.dtype("<u2"),
}  # fmt: skip
_AGAIN = "Copy it again, or make it again with `stellarator data prepare`."
_HEADER = struct.Struct("<9sQBQQ")


class ShardError(ValueError):
    """A shard that is damaged or is no shard; one line with file name, expected and found."""


def check_tokenizer(prefixes: Sequence[str], tokenizer_sha256: str) -> None:
    """Raise ShardError for shards that `data prepare` made with another tokenizer.

    Shards without a manifest of ours beside them, such as Megatron's, are taken as they are.
    """
    for prefix in prefixes:
        path = Path(prefix).parent / "manifest.json"
        if _made_with(path) not in (None, tokenizer_sha256):
            raise ShardError(
                f"{prefix}: expected shards of the tokenizer that was given, got those of another "
                f"one ({path}). Use the tokenizer in {path.parent / 'tokenizer'}."
            )


def _made_with(path: Path) -> str | None:
    """The hash of the tokenizer in a manifest of `data prepare`; None if it is not one."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    tokenizer = manifest.get("tokenizer") if isinstance(manifest, dict) else None
    found = tokenizer.get("sha256") if isinstance(tokenizer, dict) else None
    return found if isinstance(found, str) else None


def best_dtype(vocab_size: int) -> np.dtype:
    """What Megatron stores a vocabulary as: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def hash_shard(whole, prefix: str) -> None:
    """Add to a hash what tells a shard from others: its index, and of its tokens the size and 256
    blocks spread over them (a corpus is too large to be read at every start).
    """
    with open(prefix + ".idx", "rb") as file:
        whole.update(file.read())
    with open(prefix + ".bin", "rb") as file:
        size = file.seek(0, 2)
        whole.update(str(size).encode())
        for block in range(256):
            file.seek(block * size // 256)
            whole.update(file.read(4096))


class ShardWriter:
    """Writes a shard aside and puts it in place in `close()`.

    Until then nothing exists under the final names, or what was there before. The index goes last
    and an old one is removed first, so an index in place always belongs to the `.bin` beside it.
    Used as a context manager it removes what it wrote if an exception leaves the block.

    Args:
        prefix: path without `.bin` and `.idx`; the folder must exist.
        dtype: of the tokens, one of uint8, int8, int16, uint16, int32, int64.
    Raises:
        ValueError: another dtype.
    Cost: 4 bytes of memory per document, 28 while closing.
    """

    def __init__(self, prefix: str | os.PathLike, dtype: np.dtype | type | str):
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in CODES.items() if known == self.dtype]
        if not codes:
            raise ValueError(
                f"shard: expected an integer dtype of {[str(d) for d in CODES.values()]}, "
                f"got {np.dtype(dtype)}."
            )
        self.num_tokens = 0
        self._code = codes[0]
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        self._file = open(self.prefix + ".bin.partial", "wb")

    def __len__(self) -> int:
        return len(self._lengths)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document.

        Raises:
            ValueError: not one-dimensional integers, or an id that the dtype cannot hold.
            OSError: the disk is full; the message names the file.
        """
        ids = np.asarray(ids)
        if not ids.size:
            ids = ids.astype(self.dtype)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"shard: expected (n,) integer ids, got {ids.dtype} of shape {ids.shape}."
            )
        limits = np.iinfo(self.dtype)
        if ids.size and not limits.min <= ids.min() <= ids.max() <= limits.max:
            raise ValueError(
                f"shard: expected ids in [{limits.min}, {limits.max}] ({self.dtype}), got "
                f"{ids.min()} to {ids.max()}. Use a wider dtype."
            )
        data = ids.astype(self.dtype, copy=False).tobytes()
        with _naming(self._file.name):
            self._file.write(data)
        self._hash.update(data)
        self._lengths.append(len(ids))
        self.num_tokens += len(ids)

    def close(self) -> dict[str, str]:
        """Put the shard in place. Returns the SHA-256 of both files, by their extension."""
        count = len(self._lengths)
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(1, dtype="<i8"), ends])[:count]
        documents = np.arange(count + 1, dtype="<i8")
        header = _HEADER.pack(MAGIC, VERSION, self._code, count, count + 1)
        index = header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()
        with _naming(self._file.name):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        aside = self.prefix + ".idx.partial"
        with _naming(aside), open(aside, "wb") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.prefix + ".idx")
        os.replace(self._file.name, self.prefix + ".bin")
        os.replace(aside, self.prefix + ".idx")
        return {"bin": self._hash.hexdigest(), "idx": hashlib.sha256(index).hexdigest()}

    def abort(self) -> None:
        """Remove what was written so far."""
        with contextlib.suppress(OSError):  # the disk may be full; nothing is kept anyway
            self._file.close()
        for name in (".bin.partial", ".idx.partial"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.prefix + name)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is not None:
            self.abort()
        elif not self._file.closed:
            self.close()


class Shard:
    """A shard on disk, mapped and not read: opening costs one pass over the index.

    `shard[i]` is document i as a read-only view; `len(shard)` the number of documents; `lengths`
    (D,) int64 their tokens; `tokens` all of them, one document after another, as a read-only view;
    `prefix`, `num_sequences`, `num_tokens`, `dtype`. Can be pickled, then maps again.

    Raises:
        ShardError: missing, truncated, foreign or contradictory files.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = os.fspath(prefix)
        index, tokens = self.prefix + ".idx", self.prefix + ".bin"
        self.dtype, lengths, pointers, documents = _read_index(index)
        self.num_sequences = len(lengths)
        self.num_tokens = _check_sequences(index, lengths, pointers, self.dtype.itemsize)
        starts = _check_documents(index, documents, pointers, self.num_tokens, self.dtype.itemsize)
        self.lengths = np.diff(starts)
        self._starts = starts
        size = _size_of(tokens)
        if size != self.num_tokens * self.dtype.itemsize:
            raise ShardError(
                f"{tokens}: expected {self.num_tokens * self.dtype.itemsize} bytes "
                f"({self.num_tokens} {self.dtype} tokens in {index}), got {size}. "
                + (f"It is truncated. {_AGAIN}" if size < self.num_tokens * self.dtype.itemsize
                   else "It belongs to another index.")
            )  # fmt: skip
        self.tokens = _map(tokens, self.dtype, 0, self.num_tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"{self.prefix}: expected a document in [0, {len(self)}), got {index}."
            )
        index %= len(self)
        return self.tokens[self._starts[index] : self._starts[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self):
        return Shard, (self.prefix,)


def _read_index(path: str):
    """(dtype, lengths (N,), pointers (N,), documents (D+1,)), the arrays mapped."""
    size = _size_of(path)
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if MAGIC.startswith(header[: len(MAGIC)]) and size < _HEADER.size:
        raise ShardError(
            f"{path}: expected a header of {_HEADER.size} bytes, got {size}. It is truncated. "
            + _AGAIN
        )
    if not header.startswith(MAGIC):
        raise ShardError(
            f"{path}: expected a Megatron index starting with {MAGIC!r}, got {header[:9]!r}."
        )
    _, version, code, num_sequences, num_entries = _HEADER.unpack(header)
    if version != VERSION:
        raise ShardError(f"{path}: expected version {VERSION} of the index, got {version}.")
    if code not in CODES:
        raise ShardError(
            f"{path}: expected integer tokens, dtype code in {list(CODES)}, got {code}."
        )
    expected = _HEADER.size + 12 * num_sequences + 8 * num_entries
    # Megatron's multimodal index ends with one more byte per sequence, which says nothing to us.
    if size not in (expected, expected + num_sequences):
        raise ShardError(
            f"{path}: expected {expected} bytes for {num_sequences} sequences and {num_entries} "
            f"document entries, got {size}. " + ("It is truncated. " * (size < expected)) + _AGAIN
        )
    at = _HEADER.size
    lengths = _map(path, np.dtype("<i4"), at, num_sequences)
    pointers = _map(path, np.dtype("<i8"), at + 4 * num_sequences, num_sequences)
    documents = _map(path, np.dtype("<i8"), at + 12 * num_sequences, num_entries)
    return CODES[code], lengths, pointers, documents


def _check_sequences(path: str, lengths, pointers, itemsize: int, step: int = 1 << 20) -> int:
    """The number of tokens; the sequences must lie side by side from byte 0. In bounded memory."""
    total = 0
    for begin in range(0, len(lengths), step):
        part = lengths[begin : begin + step]
        if part.min() < 0:
            raise ShardError(f"{path}: expected lengths >= 0, got {part.min()}.")
        ends = total + np.cumsum(part, dtype=np.int64)
        wanted = np.concatenate([[total], ends[:-1]]) * itemsize
        wrong = np.flatnonzero(pointers[begin : begin + step] != wanted)
        if wrong.size:
            first = int(wrong[0])
            raise ShardError(
                f"{path}: expected sequence {begin + first} at byte {wanted[first]}, behind "
                f"the one before it, got {pointers[begin + first]}."
            )
        total = int(ends[-1])
    return total


def _check_documents(path: str, documents, pointers, num_tokens: int, itemsize: int) -> np.ndarray:
    """(D+1,) int64: the first token of each document, and the number of tokens."""
    count = len(pointers)
    if not len(documents) or documents[0] != 0 or documents[-1] != count:
        ends = f"{documents[0]} ... {documents[-1]}" if len(documents) else "nothing"
        raise ShardError(f"{path}: expected a document index 0 ... {count}, got {ends}.")
    if np.any(documents[1:] < documents[:-1]):
        raise ShardError(f"{path}: expected a document index that never falls, got one that does.")
    starts = np.full(len(documents), num_tokens, dtype=np.int64)
    inside = documents < count
    starts[inside] = pointers[documents[inside]] // itemsize
    return starts


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        advice = _advice(path[: -len(".idx")])
        raise ShardError(f"{path}: cannot be read: {error.strerror}. {advice}") from None


def _advice(prefix: str) -> str:
    """What to give instead of a prefix that lacks a file."""
    root, extension = os.path.splitext(prefix)
    if extension in (".bin", ".idx") and os.path.exists(root + ".idx"):
        return f"Give {root} without {extension}."
    names = sorted(os.listdir(prefix)) if os.path.isdir(prefix) else ()
    shards = [os.path.join(prefix, name[:-4]) for name in names if name.endswith(".idx")]
    if shards:
        return f"That is a folder: give a shard in it, such as {shards[0]}."
    return "Give the prefix of a .bin and .idx pair."


def _map(path: str, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """A read-only array over a part of a file; mapping nothing is not possible."""
    if not count:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors of writing say which file: `file.write` alone raises them without a name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"shard: cannot be written: {error.strerror}", path) from None
