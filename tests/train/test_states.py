"""Narrow weights and moments through the engine: the optimizer, a run, its checkpoints.

References: for remainders fp32 masters, to the bit; for stochastic rounding the op on the whole
parameter, and a closed form of which bits an element has; for moments of 8 bits the run with fp32
ones. The ops themselves are in tests/ops/test_adamw_states.py, ZeRO on processes in
tests/parallel/test_zero.py. Not covered: how well a long run trains with 8 bits.
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stellarator import settings
from stellarator.config import OptimConfig, ParallelConfig
from stellarator.model import build_model
from stellarator.parallel.buckets import DataParallel
from stellarator.parallel.layout import Part
from stellarator.parallel.mesh import Axis
from stellarator.parallel.tensor import TensorParallel
from stellarator.train import kernels
from stellarator.train.loop import Trainer
from stellarator.train.optimizer import FlatOptimizer
from stellarator_kernels import adamw_
from stellarator_kernels.adamw_states import split_master

TENSORS = Path("checkpoints", "step_{:08d}", "tensors.safetensors")


def narrow(config, weights="masters", moments="fp32", **train):
    """The configuration with these kinds; with the update in torch, which has all of them."""
    optim = dataclasses.replace(config.optim, weights=weights, moments=moments)
    train = {"kernels": "torch", "eval_interval": None} | train
    return dataclasses.replace(
        config, optim=optim, train=dataclasses.replace(config.train, **train)
    )


def losses(folder):
    records = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if r["kind"] == "train"]


def saved(folder, step):
    return load_file(str(Path(folder) / str(TENSORS).format(step)))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class AwayFromZero(Trainer):
    """Masters whose parameters are rounded as those of remainders are: ties go away from zero."""

    def _build(self):
        super()._build()
        publish = self.optimizer._publish

        def rounded():
            for bucket in self.optimizer.buckets:
                bucket.params.copy_(split_master(bucket.states.master)[0])
            publish()

        self.optimizer._publish = rounded
        rounded()


def test_remainders_train_as_masters_and_follow_each_other(tiny_config, tmp_path):
    """To the bit: six steps, and three with one and three with the other."""
    folders = {name: str(tmp_path / name) for name in ("masters", "remainders", "both", "back")}
    config = narrow(tiny_config, steps=6)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=()))
    schedule = dataclasses.replace(config.optim, schedule="constant")
    config = dataclasses.replace(config, optim=schedule)

    def run(kind, name, steps=6):
        given = narrow(config, kind, steps=steps)
        made = AwayFromZero if kind == "masters" else Trainer
        trainer = made(dataclasses.replace(given, folder=folders[name]))
        assert trainer.run()["step"] == steps
        return trainer

    run("masters", "masters")
    trainer = run("remainders", "remainders")
    states = trainer.optimizer.buckets[0].states
    assert states.master is None and states.remainder.dtype == torch.int16
    for first, then, name in (("masters", "remainders", "both"), ("remainders", "masters", "back")):
        run(first, name, 3)
        run(then, name)
    for name in ("remainders", "both", "back"):
        assert losses(folders[name]) == losses(folders["masters"]), name
        assert_same(saved(folders[name], 6), saved(folders["masters"], 6))
    log = Path(folders["both"], "log.txt").read_text()
    assert "changed since the checkpoint: optim.weights: masters -> remainders" in log


@pytest.mark.parametrize(
    ("weights", "moments", "precision"),
    [("stochastic", "8bit", "bf16"), ("remainders", "8bit", "bf16"), ("masters", "8bit", "fp32")],
)
def test_a_run_that_goes_on_is_the_run(weights, moments, precision, tiny_config, tmp_path):
    """Four steps at once, and two and two: random bits are those of the step, codes come back."""
    config = narrow(tiny_config, weights, moments, precision=precision, steps=4)
    once = dataclasses.replace(config, folder=str(tmp_path / "once"))
    often = dataclasses.replace(once.checkpoint, interval=2)
    Trainer(dataclasses.replace(once, checkpoint=often)).run()
    first = Path(once.folder, "checkpoints", "step_00000002")
    then = dataclasses.replace(
        config,
        folder=str(tmp_path / "then"),
        checkpoint=dataclasses.replace(config.checkpoint, resume=str(first)),
    )
    Trainer(then).run()
    assert_same(saved(then.folder, 4), saved(once.folder, 4))
    assert losses(then.folder) == losses(once.folder)[2:]
    seeded = narrow(then, weights, moments, precision=precision, steps=4, seed=9)
    seeded = dataclasses.replace(seeded, folder=str(tmp_path / "seeded"))
    Trainer(seeded).run()  # the same weights after two steps, other random bits
    a, b = saved(seeded.folder, 4), saved(once.folder, 4)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_fifty_steps_of_8_bits_follow_fp32_moments(tiny_config, tmp_path):
    """Every loss within 1 % of what it falls by; 0.2 % was measured."""
    config = narrow(tiny_config, steps=50, micro_batch_size=8)
    runs = {}
    for moments in ("fp32", "8bit"):
        folder = str(tmp_path / moments)
        Trainer(dataclasses.replace(narrow(config, "masters", moments), folder=folder)).run()
        runs[moments] = torch.tensor(losses(folder))
    fallen = runs["fp32"][0] - runs["fp32"].min()
    apart = (runs["8bit"] - runs["fp32"]).abs().max()
    assert fallen > 1 and 0 < apart < 0.01 * fallen


@torch.no_grad()
def test_all_ranks_begin_with_the_same_parameters(tiny_config):
    """Also those of other ranks' parts, where rounding to even would show: in ties."""
    model = build_model(tiny_config.model, dtype=torch.float32, seed=3)
    for parameter in model.parameters():
        parameter.view(torch.int32).bitwise_and_(~0xFFFF).bitwise_or_(0x8000)
    exact = {name: p.clone() for name, p in model.named_parameters()}
    data = DataParallel(Axis("dp", 1, 3), 1)
    optim = OptimConfig(weights="remainders")
    state = FlatOptimizer(model, optim, dtype=torch.bfloat16, data=data).state()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, split_master(exact[name])[0]), name
    assert any((state[f"master.{name}"].view(torch.int32) & 0x8000).any() for name in exact)


# Random bits.

PARTS = (Part((0,), last=False), Part((1,), first=False))
LAYOUTS = [(1, 0, [None]), (1, 3, [None]), (2, 1, PARTS), (4, 2, [None])]


@pytest.mark.parametrize("tp,stage,parts", LAYOUTS)
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_every_element_has_the_bits_of_its_place_in_the_whole(
    moments, tp, stage, parts, tiny_config
):
    """Whatever the layout: number i of the sequence that begins at the name, for element i."""
    config = dataclasses.replace(tiny_config.model, vocab_size=421, width=64)
    sizes = {n: p.numel() for n, p in build_model(config).named_parameters()}
    seen = {name: torch.zeros(n, dtype=torch.bool) for name, n in sizes.items()}
    replicas = range(3 if stage else 1)
    for tp_rank, rank, part in itertools.product(range(tp), replicas, parts):
        ranks = TensorParallel(Axis("tp", tp_rank, tp), tp > 1)
        held = build_model(config, dtype=torch.bfloat16, tp=ranks, part=part)
        data = DataParallel(Axis("dp", rank, 3), stage, bucket_bytes=20_000)
        optim = OptimConfig(weights="stochastic", moments=moments)
        for bucket in FlatOptimizer(held, optim, tp=ranks, data=data).buckets:
            marked = torch.zeros(bucket.own.stop - bucket.own.start, dtype=torch.int64)
            for run in bucket.runs():
                index = torch.arange(run.run.stop - run.run.start)
                if run.index_rows is not None:
                    offset, width, stride = run.index_rows
                    index = (index + offset) // width * stride + (index + offset) % width
                assert run.coded == (run.decay > 0 and moments == "8bit")
                assert not run.coded or run.run.start % 256 == 0
                marked[run.run] = run.first_index + index
            for name in bucket.names:
                digest = hashlib.sha256(name.encode()).digest()
                base = int.from_bytes(digest[:8], "little") // 4
                index = bucket.own_view(marked, name).reshape(-1) - base
                # What a part takes of a whole whose elements are their own numbers.
                whole = torch.arange(sizes[name]).view(bucket.shards[name].shape)
                expected = bucket.own_view(marked, name).clone()
                bucket.part_of(name).take_(expected, whole)
                assert torch.equal(index, expected.reshape(-1)), name
                seen[name][index] = True
    assert all(x.all() for x in seen.values())


def test_a_step_is_the_op_on_whole_parameters(tiny_config):
    """Stochastic with 8 bits, on the three parts of ZeRO 1 and without; gradients are given."""
    optim = OptimConfig(weights="stochastic", moments="8bit", clip_norm=None)
    generator = torch.Generator().manual_seed(5)
    grads = {
        name: torch.randn(p.shape, generator=generator)
        for name, p in build_model(tiny_config.model).named_parameters()
    }
    found = []
    for stage, ranks in ((0, 1), (1, 3)):
        params = {name: torch.zeros_like(grad) for name, grad in grads.items()}
        for rank in range(ranks):
            model = build_model(tiny_config.model, dtype=torch.bfloat16, seed=3)
            data = DataParallel(Axis("dp", rank, ranks), stage, bucket_bytes=20_000)
            optimizer = FlatOptimizer(model, optim, "torch", data=data, seed=11)
            optimizer._publish = lambda: None  # the others are not there
            for step in (1, 2):
                for name, grad in grads.items():
                    bucket = next(b for b in optimizer.buckets if name in b.spans)
                    bucket.view(bucket.full_grads, name).copy_(grad * step)
                optimizer.step(step, 1e-3, 1, torch.tensor(1.0))
            for name, tensor in optimizer.state().items():
                kind, name = name.split(".", 1)
                if kind == "master":
                    shard = optimizer.shards()[f"master.{name}"]
                    params[name] += shard.counted_into_(torch.zeros_like(params[name]), tensor)
        found.append(params)
    assert_same(*found)
    name = "layers.1.mlp.down.weight"
    digest = hashlib.sha256(name.encode()).digest()
    weight = dict(build_model(tiny_config.model, dtype=torch.bfloat16, seed=3).named_parameters())
    weight = weight[name].detach().reshape(-1).clone()
    codes = [torch.zeros(weight.numel(), dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(-(-weight.numel() // 256)) for _ in range(2)]
    for step in (1, 2):
        adamw_(
            [weight], [grads[name].reshape(-1) * step], codes[:1], codes[1:], lr=1e-3,
            beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps, weight_decay=optim.weight_decay,
            step=step, exp_avg_scales=scales[:1], exp_avg_sq_scales=scales[1:], seed=11,
            first_indices=[int.from_bytes(digest[:8], "little") // 4], impl="reference",
        )  # fmt: skip
    expected = found[0][name].reshape(-1)
    assert (weight.float() != expected).sum() <= 2  # another order of the same operations


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "bf16"}, "optim.weights: expected one of masters, remainders, stochastic"),
        ({"moments": "int8"}, "optim.moments: expected one of fp32, 8bit, got 'int8'"),
        ({"weights": "remainders", "precision": "fp32"}, "remainders go with train.precision=bf16"),
        ({"weights": "stochastic", "precision": "fp64"}, "stochastic go with train.precision=bf16"),
        ({"moments": "8bit", "precision": "fp64"}, "8bit goes with train.precision=bf16 or fp32"),
    ],
)
def test_kinds_that_do_not_go_together(changes, message, tiny_config):
    problems = settings.check(narrow(tiny_config, **changes))
    assert len(problems) == 1 and message in problems[0]


def test_shared_heads_begin_with_a_group(tiny_config):
    """The heads of 8 of a width of 32 are groups of 256 on each rank; those of 24 wide are not."""
    parallel = ParallelConfig(tp=2)
    right = dataclasses.replace(narrow(tiny_config, moments="8bit"), parallel=parallel)
    assert not settings.check_layout(right, 2)
    heads = {"width": 24, "num_heads": 3, "num_kv_heads": 3}
    wrong = dataclasses.replace(
        right, parallel=ParallelConfig(tp=3), model=dataclasses.replace(right.model, **heads)
    )
    problems = settings.check_layout(wrong, 3)
    assert any("group of 256 moments on every rank, got width 24" in p for p in problems)


def test_the_update_in_cpp_has_masters_only(tiny_config):
    wide = dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, width=64))
    kernels.check(narrow(wide, kernels="cpu"), torch.device("cpu"), torch.bfloat16)
    config = narrow(wide, "remainders", kernels="cpu")
    with pytest.raises(ValueError, match="adamw_: remainders, stochastic rounding and moments of"):
        kernels.check(config, torch.device("cpu"), torch.bfloat16)
