"""Tuned launch configurations by GPU: read from files, never measured while a program runs.

defines: lookup, gpu_name, use, read, FOLDER, VARIABLE

tables/<gpu>.json is shipped with the package, so every rank runs the same kernels;
STELLARATOR_TABLES names another folder. `stellarator tune` writes such a file. What no file knows
is launched as the kernel's own table says, which was chosen by compiling.

A file: {"gpu": as torch names it, "triton": its version, "command" and "date": where the entries
come from, "entries": {"flash_attention forward 128": {"own": 128, ...}, ...}}. An entry is
looked up by "flash_attention <phase> <padded head width>" or "matmul <phase>"; keys and values are
those of the op's own table.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("tables")
VARIABLE = "STELLARATOR_TABLES"
_FIELDS = {"gpu": str, "triton": str, "command": str, "date": str, "entries": dict}
_trial: dict[str, dict] | None = None  # entries in use instead of those of files


def read(path: Path) -> dict:
    """One file.

    Raises:
        ValueError: it is not JSON, or lacks a field, or an entry is not of whole numbers and words.
    """
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}. Write it again.") from None
    for name, kind in _FIELDS.items():
        got = table.get(name) if isinstance(table, dict) else table
        if not isinstance(got, kind):
            raise ValueError(
                f"{path}: expected a {kind.__name__} as {name!r}, got {got!r}. "
                "`stellarator tune` writes such files."
            )
    for name, entry in table["entries"].items():
        if not isinstance(entry, dict) or not all(type(v) in (int, str) for v in entry.values()):
            raise ValueError(
                f"{path}: expected whole numbers and words in the entry {name!r}, got {entry!r}. "
                "`stellarator tune` writes such files."
            )
    return table


@functools.cache
def _tables() -> dict[str, dict[str, dict]]:
    """{GPU: entries} of all files, read once."""
    folder = Path(os.environ.get(VARIABLE) or FOLDER)
    if os.environ.get(VARIABLE) and not folder.is_dir():
        raise ValueError(f"{VARIABLE}: expected a folder, got {str(folder)!r}. Unset it.")
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    return {table["gpu"]: table["entries"] for table in found}


@functools.cache
def gpu_name(device: torch.device) -> str:
    """As torch names it; "" for what is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def lookup(gpu: str, name: str) -> dict | None:
    """The entry of a GPU, or None."""
    if _trial is not None:
        return _trial.get(name)
    return _tables().get(gpu, {}).get(name)


@contextlib.contextmanager
def use(entries: dict[str, dict]) -> Iterator[None]:
    """Take these entries instead of those of files, on any GPU: to race them. Not for threads."""
    global _trial
    before, _trial = _trial, entries
    try:
        yield
    finally:
        _trial = before
