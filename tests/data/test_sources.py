"""Reading of folders and git checkouts, and of everything that can be wrong in them.

The reference is what the tests put on disk: every file must be a document with exactly its text,
or counted under the expected reason. Not covered: files without permission to read where the tests
run as root, and disks that fail.
"""

import os
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
from source_helpers import put, read, read_apart

from stellarator.data.sources import SourceError

GIT = shutil.which("git")


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
    ("bom.py", b"\xef\xbb\xbfx = 7\n", None),
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
    wanted = sorted(content.decode("utf-8-sig") for _, content, reason in NASTY if reason is None)
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
