"""From source code to token shards, a tokenizer, a held-out set and an account of it all.

defines: prepare, make_folder

    output/tokenizer/         as transformers reads it
    output/train.bin .idx     training side; each document ends with <|endoftext|>
    output/validation.bin .idx
    output/held_out.jsonl     the documents of the validation side as text; `read_sources` reads it
    output/manifest.json      every file kept or skipped, sizes, hashes, seed, versions
    output/timings.json       seconds per stage; apart, so that all else is the same in every run

All of it is a function of the sources, the arguments and the versions in the manifest. It is made
in a folder inside `output` and moved out of it at the end, the manifest last. So a folder with a
manifest is complete. A run that fails or is killed before the moving leaves the old result as it
was; one that is killed during the moving leaves no manifest, and a mark: files with these names are
replaced without being asked to only where it stands.

Memory: the largest repository (up to MAX_EXAMPLE_BYTES of it), 130 bytes per document, and
the distinct words of the texts that the tokenizer is trained on. The rest waits on disk.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from stellarator.data import formats
from stellarator.data.documents import Document, Limits, Report
from stellarator.data.filters import Filters
from stellarator.data.shards import ShardWriter, best_dtype
from stellarator.data.sources import SourceError, read_sources
from stellarator.data.spool import Spool, hold_out, seed_of, units_of
from stellarator.data.tokenizer import Tokenizer, check_vocab_size

SIDES = ("train", "validation")
_SHARDS = tuple(f"{side}.{kind}" for side in SIDES for kind in ("bin", "idx"))
_FILES = (*_SHARDS, "held_out.jsonl", "timings.json", "manifest.json")  # as they are put in place
_LOCK, _WORK, _MOVING = ".lock", ".partial", ".moving"
MAX_EXAMPLE_BYTES = 32 << 20  # a larger repository becomes several examples
TOKENIZER_BYTES = 512 << 20  # text that the tokenizer is trained on, at most
_ENCODE_BYTES = 2 << 20  # per batch

Progress = Callable[[float, str], None]


def prepare(
    sources: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    vocab_size: int = 49_152,
    generation: str = "starcoder2",
    format: str | None = None,
    validation_fraction: float = 0.05,
    seed: int = 1234,
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    limits: Limits | None = None,
    filters: Filters | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict:
    """Read, filter, split by repository, train a tokenizer, lay out, encode and write.

    Args:
        sources: see `read_sources`; of one that contains `output` all else is read.
        output: folder, made if it is not there; files with other names in it are left alone.
        vocab_size, generation: of the tokenizer that is trained, on the training side only.
        format: "starcoder" (a file is a document) or "starcoder2" (a repository is one); by default
            that of the generation.
        validation_fraction: of the bytes, held out as whole repositories; 0 holds out nothing.
        tokenizer: one to use instead of training; then `vocab_size` and `generation` are its own.
        progress: called with the share done and what goes on.
        overwrite: replace a data set that `output` holds. What an interrupted run left is replaced
            in any case.
    Returns:
        The manifest.
    Raises:
        ValueError: arguments, `output` holds a data set or is a file, sources without documents, a
            split that is not possible; one line.
        RuntimeError: another run is writing to `output`.
        OSError: the disk is full; the message names the file.
    Cost: 31 MB of Python, vocabulary of 16,384: 10 s on two free cores, 230 MB of memory.
    """
    limits, filters = limits or Limits(), filters or Filters()
    progress = progress or (lambda done, text: None)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    if tokenizer is not None:
        generation = tokenizer.generation
    else:
        check_vocab_size(vocab_size, generation)
    format = format or generation
    _check_arguments(format, generation, validation_fraction)
    output = Path(output)
    if any(Path(source).resolve() == output.resolve() for source in sources):
        raise ValueError(
            f"prepare: expected another folder for the output, got the source {output} itself. "
            "Choose one inside or beside it."
        )
    with (
        _work_folder(output, overwrite) as work,
        contextlib.closing(Spool(work / "spool")) as spool,
    ):
        clock = _Clock()
        report = _read(sources, output, spool, limits, filters, progress)
        sides, split = _split(spool, validation_fraction, seed, report)
        clock.stop("read")
        given = tokenizer is not None
        if not given:
            texts = _training_texts(spool, sides["train"], seed, progress)
            tokenizer = Tokenizer.train(texts, vocab_size, generation)
        tokenizer.save(work / "tokenizer")
        clock.stop("tokenizer")
        encoder = _Encoder(spool, tokenizer, format, seed, progress)
        written = {side: encoder.write(sides[side], work / side) for side in SIDES}
        _write_held_out(spool, sides["validation"], work / "held_out.jsonl")
        clock.stop("encode")
        manifest = {
            "version": 1,
            "sources": [os.fspath(source) for source in sources],
            "seed": seed,
            "format": format,
            "validation_fraction": validation_fraction,
            "limits": dataclasses.asdict(limits),
            "filters": dataclasses.asdict(filters),
            "split": split,
            **written,
            "tokenizer": {
                "generation": generation,
                "vocab_size": tokenizer.vocab_size,
                "sha256": tokenizer.sha256,
                "trained_here": not given,
            },
            "report": report.to_json(),
            "versions": {"tokenizers": tokenizers.__version__, "numpy": np.__version__},
        }
        _write_json(work / "manifest.json", manifest)
        _write_json(work / "timings.json", clock.seconds)
        _put_in_place(work, output)
    progress(1.0, "done")
    return manifest


def _check_arguments(format: str, generation: str, fraction: float) -> None:
    if format != generation:
        raise ValueError(
            f"prepare: expected the format of the tokenizer, {generation!r}, got {format!r}. "
            "Its special tokens are those of one generation."
        )
    hold_out({"a": 1, "b": 1}, fraction, 0)  # the range is checked before hours of reading


def _read(
    sources, output: Path, spool: Spool, limits: Limits, filters: Filters, progress
) -> Report:
    """Fill the spool with the documents that pass the filters."""
    report = Report()
    for document in read_sources(sources, report=report, limits=limits, leave_out=output):
        if reason := filters.reason(document):
            report.reject(reason, document.source, len(document.text.encode()))
            continue
        spool.add(document)
        if len(spool) % 256 == 0:  # how many there are is not known before the end
            progress(0.01, f"reading: {report.kept:,} files, {report.kept_bytes >> 20:,} MiB")
    report.check()
    if not len(spool):
        raise SourceError(f"prepare: no document passed the filters: {report.summary()}.")
    return report


def _split(spool: Spool, fraction: float, seed: int, report: Report):
    """({side: {repository: documents}}, what the manifest says about it)."""
    units, level = units_of(spool)
    held_out = hold_out({unit: spool.num_bytes(units[unit]) for unit in units}, fraction, seed)
    by = "repository"
    if level and held_out:
        by = "the first part of the path" if level == 1 else f"the first {level} parts of the path"
        report.note(f"there is one repository only, so what is held out is chosen by {by}")
    sides: dict[str, dict[str, list[int]]] = {side: {} for side in SIDES}
    for unit, numbers in units.items():
        repository = unit if not level else spool.repositories()[0]
        side = sides["validation" if unit in held_out else "train"]
        side.setdefault(repository, []).extend(numbers)
    return sides, {"by": by, "units": len(units), "held_out": sorted(held_out)}


def _training_texts(
    spool: Spool, side: dict[str, list[int]], seed: int, progress: Progress
) -> Iterator[str]:
    """The texts of a side; of a large one a random sample of about TOKENIZER_BYTES."""
    numbers = [number for repository in sorted(side) for number in side[repository]]
    total, done = spool.num_bytes(numbers), 0
    rng = np.random.default_rng([seed, 0])
    for number in numbers:
        if rng.random() * total < TOKENIZER_BYTES:
            yield spool[number].text
        done += spool.num_bytes([number])
        progress(0.05 + 0.3 * done / total, "training the tokenizer")


class _Encoder:
    """Lays out, encodes and writes one side after the other."""

    def __init__(
        self, spool: Spool, tokenizer: Tokenizer, format: str, seed: int, progress: Progress
    ):
        self.spool, self.tokenizer, self.format = spool, tokenizer, format
        self.seed, self.progress = seed, progress
        self._done, self._total = 0, max(1, spool.num_bytes(range(len(spool))))

    def write(self, side: dict[str, list[int]], prefix: Path) -> dict:
        """Write a shard; returns its entry of the manifest."""
        dtype = best_dtype(self.tokenizer.vocab_size)
        eod = np.array([self.tokenizer.eod], dtype=np.int32)
        examples = (pair for name in sorted(side) for pair in self._examples(name, side[name]))
        writer = ShardWriter(prefix, dtype)
        with writer:
            for batch in _batches(examples):
                for ids in self.tokenizer.encode_pieces_batch([pieces for pieces, _ in batch]):
                    writer.add_document(np.concatenate([ids, eod]))
                self._done += sum(size for _, size in batch)
                self.progress(0.4 + 0.59 * self._done / self._total, "encoding")
            hashes = writer.close()
        numbers = [number for found in side.values() for number in found]
        return {
            "repositories": len(side),
            "documents": len(numbers),
            "bytes": self.spool.num_bytes(numbers),
            "examples": len(writer),
            "tokens": writer.num_tokens,
            "dtype": dtype.name,
            "sha256": hashes,
        }

    def _examples(self, repository: str, numbers: list[int]):
        """(pieces, bytes) of each example of a repository; depends on (seed, its name) only."""
        rng = np.random.default_rng(seed_of(self.seed, repository))
        if self.format == "starcoder":
            for number in numbers:
                document = self.spool[number]
                yield formats.starcoder(document, rng), self.spool.num_bytes([number])
            return
        if self.spool.num_bytes(numbers) > MAX_EXAMPLE_BYTES:
            numbers = [numbers[index] for index in rng.permutation(len(numbers))]
        for group in self._groups(numbers):
            documents: list[Document] = [self.spool[number] for number in group]
            size = self.spool.num_bytes(group)
            yield formats.starcoder2_repository(documents, rng), size

    def _groups(self, numbers: list[int]) -> Iterator[list[int]]:
        """`numbers` in lists of at most MAX_EXAMPLE_BYTES, each at least one document."""
        group, size = [], 0
        for number in numbers:
            more = self.spool.num_bytes([number])
            if group and size + more > MAX_EXAMPLE_BYTES:
                yield group
                group, size = [], 0
            group.append(number)
            size += more
        yield group


def _batches(examples) -> Iterator[list]:
    """(pieces, bytes) pairs in lists of about _ENCODE_BYTES."""
    batch, size = [], 0
    for pieces, num_bytes in examples:
        batch.append((pieces, num_bytes))
        size += num_bytes
        if size >= _ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_held_out(spool: Spool, side: dict[str, list[int]], path: Path) -> None:
    """The documents of a side as JSON lines with The Stack's column names."""
    with open(path, "w", encoding="utf-8") as file:
        for repository in sorted(side):
            for number in side[repository]:
                document = spool[number]
                row = {
                    "repo_name": document.repository,
                    "path": document.path,
                    "language": document.language,
                    "license": document.licence,
                    "stars": document.stars,
                    "content": document.text,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _work_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder inside `output` that is gone in the end, and `output` with it if it stays empty."""
    made = make_folder(output)
    try:
        with _lock(output):
            _check_free(output, overwrite)
            work = output / _WORK
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
            try:
                work.mkdir()
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(  # as raised by `write`, which knows no name
            error.errno, f"prepare: cannot be written: {error.strerror}", str(output)
        ) from None
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def make_folder(folder: Path) -> list[Path]:
    """Make a folder; returns it and those above it that were not there, the innermost first."""
    missing = list(itertools.takewhile(lambda path: not path.exists(), [folder, *folder.parents]))
    nearest = [folder, *folder.parents][len(missing)]
    if not nearest.is_dir():
        raise ValueError(
            f"prepare: expected a folder for the output, got {nearest}, which is a file. "
            "Choose another name."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return missing


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    """One run at a time: others are refused. The file is gone in the end."""
    path, held = output / _LOCK, False
    with open(path, "w") as file:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(file.fileno()).st_nlink > 0  # else another run has just removed it
        if not held:
            raise RuntimeError(
                f"prepare: expected {output} to be free, but another run is writing to it. "
                "Wait for it or choose another folder."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_free(output: Path, overwrite: bool) -> None:
    """Raise ValueError where files would be lost that nobody said may be replaced."""
    found = [name for name in ("tokenizer", *_FILES) if os.path.lexists(output / name)]
    unfinished = (output / _MOVING).exists() and "manifest.json" not in found
    if found and not overwrite and not unfinished:
        what = "a data set" if "manifest.json" in found else ", ".join(found)
        raise ValueError(
            f"prepare: expected a folder without data, got {output}, which holds {what}. "
            "Choose another folder, or pass --overwrite to replace it."
        )


def _put_in_place(work: Path, output: Path) -> None:
    """Move the finished files; no manifest in between, and each index after its tokens."""
    (output / _MOVING).touch()
    for name in ("manifest.json", "train.idx", "validation.idx"):
        (output / name).unlink(missing_ok=True)
    (output / "tokenizer").mkdir(exist_ok=True)
    for file in sorted((work / "tokenizer").iterdir()):
        os.replace(file, output / "tokenizer" / file.name)
    for name in _FILES:
        os.replace(work / name, output / name)
    (output / _MOVING).unlink()


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def stop(self, stage: str) -> None:
        """The stage that began with the last call ends."""
        now = time.monotonic()
        self.seconds[stage] = round(now - self._since, 3)
        self._since = now
