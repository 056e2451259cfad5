"""The files of a Hugging Face folder: read without trust, and written whole or not at all.

defines: FolderError, read_json, WeightFiles, replaced_folder

Weights are read from safetensors only. Pickle files (.bin, .pt) are refused: opening one can run
code. Every path stays inside the folder, with one exception: the download cache of Hugging Face,
where `snapshots/<revision>/<file>` is a link to `../../blobs/<hash>`.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from stellarator.files import sync

_JSON_LIMIT_BYTES = 64 << 20
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class FolderError(ValueError):
    """A folder is not what it should be; the message names the file and says what to do."""


def _inside(folder: Path, name: str) -> Path:
    """The regular file `name` of the folder, links followed.

    Raises:
        FolderError: missing, not a file, or a link that leads out of the folder.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
        root = folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise FolderError(f"{path}: expected a file, got none ({error}).") from None
    blobs = root.parent.parent / "blobs"
    in_cache = root.parent.name == "snapshots" and target.parent == blobs
    if not target.is_relative_to(root) and not in_cache:
        raise FolderError(f"{path}: expected a file inside the folder, got a link to {target}.")
    if not target.is_file():
        raise FolderError(f"{path}: expected a regular file, got something else.")
    return target


def read_json(folder: Path, name: str) -> dict:
    """A JSON object of the folder.

    Raises:
        FolderError: not there, too large, not JSON, not an object, or a key stands twice.
    """
    path = _inside(folder, name)
    if path.stat().st_size > _JSON_LIMIT_BYTES:
        raise FolderError(f"{folder / name}: expected at most {_JSON_LIMIT_BYTES} bytes of JSON.")

    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{folder / name}: expected JSON, got an error: {error}.") from None
    if not isinstance(tree, dict):
        raise FolderError(f"{folder / name}: expected a JSON object, got {type(tree).__name__}.")
    return tree


class WeightFiles:
    """The tensors of a folder, by name; a context manager that keeps the files open.

    shapes: {name: shape}; dtypes: {name: torch.dtype, or the file's own word for another kind}.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self._files = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        with self._stack:  # closes what is open if this fails
            self._open()
            self._stack = self._stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, mapped from the file where possible."""
        return self._files[name].get_tensor(name)

    def _open(self) -> None:
        single, index = (os.path.lexists(self.folder / n) for n in (_SINGLE, _INDEX))
        if single and index:
            raise FolderError(
                f"{self.folder}: expected {_SINGLE} or {_INDEX}, got both. Remove the stale one."
            )
        if not single and not index:
            raise FolderError(_no_weights(self.folder))
        if single:
            self._add_file(_SINGLE, None)
            return
        files: dict[str, set[str]] = {}
        weight_map = read_json(self.folder, _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FolderError(f"{self.folder / _INDEX}: expected a weight_map, got {weight_map!r}.")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
                raise FolderError(
                    f"{self.folder / _INDEX}: expected names of .safetensors files beside it, "
                    f"got {file!r}."
                )
            files.setdefault(file, set()).add(name)
        for file, names in files.items():
            self._add_file(file, names)

    def _add_file(self, file: str, expected: set[str] | None) -> None:
        """Open one file; its names must be those of the index."""
        path = _inside(self.folder, file)
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
            names = set(handle.keys())
            for name in names:
                piece = handle.get_slice(name)
                self.shapes[name] = tuple(piece.get_shape())
                self.dtypes[name] = _DTYPES.get(piece.get_dtype(), piece.get_dtype())
                self._files[name] = handle
        except (SafetensorError, OSError) as error:
            raise FolderError(
                f"{self.folder / file}: expected a whole safetensors file, got an error: {error}. "
                "Download or export it again."
            ) from None
        if expected is not None and names != expected:
            raise FolderError(
                f"{self.folder / file}: expected the tensors that {_INDEX} names, "
                f"missing {_few(expected - names)}, not named {_few(names - expected)}."
            )


def _few(names) -> str:
    """Some names and how many more."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more


def _no_weights(folder: Path) -> str:
    """Message for a folder without safetensors."""
    if not folder.is_dir():
        return f"{folder}: expected a folder, got none."
    pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        return (
            f"{folder}: expected {_SINGLE}, got {_few(pickles)}. Pickle files can run code and are "
            "not opened: convert them to safetensors where you trust them."
        )
    return f"{folder}: expected {_SINGLE} or {_INDEX}, got neither."


@contextlib.contextmanager
def replaced_folder(folder: Path, is_ours):
    """A new folder to write into, which takes the place of `folder` at the end of the block.

    If the block fails nothing is left of it and `folder` is as it was.
    If the machine stops between the two renames at the end, or the second one fails and the first
    cannot be undone, the earlier export is whole beside it, as `.<folder>.before-<pid>`.

    Args:
        folder: absent, empty, or an earlier export.
        is_ours: file name -> whether an export writes such a file; anything else is not replaced.
    Raises:
        FolderError: the folder holds other files. OSError: the disk is full, no permission, ...
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder}: expected a folder or nothing, got a file. Remove it.")
    foreign = [p.name for p in folder.iterdir() if not is_ours(p.name)] if folder.exists() else []
    if foreign:
        raise FolderError(
            f"{folder}: expected an earlier export or nothing, got other files: {_few(foreign)}. "
            "Choose another folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    before = folder.parent / f".{folder.name}.before-{os.getpid()}"
    try:
        aside.mkdir()
        yield aside
        sync(aside)
        if folder.exists():
            folder.rename(before)
        aside.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if before.exists() and not folder.exists():  # stopped between the two renames
            before.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
