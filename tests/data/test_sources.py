"""Reading of folders, git checkouts, JSON lines and Parquet, and of everything that can be wrong.

The reference is what the tests put on disk: every file or row must be a document with exactly its
text, or counted under the expected reason. Not covered: files without permission to read where the
tests run as root, and disks that fail.
"""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from stellarator.data.documents import Document, Limits, Report
from stellarator.data.sources import SourceError, read_sources

GIT = shutil.which("git")


def read(*paths, limits=None, deduplicate=True):
    """(documents, report) of these sources; the account must be complete."""
    report = Report()
    options = {"report": report, "limits": limits, "deduplicate": deduplicate}
    documents = list(read_sources(paths, **options))
    report.check()
    assert report.kept == len(documents)
    assert report.kept_bytes == sum(len(document.text.encode()) for document in documents)
    json.dumps(report.to_json(), ensure_ascii=False).encode()
    return documents, report


READER = r"""
import json, re, sys, time
from stellarator.data.documents import Report
from stellarator.data.sources import read_sources
import pyarrow.parquet, zstandard  # so that their own size is not counted

def peak_mib():  # of this process alone; ru_maxrss is inherited from the parent
    return int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024

report, began, before = Report(), time.process_time(), peak_mib()
texts = [document.text for document in read_sources(sys.argv[1:], report=report)]
grown, seconds = peak_mib() - before, time.process_time() - began
report.check()
print(json.dumps([texts, report.skipped, report.seen, grown, seconds]))
"""


def read_apart(*paths):
    """(texts, reasons, seen) read in a process of its own: at most 5 s of CPU and 64 MiB more."""
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)], capture_output=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60,
    )  # fmt: skip
    texts, skipped, seen, grown_mib, seconds = json.loads(done.stdout)
    assert grown_mib < 64 and seconds < 5, (grown_mib, seconds)
    return texts, skipped, seen


def put(path, data: bytes | str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# Folders


def test_parts_of_a_folder_are_its_repositories(tmp_path):
    root = tmp_path / "lib"
    for name in ("asyncio/tasks.py", "asyncio/sub/x.py", "argparse.py", "email/a.py", "z.b.py"):
        put(root / name, f"name = {name!r}\n")
    documents, report = read(root)
    assert [(d.repository, d.path, d.language) for d in documents] == [
        ("lib/argparse", "argparse.py", "Python"),
        ("lib/z", "z.b.py", "Python"),
        ("lib/asyncio", "asyncio/tasks.py", "Python"),
        ("lib/asyncio", "asyncio/sub/x.py", "Python"),
        ("lib/email", "email/a.py", "Python"),
    ]
    assert documents[0].text == "name = 'argparse.py'\n"
    assert documents[0].source == str(root / "argparse.py")
    assert (report.seen, dict(report.skipped)) == (5, {})


def test_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f"{a}/{b}.py" for a in "zaM\u00e9" for b in "b10 b2 B a".split()]
    orders = []
    for seed in range(3):
        root = tmp_path / str(seed) / "lib"
        for name in np.random.default_rng(seed).permutation(names):
            put(root / name, f"x = {name!r}\n")
        orders.append([(d.repository, d.path, d.text) for d in read(root)[0]])
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == len(names)


def test_a_single_file_and_a_link_given_by_name_are_read(tmp_path):
    file = put(tmp_path / "project" / "a.py", "x = 1\n")
    (tmp_path / "link.py").symlink_to(file)
    for path in (file, tmp_path / "link.py", str(file)):
        (document,), _ = read(path)
        assert (document.repository, document.path) == ("project", "a.py")


def test_installed_packages_and_hidden_folders_are_not_entered(tmp_path):
    put(tmp_path / "a.py", "x = 1\n")
    for folder in ("site-packages", "node_modules", "__pycache__", ".git2", "environment"):
        put(tmp_path / folder / "b.py", f"y = '{folder}'\n")
    put(tmp_path / "environment" / "pyvenv.cfg", "home = /usr\n")
    documents, report = read(tmp_path)
    assert [document.path for document in documents] == ["a.py"]
    assert report.folders_skipped == {"hidden or foreign": 5} and report.seen == 1


def test_links_are_never_followed_inside_a_folder(tmp_path):
    secret = put(tmp_path / "outside" / "secret.py", "password = 1\n")
    root = tmp_path / "root"
    put(root / "a" / "real.py", "x = 1\n")
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "self").symlink_to("self")
    (root / "up.py").symlink_to(secret)
    (root / "folder.py").symlink_to(tmp_path / "outside")
    (root / "gone.py").symlink_to(tmp_path / "nothing")
    (root / "data.jsonl").symlink_to(secret)
    documents, report = read(root)
    assert [document.path for document in documents] == ["a/real.py"]
    assert report.skipped == {"symbolic link": 6}


def test_folders_deeper_than_a_path_may_be_are_counted(tmp_path):
    put(tmp_path / "top.py", "x = 1\n")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):  # 25 * 200 characters; the limit of Linux is 4096
        os.mkdir("d" * 200, dir_fd=here)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    try:
        documents, report = read(tmp_path)
        assert [document.path for document in documents] == ["top.py"]
        assert report.folders_skipped == {"unreadable": 1}
    finally:
        subprocess.run(["rm", "-rf", tmp_path / ("d" * 200)], check=True)


# The nasty folder: (name, content, reason or None for a document)
NASTY = [
    ("good.py", b"x = 1\n", None),
    ("utf8.py", "caf\u00e9 = '\U0001f600'\n".encode(), None),
    ("crlf.py", b"x = 1\r\ny = 2\r\n", None),
    ("bom.py", b"\xef\xbb\xbfx = 1\n", None),
    ("no_newline.py", b"x", None),
    ("sentinels.py", b"'<fim_prefix><|endoftext|>'\n", None),
    ("nonchar.py", "\uffff\U0010ffff\u200b\u202e = 1\n".encode(), None),
    ("one_mib.py", b"#" * (1 << 20), None),
    ("controls.py", bytes(range(1, 32)) + b"x", None),
    ("quote\"'\\.py", b"q = 1\n", None),
    ("new\nline.py", b"n = 1\n", None),
    ("\u4e2d\u6587.py", b"z = 1\n", None),
    (b"latin\xe9.py", b"l = 1\n", None),
    ("copy.py", b"x = 1\n", "duplicate"),
    ("empty.py", b"", "empty"),
    ("white.py", b" \n\t\r\n", "empty"),
    ("latin1.py", b"# caf\xe9\n", "not UTF-8"),
    ("cut.py", "x = '\u4e2d".encode()[:-1], "not UTF-8"),
    ("surrogate.py", b"x = '\xed\xa0\x80'\n", "not UTF-8"),
    ("overlong.py", b"x = '\xc0\xaf'\n", "not UTF-8"),
    ("nul.py", b"x = 1\0\n", "binary"),
    ("utf16.py", "x = 1\n".encode("utf-16"), "binary"),
    ("elf.c", b"\x7fELF\x02\x01\x01\0\0", "binary"),
    ("late_nul.py", b"x = 1\n" * 50_000 + b"\0", "binary"),
    ("too_large.py", b"#" * ((1 << 20) + 1), "too large"),
    ("picture.png", b"\x89PNG", "unknown language"),
    ("noextension", b"text", "unknown language"),
    (".hidden.py", b"h = 1\n", "hidden or foreign"),
    ("bad.jsonl", b"not json\n", "bad JSON"),
    ("bad.jsonl.gz", b"no gzip", "damaged"),
    ("bad.jsonl.zst", b"no zstd", "damaged"),
    ("bad.parquet", b"no parquet", "truncated"),
    ("empty.parquet", b"", "damaged"),
    ("empty.jsonl", b"", "empty"),
    ("empty.jsonl.gz", b"", "empty"),
]


def make_nasty(root) -> None:
    root.mkdir()
    for name, content, _ in NASTY:
        path = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else name.encode())
        with open(path, "wb") as file:
            file.write(content)
    os.mkfifo(root / "fifo.py")
    os.mkfifo(root / "fifo.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "socket.py"))
    with open(root / "hundred_mb.py", "wb") as file:
        file.truncate(100 << 20)
    with open(root / "terabyte.py", "wb") as file:
        file.truncate(1 << 40)
    (root / "loop.py").symlink_to("loop.py")


def test_nasty_folder_is_read_without_a_crash_and_all_of_it_accounted_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
    root = tmp_path / "nasty"
    make_nasty(root)
    began = time.monotonic()
    documents, report = read(root)
    assert time.monotonic() - began < 10
    expected = {}
    for _, _, reason in NASTY:
        if reason:
            expected[reason] = expected.get(reason, 0) + 1
    expected["too large"] += 2
    expected |= {"not a regular file": 3, "symbolic link": 1}
    # good.py and copy.py are one text: the first by name is kept, which is copy.py
    wanted = sorted(content.decode() for _, content, reason in NASTY if reason is None)
    assert sorted(document.text for document in documents) == wanted
    assert dict(report.skipped) == expected
    assert report.seen == len(NASTY) + 6
    for document in documents:
        assert "\n" not in document.path
        (document.path + document.repository + document.source).encode()
    assert "latin\ufffd.py" in [document.path for document in documents]


def test_a_hundred_megabytes_in_one_line_cost_neither_time_nor_memory(tmp_path):
    line = b'{"content": "' + b"x" * (100 << 20) + b'"}\n'
    (tmp_path / "big.py").write_bytes(line)
    (tmp_path / "big.jsonl").write_bytes(line + b'{"content": "x = 1"}\n')
    texts, skipped, seen = read_apart(tmp_path / "big.jsonl", tmp_path)
    assert texts == ["x = 1"] and seen == 5
    assert skipped == {"too large": 3, "duplicate": 1}


def test_no_documents_is_one_clear_line(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match=r"no documents found in .*/folder: 0 files or rows seen"):
        read(tmp_path / "folder")
    put(tmp_path / "folder" / "a.py", b"\0")
    put(tmp_path / "folder" / "b.xyz", b"x")
    with pytest.raises(SourceError, match="2 files .*skipped: 1 binary, 1 unknown language") as e:
        read(tmp_path / "folder")
    assert "\n" not in str(e.value)
    with pytest.raises(SourceError, match="got '.*/none', which does not exist"):
        read(tmp_path / "folder", tmp_path / "none")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SourceError, match="does not exist"):
        read(tmp_path / "loop")
    with pytest.raises(SourceError, match="no documents found in nothing"):
        read()


def test_duplicates_can_be_kept(tmp_path):
    put(tmp_path / "a.py", "x = 1\n")
    put(tmp_path / "b.py", "x = 1\n")
    assert len(read(tmp_path)[0]) == 1
    assert len(read(tmp_path, deduplicate=False)[0]) == 2
    documents, report = read(tmp_path, tmp_path)
    assert len(documents) == 1 and report.skipped == {"duplicate": 3}


# Git


def git(folder, *arguments) -> None:
    subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    if GIT is None:
        pytest.skip("git is not installed")
    root = tmp_path / "checkout"
    put(root / "a.py", "a = 1\n")
    put(root / "src" / "b.py", "b = 1\n")
    put(root / "untracked.py", "u = 1\n")
    put(root / ".github" / "c.yml", "c: 1\n")
    put(root / "gone.py", "g = 1\n")
    git(root.parent, "init", "-q", root)
    git(root, "add", "a.py", "src", ".github", "gone.py")
    os.remove(root / "gone.py")
    return root


def test_a_checkout_gives_its_tracked_files(checkout):
    documents, report = read(checkout)
    assert [(d.repository, d.path) for d in documents] == [
        ("checkout", "a.py"),
        ("checkout", "src/b.py"),
    ]
    assert report.skipped == {"hidden or foreign": 1, "unreadable": 1}


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://github.com/owner/name.git", "owner/name"),
        ("https://github.com/owner/name", "owner/name"),
        ("https://github.com/owner/name/", "owner/name"),
        ("https://user:token@gitlab.com/group/owner/name.git", "owner/name"),
        ("git@github.com:owner/name.git", "owner/name"),
        ("ssh://git@host:2222/owner/na.me.git", "owner/na.me"),
        ("git@github.com:name.git", "checkout"),
        ("/srv/owner/name.git", "checkout"),
        ("file:///srv/owner/name.git", "checkout"),
        ("../owner/name", "checkout"),
    ],
)
def test_repository_name_from_the_remote(checkout, url, name):
    git(checkout, "remote", "add", "upstream", "https://host/other/fork")
    git(checkout, "remote", "add", "origin", url)
    documents, _ = read(checkout)
    assert {document.repository for document in documents} == {name}


def test_checkouts_inside_a_folder_and_submodules_are_repositories(checkout, tmp_path):
    put(tmp_path / "loose.py", "loose = 1\n")
    inner = checkout / "deps" / "inner"
    put(inner / "i.py", "i = 1\n")
    git(tmp_path, "init", "-q", inner)
    git(inner, "add", "i.py")
    git(inner, "remote", "add", "origin", "https://host/in/ner.git")
    git(inner, "-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "m")
    git(checkout, "add", "deps/inner")
    documents, _ = read(tmp_path)
    assert {(d.repository, d.path) for d in documents} == {
        (f"{tmp_path.name}/loose", "loose.py"),
        ("checkout", "a.py"),
        ("checkout", "src/b.py"),
        ("in/ner", "i.py"),
    }
    shutil.rmtree(inner)
    inner.mkdir()
    _, report = read(checkout)
    assert report.folders_skipped == {"submodule that is not checked out": 1}


def test_a_checkout_that_git_does_not_read_is_walked(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    documents, report = read(checkout)
    assert {d.path for d in documents} == {"a.py", "src/b.py", "untracked.py"}
    assert {d.repository for d in documents} == {"checkout"}
    assert "git did not list its files" in report.notes[0]


def test_a_checkout_cannot_run_commands_nor_lead_outside(checkout, tmp_path):
    canary = tmp_path / "canary"
    git(checkout, "config", "core.fsmonitor", f"touch {canary}; true")
    git(checkout, "config", "core.hooksPath", str(tmp_path))
    put(tmp_path / "outside" / "b.py", "secret = 1\n")
    shutil.rmtree(checkout / "src")
    (checkout / "src").symlink_to(tmp_path / "outside")
    documents, report = read(checkout)
    assert [document.path for document in documents] == ["a.py"]
    assert report.skipped["symbolic link"] == 1
    assert not canary.exists()


def test_git_variables_of_the_caller_do_not_count(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "nothing"))
    assert [document.path for document in read(checkout)[0]] == ["a.py", "src/b.py"]


# Data sets

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
