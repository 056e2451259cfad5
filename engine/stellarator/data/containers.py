"""Documents out of data sets: JSON lines (plain, gzip, zstd) and Parquet, with The Stack's columns.

defines: is_container, read_container, checked_text

Everything is streamed. A bad row is a counted skip; a file that is damaged or cut off is one
counted skip more, and what was read before stays. Output of a decompressor is limited at every
step, so a compression bomb costs the limits of `Limits` and no more. The column names are those
of The Stack v1 and v2, of the data sets made from them, and the obvious ones.
"""

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from stellarator.data.documents import Document, Limits, Report, language_of, printable

SUFFIXES = (
    ".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".json.gz",
    ".json.zst", ".parquet",
)  # fmt: skip

COLUMNS = {
    "text": ("content", "text", "code"),
    "repository": ("max_stars_repo_name", "repo_name", "repository_name", "repository", "repo"),
    "path": ("max_stars_repo_path", "path", "file_path", "filename"),
    "language": ("lang", "language", "programming_language"),
    "stars": ("max_stars_count", "star_events_count", "stars"),
    "licence": ("max_stars_repo_licenses", "detected_licenses", "licenses", "license", "licence",
                "license_type"),
}  # fmt: skip

_STEP = 1 << 20  # bytes of a plain or gzip file at a time
_ZSTD_STEP = 512  # packed bytes at a time; 4 can stand for 128 KiB, so at most 16 MiB come out
_PARQUET_ROWS = 64


_TOO_LARGE = object()  # in place of a value that is over the limit


class _DamagedError(Exception):
    """The rest of a file cannot be read: (reason to count, detail)."""


def is_container(name: str) -> bool:
    """Whether a file of this name holds many documents."""
    return name.lower().endswith(SUFFIXES)


def read_container(path: Path, report: Report, limits: Limits) -> Iterator[Document]:
    """The documents of a JSONL or Parquet file, in order; see the top of this file.

    Rows that name no repository get the name of the file, so that a split by repository keeps
    them together.
    """
    before = report.seen
    try:
        if path.name.lower().endswith(".parquet"):
            yield from _read_parquet(path, report, limits)
        else:
            yield from _read_jsonl(path, report, limits)
    except _DamagedError as error:
        report.see()
        report.skip(error.args[0], str(path), error.args[1])
    except OSError as error:
        report.see()
        report.skip("unreadable", str(path), error.strerror or str(error))
    else:
        if report.seen == before:
            report.see()
            report.skip("empty", str(path))


def _read_jsonl(path: Path, report: Report, limits: Limits) -> Iterator[Document]:
    name = path.name.lower()
    limit = 6 * limits.max_file_bytes + (64 << 10)  # JSON may write one byte as \u0000
    with open(path, "rb") as file:
        if name.endswith(".gz"):
            chunks = _gzip_chunks(file)
        elif name.endswith(".zst"):
            chunks = _zstd_chunks(file)
        else:
            chunks = iter(lambda: file.read(_STEP), b"")
        packed = name.endswith((".gz", ".zst"))
        chunks = _limited(chunks, file.tell if packed else None, limits)
        for number, line in enumerate(_lines(chunks, limit), 1):
            if line is None or line.strip(b" \t\r\n\xef\xbb\xbf"):
                report.see()
                document = _document_of_line(line, f"{path}:{number}", path, report, limits)
                if document is not None:
                    yield document


def _document_of_line(line, where: str, path: Path, report: Report, limits: Limits):
    if line is None:
        return report.skip("too large", where)
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
    except UnicodeDecodeError:
        return report.skip("not UTF-8", where)
    except (ValueError, RecursionError) as error:
        return report.skip("bad JSON", where, str(error))
    if not isinstance(row, dict):
        return report.skip("bad row", where, f"expected an object, got {type(row).__name__}")
    return _document(row, where, path, report, limits)


def _lines(chunks: Iterator[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines without their end; None for one longer than `limit`, which is never held."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for piece in whole:
            size += len(piece)
            yield b"".join([*parts, piece]) if size <= limit else None
            parts, size = [], 0
        size += len(rest)
        parts.append(rest)
        if size > limit:
            parts.clear()
    if size:
        yield b"".join(parts) if size <= limit else None


def _gzip_chunks(file) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        while True:
            try:
                chunk = stream.read1(_STEP)
            except EOFError:
                raise _DamagedError("truncated", "gzip data ends early") from None
            except (gzip.BadGzipFile, zlib.error) as error:
                raise _DamagedError("damaged", f"gzip: {error}") from None
            if not chunk:
                return
            yield chunk


def _zstd_chunks(file) -> Iterator[bytes]:
    import zstandard

    # 128 MiB is the window that `zstd -d` accepts without being asked.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    stream, data = None, b""
    while True:
        data = data or file.read(_ZSTD_STEP)
        if not data:
            break
        stream = stream or decompressor.decompressobj()
        try:
            chunk = stream.decompress(data)
        except zstandard.ZstdError as error:
            raise _DamagedError("damaged", f"zstd: {error}") from None
        data = stream.unused_data if stream.eof else b""
        if stream.eof:
            stream = None  # the next frame, if there is one
        if chunk:
            yield chunk
    if stream is not None:
        raise _DamagedError("truncated", "zstd data ends early")


def _limited(
    chunks: Iterator[bytes], packed_bytes: Callable[[], int] | None, limits: Limits
) -> Iterator[bytes]:
    """`chunks` until they are more than the limits allow; the ratio only where data are packed."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if packed_bytes:
            _check_unpacked(total, packed_bytes(), limits)
        yield chunk


def _check_unpacked(unpacked: int, packed: int, limits: Limits) -> None:
    if unpacked > limits.max_unpacked_bytes:
        raise _DamagedError("too large unpacked", f"over {limits.max_unpacked_bytes} bytes")
    if unpacked > limits.ratio_from_bytes and unpacked > limits.max_ratio * max(1, packed):
        raise _DamagedError("compression bomb", f"{packed} bytes unpack to over {unpacked}")


def _read_parquet(path: Path, report: Report, limits: Limits) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        if not any(name in schema.names for name in COLUMNS["text"]):
            raise _DamagedError("bad row", f"expected a column of {COLUMNS['text']}")
        wanted = [name for known in COLUMNS.values() for name in known if name in schema.names]
        # As a dictionary, a text that is repeated a million times is in memory once.
        texts = [name for name in wanted if _is_text(schema.field(name).type)]
        with pyarrow.parquet.ParquetFile(
            path, read_dictionary=texts, page_checksum_verification=True, pre_buffer=False,
            buffer_size=_STEP, thrift_string_size_limit=100 << 20,
            thrift_container_size_limit=1 << 24,
        ) as file:  # fmt: skip
            packed, total = os.stat(path).st_size, 0
            _check_unpacked(_unpacked_bytes(file.metadata), packed, limits)
            rows = (
                row
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted)
                for row in _rows(batch, limits)
            )
            for number, row in enumerate(rows, 1):
                total += sum(len(value) for value in row.values() if isinstance(value, bytes))
                _check_unpacked(total, packed, limits)
                report.see()
                document = _document(row, f"{path}:{number}", path, report, limits)
                if document is not None:
                    yield document
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        detail = str(error).partition("\n")[0]
        cut_off = "magic bytes" in detail or "footer" in detail
        raise _DamagedError("truncated" if cut_off else "damaged", f"Parquet: {detail}") from None


def _unpacked_bytes(metadata) -> int:
    """What the footer of a Parquet file says; batches bound what is really held at a time."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    return sum(
        max(0, group.column(index).total_uncompressed_size)
        for group in groups
        for index in range(group.num_columns)
    )


def _is_text(kind) -> bool:
    from pyarrow import types

    return (
        types.is_string(kind) or types.is_large_string(kind)
        or types.is_binary(kind) or types.is_large_binary(kind)
    )  # fmt: skip


def _rows(batch, limits: Limits) -> Iterator[dict]:
    """The rows of a batch as dicts; texts as bytes, and `_TOO_LARGE` for one over the limit."""
    columns = []
    for column in batch.columns:
        if hasattr(column, "dictionary"):
            values, indices = _texts(column.dictionary, limits), column.indices.to_pylist()
            if not all(index is None or 0 <= index < len(values) for index in indices):
                raise _DamagedError("damaged", "Parquet: an index outside its dictionary")
            columns.append([None if index is None else values[index] for index in indices])
        else:
            columns.append(_texts(column, limits))
    for row in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def _texts(array, limits: Limits) -> list:
    """The values of an array; texts as bytes."""
    import pyarrow
    from pyarrow import compute, types

    if not _is_text(array.type):
        return array.to_pylist()
    if types.is_string(array.type) or types.is_large_string(array.type):
        large = types.is_large_string(array.type)
        array = array.cast(pyarrow.large_binary() if large else pyarrow.binary())
    lengths = compute.binary_length(array).to_pylist()
    return [
        _TOO_LARGE if length is not None and length > limits.max_file_bytes else value.as_py()
        for value, length in zip(array, lengths, strict=True)
    ]


def _document(row: dict, where: str, path: Path, report: Report, limits: Limits) -> Document | None:
    """The document of a row, counted as kept; or None, counted as skipped."""
    values = {field: _first(row, names) for field, names in COLUMNS.items()}
    text = values["text"]
    if text is _TOO_LARGE:
        return report.skip("too large", where)
    if not isinstance(text, str | bytes):
        return report.skip("bad row", where, "expected text in a column named content")
    text, num_bytes, reason = checked_text(text, limits, report)
    if reason:
        return report.skip(reason, where)
    report.keep(num_bytes)
    file = _name(values["path"])
    return Document(
        text=text,
        repository=_name(values["repository"]) or path.name,
        path=file,
        language=_name(values["language"]) or language_of(file),
        licence=_licence(values["licence"]),
        stars=_stars(values["stars"]),
        source=where,
    )


def checked_text(data: bytes | str, limits: Limits, report: Report) -> tuple[str, int, str | None]:
    """(text, its UTF-8 bytes, None), or why these data are not a text to train on.

    A byte order mark at the start is no part of the text; removing one is counted.
    """
    if len(data) > limits.max_file_bytes:
        return "", 0, "too large"
    try:
        if isinstance(data, str):
            text, data = data, data.encode()
        else:
            text = ""
    except UnicodeEncodeError:
        return "", 0, "lone surrogate"
    if len(data) > limits.max_file_bytes:
        return "", 0, "too large"
    if b"\0" in data:
        return "", 0, "binary"
    bare = data.removeprefix(codecs.BOM_UTF8)
    if not bare.strip():
        return "", 0, "empty"
    try:
        text = text.removeprefix("\ufeff") or bare.decode()
    except UnicodeDecodeError:
        return "", 0, "not UTF-8"
    if len(bare) < len(data):
        report.changed["byte order mark removed"] += 1
    return text, len(bare), None


def _first(row: dict, names: tuple[str, ...]):
    """The first of these columns that has a value; if all are empty, the first that is there."""
    values = [row[name] for name in names if row.get(name) is not None]
    return next((value for value in values if value not in ("", b"", [])), next(iter(values), None))


def _name(value: object) -> str:
    """A repository, path or language on one line, whatever the row held there."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return printable(value)[:1000] if isinstance(value, str) else ""


def _licence(value: object) -> str | None:
    if isinstance(value, list | tuple):
        value = ",".join(filter(None, map(_name, value[:20])))
    return _name(value) or None


def _stars(value: object) -> int | None:
    # JSON knows numbers of any length, NaN and infinity; none of those lies within.
    if isinstance(value, int | float) and 0 <= value < 1 << 63:
        return int(value)
    return None
