"""Checkpoints: exact round trip, every kind of damage is found, a failed save loses nothing.

The independent reader is the safetensors library. Kills at random times are in test_resume.py.
"""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from stellarator.train import checkpoint
from stellarator.train.checkpoint import CheckpointError


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "master.a": torch.randn(33, 7, generator=generator),
        "master.b": torch.randn(5, generator=generator).to(torch.bfloat16),
        "exp_avg.scalar": torch.tensor(2.5, dtype=torch.float64),
        "exp_avg.empty": torch.empty(0, 3),
    }


def write(folder, step=3, seed=0):
    return checkpoint.save(folder, step, tensors(seed), {"note": "x"})


def test_round_trip_is_exact_and_the_library_reads_it(tmp_path):
    folder = write(tmp_path)
    assert folder.name == "step_00000003" and (tmp_path / "latest").read_text() == "step_00000003\n"
    found = load_file(folder / "tensors.safetensors")
    loaded = {name: torch.full_like(t, 9.0) for name, t in tensors().items()}
    checkpoint.load(folder).load_into(loaded)
    for name, expected in tensors().items():
        assert torch.equal(found[name], expected) and torch.equal(loaded[name], expected)
        assert found[name].dtype == expected.dtype
    assert checkpoint.load(folder).manifest["state"] == {"note": "x"}


def test_every_flipped_byte_is_found(tmp_path):
    folder = write(tmp_path)
    rng = random.Random(0)
    for path in (folder / "tensors.safetensors", folder / "manifest.json"):
        whole = path.read_bytes()
        for _ in range(100):
            at, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
                checkpoint.load(folder)
        path.write_bytes(whole)
    checkpoint.load(folder)


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
def test_truncated_and_missing_files_fall_back_to_the_step_before(tmp_path, name):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    whole = path.read_bytes()
    rng = random.Random(1)
    for size in [0, *(rng.randrange(len(whole)) for _ in range(10)), None]:
        path.unlink() if size is None else path.write_bytes(whole[:size])
        said: list[str] = []
        assert checkpoint.find(tmp_path, said.append).manifest["step"] == 1
        assert len(said) == 1 and name in said[0]


def test_swapped_tensors_of_another_step_are_refused(tmp_path):
    first, second = write(tmp_path, 1, seed=1), write(tmp_path, 2, seed=2)
    (second / "tensors.safetensors").write_bytes((first / "tensors.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoint.load(second)


def test_another_model_is_named(tmp_path):
    found = checkpoint.load(write(tmp_path))
    other = tensors() | {"master.a": torch.zeros(7, 33)}
    with pytest.raises(CheckpointError, match=r"master\.a: expected .*\[7, 33\].* got .*\[33, 7\]"):
        found.load_into(other)
    with pytest.raises(CheckpointError, match=r"master\.c is missing"):
        found.load_into(tensors() | {"master.c": torch.zeros(1)})
    some = {"master.b": torch.zeros(5, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match="is not in the model"):
        found.load_into(some)
    found.load_into(some, partly=True)
    assert torch.equal(some["master.b"], tensors()["master.b"])


def test_other_format_versions_are_refused(tmp_path):
    folder = write(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    sealed = checkpoint._sealed(manifest | {"format_version": 99})
    (folder / "manifest.json").write_text(json.dumps(sealed))
    with pytest.raises(CheckpointError, match="expected format_version 1, got 99"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", "5", "[" * 50_000], ids=lambda c: c[:3])
def test_a_damaged_manifest_is_said_in_words(tmp_path, content):
    folder = write(tmp_path)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    path = folder / "manifest.json"
    assert str(error.value) == f"{path}: damaged: not the JSON of a checkpoint"


FULL_DISK = """
import resource, sys, signal, torch
from pathlib import Path
from stellarator.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"a": torch.ones(10)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    checkpoint.save(folder, 2, {"a": torch.ones(1 << 20)}, {})
except checkpoint.CheckpointError as error:
    print(error)
"""


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert "cannot be saved: File too large" in done.stdout and "untouched" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]
    assert checkpoint.find(tmp_path, pytest.fail).manifest["step"] == 1


def test_rotation_keeps_the_newest_and_removes_leftovers(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    (tmp_path / ".tmp-00000009-dead").mkdir()
    checkpoint.rotate(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000004", "step_00000005"]
    checkpoint.rotate(tmp_path, None)
    assert len(list(tmp_path.glob("step_*"))) == 2


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 1, seed=1)
    folder = write(tmp_path, 1, seed=2)
    assert torch.equal(
        load_file(folder / "tensors.safetensors")["master.a"], tensors(2)["master.a"]
    )
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]


def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path, monkeypatch):
    """Between the two renames neither the old nor the new folder has its name."""
    write(tmp_path, 1, seed=1)
    write(tmp_path, 2, seed=1)
    renames, rename = [], type(tmp_path).rename

    def killed(path, target):
        renames.append(path)
        if len(renames) == 2:
            raise KeyboardInterrupt  # as any end of the process: nothing after it runs
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, seed=2)
    monkeypatch.undo()
    assert [f.name for f in tmp_path.glob("step_*")] == ["step_00000001"]
    checkpoint.take_back(tmp_path)
    found = checkpoint.find(tmp_path, pytest.fail)
    assert found.manifest["step"] == 2
    loaded = tensors()
    found.load_into(loaded)
    assert torch.equal(loaded["master.a"], tensors(1)["master.a"])
    checkpoint.rotate(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001", "step_00000002"]


def test_only_what_is_missing_is_taken_back(tmp_path):
    write(tmp_path, 2, seed=2)
    write(tmp_path / "other", 2, seed=1).rename(tmp_path / ".tmp-old-00000002-dead")
    (tmp_path / ".tmp-old-dead").mkdir()
    checkpoint.take_back(tmp_path)
    assert (tmp_path / ".tmp-old-00000002-dead").exists()
    file = load_file(tmp_path / "step_00000002" / "tensors.safetensors")
    assert torch.equal(file["master.a"], tensors(2)["master.a"])
    checkpoint.take_back(tmp_path / "absent")
