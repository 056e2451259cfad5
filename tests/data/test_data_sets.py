"""Reading of JSON lines and Parquet, packed or not, damaged or hostile.

The reference is what the tests put on disk: every row must be a document with exactly its text, or
counted under the expected reason. Not covered: disks that fail.
"""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from source_helpers import put, read, read_apart

from stellarator.data.documents import Document, Limits
from stellarator.data.sources import SourceError

ROWS = [
    {"content": "x = 1\n", "max_stars_repo_name": "o/n", "max_stars_repo_path": "a.py",
     "lang": "Python", "max_stars_count": 7, "max_stars_repo_licenses": ["MIT", "BSD"]},
    {"content": "y = 1\n", "max_stars_repo_name": "o/n", "max_stars_repo_path": "b.c",
     "lang": None, "max_stars_count": None, "max_stars_repo_licenses": []},
]  # fmt: skip
EXPECTED = [
    Document("x = 1\n", "o/n", "a.py", "Python", "MIT,BSD", 7),
    Document("y = 1\n", "o/n", "b.c", "C", None, None),
]
SECOND = {
    "content": "x = 1\n", "repo_name": "o/n", "path": "a.py", "language": "Python",
    "star_events_count": 7, "license_type": "permissive", "detected_licenses": ["MIT"],
    "blob_id": "b", "snapshot_id": "s", "gha_language": None, "src_encoding": "UTF-8",
}  # fmt: skip


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_parquet(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def write_as(path, rows):
    """Rows in the form that the file name says."""
    if path.suffix == ".parquet":
        return write_parquet(path, rows)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    return put(path, pack(lines(rows)))


FORMS = ["d.jsonl", "d.ndjson", "d.jsonl.gz", "d.jsonl.zst", "d.json.gz", "d.parquet", "D.JSONL"]


def without_source(documents):
    return [Document(**{**vars(document), "source": ""}) for document in documents]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("inside_folder", [False, True])
def test_data_sets_in_every_form(tmp_path, name, inside_folder):
    path = write_as(tmp_path / name, ROWS)
    documents, report = read(tmp_path if inside_folder else path)
    assert without_source(documents) == EXPECTED
    assert [document.source for document in documents] == [f"{path}:1", f"{path}:2"]
    assert report.seen == 2


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_columns_of_the_second_stack(tmp_path, name):
    (document,), _ = read(write_as(tmp_path / name, [SECOND]))
    assert without_source([document]) == [Document("x = 1\n", "o/n", "a.py", "Python", "MIT", 7)]


def test_rows_without_a_repository_get_the_name_of_the_file(tmp_path):
    (document,), _ = read(write_as(tmp_path / "d.jsonl", [{"text": "x = 1"}]))
    assert (document.repository, document.path, document.language) == ("d.jsonl", "", None)


def test_byte_order_marks_are_removed_and_counted(tmp_path):
    """Of files and of rows; a text is a duplicate of the same one with a mark."""
    texts = ["\ufeffa = 1\n", "\ufeff\ufeffb = 1\n", "c = '\ufeff'\n"]
    texts += ["\ufeff", "\ufeff \n", "a = 1\n"]
    expected = ["a = 1\n", "\ufeffb = 1\n", "c = '\ufeff'\n"]
    for number, text in enumerate(texts):
        path = tmp_path / "files" / f"{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    rows = [{"content": text} for text in texts]
    written = [write_as(tmp_path / name, rows) for name in ("d.jsonl", "d.parquet")]
    for source in (tmp_path / "files", *written):
        documents, report = read(source)
        assert [document.text for document in documents] == expected
        assert report.skipped == {"empty": 2, "duplicate": 1}
        assert report.changed == {"byte order mark removed": 2}


BAD_LINES = [
    (b'{"content": "ok 1"}', None),
    (b'\xef\xbb\xbf{"content": "ok 2"}', None),
    (b'{"content": "pair \\ud83d\\ude00"}', None),
    (b'{"content": "ok 3", "repo_name": 5, "path": {}, "stars": "x", "license": [1]}', None),
    (b'{"content": "ok 4", "repo_name": "\\ud800", "path": "a\\nb"}', None),
    (b'{"content": "ok 5", "stars": NaN}', None),
    (b'{"content": "ok 6", "stars": 1e999}', None),
    (b"{", "bad JSON"),
    (b"null", "bad row"),
    (b"[1]", "bad row"),
    (b"5", "bad row"),
    (b"{}", "bad row"),
    (b'{"content": null}', "bad row"),
    (b'{"content": 5}', "bad row"),
    (b'{"content": ["x"]}', "bad row"),
    (b'{"content": ""}', "empty"),
    (b'{"content": " "}', "empty"),
    (b'{"content": "a\\u0000b"}', "binary"),
    (b'{"content": "\\ud800"}', "lone surrogate"),
    (b'{"content": "\xff"}', "not UTF-8"),
    (b'{"content": "\xed\xa0\x80"}', "not UTF-8"),
    (b"[" * 50_000, "bad JSON"),
    (b'{"content": ' + b"9" * 5000 + b"}", "bad JSON"),
    (b'{"content": "' + b"x" * 1001 + b'"}', "too large"),
    (b'{"content": "' + "\u4e2d".encode() * 334 + b'"}', "too large"),
    (b'{"content": "' + b"x" * 100_000 + b'"}', "too large"),
    (b'{"content": "' + b"\\u0041" * 1000 + b'"}', None),
    (b'"\0', "bad JSON"),
]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_one_bad_line_is_one_counted_skip(tmp_path, packing):
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(packing, bytes)
    data = b"\n".join(line for line, _ in BAD_LINES) + b"\r\n\n  \n"
    path = put(tmp_path / f"d.jsonl{packing}", pack(data))
    documents, report = read(path, limits=Limits(max_file_bytes=1000))
    expected = {}
    for _, reason in BAD_LINES:
        if reason:
            expected[reason] = expected.get(reason, 0) + 1
    assert dict(report.skipped) == expected
    assert report.seen == len(BAD_LINES) and len(documents) == 8
    texts = [document.text for document in documents]
    assert texts == [
        "ok 1",
        "ok 2",
        "pair \U0001f600",
        *[f"ok {i}" for i in range(3, 7)],
        "A" * 1000,
    ]
    assert (documents[4].repository, documents[4].path) == ("?", "a\ufffdb")
    assert all(document.stars is None and document.licence is None for document in documents)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_what_was_read_before_a_truncation_is_kept(tmp_path, packing):
    rng = np.random.default_rng(0)
    rows = [{"content": rng.bytes(3000).hex() + f" {i}"} for i in range(500)]
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    data = pack(lines(rows))
    for cut in (len(data) // 2, len(data) - 1):
        path = put(tmp_path / f"d.jsonl{packing}", data[:cut])
        documents, report = read(path)
        assert report.skipped == {"truncated": 1}
        texts = [row["content"] for row in rows]
        assert [document.text for document in documents] == texts[: len(documents)]
        assert len(documents) > 0.9 * 500 * cut / len(data) - 130  # a zstd block is 128 KiB
        assert "data ends early" in report.examples["truncated"][0]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_damage_and_garbage_behind_packed_data(tmp_path, packing):
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    path = put(tmp_path / f"d.jsonl{packing}", pack(lines(ROWS)) + b"garbage")
    documents, report = read(path)
    assert len(documents) == 2 and report.skipped == {"damaged": 1}
    path = put(path, pack(lines(ROWS[:1])) + pack(lines(ROWS[1:])))  # two members, which is valid
    documents, report = read(path)
    assert without_source(documents) == EXPECTED and not report.skipped
    good, rng = pack(lines(ROWS * 100)), np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(good)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        try:
            read(put(path, bytes(data)), deduplicate=False)
        except SourceError:
            pass  # nothing was left to read


def bomb(packing: str, megabytes: int) -> bytes:
    if packing == ".gz":
        return gzip.compress(bytes(megabytes << 20))
    return zstandard.ZstdCompressor(level=19).compress(bytes(megabytes << 20))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_compression_bombs_are_stopped_early(tmp_path, packing):
    data = bomb(packing, 100)
    assert len(data) < 1 << 20
    bombed = put(tmp_path / f"bomb.jsonl{packing}", data)
    good = write_as(tmp_path / "good.jsonl", ROWS)
    texts, skipped, _ = read_apart(bombed, good)
    assert len(texts) == 2 and skipped == {"compression bomb": 1}
    limits = Limits(max_unpacked_bytes=1 << 20)
    documents, report = read(bombed, good, limits=limits)
    assert report.skipped == {"too large unpacked": 1}


def test_zstd_windows_of_gigabytes_are_refused(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    packed = zstandard.ZstdCompressor(compression_params=parameters)
    stream = packed.compressobj()  # the size is not known, so the header asks for the whole window
    data = stream.compress(lines(ROWS)) + stream.flush()
    documents, report = read(
        put(tmp_path / "d.jsonl.zst", data), write_as(tmp_path / "e.jsonl", ROWS)
    )
    assert len(documents) == 2 and report.skipped == {"damaged": 1}


# Parquet


def test_parquet_in_many_row_groups_and_types(tmp_path):
    rows = [{**ROWS[0], "content": f"x = {i}\n"} for i in range(500)]
    path = write_parquet(tmp_path / "d.parquet", rows, row_group_size=37)
    documents, _ = read(path)
    assert [document.text for document in documents] == [row["content"] for row in rows]
    table = pyarrow.Table.from_pylist(rows)
    for kind in (pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary(),
                 pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):  # fmt: skip
        index = table.schema.names.index("content")
        other = table.set_column(index, "content", table["content"].cast(kind))
        pyarrow.parquet.write_table(other, path, use_dictionary=False)
        assert [document.text for document in read(path)[0]] == [row["content"] for row in rows]


def test_bad_rows_of_parquet(tmp_path):
    texts = [b"ok", None, b"\xff", b"a\0b", b"", b" ", b"x" * 1001, b"y" * 1000, b"ok"]
    reasons = {"bad row": 1, "not UTF-8": 1, "binary": 1, "empty": 2, "too large": 1}
    reasons["duplicate"] = 1
    table = pyarrow.table({"content": pyarrow.array(texts, pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    documents, report = read(tmp_path / "d.parquet", limits=Limits(max_file_bytes=1000))
    assert [document.text for document in documents] == ["ok", "y" * 1000]
    assert dict(report.skipped) == reasons


def test_parquet_without_text_and_with_numbers_for_text(tmp_path):
    good = write_as(tmp_path / "good.jsonl", ROWS)
    for rows in ([{"blob_id": "a"}], [{"content": 5}], [{"content": ["x"]}]):
        path = write_parquet(tmp_path / "d.parquet", rows)
        documents, report = read(path, good)
        assert len(documents) == 2 and report.skipped == {"bad row": 1}


def test_truncated_and_damaged_parquet_is_one_line(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"content": rng.bytes(50).hex()} for _ in range(300)]
    options = {"row_group_size": 100, "write_page_checksum": True}
    good = write_parquet(tmp_path / "good.parquet", rows, **options).read_bytes()
    texts = {row["content"] for row in rows}
    other = write_as(tmp_path / "other.jsonl", ROWS)
    path = put(tmp_path / "d.parquet", good[: len(good) // 2])
    _, report = read(path, other)
    assert report.skipped == {"truncated": 1}
    found = 0
    for _ in range(80):
        data = bytearray(good)
        data[rng.integers(4, len(data))] ^= 1 << int(rng.integers(8))
        documents, report = read(put(path, bytes(data)), other)
        assert {document.text for document in documents} <= texts | {"x = 1\n", "y = 1\n"}
        found += bool(report.skipped)
    assert found > 40  # the others hit statistics and padding


def test_a_text_repeated_in_a_parquet_dictionary_is_held_once(tmp_path):
    """200,000 rows of one text of 1 MB: 200 GB as plain strings, a few KB on disk."""
    text, count = "x" * 999_000 + "\n", 200_000
    indices = pyarrow.array(np.zeros(count, dtype=np.int32))
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": column}), path, row_group_size=count)
    texts, skipped, seen = read_apart(path)
    assert texts == [text]
    assert skipped["compression bomb"] == 1 and seen < 100


@pytest.mark.parametrize("form", ["d.jsonl", "d.parquet"])
def test_stars_are_counts_that_a_file_can_hold(tmp_path, form):
    """Anything else is as if there were no count, and the row is a document."""
    counts = {0: 0, 7: 7, 3.0: 3, 1e18: 10**18, 2**63 - 1: 2**63 - 1, -1: None, -1e300: None}
    if form == "d.jsonl":
        counts |= {10**400: None, -(10**400): None, 2**63: None}
    for number, (written, expected) in enumerate(counts.items()):
        path = write_as(tmp_path / f"{number}{form}", [ROWS[0] | {"max_stars_count": written}])
        (document,), report = read(path)
        assert document.stars == expected and report.kept == 1, written
