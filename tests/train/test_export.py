"""What `export` says about a folder or a tokenizer that is not there.

The weights that it writes are compared in test_loop.py and the demo's test.
"""

import dataclasses
import json
import shutil

import pytest

from stellarator.train.checkpoint import CheckpointError
from stellarator.train.export import export
from stellarator.train.loop import Trainer


@pytest.fixture
def run_folder(tiny_config, tiny_corpus, tmp_path):
    """A run of two steps, with a tokenizer of its own."""
    shutil.copytree(tiny_corpus / "tokenizer", tmp_path / "tokenizer")
    config = dataclasses.replace(
        tiny_config,
        data=dataclasses.replace(tiny_config.data, tokenizer=str(tmp_path / "tokenizer")),
        train=dataclasses.replace(tiny_config.train, steps=3, eval_interval=None),
    )
    Trainer(config).run()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("path", "got"),
    [("absent", "got nothing there"), ("file", "got a file there"), ("empty", "got neither")],
)
def test_what_is_no_run_is_the_users_mistake(tmp_path, path, got):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{path}: expected a run folder.*{got}"):
        export(tmp_path / path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_damaged_checkpoint_is_not(run_folder, tmp_path, capsys):
    (weights,) = run_folder.glob("checkpoints/*/tensors.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="run: expected a checkpoint that can be read, got"):
        export(run_folder, tmp_path / "model")
    assert "passed over a damaged checkpoint" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="it was cut"):
        export(weights.parent, tmp_path / "model")


def test_a_tokenizer_that_has_moved_is_one_clear_line(run_folder, tmp_path):
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"export: expected the tokenizer of the run in .*tokeniz"):
        export(run_folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "tokenizer")
    export(run_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["vocab_size"] == 420 and (tmp_path / "model" / "tokenizer.json").exists()
