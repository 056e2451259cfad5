"""Hugging Face folders, against transformers itself.

Independent reference: transformers' `Starcoder2ForCausalLM` and `GPTBigCodeForCausalLM` with eager
attention, on random weights (biases and norms too), in fp32: logits and every gradient, both ways
through the files. Damaged and hostile folders are in test_hf_folder.py. Not covered: released
checkpoints (no network), transformers 4 (its dialect of config.json is checked by key only).
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stellarator.config import ModelConfig
from stellarator.model import build_model, load_pretrained, save_pretrained
from stellarator.model.hf import tensor_map

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

V, T = 61, 23
_SMALL = {"vocab_size": V, "num_layers": 2, "width": 48, "ffn_width": 72, "max_positions": 32}
_STARCODER2 = {**_SMALL, "num_heads": 6, "num_kv_heads": 2, "rope_theta": 999999.4420358813}
_BIGCODE = {
    **_SMALL,
    "family": "gpt_bigcode",
    "num_heads": 4,
    "positions": "learned",
    "window": None,
}
CASES = {
    "starcoder2, window shorter than the text, tied": ModelConfig(**_STARCODER2, window=7),
    "starcoder2, untied, erf gelu": ModelConfig(
        **_STARCODER2, window=7, tie_embeddings=False, activation="gelu_erf"
    ),
    "starcoder2, no window": ModelConfig(**_STARCODER2, window=None),
    "gpt_bigcode, one key/value head, tied": ModelConfig(**_BIGCODE, num_kv_heads=1),
    "gpt_bigcode, all key/value heads, erf gelu": ModelConfig(
        **_BIGCODE, num_kv_heads=4, activation="gelu_erf"
    ),
    "gpt_bigcode, untied": ModelConfig(**_BIGCODE, num_kv_heads=1, tie_embeddings=False),
}
LIMIT = 1e-5  # of the largest value of a tensor; fp32 with sums of at most 72 terms


def _model(config, dtype=torch.float32, std=0.15):
    """Every parameter random, so that a forgotten bias or a swapped norm shows."""
    model = build_model(config, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + name.count("norm.weight"))
    return model


def _peer(folder):
    """The model of transformers from a folder."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="auto"
    )
    return loaded.eval()


def _batch():
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(V, (3, T), generator=generator)
    targets = torch.randint(V, (3, T), generator=generator)
    targets[0, 4:9] = -100
    return tokens, targets


def _relative(actual, expected):
    """Largest difference over the largest value."""
    actual, expected = actual.detach(), expected.detach()
    error = float((actual - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")  # so that a NaN is never the smallest


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_logits_and_every_gradient_equal_transformers(config, tmp_path):
    model = _model(config)
    peer = _peer(save_pretrained(model, tmp_path / "out"))
    tokens, targets = _batch()

    logits, peer_logits = model(tokens), peer(tokens).logits
    errors = {"logits": _relative(logits, peer_logits)}
    loss = model(tokens, targets)
    loss.backward()
    peer_loss = torch.nn.functional.cross_entropy(peer_logits.flatten(0, 1), targets.flatten())
    peer_loss.backward()
    errors["loss"] = _relative(loss, peer_loss)
    peer_grads = {name: p.grad for name, p in peer.named_parameters()}
    parameters = dict(model.named_parameters())
    for tensor in tensor_map(config):
        expected = tensor.gather(peer_grads.pop)
        errors[tensor.ours] = _relative(parameters.pop(tensor.ours).grad, expected)
    assert not parameters and not peer_grads  # both sides have all of them
    print(f"\nlargest relative error {max(errors.values()):.2e} of {max(errors, key=errors.get)}")
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_folder_written_by_transformers_loads_and_round_trips(config, tmp_path):
    save_pretrained(_model(config), tmp_path / "ours")
    peer = _peer(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    assert model.config == config
    tokens, _ = _batch()
    with torch.no_grad():
        assert _relative(model(tokens), peer(tokens).logits) < LIMIT

    before = load_file(tmp_path / "ours" / "model.safetensors")
    save_pretrained(model, tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_shards_with_an_index(config, tmp_path):
    model = _model(config)
    folder = save_pretrained(model, tmp_path / "out", max_shard_bytes=20_000)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert index["metadata"]["total_size"] == 4 * index["metadata"]["total_parameters"]

    again = load_pretrained(folder)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    tokens, _ = _batch()
    with torch.no_grad():
        assert _relative(model(tokens), _peer(folder)(tokens).logits) < LIMIT


def test_bf16_is_kept_or_cast(tmp_path):
    config = CASES["starcoder2, window shorter than the text, tied"]
    folder = save_pretrained(_model(config, torch.bfloat16), tmp_path / "out")
    as_stored, cast = load_pretrained(folder), load_pretrained(folder, dtype=torch.float32)
    for a, b in zip(as_stored.parameters(), cast.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and b.dtype == torch.float32
        assert torch.equal(a.float(), b)
    peer = _peer(folder)
    assert peer.dtype == torch.bfloat16
    tokens, _ = _batch()
    with torch.no_grad():
        exact = cast(tokens)
        ours, theirs = as_stored(tokens), peer(tokens).logits.float()
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (
        theirs - exact
    ).abs().max() + 2**-8 * exact.abs().max()


@pytest.mark.parametrize("family", ["starcoder2", "gpt_bigcode"])
def test_tied_head_may_be_stored(family, tmp_path):
    config = next(c for c in CASES.values() if c.family == family and c.tie_embeddings)
    folder = save_pretrained(_model(config), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    name = {"starcoder2": "model.embed_tokens.weight", "gpt_bigcode": "transformer.wte.weight"}[
        family
    ]
    tensors["lm_head.weight"] = tensors[name].clone()
    if family == "gpt_bigcode":  # old versions of transformers stored the causal mask as well
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_pretrained(folder)
    assert torch.equal(model.embedding.weight, tensors[name])

    tensors["lm_head.weight"][3, 1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight equal to .*Set it to false"):
        load_pretrained(folder)


def test_config_has_both_dialects(tmp_path):
    config = CASES["starcoder2, untied, erf gelu"]
    folder = save_pretrained(_model(config, torch.bfloat16), tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == config.rope_theta
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert written["bos_token_id"] == written["eos_token_id"] == 0
    assert written["sliding_window"] == 7 and written["tie_word_embeddings"] is False
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0
    for left_out in ({"rope_theta", "torch_dtype"}, {"rope_parameters", "dtype"}):
        kept = {k: v for k, v in written.items() if k not in left_out}
        (folder / "config.json").write_text(json.dumps(kept))
        assert load_pretrained(folder).config == config


@pytest.mark.parametrize(
    "string, activation",
    [("gelu", "gelu_erf"), ("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh"),
     ("gelu_pytorch_tanh", "gelu_tanh")],
)  # fmt: skip
def test_activation_strings_mean_what_transformers_means(string, activation, tmp_path):
    from transformers.activations import ACT2FN

    config = CASES["gpt_bigcode, one key/value head, tied"]
    folder = save_pretrained(_model(config), tmp_path / "out")
    written = json.loads((folder / "config.json").read_text()) | {"activation_function": string}
    (folder / "config.json").write_text(json.dumps(written))
    assert load_pretrained(folder).config.activation == activation
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    form = {"gelu_erf": "none", "gelu_tanh": "tanh"}[activation]
    expected = torch.nn.functional.gelu(x, approximate=form)
    torch.testing.assert_close(ACT2FN[string](x), expected, rtol=0, atol=1e-9)


def test_dropout_and_defaults_are_read(tmp_path):
    config = CASES["gpt_bigcode, one key/value head, tied"]
    folder = save_pretrained(_model(config), tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "multi_query"):
        del written[key]
    (folder / "config.json").write_text(json.dumps(written))
    peer = transformers.AutoConfig.from_pretrained(folder)
    loaded = load_pretrained(folder).config
    assert loaded.residual_dropout == peer.resid_pdrop == 0.1
    assert loaded.attention_dropout == peer.attn_pdrop == 0.1
    assert loaded.num_kv_heads == 1 and loaded.norm_eps == peer.layer_norm_epsilon
    again = save_pretrained(load_pretrained(folder), tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["embd_pdrop"] == 0.1
