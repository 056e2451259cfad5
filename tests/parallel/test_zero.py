"""Data parallelism in buckets and the stages of ZeRO: gloo processes, float64, through the loop.

The reference is the run of one process: its losses, weights and moments. Not covered: NCCL, and
how much time the overlap saves.
"""

import dataclasses
import itertools
import json
import signal
from pathlib import Path

import pytest
import torch
from runs import assert_same_state, changed, counts, losses, stopping, torchrun
from safetensors.torch import load_file

from stellarator import settings
from stellarator.config import OptimConfig, ParallelConfig
from stellarator.model import build_model
from stellarator.parallel.buckets import DataParallel
from stellarator.parallel.layout import Part
from stellarator.parallel.mesh import Axis
from stellarator.parallel.tensor import TensorParallel
from stellarator.sizes import bytes_per_parameter
from stellarator.train.loop import Trainer
from stellarator.train.optimizer import FlatOptimizer

BUCKET_MIB = 0.03  # five buckets of the tiny model in float64
# name: layout, recompute; more are in benchmarks/parity.py. Each of these groups is run by the same
# processes, one after the other.
TWO = {
    "zero 0": ({"zero": 0}, "none"),
    "zero 1": ({"zero": 1}, "none"),
    "zero 2": ({"zero": 2}, "none"),
    "zero 3": ({"zero": 3}, "none"),
    "zero 3 selective": ({"zero": 3}, "selective"),
    "zero 3 full": ({"zero": 3}, "full"),
    "zero 3 full to the end": ({"zero": 3}, "full"),  # of a layer, not of what is needed of it
}
FOUR = {
    "zero 1 sp": ({"zero": 1, "tp": 2, "sp": True}, "none"),
    "zero 3 sp": ({"zero": 3, "tp": 2, "sp": True}, "none"),
    "zero 3 of four": ({"zero": 3}, "none"),
    "zero 1 pp": ({"zero": 1, "pp": 2, "schedule": "zb_h1"}, "none"),
    "zero 0 cp": ({"zero": 0, "cp": 4}, "selective"),
    "zero 2 cp": ({"zero": 2, "cp": 2}, "none"),
    "zero 3 cp": ({"zero": 3, "cp": 2, "cp_form": "gather"}, "full"),
    "zero 1 cp pp": ({"zero": 1, "cp": 2, "pp": 2, "schedule": "zb_h1"}, "none"),
}
# One process group for all runs: to make another one in the same processes may hang.
ONE_BY_ONE = """
import sys
from torch.utils.checkpoint import set_checkpoint_early_stop
from stellarator import settings
from stellarator.config import RunConfig
from stellarator.parallel import mesh
from stellarator.train.loop import Trainer

stop, meshes = mesh.Mesh.stop, []
mesh.Mesh.stop = lambda self: meshes.append(self)
for path in open(sys.argv[1]).read().splitlines():
    with set_checkpoint_early_stop("to the end" not in path):
        Trainer(settings.resolve(RunConfig(), path)).run()
for each in meshes:
    stop(each)
"""


@pytest.fixture
def small(tiny_config, tmp_path):
    """Three steps in float64; two micro-batches on each of two ranks."""
    config = changed(
        tiny_config,
        train={"precision": "fp64", "steps": 3, "micro_batch_size": 2, "eval_interval": 2},
        checkpoint={"interval": 2},
    )
    return dataclasses.replace(config, folder=str(tmp_path / "one"))


def run_all(cases, one, tmp_path, processes: int, program: str = ONE_BY_ONE) -> dict:
    """The configuration of each case, which so many processes have run."""
    found, paths = {}, []
    for name, (layout, recompute, *optim) in cases.items():
        config = changed(one, train={"recompute": recompute}, optim=optim[0] if optim else {})
        parallel = ParallelConfig(bucket_mib=BUCKET_MIB, **layout)
        folder = str(tmp_path / name)
        found[name] = dataclasses.replace(config, parallel=parallel, folder=folder)
        paths.append(tmp_path / f"{name}.toml")
        paths[-1].write_text(settings.to_toml(found[name]))
    listed, script = tmp_path / "configs.txt", tmp_path / "program.py"
    listed.write_text("\n".join(map(str, paths)))
    script.write_text(program)
    done = torchrun(one, tmp_path, processes, [str(script), str(listed)])
    assert done.returncode == 0, done.stderr[:6000]
    return found


@pytest.mark.parametrize("processes,cases,model", [(2, TWO, {}), (4, FOUR, {"vocab_size": 421})])
def test_ranks_follow_one_process(processes, cases, model, small, tmp_path):
    one = changed(small, model=model)
    Trainer(one).run()
    for name, many in run_all(cases, one, tmp_path, processes).items():
        assert losses(many.folder) == pytest.approx(losses(one.folder), rel=1e-12, abs=0), name
        assert counts(many.folder, processes) == pytest.approx(counts(one.folder, 1), rel=1e-9)
        assert_same_state(one.folder, many.folder, 3)


# What each rank of a run holds, what it has done in which order, and whose gradient it calls wrong.
LOOKING = """
import contextlib, json, pathlib, sys
import torch
from stellarator import settings
from stellarator.config import RunConfig
from stellarator.parallel import mesh
from stellarator.parallel.buckets import Bucket
from stellarator.parallel.pipeline.execute import Executor
from stellarator.parallel.reducer import Reducer
from stellarator.train.loop import Trainer

events, gathered = [], []

def watched(kind, method):
    def watching(self, *arguments):
        events.append(kind)
        return method(self, *arguments)
    return watching

def ended(self, *arguments, run=Executor.run):
    found = run(self, *arguments)
    events.append("end")
    return found

Executor.run = ended
Reducer._made = watched("gradient", Reducer._made)
Bucket.begin_reduce = watched("begin", Bucket.begin_reduce)
for name in ("begin_sum_", "begin_scatter_sum_"):
    begin = getattr(mesh.Axis, name)
    setattr(mesh.Axis, name, lambda self, x, tag, begin=begin: Waiting(self, begin(self, x, tag)))

class Waiting:
    def __init__(self, axis, work):
        self.axis, self.work = axis, work

    def wait(self):
        if self.axis.size > 1:
            events.append("wait")
        self.work.wait()

def held(optimizer):
    kinds = ("full_params", "params", "full_grads", "grads")
    tensors = [getattr(b, kind) for b in optimizer.buckets for kind in kinds]
    tensors += [x for b in optimizer.buckets for kind in b.states.tensors().values() for x in kind]
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({s._cdata: s.nbytes() for s in storages}.values())

class Looking(Trainer):
    def _build(self):
        super()._build()
        if "plain" in self.config.folder:
            self.optimizer.last_micro_batch = lambda last: contextlib.nullcontext()
        buckets = self.optimizer.buckets
        def look(*_):
            gathered.append(sum(b.full_params.untyped_storage().nbytes() > 0 for b in buckets))
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(look)
        for layer in self.model.layers:
            layer.register_forward_pre_hook(look)

    def _one_step(self):
        events.clear(), gathered.clear()
        return super()._one_step()

    def look(self):
        optimizer = self.optimizer
        found = {"held": held(optimizer), "events": list(events), "buckets": len(optimizer.buckets)}
        found["gathered"] = max(gathered)
        optimizer.zero_grad()
        bucket = optimizer.buckets[0]
        if self.mesh.dp.rank == 1:
            bucket.grads[0] = float("nan")
        optimizer.complete_grads()
        found["not_finite"] = optimizer.not_finite(self.whole)
        found["at"] = [n for n in bucket.names if bucket.own_view(bucket.grads, n).isnan().any()]
        path = pathlib.Path(self.folder, f"rank{self.mesh.dp.rank}.json")
        path.write_text(json.dumps(found))

stop, meshes = mesh.Mesh.stop, []
mesh.Mesh.stop = lambda self: meshes.append(self)
for path in open(sys.argv[1]).read().splitlines():
    trainer = Looking(settings.resolve(RunConfig(), path))
    trainer.run()
    trainer.look()
for each in meshes:
    stop(each)
"""
RANDOM = {"weights": "stochastic", "moments": "8bit"}
LOOKED_AT = {
    "zero 0": ({"zero": 0}, "none"),
    "zero 1": ({"zero": 1}, "none"),
    "zero 2": ({"zero": 2}, "none"),
    "zero 3": ({"zero": 3}, "none"),
    "zero 3 again": ({"zero": 3}, "none"),
    "zero 1 plain": ({"zero": 1}, "none"),
    "zero 1 rounded": ({"zero": 1, "reduce_dtype": "bf16"}, "none"),
    "zero 1 staged": ({"zero": 1, "schedule": "interleaved", "stages_per_rank": 2}, "none"),
    "zero 0 apart": ({"zero": 0, "schedule": "zb_v", "stages_per_rank": 2}, "none"),
    "zero 0 remainders": ({"zero": 0}, "none", {"weights": "remainders"}),
    "zero 1 remainders": ({"zero": 1}, "none", {"weights": "remainders"}),
    "zero 0 random": ({"zero": 0}, "none", RANDOM),
    "zero 1 random": ({"zero": 1}, "none", RANDOM),
    "zero 3 random": ({"zero": 3}, "none", RANDOM),
}


def test_stages_hold_less_overlap_and_make_the_same_bits(tiny_config, tmp_path):
    """In bf16 with masters. One micro-batch and no clipping: every sum is the same then."""
    config = changed(
        tiny_config,
        train={"steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "eval_interval": None},
        data={"validation": ()},
        model={"num_layers": 5},
        optim={"clip_norm": None, "warmup_steps": 1},
    )
    runs = run_all(LOOKED_AT, config, tmp_path, 2, LOOKING)
    tensors = Path("checkpoints", "step_00000002", "tensors.safetensors")
    states = {name: load_file(Path(run.folder, tensors)) for name, run in runs.items()}
    count = sum(t.numel() for n, t in states["zero 0"].items() if n.startswith("master."))
    for name, (layout, _, *optim) in LOOKED_AT.items():
        kind = name[6:].strip() if optim else ""
        same = [
            torch.equal(t, states[f"zero 0 {kind}".strip()][n]) for n, t in states[name].items()
        ]
        if "stages_per_rank" not in layout:  # what goes to the next stage is rounded once more
            assert all(same) == (name != "zero 1 rounded"), name
        ranks = [json.loads(Path(runs[name].folder, f"rank{r}.json").read_text()) for r in (0, 1)]
        for seen in ranks:
            kinds = optim[0] if optim else {}
            expected = count * bytes_per_parameter("bf16", layout["zero"], 2, **kinds)
            # Parts are padded, and small tensors keep moments in fp32.
            assert 1.0 <= seen["held"] / expected < (1.25 if "moments" in kinds else 1.1), name
            check_order(name, layout["zero"], seen["events"], seen["buckets"])
            if layout["zero"] == 3:  # what is no layer, the layer in use, the one on its way
                assert seen["buckets"] == 6 and seen["gathered"] == 3
            assert len(seen["not_finite"]) == 1 and seen["not_finite"] == ranks[1]["at"], name


def check_order(name: str, stage: int, events: list[str], num_buckets: int) -> None:
    """Of one step: sums begin before the last gradient is made, and nobody waits for them.

    In stages: before the last action is done. Both times all but that of the tied embedding. Where
    they hold copies two are in flight, and older ones are waited for.
    """
    last = len(events) - 1 - events[::-1].index("end" if "end" in events else "gradient")
    before = events[:last]
    assert events.count("begin") == events.count("wait") == num_buckets > 3, name
    assert before.count("begin") == (0 if "plain" in name else num_buckets - 1), name
    if stage < 2:
        assert before.count("wait") == (num_buckets - 3 if "rounded" in name else 0), name


def test_a_checkpoint_goes_from_one_stage_to_another(small, tmp_path):
    """Two steps of ZeRO 3 on two processes, then two of one; and the other way round."""
    small = changed(small, train={"steps": 4, "eval_interval": None}, data={"validation": ()})
    Trainer(small).run()
    sharded = dataclasses.replace(small, parallel=ParallelConfig(zero=3))

    class Stopping(Trainer):
        def _one_step(self):
            done = super()._one_step()
            if done.step == 2:
                self.stop.received = signal.SIGTERM
            return done

    def one(config, stopped):
        assert (Stopping if stopped else Trainer)(config).run()["step"] == (2 if stopped else 4)

    def two(config, stopped):
        program = str(stopping(tmp_path, 2 if stopped else 5))
        done = torchrun(dataclasses.replace(sharded, folder=config.folder), tmp_path, 2, (program,))
        assert done.returncode == 0, done.stderr[:6000]

    for first, then in ((one, two), (two, one)):
        config = dataclasses.replace(small, folder=str(tmp_path / first.__name__) + "_first")
        first(config, True)
        then(config, False)
        assert losses(config.folder) == pytest.approx(losses(small.folder), rel=1e-12, abs=0)
        assert_same_state(small.folder, config.folder, 4)


PARTS = (Part((0,), last=False), Part((1,), first=False))  # of a tied model in a pipeline
UNEVEN = {"vocab_size": 421}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "tp,parts,model", [(1, [None], {}), (2, [None], UNEVEN), (4, [None], {}), (2, PARTS, UNEVEN)]
)
def test_parts_make_up_each_element_once(stage, tp, parts, model, tiny_config):
    """Of states, to the bit, and of what the gradient norm counts; on three replicas."""
    config = dataclasses.replace(tiny_config.model, **model)
    whole = build_model(config, dtype=torch.float64).named_parameters()
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in whole}
    for value in values.values():
        value.view(-1)[::3] = -0.0
    found = {name: torch.zeros_like(value).view(torch.int64) for name, value in values.items()}
    squares = 0.0
    replicas = range(3 if stage else 1)  # without ZeRO they are alike
    for tp_rank, rank, part in itertools.product(range(tp), replicas, parts):
        ranks = TensorParallel(Axis("tp", tp_rank, tp), tp > 1)
        held = build_model(config, dtype=torch.float64, tp=ranks, part=part)
        data = DataParallel(Axis("dp", rank, 3), stage, bucket_bytes=20_000)
        optimizer = FlatOptimizer(held, OptimConfig(), tp=ranks, data=data)
        shards = optimizer.shards()
        for name, tensor in optimizer.state().items():
            kind, name = name.split(".", 1)
            shard = shards[f"{kind}.{name}"]
            if kind == "exp_avg":
                shard.take_(tensor, values[name])
                mine = shard.counted_into_(torch.zeros_like(values[name]), tensor)
                found[name] += mine.view(torch.int64)
        for bucket in optimizer.buckets:
            bucket.grads.copy_(bucket.states.exp_avg.wide)
            squares += sum(float(x.square().sum()) for x in bucket.counted_grads())
    for name, value in values.items():
        assert torch.equal(found[name], value.view(torch.int64)), name
    assert squares == pytest.approx(
        sum(float(v.square().sum()) for v in values.values()), rel=1e-12
    )


def test_ranks_of_a_pipeline_name_the_same_gradients(tiny_config):
    """They hold other parameters; what one has said before stands for the collective here."""
    said = []

    class Saying(Axis):
        def max_(self, x, tag):
            said.append(x.clone())
            return x.copy_(torch.stack(said).amax(0))

    names = [name for name, _ in build_model(tiny_config.model).named_parameters()]
    for rank, part in enumerate(PARTS):
        model = build_model(tiny_config.model, part=part)
        optimizer = FlatOptimizer(model, OptimConfig(), pp=Saying("pp", rank, 2))
        if rank == 0:
            optimizer.grad("layers.0.mlp.up.weight")[0, 0] = float("inf")
        assert optimizer.not_finite(names) == ["layers.0.mlp.up.weight"]
    assert len(said) == 2 and not said[1].any()


def test_a_gradient_after_its_reduction_is_an_error(tiny_config):
    """No sum is needed to see it: another process is not there."""

    class Silent(Axis):
        def begin_sum_(self, x, tag):
            return torch.futures.Future()

    model = build_model(tiny_config.model)
    optimizer = FlatOptimizer(model, OptimConfig(), data=DataParallel(Silent("dp", 0, 2)))
    tokens = torch.arange(40).view(2, 20)
    with optimizer.last_micro_batch():
        model(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    with pytest.raises(AssertionError, match="comes after its reduction began"):
        model(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
