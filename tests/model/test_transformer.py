"""The decoder: recomputation, packing, cache, checks. Its mathematics is compared in test_hf.py.

Independent references: a plain float64 decoder written below from the formulas (no project code),
one forward pass per document for packing, the pass without a cache for the cache, and the pass
without recomputation, to the bit. Not covered: GPU, speed.
"""

import copy
import dataclasses
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stellarator.config import ModelConfig
from stellarator.model import KVCache, build_model
from stellarator_kernels import _triton

_SMALL = {
    "vocab_size": 53, "num_layers": 2, "width": 48, "num_heads": 6, "ffn_width": 80,
    "max_positions": 40, "init_std": 0.15,
}  # fmt: skip
STARCODER2 = ModelConfig(**_SMALL, num_kv_heads=2, window=5)
STARCODER = ModelConfig(
    **_SMALL, family="gpt_bigcode", num_kv_heads=1, positions="learned", window=None,
    activation="gelu_erf", tie_embeddings=False,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [STARCODER2, STARCODER], ids=["starcoder2", "starcoder"])


def _model(config, **options):
    """Biases and norms random as well."""
    model = build_model(config, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.copy_(0.2 * noise + name.count("norm.weight"))
    return model


def _batch(B=2, T=17, V=53):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(V, (B, T), generator=generator)
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, 3:6] = -100
    return tokens, targets


def _plain(model, tokens):
    """Logits of one row (T,) in float64, from the formulas, one head at a time."""
    c, w = model.config, {n: p.detach().double() for n, p in model.named_parameters()}
    T, D = len(tokens), c.width // c.num_heads
    x = w["embedding.weight"][tokens]
    if c.positions == "learned":
        x = x + w["position_embedding.weight"][:T]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()
        return centred / scale * w[name + ".weight"] + w[name + ".bias"]

    def rotate(x):
        if c.positions == "learned":
            return x
        angle = torch.arange(T).double()[:, None] * c.rope_theta ** (
            -torch.arange(0, D, 2).double() / D
        )
        z = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([z.real, z.imag], -1)

    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    visible = (distance >= 0) & (distance < (c.window or T))
    for i in range(c.num_layers):
        p = f"layers.{i}."
        rows = norm(x, p + "attention_norm") @ w[p + "attention.qkv.weight"].T
        heads = (rows + w[p + "attention.qkv.bias"]).split(D, dim=-1)
        outs = []
        for h in range(c.num_heads):
            g = h // (c.num_heads // c.num_kv_heads)
            q, k = rotate(heads[h]), rotate(heads[c.num_heads + g])
            scores = (q @ k.T / math.sqrt(D)).masked_fill(~visible, -math.inf)
            outs.append(scores.softmax(-1) @ heads[c.num_heads + c.num_kv_heads + g])
        x = x + torch.cat(outs, -1) @ w[p + "attention.out.weight"].T + w[p + "attention.out.bias"]
        u = norm(x, p + "mlp_norm") @ w[p + "mlp.up.weight"].T + w[p + "mlp.up.bias"]
        if c.activation == "gelu_erf":
            u = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        else:
            u = u * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + u @ w[p + "mlp.down.weight"].T + w[p + "mlp.down.bias"]
    head = w["embedding.weight"] if c.tie_embeddings else w["head.weight"]
    return norm(x, "final_norm") @ head.T


def _assert_close(actual, expected, limit=1e-5):
    actual, expected = actual.detach(), expected.detach()
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < limit, error  # also fails for NaN


@BOTH
def test_logits_and_losses_follow_the_formulas(config):
    model = _model(config)
    tokens, targets = _batch()
    logits, expected = model(tokens), torch.stack([_plain(model, row) for row in tokens])
    assert logits.dtype == torch.float32
    _assert_close(logits.double(), expected)
    losses = torch.nn.functional.cross_entropy(expected.mT, targets, reduction="none")
    _assert_close(model(tokens, targets, reduction="none").double(), losses)
    _assert_close(model(tokens, targets, reduction="sum").double(), losses.sum())
    _assert_close(model(tokens, targets).double(), losses.sum() / (targets != -100).sum())
    assert (model(tokens, targets, reduction="none")[0, 3:6] == 0).all()


@BOTH
def test_float64_model_is_float64_throughout(config):
    model = _model(config, dtype=torch.float64)
    tokens, targets = _batch()
    logits = model(tokens)
    assert logits.dtype == torch.float64 and model(tokens, targets).dtype == torch.float64
    expected = torch.stack([_plain(model, row) for row in tokens])
    # Angles of RoPE are float32 by definition; learned positions leave nothing but float64.
    _assert_close(logits, expected, 1e-6 if config.positions == "rope" else 1e-13)


@BOTH
def test_implementations_agree(config):
    tokens, targets = _batch()
    results = []
    for kernels in ("torch", "reference"):
        model = _model(config, kernels=kernels)
        model(tokens, targets).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in results[0].items():
        _assert_close(grad, results[1][name])


@BOTH
def test_a_step_with_tritons_kernels(config, monkeypatch):
    """In the interpreter, which "auto" never takes; the projection leaves its bias to bias_rope."""
    if _triton.FAILURE is not None or not _triton.INTERPRETED:
        pytest.skip("Triton's kernels run on a GPU in tests/ops")
    config = dataclasses.replace(config, num_layers=1, width=64, num_heads=4, window=5)
    tokens, targets = _batch(B=1, T=7)
    results, seen, product = [], [], torch.ops.stellarator.bias_rope_backward
    noting = lambda *given: seen.append(given[5]) or product(*given)  # noqa: E731
    monkeypatch.setattr(torch.ops.stellarator, "bias_rope_backward", noting)
    for kernels, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        model = _model(config, kernels=kernels, dtype=dtype)
        loss = model(tokens, targets)
        loss.backward()
        results.append({"loss": loss} | {n: p.grad for n, p in model.named_parameters()})
    assert seen == [True]  # with the gradient of the bias; the reference has another way
    for name, grad in results[0].items():
        _assert_close(grad.double(), results[1][name], 2e-5)


@BOTH
def test_recomputation_gives_the_same_gradients_to_the_bit(config):
    tokens, targets = _batch()
    results = {}
    for recompute in ("none", "selective", "full"):
        model = _model(config, recompute=recompute)
        loss = model(tokens, targets)
        loss.backward()
        results[recompute] = [loss.detach()] + [p.grad for p in model.parameters()]
    for recompute in ("selective", "full"):
        pairs = zip(results["none"], results[recompute], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), recompute


class _Storages(TorchDispatchMode):
    """Remembers which of the buffers made under it are alive, and counts matrix products."""

    def __init__(self, model):
        super().__init__()
        self.alive, self.products = {}, 0
        self.parameters = [p.untyped_storage() for p in model.parameters()]
        self.known = {id(storage) for storage in self.parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        dear = ("product", "mlp_up", "flash_attention_forward")
        self.products += func.name().removeprefix("stellarator::") in dear
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = id(storage)
                if key in self.known:  # a view of a parameter
                    continue
                drop = lambda _, key=key: self.alive.pop(key, None)  # noqa: E731
                self.alive.setdefault(key, (weakref.ref(storage, drop), storage.nbytes()))
        return out

    def bytes(self):
        return sum(size for _, size in self.alive.values())


def _kept_and_products(recompute):
    """(bytes alive between forward and backward, products and attentions in the backward)."""
    shape = {"num_layers": 4, "ffn_width": 4 * STARCODER2.width}
    config = ModelConfig(**{**vars(STARCODER2), **shape})
    model = _model(config, recompute=recompute)
    tokens, targets = _batch(T=32)
    with _Storages(model) as storages:
        loss = model(tokens, targets)
        kept, before = storages.bytes(), storages.products
        loss.backward()
        return kept, storages.products - before


def test_recomputation_keeps_less_and_selective_repeats_one_product():
    kept, products = zip(
        *(_kept_and_products(r) for r in ("none", "selective", "full")), strict=True
    )
    none, selective, full = kept
    print(f"\nbytes kept: none {none:,}, selective {selective:,}, full {full:,}")
    assert selective < 0.75 * none and full < 0.5 * selective
    # A layer has 4 products and 1 attention. Selective repeats the one into the MLP; full repeats
    # all, also the last product, which its function makes before it can say what it keeps.
    assert products[1] == products[0] + 4 and products[2] == products[0] + 4 * 5


@BOTH
def test_packed_documents_do_not_see_each_other(config):
    model = _model(config)
    tokens, _ = _batch(B=2, T=17)
    lengths = [5, 1, 11, 17]  # three documents in the first row, one in the second
    bounds = torch.tensor([0, 5, 6, 17, 34], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 17)
    packed = model(tokens, positions=positions, cu_seqlens=bounds).flatten(0, 1)
    for document, logits in zip(
        tokens.flatten().split(lengths), packed.split(lengths), strict=True
    ):
        _assert_close(logits, model(document[None])[0])


def test_given_positions_are_used():
    model = _model(STARCODER)
    tokens, _ = _batch()
    positions = torch.arange(17).expand(2, 17)
    assert torch.equal(model(tokens), model(tokens, positions=positions))
    assert not torch.equal(model(tokens), model(tokens, positions=positions + 3))
    model = _model(STARCODER2)  # only differences count for RoPE
    _assert_close(model(tokens, positions=positions + 3), model(tokens))


@BOTH
def test_cache_in_pieces_equals_one_pass(config):
    model = _model(config)
    tokens, _ = _batch(T=24)
    with torch.no_grad():
        expected = model(tokens)
        for pieces in ([1] * 24, [10, 1, 1, 12], [23, 1], [24]):
            cache = KVCache(config, 2, 24, torch.float32, "cpu")
            parts = [model(part, cache=cache) for part in tokens.split(pieces, dim=1)]
            _assert_close(torch.cat(parts, 1), expected)
            assert cache.lengths.tolist() == [24, 24]


@BOTH
def test_cache_rows_of_different_lengths(config):
    """Right-padded prompts, cut back, then grown at their own lengths; a row is left out."""
    model = _model(config)
    tokens, _ = _batch(B=3, T=20)
    lengths = torch.tensor([9, 4, 12])
    padded = tokens[:, :12].clone()
    padded[0, 9:], padded[1, 4:] = 50, 51  # must not matter
    with torch.no_grad():
        expected = [model(tokens[b : b + 1])[0] for b in range(3)]
        cache = KVCache(config, 3, 20, torch.float32, "cpu")
        model(padded, cache=cache)
        cache.truncate(lengths)
        rows = [0, 1, 2]
        for step in range(6):
            if step == 3:
                cache.keep([0, 2])
                rows = [0, 2]
            at = [int(lengths[b]) + step for b in rows]
            new = torch.stack([tokens[b, t : t + 1] for b, t in zip(rows, at, strict=True)])
            logits = model(new, cache=cache)
            for row, (b, t) in enumerate(zip(rows, at, strict=True)):
                _assert_close(logits[row, 0], expected[b][t])
        assert cache.lengths.tolist() == [15, 18]


def test_one_key_value_head_needs_less_cache():
    few, all_heads = (
        KVCache(ModelConfig(**{**vars(STARCODER), "num_kv_heads": g}), 1, 8, torch.float32, "cpu")
        for g in (1, 6)
    )
    assert 6 * few.k.nbytes == all_heads.k.nbytes and few.v.nbytes == few.k.nbytes


def test_full_cache_is_an_error():
    model = _model(STARCODER2)
    cache = KVCache(STARCODER2, 2, 18, torch.float32, "cpu")
    tokens, _ = _batch()
    with torch.no_grad():
        model(tokens, cache=cache)
        model(tokens[:, :1], cache=cache)
        with pytest.raises(ValueError, match=r"at most 18 tokens in a row, got 18 \+ 1"):
            model(tokens[:, :1], cache=cache)
        with pytest.raises(ValueError, match="a cache of 1 rows, got 2"):
            model(tokens[:1, :1], cache=cache)


def test_errors_name_what_is_wrong():
    model = _model(STARCODER)
    tokens, targets = _batch()
    long = torch.zeros(1, 41, dtype=torch.int64)
    bounds = torch.tensor([0, 34], dtype=torch.int32)
    cache = KVCache(STARCODER, 2, 18, torch.float32, "cpu")
    for message, call in {
        r"at most 40 learned positions, got 41": lambda: model(long),
        r"tokens with dtype .*int64.*, got torch.int32": lambda: model(tokens.int()),
        r"tokens \(B, T\), got \(17,\)": lambda: model(tokens[0]),
        r"targets \(B, T\) = \(2, 17\), got \(2, 16\)": lambda: model(tokens, targets[:, 1:]),
        r"targets with dtype": lambda: model(tokens, targets.int()),
        r"reduction in": lambda: model(tokens, targets, reduction="median"),
        r"no cache with targets": lambda: model(tokens, targets, cache=cache),
        r"no cu_seqlens with a cache": lambda: model(tokens, cu_seqlens=bounds, cache=cache),
        r"positions \(B, T\)": lambda: model(tokens, positions=tokens[:1]),
        r"positions with dtype": lambda: model(tokens, positions=tokens.int()),
    }.items():
        with pytest.raises(ValueError, match="^model: expected " + message):
            call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"positions": "alibi"}, "positions: expected rope or learned"),
        ({"activation": "relu"}, "activation: expected gelu_tanh or gelu_erf"),
        ({"width": 50}, "width: expected a multiple of 6 heads"),
        ({"width": 54}, "width: expected an even head width for RoPE, got 9"),
        ({"num_kv_heads": 4}, "num_kv_heads: expected a divisor of num_heads = 6, got 4"),
        ({"window": 0}, "window: expected at least 1 visible key"),
        ({"recompute": "some"}, "recompute: expected one of"),
    ],
)
def test_contradictions_are_refused(change, message):
    change = dict(change)
    recompute = change.pop("recompute", "none")
    config = ModelConfig(**{**vars(STARCODER2), **change})
    with pytest.raises(ValueError, match=message):
        build_model(config, device="meta", recompute=recompute)


@BOTH
def test_exactly_one_kind_of_positions_and_of_head(config):
    names = {name for name, _ in build_model(config, device="meta").named_parameters()}
    assert ("position_embedding.weight" in names) == (config.positions == "learned")
    assert ("head.weight" in names) == (not config.tie_embeddings)


@BOTH
def test_compiles_without_a_graph_break(config):
    model = _model(config)
    tokens, targets = _batch()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(tokens, targets), model(tokens, targets)
    loss.backward()
    expected.backward()
    _assert_close(loss.detach(), expected.detach())
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert q.grad is not None, name
        _assert_close(q.grad, p.grad)


@pytest.mark.parametrize("kernels", ["auto", "torch", "reference"])
def test_gradients_in_bf16_do_not_lose_sums_over_many_tokens(kernels):
    """4,096 tokens, 53 of them different, against float64 with the same rounded weights.

    The bar is not eager bf16 code: that loses half of a norm's bias and of a frequent token's row.
    """
    exact = _model(STARCODER2, dtype=torch.float64, kernels="reference")
    rounded = _model(STARCODER2, dtype=torch.bfloat16, kernels=kernels)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
            p.copy_(q)
    tokens, targets = _batch(B=128, T=32)
    for model in (exact, rounded):
        model(tokens, targets).backward()
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert (q.grad - p.grad).norm() < 0.03 * p.grad.norm(), name


def _projections(model):
    """(parent, name, module) of every product and norm within the layers."""
    for layer in model.layers:
        for parent in (layer, layer.attention, layer.mlp):
            for name, module in parent.named_children():
                if not list(module.children()):
                    yield parent, name, module


@BOTH
def test_products_and_norms_that_are_watched_or_replaced_run(config):
    """Ops that span modules give way; the loss and the gradients stay what they were."""

    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *inputs):
            self.calls += 1
            return self.inner(*inputs)

    def run(model):
        loss = model(*_batch())
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    model = _model(config, dtype=torch.float64)
    expected = run(model)
    watched, seen = copy.deepcopy(model), []
    for _, _, module in _projections(watched):
        module.register_forward_hook(lambda module, inputs, output: seen.append(id(module)))
    assert len(list(_projections(watched))) == 6 * config.num_layers
    found = run(watched)
    assert sorted(seen) == sorted(id(module) for _, _, module in _projections(watched))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for parent, name, module in list(_projections(model)):
        setattr(parent, name, Adapter(module))
    torch.testing.assert_close(run(model), expected, rtol=1e-10, atol=1e-12)
    assert all(m.calls == 1 for m in model.modules() if isinstance(m, Adapter))
