"""Checkpoints: tensors in safetensors and a JSON manifest with hashes, put there by one rename.

defines: save, load, find, take_back, set_aside_newer, rotate, Checkpoint, CheckpointError

    checkpoints/step_00000100/tensors.safetensors   names like master.layers.0.mlp.up.weight
    checkpoints/step_00000100/manifest.json         step, state, sizes, SHA-256 of files and tensors
    checkpoints/latest                              name of the newest folder, as text

A folder is written aside under a name that starts with `.tmp-`, hashed from the bytes as they are
written, synced, and renamed: a reader sees all of it or nothing. Names and shapes do not depend on
how the run was laid out over processes. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from stellarator.files import replace_text, sync, write_text
from stellarator.parallel.shard import Shard

FORMAT_VERSION = 1
_TENSORS, _MANIFEST = "tensors.safetensors", "manifest.json"
_OLD = ".tmp-old-"  # of a step that is being saved again; its number follows
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
_BLOCK_BYTES = 1 << 24


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or cannot be trusted."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and its manifest. Tensors are read on request."""

    folder: Path
    manifest: dict

    def load_into(
        self,
        tensors: Mapping[str, torch.Tensor],
        partly: bool = False,
        shards: dict[str, Shard] | None = None,
        put: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        """Fill `tensors` in place; with `partly` the checkpoint may hold more than these.

        shards: what part of the stored one each tensor is, by its name; None: the whole.
        put: is given each tensor when it is filled, for those that are copies of something.

        Raises:
            CheckpointError: names, shapes or dtypes differ; the first few are listed.
        """
        with safe_open(self.folder / _TENSORS, framework="pt") as file:
            stored = self.manifest["tensors"]
            wrong = [f"{name} is missing" for name in tensors if name not in stored]
            if not partly:
                wrong += [f"{name} is not in the model" for name in stored if name not in tensors]
            for name in tensors.keys() & stored.keys():
                shape = tensors[name].shape if shards is None else shards[name].shape
                here = [_DTYPES[tensors[name].dtype], list(shape)]
                there = [stored[name]["dtype"], stored[name]["shape"]]
                if here != there:
                    wrong.append(f"{name}: expected {here}, got {there}")
            if wrong:
                raise CheckpointError(
                    f"{self.folder}: holds another model: {'; '.join(sorted(wrong)[:4])}"
                    + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
                )
            for name, tensor in tensors.items():
                if shards is None:
                    tensor.copy_(file.get_tensor(name))
                else:
                    shards[name].take_(tensor, file.get_tensor(name))
                if put is not None:
                    put(name, tensor)


def save(
    folder: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict,
    read: Callable[[str], torch.Tensor] | None = None,
) -> Path:
    """Write `folder/step_XXXXXXXX` and point `latest` at it.

    Args:
        folder: of the run's checkpoints; made if needed.
        step: updates done.
        tensors: logical name -> tensor, any device.
        state: JSON values: everything else that a resumed run needs.
        read: gives each tensor when it is written, in their order; `tensors` may then be without
            values ("meta"). None: they are what `tensors` holds.
    Returns:
        the committed folder.
    Raises:
        CheckpointError: it could not be written (full disk, no permission). What was there before
            is untouched and nothing half-written is left.
    Cost: writes every byte once, SHA-256 of it at about 2 GB/s a core.
    """
    final = folder / f"step_{step:08d}"
    aside = folder / f".tmp-{step:08d}-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(parents=True)
        described, size, digest = _write_tensors(aside / _TENSORS, tensors, read)
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "state": state,
            "files": {_TENSORS: {"bytes": size, "sha256": digest}},
            "tensors": described,
        }
        write_text(aside / _MANIFEST, json.dumps(_sealed(manifest), indent=1))
        sync(aside)
        if final.exists():
            # The same step was saved before (a resumed run): keep the old folder until the new one
            # is there. After a kill in between `take_back` gives it its name again.
            old = folder / f"{_OLD}{step:08d}-{uuid.uuid4().hex[:8]}"
            final.rename(old)
            aside.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.rename(final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be saved: {error.strerror or error}. Free some space or change "
            "`folder`; older checkpoints are untouched."
        ) from error
    with contextlib.suppress(OSError):  # for people and scripts; `find` does not depend on it
        replace_text(folder / "latest", final.name + "\n")
    return final


def _write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor] | None
) -> tuple[dict, int, str]:
    """One safetensors file; hashes are taken of the bytes on their way to the disk."""
    header, described, start = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [start, start + size]}
        described[name] = entry
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = hashlib.sha256()
    with open(path, "wb") as file:

        def write(part) -> None:
            file.write(part)
            whole.update(part)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name, tensor in tensors.items():
            one = hashlib.sha256()
            for part in _bytes_of(tensor if read is None else read(name)):
                write(part)
                one.update(part)
            described[name] = described[name] | {"sha256": one.hexdigest()}
        file.flush()
        os.fsync(file.fileno())
    return described, 8 + len(text) + start, whole.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in blocks, little-endian, row-major."""
    if tensor.numel() == 0:
        return
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    for start in range(0, flat.size, _BLOCK_BYTES):
        yield memoryview(flat[start : start + _BLOCK_BYTES])


def _sealed(manifest: dict) -> dict:
    """The manifest with a hash of itself, so that a flipped bit in it shows too."""
    text = json.dumps(manifest, sort_keys=True)
    return manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def load(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, after every byte of it was checked.

    Raises:
        CheckpointError: no manifest, another format, or a file that is missing, cut or changed; the
            message names the file.
    Cost: reads every byte once.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        seal = manifest.pop("sha256", None)
        version = manifest["format_version"]
        files = manifest["files"]
    except OSError as error:
        raise CheckpointError(f"{folder / _MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / _MANIFEST}: damaged: not the JSON of a checkpoint"
        ) from error
    if _sealed(manifest)["sha256"] != seal:
        raise CheckpointError(f"{folder / _MANIFEST}: damaged: its content does not match its hash")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / _MANIFEST}: expected format_version {FORMAT_VERSION}, got {version}. "
            "Use the version of stellarator that wrote it."
        )
    for name, entry in files.items():
        _verify(folder / name, entry["bytes"], entry["sha256"])
    return Checkpoint(folder, manifest)


def _verify(path: Path, size: int, digest: str) -> None:
    """Raise CheckpointError unless the file has this size and SHA-256."""
    try:
        actual = path.stat().st_size
        if actual != size:
            raise CheckpointError(f"{path}: expected {size} bytes, got {actual}: it was cut")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if found != digest:
        raise CheckpointError(f"{path}: its content does not match its SHA-256: it was changed")


def find(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that can be trusted; None if there is none.

    Args:
        folder: of the run's checkpoints.
        warn: told about every newer one that was passed over.
    """
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        try:
            return load(candidate)
        except CheckpointError as error:
            warn(f"passed over a damaged checkpoint: {error}")
    return None


def take_back(folder: Path) -> None:
    """Give a step that was being replaced when a run was killed its name again.

    For the process that owns the folder, before it looks for the newest checkpoint.
    """
    for old in sorted(folder.glob(f"{_OLD}????????-*")):
        final = folder / f"step_{old.name.removeprefix(_OLD)[:8]}"
        if not final.exists():
            old.rename(final)


def set_aside_newer(folder: Path, step: int) -> list[str]:
    """Rename checkpoints after `step`, which could not be trusted, to damaged-*; their names."""
    newer = [f for f in sorted(folder.glob("step_*")) if f.name > f"step_{step:08d}"]
    for old in newer:
        old.rename(folder / f"damaged-{uuid.uuid4().hex[:8]}-{old.name}")
    return [old.name for old in newer]


def rotate(folder: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed runs left half-written."""
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    if keep is not None:
        for old in sorted(folder.glob("step_*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
