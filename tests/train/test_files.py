"""Files written whole: the order in which bytes and names reach the disk, and a disk that is full.

The reference is POSIX: a rename keeps its promise over a power cut only if the content was synced
before it and the folder after it. Not covered: a real power cut.
"""

import errno
import os

import pytest

from stellarator import files
from stellarator.train import checkpoint, metrics


@pytest.fixture
def calls(monkeypatch):
    """Every fsync and rename, in order: ("sync", name) and ("rename", name after it)."""
    seen, fsync, replace = [], os.fsync, os.replace

    def name_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def record_sync(descriptor):
        seen.append(("sync", name_of(descriptor)))
        fsync(descriptor)

    def record_replace(source, target):
        seen.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    return seen


def test_content_then_name_then_folder(tmp_path, calls):
    path = tmp_path / "latest"
    path.write_text("old")
    files.replace_text(path, "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n\n")
    assert path.read_bytes() == b"gr\xc3\xbcn\n" and os.listdir(tmp_path) == ["latest"]
    assert calls == [("sync", ".tmp-latest"), ("rename", "latest"), ("sync", tmp_path.name)]


def test_status_and_latest_are_written_so(tmp_path, calls):
    metrics.write_status(tmp_path, "running", 3)
    assert [name for _, name in calls] == [".tmp-status.json", "status.json", tmp_path.name]
    calls.clear()
    checkpoint.save(tmp_path, 1, {}, {})
    names = [name if not name.startswith(".tmp-0000") else "aside" for _, name in calls]
    content = ["tensors.safetensors", "manifest.json", "aside", tmp_path.name]
    assert names == [*content, ".tmp-latest", "latest", tmp_path.name]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, fails):
    path = tmp_path / "status.json"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        files.replace_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["status.json"]


def test_what_a_killed_writer_left_is_written_over(tmp_path):
    (tmp_path / ".tmp-latest").write_text("half of a longer tex")
    files.replace_text(tmp_path / "latest", "new")
    assert (tmp_path / "latest").read_text() == "new" and os.listdir(tmp_path) == ["latest"]
