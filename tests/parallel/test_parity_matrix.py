"""A short form of `python -m benchmarks parity`: layouts beside one process, in float64.

The models have 4 layers instead of 8. Not covered: the other layouts, eight processes, fp32 (the
verb has them); NCCL.
"""

import dataclasses
import json

import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import parity
from stellarator.config import ParallelConfig

NAMES = [
    ("starcoder2", "pp 2 interleaved"),
    ("starcoder2 dropout", "cp 2 ring"),
    ("starcoder2 dropout", "pp 2 zb_v"),
    ("starcoder2 dropout", "tp 2 sp dp 2 zero 2"),
    ("starcoder2 untied", "tp 4 sp"),
    ("starcoder", "tp 2 sp cp 2 ring"),
    ("starcoder", "pp 4 1f1b"),
]


def test_layouts_train_the_same_model(monkeypatch):
    small = {name: dataclasses.replace(m, num_layers=4) for name, m in parity.MODELS.items()}
    monkeypatch.setattr(parity, "MODELS", small)
    cases = [case for case in parity.CASES if (case.model, case.name) in NAMES]
    assert len(cases) == len(NAMES)
    for found in parity.compare(cases, ["fp64"], lambda share, text: None):
        assert found.right, found


def test_a_layout_that_differs_is_seen(tmp_path, monkeypatch):
    """Other first weights, another loss, another moment; a run that fails."""
    parity.corpus(tmp_path)
    config = parity.configuration(tmp_path, "starcoder2", "fp64")
    small = dataclasses.replace(config.model, num_layers=1)
    config = dataclasses.replace(config, model=small)
    seeded = dataclasses.replace(config.train, seed=7)
    runs = [(config, tmp_path / "a"), (dataclasses.replace(config, train=seeded), tmp_path / "b")]
    assert parity.run_all(runs, 1, lambda done: None) == ""
    assert parity.differences(tmp_path / "a", tmp_path / "a") == (True, 0.0, 0.0)
    same, loss, state = parity.differences(tmp_path / "a", tmp_path / "b")
    assert not same and loss > 1e-4 and state > 1e-2
    path = tmp_path / "b" / "checkpoints" / f"step_{parity.STEPS:08d}" / "tensors.safetensors"
    tensors = load_file(tmp_path / "a" / path.relative_to(tmp_path / "b"))
    name = next(name for name in tensors if name.startswith("exp_avg."))
    save_file(tensors | {name: tensors[name] * (1 + 1e-9)}, path)
    assert parity.differences(tmp_path / "a", tmp_path / "b")[2] == pytest.approx(1e-9, rel=0.01)
    wrong = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tp=3))
    said = parity.run_all([(wrong, tmp_path / "c")], 2, lambda done: None)
    assert "ConfigError" in said


def test_a_copy_that_differs_is_seen(tmp_path):
    """Norms of two tensor ranks, embeddings of the first and the last stage, parts of replicas."""
    parity.corpus(tmp_path)
    config = parity.configuration(tmp_path, "starcoder2", "fp64")
    layouts = {"tp": {"tp": 2, "sp": True}, "pp": {"pp": 2}, "dp": {}}
    names = {"tp": "norm", "pp": "embedding", "dp": "down"}
    runs = [
        (dataclasses.replace(config, parallel=ParallelConfig(**layout)), tmp_path / kind)
        for kind, layout in layouts.items()
    ]
    assert parity.run_all(runs, 2, lambda done: None) == ""
    for kind in layouts:
        folder = tmp_path / kind
        assert parity.copies_agree(folder)
        path = folder / "first-1.json"
        own = json.loads(path.read_text())
        key = next(key for key in own if names[kind] in key)
        path.write_text(json.dumps(own | {key: "other"}))
        assert not parity.copies_agree(folder)
        path.unlink()
        assert parity.copies_agree(folder)
        (folder / "first-0.json").unlink()
        assert not parity.copies_agree(folder)


def test_the_matrix_has_what_it_promises():
    names = {case.name for case in parity.CASES}
    assert len(parity.CASES) >= 24 and len(set(parity.CASES)) == len(parity.CASES)
    for axis, sizes in (("tp", (2, 4)), ("pp", (2, 4)), ("cp", (2, 4)), ("dp", (2, 4))):
        for size in sizes:
            assert any(f"{axis} {size}" in name for name in names)
    assert max(case.processes for case in parity.CASES) == 8
