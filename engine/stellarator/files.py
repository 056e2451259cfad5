"""Small files and folders that are on the disk whole or not at all, also after a power cut.

defines: sync, write_text, replace_text
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
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old content or the new one.

    For one writer at a time: what a killed one left beside the file is written over.

    Raises:
        OSError: it could not be written; the old content is as it was and nothing else is left.
    """
    aside = path.with_name(f".tmp-{path.name}")
    try:
        write_text(aside, text)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)
