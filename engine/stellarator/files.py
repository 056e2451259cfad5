"""Small files and folders that are on the disk whole or not at all, also after a power cut.

defines: sync, write_text, replace_text, replace_bytes
"""

import contextlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk.

    A rename is durable once the folder that holds the new name is synced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file and wait until its content is on the disk."""
    _write(path, text.encode("utf-8"))


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader sees the old content or the new one.

    For one writer at a time: what a killed one left beside the file is written over.

    Raises:
        OSError: it could not be written; the old content is as it was and nothing else is left.
    """
    aside = path.with_name(f".tmp-{path.name}")
    try:
        _write(aside, content)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)
