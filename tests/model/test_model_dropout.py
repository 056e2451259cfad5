"""Dropout in the model: against a plain float64 decoder with the same masks, and what may not move.

The decoder below is written from the formulas with torch's own ops and autograd; its masks come
from stellarator_kernels.random by token, place and channel, which tests/ops holds to the bits.
Not covered: several ranks (test_data_parallel.py), the Triton kernels on a GPU.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from stellarator.config import ModelConfig
from stellarator.model import KVCache, build_model
from stellarator.model.dropout import Dropout
from stellarator_kernels import random
from stellarator_kernels.rope import rope_table

_SMALL = {
    "vocab_size": 53, "num_layers": 2, "width": 48, "num_heads": 6, "ffn_width": 80,
    "max_positions": 40, "init_std": 0.15,
    "residual_dropout": 0.2, "embedding_dropout": 0.1, "attention_dropout": 0.3,
}  # fmt: skip
STARCODER2 = ModelConfig(**_SMALL, num_kv_heads=2, window=5)
STARCODER = ModelConfig(
    **_SMALL, family="gpt_bigcode", num_kv_heads=1, positions="learned", window=None,
    activation="gelu_erf", tie_embeddings=False,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [STARCODER2, STARCODER], ids=["starcoder2", "starcoder"])
SEED, FIRST = 77, 1000
B, T = 4, 9


def without(config):
    """The same shape with every rate 0."""
    rates = ("residual_dropout", "embedding_dropout", "attention_dropout")
    return dataclasses.replace(config, **dict.fromkeys(rates, 0.0))


def batch():
    g = torch.Generator().manual_seed(2)
    return torch.randint(53, (B, T), generator=g), torch.randint(53, (B, T), generator=g)


def plain_loss(model, tokens, targets):
    """Sum of the losses, from the formulas, one place of dropout after the other."""
    c, w = model.config, dict(model.named_parameters())
    H, G, D = c.num_heads, c.num_kv_heads, c.width // c.num_heads
    rows = random.element_keys(SEED, 2, (FIRST * T,), (B * T,), "cpu")
    columns = random.element_keys(SEED, 3, (0, 0), (2 * c.num_layers + 1, c.width), "cpu")

    def drop(x, place, p):
        kept = random.kept(rows[:, None], columns[place], p).view(x.shape)
        return torch.where(kept, x / (1 - p), 0.0)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], c.norm_eps)

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def rotate(x):
        if c.positions == "learned":
            return x
        cos, sin = (t.double()[:, None] for t in rope_table(torch.arange(T), D, c.rope_theta))
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    x = w["embedding.weight"][tokens]
    if c.positions == "learned":
        x = x + w["position_embedding.weight"][:T]
    x = drop(x, 0, c.embedding_dropout)
    reach = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (reach < 0) | (reach >= (c.window or T))
    for i in range(c.num_layers):
        heads = linear(norm(x, f"layers.{i}.attention_norm"), f"layers.{i}.attention.qkv")
        q, k, v = heads.unflatten(-1, (-1, D)).split((H, G, G), 2)
        k, v = (x.repeat_interleave(H // G, 2) for x in (rotate(k), v))
        scores = torch.einsum("bthd,bshd->bhts", rotate(q), k) / math.sqrt(D)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        seed = random.derived(SEED, 4, i)
        queries = random.element_keys(seed, 0, (FIRST, 0, 0), (B, H, T), "cpu")
        keys = random.element_keys(seed, 1, (FIRST, 0), (B, T), "cpu")
        kept = random.kept(queries[..., None], keys[:, None, None], c.attention_dropout)
        weights = torch.where(kept, weights / (1 - c.attention_dropout), 0.0)
        out = torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)
        branch = linear(out, f"layers.{i}.attention.out")
        x = x + drop(branch, 2 * i + 1, c.residual_dropout)
        h = linear(norm(x, f"layers.{i}.mlp_norm"), f"layers.{i}.mlp.up")
        h = F.gelu(h, approximate="tanh" if c.activation == "gelu_tanh" else "none")
        x = x + drop(linear(h, f"layers.{i}.mlp.down"), 2 * i + 2, c.residual_dropout)
    logits = F.linear(norm(x, "final_norm"), model.head_weight)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def loss_and_gradients(model, tokens, targets, dropout, **options):
    model.zero_grad()
    loss = model(tokens, targets, reduction="sum", dropout=dropout, **options)
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters()]


@BOTH
def test_loss_and_every_gradient_against_a_plain_decoder(config):
    model, (tokens, targets) = build_model(config, dtype=torch.float64), batch()
    actual = loss_and_gradients(model, tokens, targets, Dropout(SEED, FIRST))
    model.zero_grad()
    plain = plain_loss(model, tokens, targets)
    plain.backward()
    expected = [plain.detach()] + [p.grad for p in model.parameters()]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)
    off = loss_and_gradients(model, tokens, targets, None)
    assert abs(off[0] - actual[0]) > 0.01  # the masks did something


@BOTH
def test_one_place_at_a_time(config):
    """Each rate alone agrees as well, and changes the loss."""
    (tokens, targets), found = batch(), set()
    for name in ("residual_dropout", "embedding_dropout", "attention_dropout"):
        only = dataclasses.replace(without(config), **{name: 0.25})
        model = build_model(only, dtype=torch.float64)
        loss = model(tokens, targets, reduction="sum", dropout=Dropout(SEED, FIRST))
        torch.testing.assert_close(loss, plain_loss(model, tokens, targets))
        found.add(float(loss.detach()))
    assert len(found | {float(model(tokens, targets, reduction="sum").detach())}) == 4


@BOTH
@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_have_the_masks_of_the_whole(config, packed):
    model, (tokens, targets) = build_model(config, dtype=torch.float64), batch()

    def run(first, last):
        bounds = torch.arange(0, (last - first) * T + 1, T, dtype=torch.int32)
        rows, dropout = slice(first, last), Dropout(SEED, FIRST + first)
        options = {"cu_seqlens": bounds} if packed else {}
        return loss_and_gradients(model, tokens[rows], targets[rows], dropout, **options)

    whole, first, rest = run(0, 4), run(0, 1), run(1, 4)
    for a, b, c in zip(whole, first, rest, strict=True):
        torch.testing.assert_close(b + c, a, rtol=1e-10, atol=1e-12)
    other = loss_and_gradients(model, tokens, targets, Dropout(SEED + 1, FIRST))
    assert abs(other[0] - whole[0]) > 1e-3


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_recomputation_changes_no_bit(config, dtype):
    (tokens, targets), results = batch(), []
    for recompute in ("none", "selective", "full"):
        model = build_model(config, dtype=dtype, recompute=recompute)
        results.append(loss_and_gradients(model, tokens, targets, Dropout(SEED, FIRST)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@BOTH
def test_no_dropout_is_the_model_without_rates_to_the_bit(config):
    tokens, targets = batch()
    rates, none = (build_model(c, dtype=torch.bfloat16) for c in (config, without(config)))
    expected = loss_and_gradients(none, tokens, targets, None)
    for model, dropout in ((rates, None), (none, Dropout(SEED, FIRST))):
        actual = loss_and_gradients(model, tokens, targets, dropout)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_cache_and_dropout_are_refused():
    model = build_model(STARCODER2)
    cache = KVCache(STARCODER2, 1, 9, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="model: expected no dropout with a cache"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache, dropout=Dropout(1, 0))
