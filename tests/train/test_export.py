"""The weights of a run as `export` writes them, and what it says where something is not there.

References: the masters in the checkpoint's own file, read by the safetensors library, under names
written down here; and the logits of transformers' model from the exported folder.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from stellarator.model import build_model
from stellarator.train.checkpoint import CheckpointError
from stellarator.train.export import export, model_from_checkpoint
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


THEIRS = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm": "model.norm",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def masters(folder) -> dict[str, torch.Tensor]:
    """The fp32 weights in the only checkpoint of a run."""
    (path,) = folder.glob("checkpoints/*/tensors.safetensors")
    tensors = load_file(path)
    return {k.removeprefix("master."): t for k, t in tensors.items() if k.startswith("master.")}


def renamed(tensors: dict[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    """The same under the names of transformers."""
    D, found = model.width // model.num_heads, {}
    rows = [model.num_heads * D, model.num_kv_heads * D, model.num_kv_heads * D]
    for name, tensor in tensors.items():
        for ours, theirs in THEIRS.items():
            name = name.replace(ours, theirs)
        if "attention.qkv" in name:
            parts = zip("qkv", tensor.split(rows), strict=True)
            found |= {name.replace("attention.qkv", f"self_attn.{x}_proj"): t for x, t in parts}
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_masters_of_the_checkpoint_rounded_once(run_folder, tiny_config, tmp_path, name, dtype):
    export(run_folder, tmp_path / "model", name)
    found = load_file(tmp_path / "model" / "model.safetensors")
    expected = masters(run_folder)
    for theirs, tensor in renamed(expected, tiny_config.model).items():
        assert torch.equal(found.pop(theirs), tensor.to(dtype)), theirs
    assert not found
    model, _ = model_from_checkpoint(run_folder, dtype)
    for ours, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.pop(ours).to(dtype)), ours
    assert not expected


def test_transformers_gives_the_logits_of_the_checkpoint(run_folder, tiny_config, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    export(run_folder, tmp_path / "model", "fp32")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    ours = build_model(tiny_config.model, dtype=torch.float32, seed=77)
    ours.load_state_dict(masters(run_folder))
    tokens = torch.arange(2 * 60).reshape(2, 60) % 420
    with torch.no_grad():
        expected, got = ours(tokens), peer.eval()(tokens).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


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
