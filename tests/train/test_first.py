"""A rank that shares the model makes its own part of it: values, and memory at the start.

References: the whole model; sums of its parameters' bytes. Memory is what torch's allocator gave
out, by its profiler. Not covered: what numpy needs; a GPU.
"""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from stellarator import recipes
from stellarator.config import OptimConfig
from stellarator.model import Transformer, build_model, save_pretrained
from stellarator.parallel.buckets import DataParallel
from stellarator.parallel.layout import Part
from stellarator.parallel.mesh import Axis
from stellarator.parallel.shard import shards_of
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator.parallel.unfilled import without_memory
from stellarator.sizes import bytes_per_parameter
from stellarator.train.first import first_values
from stellarator.train.optimizer import FlatOptimizer
from stellarator.train.resume import RefusedError

TP4, DP16 = TensorParallel(Axis("tp", 1, 4)), DataParallel(Axis("dp", 1, 16), zero=3)
# name: tensor ranks, replicas, part of a pipeline. One process plays one of the ranks.
RANKS = {
    "whole": (ALONE, DataParallel(), None),
    "tp 4": (TP4, DataParallel(), None),
    "zero 3 of 16": (ALONE, DP16, None),
    "tp 4 zero 3 of 16": (TP4, DP16, None),
    "pp 4": (ALONE, DataParallel(), Part((2, 3), first=False, last=False)),
}


@pytest.fixture(scope="module")
def config():
    """Eight layers of 200,000 parameters, an embedding of 65,536."""
    base = recipes.tiny()
    model = dataclasses.replace(
        base.model, num_layers=8, width=128, ffn_width=512, num_kv_heads=4, vocab_size=512
    )
    return dataclasses.replace(base, model=model)


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "released"
    return str(save_pretrained(build_model(config.model, seed=5), path))


def made(config, tp, data, part, dtype=torch.float32) -> tuple[Transformer, FlatOptimizer]:
    """As the loop makes them."""
    model = Transformer(config.model, tp=tp, part=part, device="meta", dtype=torch.float32)
    with first_values(config, resumed=False) as fill:
        without_memory(model, torch.device("cpu"), fill)
        return model, FlatOptimizer(model, OptimConfig(), "auto", dtype, tp, data)


def peak_of(call) -> int:
    """Bytes that torch's allocator has given out at most during a call."""
    gc.collect()  # what calls before have left in circles would count as given back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def started(config, source, folder):
    train = dataclasses.replace(config.train, init_from=folder if source == "folder" else None)
    return dataclasses.replace(config, train=train)


@pytest.mark.parametrize("source", ["seed", "folder"])
@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_never_holds_more_than_its_part_and_one_bucket(rank, source, config, folder):
    """Beside states and gradients: a bucket that is shared out, and one parameter being made."""
    config, (tp, data, part) = started(config, source, folder), RANKS[rank]
    with torch.device("meta"):
        model = Transformer(config.model, tp=tp, part=part)
    sizes = [p.numel() for p in model.parameters()]
    kept = bytes_per_parameter("fp32", data.stage, data.axis.size) * sum(sizes)
    layer = max(sum(p.numel() for p in x.parameters()) for x in model.layers)
    rest = sum(sizes) - sum(p.numel() for x in model.layers for p in x.parameters())
    bucket = 4 * max(layer, rest) if data.stage == 3 else 0
    # The one that is made, as a whole where it comes from a file, regrouped and cut.
    one = 3 * 4 * max(p.numel() for p in build_model(config.model, device="meta").parameters())
    peak = peak_of(lambda: made(config, tp, data, part))
    if source == "folder":  # its file is mapped, which the allocator counts as given out
        peak -= Path(folder, "model.safetensors").stat().st_size
    assert kept < peak < kept + bucket + one + 50_000
    if rank != "whole":  # which is less than the whole model and the part would be
        whole = 4 * sum(p.numel() for p in build_model(config.model, device="meta").parameters())
        assert peak < kept + 0.4 * whole


@pytest.mark.parametrize("source", ["seed", "folder"])
@pytest.mark.parametrize("rank", RANKS)
def test_the_parts_are_those_of_the_whole(rank, source, config, folder):
    config, (tp, data, part) = started(config, source, folder), RANKS[rank]
    whole = build_model(config.model, seed=5 if source == "folder" else config.train.seed)
    whole = dict(whole.named_parameters())
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = made(config, tp, data, part, dtype)
        shards, states = optimizer.shards(), optimizer.state()
        names = [name for name, _ in model.named_parameters()]
        assert set(names) == set(shards_of(model))
        for name in names:
            master = states[f"master.{name}"]
            expected = torch.empty_like(master)
            shards[f"master.{name}"].take_(expected, whole[name].detach())
            assert torch.equal(master, expected)
            if data.stage == 0:
                parameter = dict(model.named_parameters())[name]
                assert parameter.dtype == dtype and torch.equal(parameter, expected.to(dtype))


def test_another_model_in_the_folder_is_refused(config, folder):
    train = dataclasses.replace(config.train, init_from=folder)
    other = dataclasses.replace(config.model, num_layers=7)
    given = dataclasses.replace(config, model=other, train=train)
    with pytest.raises(RefusedError, match="Pass model.num_layers=8"):
        made(given, ALONE, DataParallel(), None)
