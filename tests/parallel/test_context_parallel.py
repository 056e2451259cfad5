"""Context parallelism in the model: gloo processes against one process, in float64.

A model whose tokens are cut gives the losses and, summed over the ranks, the gradients of whole
rows, with planted faults that must be seen. Not covered: NCCL; attention alone (test_context.py);
runs (test_zero.py, test_parity_matrix.py, `python -m benchmarks parity`).
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from stellarator.config import ModelConfig
from stellarator.model import KVCache, build_model
from stellarator.model.dropout import Dropout, Masks
from stellarator.parallel import zigzag
from stellarator.parallel.collectives import Group
from stellarator.parallel.mesh import Axis
from stellarator.parallel.rows import ContextParallel, Cut
from stellarator.parallel.tensor import TensorParallel

pytestmark = pytest.mark.dist
B, T, V = 2, 24, 61
SMALL = ModelConfig(
    vocab_size=V, num_layers=2, width=48, num_heads=6, num_kv_heads=2, ffn_width=80,
    max_positions=32, init_std=0.15, window=7,
)  # fmt: skip
RATES = {"residual_dropout": 0.2, "embedding_dropout": 0.1, "attention_dropout": 0.3}
LEARNED = {"family": "gpt_bigcode", "num_kv_heads": 1, "positions": "learned", "window": None}
DOCUMENTS = (0, 5, 20, 24, 31, 48)
# name: fields of the model, bounds of documents, recompute
MODELS = {
    "documents": ({}, DOCUMENTS, "none"),
    "rows": ({}, None, "none"),
    "learned": (LEARNED | {"tie_embeddings": False}, DOCUMENTS, "none"),
    "learned, rows": (LEARNED, None, "full"),
    "dropout": (RATES, DOCUMENTS, "none"),
    "dropout, rows": (RATES | LEARNED, None, "selective"),
    "selective": ({}, DOCUMENTS, "selective"),
    "full": ({"window": None}, DOCUMENTS, "full"),
}


def rows_of(bounds):
    """tokens, targets (one left out), positions that begin again in each document."""
    g = torch.Generator().manual_seed(4)
    tokens, targets = (torch.randint(V, (B, T), generator=g) for _ in range(2))
    targets[0, 3] = -100
    positions = torch.arange(T).repeat(B)
    for start, end in zip(bounds or (), (bounds or ())[1:], strict=False):
        positions[start:end] = torch.arange(end - start)
    return tokens, targets, positions.view(B, T)


def loss_and_gradients(name: str, cut: Cut | None = None) -> list[torch.Tensor]:
    """Of whole rows, or of the tokens of one rank."""
    fields, bounds, recompute = MODELS[name]
    config = dataclasses.replace(SMALL, **fields)
    model = build_model(config, seed=3, dtype=torch.float64, recompute=recompute)
    rows = rows_of(bounds)
    options = {"dropout": Dropout(77, 1000) if "dropout" in name else None}
    if cut is not None:
        rows, options = map(cut.own, rows), options | {"cut": cut}
    elif bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    tokens, targets, positions = rows
    if bounds is not None:  # else the model makes them
        options["positions"] = positions
    loss = model(tokens, targets, reduction="sum", **options)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


SPOILT = ("documents", "rows", "dropout", "dropout, rows")
FAULTS = {  # and which of these models each of them spoils
    "positions of the part": {"rows", "dropout, rows"},
    "masks of the part": {"dropout", "dropout, rows"},
    "attention dropped as without documents": {"dropout"},
    "neighbouring tokens": set(SPOILT),
}


def plant(fault: str) -> None:
    """Make this process wrong."""
    if fault == "positions of the part":
        Cut.positions = lambda self, device: torch.arange(T // self.plan.size).expand(B, -1)
    elif fault == "masks of the part":
        make = Masks.__init__

        def local(self, dropout, config, shape, device, tp, cut):
            make(self, dropout, config, (B, shape[1] // cut.plan.size), device, tp)
            self.first_token = dropout.first_row * T  # that of attention stays right

        Masks.__init__ = local
    elif fault == "attention dropped as without documents":
        attention = Masks.attention
        Masks.attention = lambda self, layer, packed, head: attention(self, layer, False, head)
    elif fault == "neighbouring tokens":
        Cut.own = lambda self, x: x.chunk(self.plan.size, 1)[self.plan.rank]


def all_models(rank: int, size: int) -> list[dict]:
    """Losses and gradients, summed over the ranks, of all models by each fault."""
    kept = [(owner, dict(vars(owner))) for owner in (Cut, Masks)]
    axis, found = Axis("cp", rank, size, Group(dist.group.WORLD, "cp")), []
    for fault in ("", *FAULTS):
        plant(fault)
        found.append({})
        for name in SPOILT if fault else MODELS:
            fields, bounds, _ = MODELS[name]
            window = dataclasses.replace(SMALL, **fields).window
            for form in ("ring",) if fault else ("ring", "gather"):
                cp = ContextParallel(axis, form, window)
                cut = Cut(zigzag.Plan(rank, size, B, T, window=window), cp.axis.group, form)
                if bounds is not None:
                    cut = cp.cut((B, T), torch.tensor(bounds))
                    assert cut.plan is cp.cut((B, T), torch.tensor(bounds)).plan  # made once
                found[-1][name, form] = [axis.sum_(x, "sum") for x in loss_and_gradients(name, cut)]
        for owner, names in kept:
            for name in ("own", "positions", "attention", "__init__"):
                if name in names:
                    setattr(owner, name, names[name])
    return found


def wrong(found: dict) -> set[str]:
    """The models whose loss or gradients are not those of one process."""
    names = set()
    for (name, _), actual in found.items():
        for a, e in zip(actual, loss_and_gradients(name), strict=True):
            if float((a - e).abs().max()) > 1e-12 * max(1.0, float(e.abs().max())):
                names.add(name)
    return names


def test_ranks_with_parts_of_rows_have_the_gradients_of_whole_rows():
    """All models, by ring and gathered; and each fault spoils those that it concerns, only."""
    right, *results = on_ranks(all_models, 2, 2)[0]
    assert len(right) == 2 * len(MODELS) and wrong(right) == set()
    assert {fault: wrong(x) for fault, x in zip(FAULTS, results, strict=True)} == FAULTS


class Counting(TorchDispatchMode):
    """How often attention is computed."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().startswith("stellarator::flash_attention_forward")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("form", ["ring", "gather"])
def test_selective_recomputation_leaves_attention_alone(form):
    with Counting() as calls:
        loss_and_gradients(
            "selective", Cut(zigzag.Plan(0, 1, B, T, DOCUMENTS, window=7), Group(None, "cp"), form)
        )
    assert calls.count == SMALL.num_layers


@pytest.mark.parametrize("sp", [False, True])
def test_masks_are_those_of_whole_rows_whatever_the_ranks(sp):
    """Every token's key, with tensor ranks that share out tokens, too."""
    config, dropout = dataclasses.replace(SMALL, **RATES), Dropout(77, 1000)
    whole = Masks(dropout, config, (B, T), "cpu")
    keys = whole.rows.view(B, T)
    assert len(set(keys.flatten().tolist())) == B * T
    for cp_rank in range(3):
        cut = Cut(zigzag.Plan(cp_rank, 3, B, T, DOCUMENTS, window=7), Group(None, "cp"))
        parts = []
        for tp_rank in range(2):
            tp = TensorParallel(Axis("tp", tp_rank, 2), sp)
            masks = Masks(dropout, config, (B, T), "cpu", tp, cut)
            parts.append(masks.rows)
            assert masks.attention(1, True, 3) == whole.attention(1, True, 3)
        n = T // 6  # tokens of a chunk: the rank has one from the start, one from the end
        late = (5 - cp_rank) * n
        expected = torch.cat((keys[:, cp_rank * n :][:, :n], keys[:, late : late + n]), 1)
        found = torch.cat(parts) if sp else parts[0]
        assert torch.equal(found, expected.flatten())


def test_what_does_not_fit_is_refused():
    model = build_model(SMALL)
    tokens = torch.zeros(B, T // 2, dtype=torch.int64)
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)

    def cut(**options):
        return Cut(zigzag.Plan(0, 2, B, T, **{"window": 7} | options), Group(None, "cp"))

    cache = KVCache(SMALL, B, T, dtype=torch.float32, device="cpu")
    for options in ({"cu_seqlens": bounds}, {"cache": cache}):
        with pytest.raises(ValueError, match="no cu_seqlens or cache with a cut, got both"):
            model(tokens, cut=cut(), **options)
    for wrong_mask in ({"window": 8}, {"window": None}, {"window": None, "causal": False}):
        with pytest.raises(ValueError, match="expected a causal plan with window 7, got"):
            model(tokens, cut=cut(**wrong_mask))
    with pytest.raises(ValueError, match="tokens"):
        model(torch.zeros(B, T, dtype=torch.int64), cut=cut())
    learned = build_model(dataclasses.replace(SMALL, **LEARNED | {"max_positions": 20}))
    with pytest.raises(ValueError, match="at most 20 learned positions, got 24"):
        learned(tokens, cut=cut(window=None))
