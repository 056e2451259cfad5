"""Hugging Face folders that are damaged, hostile or of another model; writing that fails half way.

Independent reference: the rules of the loading code as messages, and the file system for what is
left behind. Every damage must give a one-line FolderError and no other exception.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stellarator.config import ModelConfig
from stellarator.model import build_model, load_pretrained, save_pretrained
from stellarator.model.hf_files import FolderError

CONFIG = ModelConfig(
    vocab_size=31, num_layers=2, width=16, num_heads=2, num_kv_heads=1, ffn_width=24,
    max_positions=32, window=8,
)  # fmt: skip
BIGCODE = ModelConfig(
    **{**vars(CONFIG), "family": "gpt_bigcode", "positions": "learned", "window": None}
)


@pytest.fixture
def folder(tmp_path):
    return save_pretrained(build_model(CONFIG), tmp_path / "model")


@pytest.fixture
def shards(tmp_path):
    return save_pretrained(build_model(CONFIG), tmp_path / "shards", max_shard_bytes=3000)


def _edit(folder, name="config.json", **changes):
    """Change keys of a JSON file; a value of `...` removes the key."""
    path = folder / name
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not ...}))


def _refused(folder, message):
    with pytest.raises(FolderError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "expected model_type starcoder2 or gpt_bigcode, got 'llama'"),
        ({"hidden_size": ...}, "hidden_size: expected int, got nothing"),
        ({"hidden_size": "16"}, "hidden_size: expected int, got '16'"),
        ({"hidden_size": True}, "hidden_size: expected int, got True"),
        ({"hidden_size": 1 << 40}, "hidden_size: expected 1 to 16777216"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected 1 to 1024"),
        ({"hidden_size": 15}, "expected a width that 2 heads divide, got 15"),
        ({"num_key_value_heads": 3}, "expected key/value heads that divide 2, got 3"),
        ({"hidden_act": "relu"}, "hidden_act: expected one of gelu, .*got 'relu'"),
        ({"use_bias": False}, "use_bias: expected True, got False, not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: expected None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"factor": 2.0}}, "rope_parameters: factor is not supported"),
        ({"rope_theta": 5.0}, "rope_theta: 5.0 and 10000.0 contradict each other"),
        ({"rope_theta": -1, "rope_parameters": ...}, "rope_theta: expected a positive number"),
        ({"head_dim": 64}, "head_dim: expected 8, got 64"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types: expected sliding_attention"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map: asks for code .* never run"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
        ({"_attn_implementation": "hub/kernel"}, "_attn_implementation: 'hub/kernel' is not known"),
        ({"logit_softcap": 30.0, "qk_norm": 1}, "unknown settings logit_softcap, qk_norm"),
        ({"norm_epsilon": -1.0}, "norm_epsilon: expected a number from 0"),
    ],
)
def test_settings_that_cannot_be_followed(folder, changes, message):
    _edit(folder, **changes)
    _refused(folder, message)


def test_all_settings_are_reported_at_once(folder):
    _edit(folder, use_bias=False, hidden_act="relu", hidden_size=..., odd=1)
    text = _refused(folder, "use_bias")
    assert all(word in text for word in ("hidden_act", "hidden_size", "odd"))


def test_bigcode_settings_that_cannot_be_followed(tmp_path):
    for changes, message in (
        ({"num_key_value_heads": 2}, "num_key_value_heads: expected 1 because multi_query"),
        ({"multi_query": 1}, "multi_query: expected true or false"),
        ({"scale_attn_weights": False}, "scale_attn_weights: expected True"),
        ({"add_cross_attention": True}, "add_cross_attention: expected False"),
        ({"rope_theta": 1e4}, "rope_theta: gpt_bigcode has learned positions"),
    ):
        folder = save_pretrained(build_model(BIGCODE), tmp_path / "model")
        _edit(folder, **changes)
        _refused(folder, message)


def test_settings_without_effect_are_read_over(folder):
    before = load_pretrained(folder).config
    _edit(folder, summary_type="cls_index", transformers_version="4.28.1", rope_scaling=None,
          tie_word_embeddings=..., head_dim=8, layer_types=["sliding_attention"] * 2,
          _attn_implementation="sdpa", max_batch_size=None)  # fmt: skip
    assert load_pretrained(folder).config == before


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "expected JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"a": 1, "a": 2}', "a key stands twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"a": ' + "9" * 5000 + "}", "expected JSON"),
        ("\udcff", "expected JSON"),
    ],
    ids=["cut", "list", "twice", "nan", "deep", "digits", "bytes"],
)
def test_config_that_is_not_json(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    _refused(folder, message)


def test_tensors_that_differ_are_listed_at_once(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.bias"]
    tensors["model.norm.weight"] = torch.ones(17)
    tensors["model.layers.1.mlp.c_fc.weight"] = torch.ones(24, 16, dtype=torch.int8)
    tensors["model.layers.2.mlp.c_fc.weight"] = torch.ones(24, 16)
    save_file(tensors, path, metadata={"format": "pt"})
    text = _refused(folder, "1 missing: model.norm.bias")
    assert "1 unknown: model.layers.2.mlp.c_fc.weight" in text
    assert "1 of another shape: model.norm.weight (17,) instead of (16,)" in text
    assert "1 of a dtype that is not supported: model.layers.1.mlp.c_fc.weight I8" in text


def test_untied_model_needs_its_head(folder):
    _edit(folder, tie_word_embeddings=False)
    _refused(folder, "1 missing: lm_head.weight")


def test_pickle_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _refused(folder, "got pytorch_model.bin. Pickle files can run code")


def test_missing_files(folder, tmp_path):
    _refused(tmp_path / "nowhere", "expected a file, got none")
    (folder / "model.safetensors").unlink()
    _refused(folder, "expected model.safetensors or model.safetensors.index.json, got neither")


def test_links_stay_inside_except_in_the_download_cache(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    weights = folder / "model.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    _refused(folder, "expected a file inside the folder, got a link to")
    weights.unlink()
    weights.symlink_to("model.safetensors")  # to itself
    _refused(folder, "model.safetensors")
    weights.unlink()
    os.mkfifo(weights)
    _refused(folder, "expected a regular file")
    weights.unlink()

    cache = tmp_path / "hub" / "models--a--b"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    outside.rename(cache / "blobs" / "feed")
    (folder / "config.json").rename(cache / "blobs" / "beef")
    (snapshot / "model.safetensors").symlink_to("../../blobs/feed")
    (snapshot / "config.json").symlink_to("../../blobs/beef")
    assert load_pretrained(snapshot).config == CONFIG


@pytest.mark.parametrize("file", ["../shards/x.safetensors", "/etc/passwd", "a/b.safetensors",
                                  "weights.bin", "", 3])  # fmt: skip
def test_index_names_files_beside_it(shards, file):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.bias"] = file
    _edit(shards, "model.safetensors.index.json", weight_map=index["weight_map"])
    _refused(shards, "expected names of .safetensors files beside it")


def test_index_that_lies(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    files = sorted(set(index.values()))
    moved = index | {"model.norm.bias": next(f for f in files if f != index["model.norm.bias"])}
    _edit(shards, path.name, weight_map=moved)
    _refused(shards, "missing model.norm.bias|not named model.norm.bias")
    _edit(shards, path.name, weight_map={})
    _refused(shards, "expected a weight_map")
    _edit(shards, path.name, weight_map=index)
    assert load_pretrained(shards).config == CONFIG
    shutil.copy(shards / files[0], shards / "model.safetensors")
    _refused(shards, "got both. Remove the stale one")
    (shards / "model.safetensors").unlink()
    (shards / files[1]).unlink()
    _refused(shards, "expected a file, got none")


def test_random_damage_gives_one_kind_of_error(folder, tmp_path):
    """Cut and flipped bytes in both files: an error of ours, or the file still says the same."""
    rng = random.Random(0)
    originals = {n: (folder / n).read_bytes() for n in ("config.json", "model.safetensors")}
    header = 8 + int.from_bytes(originals["model.safetensors"][:8], "little")
    refused = 0
    for round_ in range(300):
        name = ("config.json", "model.safetensors")[round_ % 2]
        data = bytearray(originals[name])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), header))] = rng.randrange(256)
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        (folder / name).write_bytes(data)
        try:
            load_pretrained(folder)
        except FolderError as error:
            refused += "\n" not in str(error)
        (folder / name).write_bytes(originals[name])
    assert refused > 150
    assert load_pretrained(folder).config == CONFIG


def test_failed_export_leaves_the_old_one(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stellarator.model.hf.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(build_model(CONFIG, seed=9), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(build_model(CONFIG, seed=9), folder.parent / "new")
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_export_stopped_between_its_two_renames_leaves_the_old_one(folder, monkeypatch, error):
    """The earlier export is aside and the new one not yet in its place."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    rename, refused = Path.rename, [".writing-"]

    def stopped(path, target):
        if any(part in path.name for part in refused):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(type(error)):
        save_pretrained(build_model(CONFIG, seed=9), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    refused.append(".before-")  # not even back: it stays whole where it is
    with pytest.raises(type(error)):
        save_pretrained(build_model(CONFIG, seed=9), folder)
    (left,) = folder.parent.iterdir()
    assert left.name == f".{folder.name}.before-{os.getpid()}"
    assert {p.name: p.read_bytes() for p in left.iterdir()} == before


def test_export_replaces_an_export_and_nothing_else(folder):
    changed = build_model(CONFIG, seed=9)
    save_pretrained(changed, folder, max_shard_bytes=3000)
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(load_pretrained(folder).embedding.weight, changed.embedding.weight)
    (folder / "thesis.txt").write_text("dear")
    with pytest.raises(FolderError, match="got other files: thesis.txt. Choose another folder"):
        save_pretrained(changed, folder)
    assert (folder / "thesis.txt").read_text() == "dear"
    file = folder.parent / "file"
    file.write_text("")
    with pytest.raises(FolderError, match="got a file"):
        save_pretrained(changed, file)


def test_tokenizer_comes_along(folder, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [{"id": 30, "content": "<|endoftext|>"}],
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text("{}")
    (source / "notes.txt").write_text("not copied")
    out = save_pretrained(build_model(CONFIG), tmp_path / "out", tokenizer_folder=source)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "tokenizer_config.json").exists() and not (out / "notes.txt").exists()
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((out / name).read_text())
        assert settings["bos_token_id"] == settings["eos_token_id"] == 30
    assert save_pretrained(build_model(CONFIG), out) == out  # an export with tokenizer is ours too

    tokenizer["added_tokens"][0]["id"] = 31
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(FolderError, match="expected ids below vocab_size = 31, got 31"):
        save_pretrained(build_model(CONFIG), tmp_path / "bad", tokenizer_folder=source)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 8}, "gpt_bigcode has no window"),
        ({"positions": "rope"}, "gpt_bigcode has learned positions, not RoPE"),
        ({"num_heads": 4, "num_kv_heads": 2}, "gpt_bigcode has 1 or 4 key/value heads, not 2"),
        ({"family": "starcoder2"}, "starcoder2 has RoPE, not learned positions"),
        ({"family": "llama"}, "family 'llama' is none of starcoder2, gpt_bigcode"),
    ],
)
def test_what_a_model_type_cannot_express(change, message, tmp_path):
    model = build_model(ModelConfig(**{**vars(BIGCODE), **change}))
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_that_are_views_of_one_buffer(tmp_path):
    """As a flat optimizer keeps them."""
    model = build_model(CONFIG)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    at = 0
    for p in model.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    again = load_pretrained(save_pretrained(model, tmp_path / "out"))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
