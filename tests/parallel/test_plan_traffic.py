"""What `stellarator plan` says a GPU sends, beside what the ranks of a run have sent.

One step of a small model for each case, through the loop, on four gloo processes; every call of a
collective is written down where `Group` makes it. Not covered: NCCL, and how long it takes.
"""

import dataclasses
import math
import os

import pytest
from ranks import on_ranks
from runs import changed

from stellarator import settings
from stellarator.config import ParallelConfig, RunConfig
from stellarator.parallel.collectives import Group
from stellarator.parallel.journal import NOWHERE, Tag
from stellarator.parallel.mesh import Mesh
from stellarator.plan import make_case, traffic_of
from stellarator.train.loop import Trainer

# name: layout, train, model. The rest of the four ranks is data-parallel.
CASES = {
    **{
        f"tp 2{' sp' * sp} {recompute}": ({"tp": 2, "sp": sp}, {"recompute": recompute}, {})
        for sp in (False, True)
        for recompute in ("none", "selective", "full")
    },
    "tp 4 sp, shared keys": ({"tp": 4, "sp": True}, {}, {"num_kv_heads": 2}),
    "tp 2 zero 2, shared keys": ({"tp": 2, "zero": 2}, {}, {"num_kv_heads": 1}),
    "zero 0": ({"zero": 0}, {}, {}),
    "zero 2": ({"zero": 2}, {}, {"tie_embeddings": False}),
    "zero 3": ({"zero": 3}, {}, {}),
    "zero 3 tp 2 sp full": ({"zero": 3, "tp": 2, "sp": True}, {"recompute": "full"}, {}),
    "zero 1 bf16": ({"zero": 1, "reduce_dtype": "bf16"}, {}, {}),
    "pp 2 tp 2 sp": ({"pp": 2, "tp": 2, "sp": True}, {"recompute": "selective"}, {}),
    "pp 2 zb_h1": ({"pp": 2, "schedule": "zb_h1", "zero": 1}, {}, {"tie_embeddings": False}),
    "cp 2": ({"cp": 2}, {"recompute": "selective"}, {"window": None}),
    "cp 4 gather": ({"cp": 4, "cp_form": "gather"}, {"recompute": "full"}, {}),
}
# The beginning of what a collective is for: the purpose in a plan.
PURPOSES = {
    "loss": "softmax of the split vocabulary",
    "shared gradients": "shared gradients",
    "gradients of": "sum of gradients",
    "parameters of": "parameters from their parts",
    "input of stage": "states and their gradients",
    "gradient of stage": "states and their gradients",
    "gradient of the tied": "gradient of the tied embedding",
    "attention": "keys, values, their gradients",
}
# Numbers and agreements.
NOT_PLANNED = ("gradient norm", "totals", "whether", "first contact", "stop request")
NOT_PLANNED += ("work times", "barrier", "checkpoint", "token shards", "links")


def purpose(tag) -> str | None:
    """In a plan; None: it is not planned."""
    tag = tag if isinstance(tag, Tag) else Tag(tag)
    if tag.op.startswith(("enter", "leave")):
        return "embedding and head" if tag.layer == NOWHERE else "results of products"
    found = [PURPOSES[key] for key in PURPOSES if tag.op.startswith(key)]
    assert found or tag.op.startswith(NOT_PLANNED), tag
    return found[0] if found else None


def sends(rank: int, paths: list) -> list[dict]:
    """{purpose: [bytes, calls]} that this rank sends in one step of each configuration."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4"}
    found, meshes = [], []
    run, exchange = Group._run, Group.exchange

    def note(tag, num_bytes):
        for_what = purpose(tag)
        if for_what is not None:
            total = found[-1].setdefault(for_what, [0, 0])
            total[0], total[1] = total[0] + num_bytes, total[1] + 1

    def noting_run(self, kind, tag, x, *rest, **options):
        n = self.size
        share = {"all_reduce": 2 * (n - 1) / n, "reduce_scatter": (n - 1) / n, "all_gather": n - 1}
        note(tag, share[kind] * x.nbytes)
        return run(self, kind, tag, x, *rest, **options)

    def noting_exchange(self, out, incoming, tag):
        if out or "attention" in str(tag):
            note(tag, sum(message.tensor.nbytes for message in out))
        return exchange(self, out, incoming, tag)

    Group._run, Group.exchange = noting_run, noting_exchange
    Mesh.stop = lambda self: meshes.append(self)
    Trainer.evaluate = lambda self: 0.0
    Trainer._save = lambda self: None
    for path in paths:
        found.append({})
        Trainer(settings.resolve(RunConfig(), path)).run()
    for mesh in meshes:
        for group in mesh.groups:
            group.process_group = None  # gloo's threads end with the last reference
    return found


def test_a_run_sends_what_its_plan_says(tiny_config, tmp_path):
    """Number of calls and bytes, rank by rank, but for what buckets are padded with.

    Without evaluations and checkpoints. Rows are one document, as in a plan.
    """
    base = changed(
        tiny_config,
        model={"num_layers": 3, "width": 64, "ffn_width": 256, "vocab_size": 512},
        data={"attend_across_documents": True},
        train={"steps": 1, "global_batch_size": 8, "precision": "fp32"},
        optim={"warmup_steps": 0},
    )
    configs, paths = [], []
    for name, (layout, train, model) in CASES.items():
        parallel = ParallelConfig(bucket_mib=0.1, **layout)
        dp = 4 // math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp"))
        train = {**train, "micro_batch_size": 4 // dp}  # two micro-batches
        config = changed(base, train=train, model=model)
        config = dataclasses.replace(config, parallel=parallel, folder=str(tmp_path / name))
        configs.append(config)
        paths.append(tmp_path / f"{name}.toml")
        paths[-1].write_text(settings.to_toml(config))
    ranks = on_ranks(sends, 4, paths)
    wrong = []
    for number, (name, config) in enumerate(zip(CASES, configs, strict=True)):
        case = make_case(config, config.parallel, 4)
        for rank in range(4):
            planned = {
                t.purpose.removesuffix(", in parts"): (t.num_bytes, t.num_messages, t.axis)
                for t in traffic_of(case, case.layout.place(rank)["pp"])
            }
            sent = ranks[rank][number]
            for key in sorted(sent.keys() | planned.keys()):
                num_bytes, num_messages, axis = planned.get(key, (0, 0, ""))
                found, calls = sent.get(key, (0, 0))
                if axis == "cp":  # of a ring it is the mean
                    found = sum(each[number][key][0] for each in ranks) / 4
                padded = pytest.approx(num_bytes, rel=0.03 if axis == "dp" else 1e-9)
                if (found, calls) != (padded, num_messages):
                    wrong.append((name, rank, key, found, calls, num_bytes, num_messages))
    assert not wrong, "\n".join(map(str, wrong))
