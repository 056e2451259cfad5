"""The loop's promises: signals, the lock, steps that are not finite, accumulation, recomputation.

References: the healthy run of the same configuration, torch.optim.AdamW, TensorBoard's own reader,
learning rates worked out by hand. Not covered: several ranks (test_data_parallel.py), kills
(test_resume.py), CUDA.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stellarator import settings
from stellarator.config import OptimConfig
from stellarator.data.shards import Shard
from stellarator.model import build_model
from stellarator.train import flops, loop, metrics
from stellarator.train.loop import Trainer
from stellarator.train.optimizer import FlatOptimizer
from stellarator.train.resume import TrainingError
from stellarator.train.signals import folder_lock

POISONED = "layers.1.mlp.up.weight"


def with_(config, section: str, **changes):
    """The configuration with values of one section changed."""
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **changes)}
    )


def records(folder, kind: str = "train") -> list[dict]:
    """What metrics.jsonl holds, read strictly: NaN is not JSON."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [r for r in found if r["kind"] == kind]


def values(folder, key: str) -> list[float]:
    return [r[key] for r in records(folder)]


def saved(folder, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "checkpoints", f"step_{step:08d}", "tensors.safetensors"))


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class Signalled(Trainer):
    """Receives `signals` one after the other, right after step 3."""

    signals = ()

    def _one_step(self):
        done = super()._one_step()
        for number in self.signals if done.step == 3 else ():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return done


class Poisoned(Trainer):
    """The gradients of a step, here the third, have NaN for one parameter."""

    poisoned = 3

    def _build(self):
        super()._build()
        complete = self.optimizer.complete_grads

        def completing():
            complete()
            if self.step + 1 == self.poisoned:
                self.optimizer.grad(POISONED).mul_(float("nan"))

        self.optimizer.complete_grads = completing


# Signals and the lock.


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([signal.SIGINT], "interrupted"),
        ([signal.SIGUSR1], "preempted"),
        ([signal.SIGUSR2], "preempted"),
        ([signal.SIGTERM, signal.SIGTERM], "preempted"),  # torchrun passes on what it also gets
        ([signal.SIGUSR1, signal.SIGTERM], "preempted"),
        ([signal.SIGHUP], "preempted"),
    ],
)
def test_signals_save_and_leave(tiny_config, numbers, expected):
    before = [signal.getsignal(number) for number in numbers]
    trainer = Signalled(tiny_config)
    trainer.signals = numbers
    result = trainer.run()
    assert (result["status"], result["step"]) == (expected, 3)
    status = json.loads(Path(tiny_config.folder, "status.json").read_text())
    assert (status["status"], status["step"]) == (expected, 3)
    assert_equal(saved(tiny_config.folder, 3), trainer.optimizer.state())
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_terminal_that_closes_does_not_stop_a_run_under_nohup(tiny_config):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = Signalled(tiny_config)
        trainer.signals = (signal.SIGHUP,)
        assert trainer.run()["status"] == "done"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_a_terminal_that_is_gone_costs_its_lines_only(tiny_config, tmp_path, monkeypatch, number):
    class Gone(io.TextIOWrapper):
        def flush(self):
            raise OSError(number, "gone")

    config = with_(tiny_config, "train", steps=3)
    with open(tmp_path / "out", "wb") as out:
        monkeypatch.setattr(sys, "stdout", Gone(out))
        assert Trainer(config).run()["status"] == "done"
        assert os.readlink(f"/proc/self/fd/{out.fileno()}") == os.devnull
        monkeypatch.undo()
    assert "done at step 3" in Path(config.folder, "log.txt").read_text()


@pytest.mark.parametrize("method", ["_open_data", "_find_checkpoint", "_make_model", "_resume"])
@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([signal.SIGTERM] * 2, "preempted"), ([signal.SIGINT], "interrupted")],
)
def test_a_signal_before_the_first_step_leaves_at_once(tiny_config, method, numbers, expected):
    """There is nothing to save, and making a large model takes minutes."""
    reached = []

    def slow(self):
        for number in numbers:
            os.kill(os.getpid(), number)
        reached.append(time.sleep(0.01))

    result = type("Slow", (Trainer,), {method: slow})(tiny_config).run()
    assert (result["status"], result["step"], reached) == (expected, 0, [])
    status = json.loads(Path(tiny_config.folder, "status.json").read_text())
    assert (status["status"], status["reason"]) == (expected, "stopped before the first step")
    assert not Path(tiny_config.folder, "checkpoints").exists()
    assert Trainer(with_(tiny_config, "train", steps=3)).run()["status"] == "done"


def test_a_signal_whose_exception_is_lost_is_found_before_the_first_step(tiny_config):
    class Careless(Trainer):
        def _make_model(self):
            with contextlib.suppress(BaseException):  # as ctypes does with errors in callbacks
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            return super()._make_model()

        def _resume(self):
            raise AssertionError("it had been told to stop")

    assert Careless(tiny_config).run()["status"] == "preempted"


def test_a_second_ctrl_c_does_not_wait_for_the_step(tiny_config):
    trainer = Signalled(tiny_config)
    trainer.signals = (signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    status = json.loads(Path(tiny_config.folder, "status.json").read_text())
    assert (status["status"], status["reason"]) == ("failed", "KeyboardInterrupt")


HOLDER = """
import sys, time
from pathlib import Path
from stellarator.train.signals import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_its_holder_is_gone(tiny_config):
    command = [sys.executable, "-c", HOLDER, tiny_config.folder]
    config = with_(tiny_config, "train", steps=3)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            for _ in range(2):  # the first refusal neither takes nor breaks the lock
                with pytest.raises(RuntimeError, match="expected a folder of its own") as refused:
                    Trainer(config).run()
                assert f"in use by process {holder.pid} on " in str(refused.value)
            assert os.listdir(config.folder) == [".lock"]  # and no status over that of the holder
        finally:
            holder.kill()
    assert holder.returncode == -signal.SIGKILL
    assert Trainer(config).run()["status"] == "done"
    with folder_lock(Path(config.folder)):  # free again after a run, too
        pass


def test_a_folder_that_cannot_be_written_is_named(tiny_config):
    """A file that must not grow stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cases = {tiny_config.folder: "File too large", "/proc/run": "No such file or directory"}
    for folder, reason in cases.items():
        config = dataclasses.replace(tiny_config, folder=folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            with pytest.raises(RuntimeError, match=f"^{folder}: expected .*, got: {reason}. Free"):
                Trainer(config).run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Steps that are not finite.


@pytest.fixture
def healthy(tiny_config, tmp_path):
    """(configuration that keeps every checkpoint, folder of its run without a fault)."""
    config = with_(with_(tiny_config, "train", steps=6), "checkpoint", interval=1, keep=None)
    whole = dataclasses.replace(config, folder=str(tmp_path / "healthy"))
    Trainer(whole).run()
    return config, whole.folder


def test_nan_stops_the_run_before_anything_is_changed(healthy):
    config, whole = healthy
    trainer = Poisoned(config)
    with pytest.raises(TrainingError, match="step 3: expected a finite loss and gradient") as error:
        trainer.run()
    assert f"not finite: {POISONED} (1 in all)" in str(error.value)
    status = json.loads(Path(config.folder, "status.json").read_text())
    assert (status["status"], status["step"], status["reason"]) == ("failed", 2, str(error.value))
    assert_equal(trainer.optimizer.state(), saved(config.folder, 2))
    assert_equal(trainer.optimizer.state(), saved(whole, 2))
    assert Trainer(config).run()["status"] == "done"  # the fault is gone: as if it never was
    assert_equal(saved(config.folder, 6), saved(whole, 6))
    assert values(config.folder, "loss") == values(whole, "loss")


def test_nan_at_a_step_without_a_checkpoint_saves_one(tiny_config):
    trainer = Poisoned(tiny_config)
    with pytest.raises(TrainingError, match="The weights of step 2 are saved"):
        trainer.run()
    assert os.listdir(Path(tiny_config.folder, "checkpoints")).count("step_00000002") == 1
    assert_equal(trainer.optimizer.state(), saved(tiny_config.folder, 2))
    assert all(torch.isfinite(t).all() for t in saved(tiny_config.folder, 2).values())


class PoisonedLate(Poisoned):
    poisoned = 6


def test_the_way_out_of_weights_that_are_spoilt(tiny_config, tmp_path):
    """Older checkpoints stay, and what the message says works."""
    config = with_(tiny_config, "checkpoint", interval=2, keep=2)
    with pytest.raises(TrainingError) as error:
        PoisonedLate(config).run()
    folder = Path(config.folder, "checkpoints")
    names = sorted(path.name for path in folder.glob("step_*"))
    assert names == ["step_00000002", "step_00000004", "step_00000005"]
    found = re.search(r"older ones \((checkpoint\.resume=\S+) and another", str(error.value))
    other = [found[1], f"folder={tmp_path / 'other'}"]
    trainer = Trainer(settings.resolve(config, None, other))
    assert trainer.run()["status"] == "done"
    assert [r["step"] for r in records(tmp_path / "other")] == list(range(5, 13))
    with pytest.raises(TrainingError, match="the cause: begin in a new `folder`"):
        PoisonedLate(dataclasses.replace(tiny_config, folder=str(tmp_path / "third"))).run()


def test_nan_is_skipped_on_request(healthy, capfd):
    config, whole = healthy
    config = with_(config, "train", on_nonfinite="skip")
    result = Poisoned(config).run()
    assert (result["status"], result["step"]) == ("done", 6)
    assert values(config.folder, "skipped") == [False, False, True, False, False, False]
    assert_equal(saved(config.folder, 3), saved(config.folder, 2))
    assert not torch.equal(
        saved(config.folder, 4)[f"master.{POISONED}"], saved(config.folder, 3)[f"master.{POISONED}"]
    )
    assert values(config.folder, "loss")[:3] == values(whole, "loss")[:3]
    assert values(config.folder, "tokens") == values(whole, "tokens")  # the same batches
    assert all(np.isfinite(values(config.folder, "loss")))
    assert all(torch.isfinite(t).all() for t in saved(config.folder, 6).values())
    assert "update skipped" in capfd.readouterr().err


class Replayed(Poisoned):
    """Keeps the gradient and the learning rate of every update."""

    def _build(self):
        super()._build()
        self.initial = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.updates, update = [], self.optimizer.step

        def keep(step, lr, num_targets, norm):
            (bucket,) = self.optimizer.buckets
            mean = {n: bucket.view(bucket.grads, n) / num_targets for n in bucket.names}
            self.updates.append((lr, mean))
            update(step, lr, num_targets, norm)

        self.optimizer.step = keep


def test_a_skipped_step_is_no_update_for_the_bias_correction(tiny_config):
    """torch.optim.AdamW, which counts its own updates, makes the same weights of the gradients."""
    config = with_(tiny_config, "train", steps=6, precision="fp64", on_nonfinite="skip")
    trainer = Replayed(config)
    trainer.run()
    lrs = [r["lr"] for r in records(config.folder) if not r["skipped"]]
    assert len(lrs) == 5 and lrs == [lr for lr, _ in trainer.updates]  # of the steps, not updates
    named = {n: torch.nn.Parameter(p) for n, p in trainer.initial.items()}
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2]},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optim = config.optim
    peer = torch.optim.AdamW(
        groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    for lr, gradients in trainer.updates:
        for name, parameter in named.items():
            parameter.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(named.values(), optim.clip_norm)
        for group in peer.param_groups:
            group["lr"] = lr
        peer.step()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-10, atol=1e-13, msg=name)


def test_skipped_steps_are_remembered_over_a_resume(healthy, tmp_path):
    """Stopped right after the skipped step, and resumed by a trainer that never saw the fault."""

    class Stopped(Poisoned, Signalled):
        signals = (signal.SIGTERM,)

    config = with_(healthy[0], "train", on_nonfinite="skip")
    Poisoned(config).run()
    broken = dataclasses.replace(config, folder=str(tmp_path / "broken"))
    assert Stopped(broken).run()["step"] == 3
    resumed = Trainer(broken)
    assert resumed.run()["status"] == "done" and resumed.progress.skipped == 1
    assert_equal(saved(broken.folder, 6), saved(config.folder, 6))
    assert values(broken.folder, "loss") == values(config.folder, "loss")


# What must not change the numbers.


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_recomputation_changes_no_bit(tiny_config, tmp_path, precision, recompute):
    config = with_(tiny_config, "train", steps=6, precision=precision)
    Trainer(config).run()
    other = with_(config, "train", recompute=recompute)
    other = dataclasses.replace(other, folder=str(tmp_path / "recomputed"))
    trainer = Trainer(other)
    trainer.run()
    assert trainer.model.recompute == recompute
    for key in ("loss", "grad_norm"):
        assert values(config.folder, key) == values(other.folder, key)
    assert_equal(saved(config.folder, 6), saved(other.folder, 6))


def test_micro_batches_add_up_to_the_batch(tiny_config, tmp_path):
    """In float64, on micro-batches whose numbers of targets differ."""
    config = with_(tiny_config, "train", steps=6, precision="fp64", micro_batch_size=8)
    Trainer(config).run()
    other = with_(config, "train", micro_batch_size=2)
    other = dataclasses.replace(other, folder=str(tmp_path / "accumulated"))
    trainer = Trainer(other)
    trainer.run()
    counts = [[b.num_targets for b in trainer.batches.micro_batches(step)] for step in range(6)]
    assert all(len(c) == 4 and len(set(c)) > 1 for c in counts)
    assert values(other.folder, "tokens") == [sum(c) for c in counts]
    for key in ("loss", "grad_norm"):
        expected = values(config.folder, key)
        assert values(other.folder, key) == pytest.approx(expected, rel=1e-12, abs=0)
    a, b = saved(config.folder, 6), saved(other.folder, 6)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-10, atol=1e-14)


# What a run follows and tells.


def test_waiting_for_data_is_told(tiny_config):
    """Every row takes 30 ms, in a thread a step ahead: nearly all of a step is waiting."""

    class Slow(Trainer):
        def _build(self):
            super()._build()
            row = self.batches.dataset.row

            def slow(index):
                time.sleep(0.03)
                return row(index)

            self.batches.dataset.row = slow

    config = with_(with_(tiny_config, "train", steps=4), "data", validation=())
    Slow(config).run()
    found = records(config.folder)
    assert all(0.1 < r["data_wait"] < 1.0 for r in found), [r["data_wait"] for r in found]
    for r in found:  # two clocks around the same call
        waited_ms = r["data_wait"] * r["step_ms"]
        assert waited_ms == pytest.approx(r["time_ms"]["data"], rel=0.1, abs=20.0)


def test_where_files_begin_is_kept_beside_the_training_shard(tiny_config, tiny_corpus, tmp_path):
    data = shutil.copytree(tiny_corpus, tmp_path / "data")
    prefixes = {"train": (str(data / "train"),), "validation": (str(data / "validation"),)}
    (data / "train.segments").unlink(missing_ok=True)
    config = with_(with_(tiny_config, "data", **prefixes), "train", steps=3)
    Trainer(config).run()
    assert [path.name for path in data.glob("*.segments")] == ["train.segments"]
    again = dataclasses.replace(config, folder=str(tmp_path / "again"))
    Trainer(again).run()
    assert values(again.folder, "loss") == values(config.folder, "loss")


def test_wsd_run_follows_its_schedule(tiny_config):
    config = with_(tiny_config, "optim", lr=4e-3, min_lr=0.0, schedule="wsd", decay_steps=4)
    Trainer(config).run()  # 12 steps: 2 of warm-up, 6 flat, 4 down to zero
    expected = [2e-3, *[4e-3] * 7, 3e-3, 2e-3, 1e-3, 0.0]
    assert values(config.folder, "lr") == pytest.approx(expected, rel=1e-12, abs=1e-18)
    losses = values(config.folder, "loss")
    assert losses[-1] < losses[0] - 0.5
    first, last = (r["loss"] for r in records(config.folder, "eval"))
    assert last < first - 0.5


def test_the_configuration_is_replaced_in_one_step(tiny_config):
    """A second name of the old file still has all of the old content: it was not written over."""
    config = with_(tiny_config, "train", steps=3)
    Trainer(config).run()
    written = Path(config.folder, "config.toml")
    before = written.read_text()
    os.link(written, Path(config.folder, "old.toml"))
    Trainer(with_(config, "train", steps=4)).run()
    assert Path(config.folder, "old.toml").read_text() == before == settings.to_toml(config)
    assert written.read_text() == before.replace("\nsteps = 3\n", "\nsteps = 4\n")


def test_tensorboard_reads_the_metrics(tiny_config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = with_(with_(tiny_config, "metrics", tensorboard=True), "train", steps=5)
    Trainer(config).run()
    folder = Path(config.folder, "tensorboard")
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    board = EventAccumulator(str(folder))
    board.Reload()
    names = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr", "mfu": "mfu"}
    for tag, key in names.items():  # stored as float32
        found = [(e.step, e.value) for e in board.Scalars(f"train/{tag}")]
        expected = [(r["step"], float(np.float32(r[key]))) for r in records(config.folder)]
        assert found == expected and len(found) == 5
    found = [(e.step, e.value) for e in board.Scalars("eval/loss")]
    expected = records(config.folder, "eval")
    assert found == [(r["step"], float(np.float32(r["loss"]))) for r in expected]
    assert [step for step, _ in found] == [0, 5]


def test_evaluation_rows_are_the_documents_as_they_are(tiny_config):
    """All training text is transformed; what is evaluated is the shard, in order, without FIM."""
    fim = dataclasses.replace(tiny_config.data.fim, rate=1.0, fragment_rate=1.0)
    config = with_(with_(tiny_config, "data", fim=fim), "train", steps=3)
    trainer = Trainer(config)
    trainer.run()
    t = trainer.tokenizer
    sentinels = torch.tensor([t.fim_prefix, t.fim_middle, t.fim_suffix])
    for batch in trainer.batches.micro_batches(0):
        assert torch.isin(batch.tokens, sentinels).any()
    seen = 0
    for batch in trainer.validation.evaluation():
        assert not torch.isin(batch.tokens, sentinels).any()
        assert not torch.isin(batch.targets, sentinels).any()
        seen += batch.num_targets
    dataset = trainer.validation.dataset
    rows = [dataset.row(k) for k in range(dataset.rows_per_epoch)]
    shard = Shard(config.data.validation[0])
    documents = np.concatenate([shard[k] for k in range(len(shard))])
    assert np.concatenate([row.tokens[: row.length] for row in rows]).tolist() == documents.tolist()
    assert seen == len(documents) - sum(len(row.starts) for row in rows) > 500


def test_evaluation_is_the_mean_over_the_documents(tiny_config):
    """In float64; each document on its own, from logits, without batches or bounds."""
    config = with_(tiny_config, "train", steps=3, precision="fp64", eval_batches=1000)
    trainer = Trainer(config)
    trainer.run()
    dataset, total, count = trainer.validation.dataset, 0.0, 0
    for k in range(dataset.rows_per_epoch):
        row = dataset.row(k)
        for part in np.split(row.tokens[: row.length], row.starts[1:]):
            tokens = torch.from_numpy(part)
            with torch.no_grad():
                logits = trainer.model(tokens[None, :-1]) if len(tokens) > 1 else None
            if logits is not None:
                total += float(torch.nn.functional.cross_entropy(
                    logits[0].double(), tokens[1:], reduction="sum"
                ))  # fmt: skip
                count += len(tokens) - 1
    last = records(config.folder, "eval")[-1]
    assert last["step"] == 3 and last["tokens"] == count
    assert last["loss"] == pytest.approx(total / count, rel=1e-6)


def test_the_phases_of_a_step_are_those_of_the_report_and_make_up_the_step(tiny_config):
    from stellarator.train.report import _PHASES

    Trainer(tiny_config).run()
    for r in records(tiny_config.folder):
        assert list(r["time_ms"]) == ["data", "forward", "backward", "reduce", "optimizer"]
        assert r["time_ms"].keys() == _PHASES.keys()
        assert sum(r["time_ms"].values()) <= r["step_ms"]
    found = records(tiny_config.folder)
    whole = sum(r["step_ms"] for r in found)
    assert sum(sum(r["time_ms"].values()) for r in found) > 0.7 * whole


def test_speed_and_mfu_are_those_of_the_batch(tiny_config):
    config = with_(tiny_config, "metrics", peak_tflops=0.5)
    trainer = Trainer(config)
    trainer.run()
    for r in records(config.folder):
        batches = list(trainer.batches.micro_batches(r["step"] - 1))
        lengths = [np.diff(b.cu_seqlens.numpy()).tolist() for b in batches]
        needed = sum(flops.batch_flops(config.model, each) for each in lengths)
        seconds = r["step_ms"] / 1e3
        assert r["mfu"] * 0.5e12 * seconds == pytest.approx(needed, rel=1e-9)
        assert r["tokens"] == sum(b.num_targets for b in batches)
        assert r["tokens_per_second"] * seconds == pytest.approx(r["tokens"], rel=1e-9)


def test_the_time_that_is_left_counts_the_steps_of_this_start(tiny_config, monkeypatch):
    """Every step takes 10 s of a clock that nothing else moves; the second start takes 20 s."""

    class Slow(Signalled):
        seconds = 10

        def _one_step(self):
            clock[0] += self.seconds
            return super()._one_step()

    clock = [1000.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    trainer = Slow(tiny_config)
    trainer.signals = (signal.SIGTERM,)
    trainer.run()
    trainer = Slow(tiny_config)
    trainer.seconds = 20
    trainer.run()
    lines = Path(tiny_config.folder, "log.txt").read_text().splitlines()
    left = [line.rpartition(" eta ")[2] for line in lines if line.startswith("step ")]
    expected = [10 * (12 - k) for k in (1, 2, 3)] + [20 * (12 - k) for k in range(4, 13)]
    assert left == [metrics.duration(seconds) for seconds in expected]


# The optimizer.


def test_updates_are_those_of_torch_with_decay_on_matrices_alone(tiny_config):
    """Three steps with a large decay, all in float64; the second is clipped, the others are not."""
    config = OptimConfig(beta1=0.8, beta2=0.9, weight_decay=0.5, clip_norm=30.0)
    ours, peer = (build_model(tiny_config.model, dtype=torch.float64, seed=3) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases start at zero, where decay would not show
        for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
            a.copy_(torch.randn(a.shape, generator=generator, dtype=a.dtype))
            b.copy_(a)
    named = dict(peer.named_parameters())
    no_decay = [n for n in named if n.endswith(".bias") or "norm" in n]
    assert set(no_decay) == {n for n, p in named.items() if p.dim() < 2} and len(no_decay) == 18
    groups = [
        {"params": [named[n] for n in named if n not in no_decay], "weight_decay": 0.5},
        {"params": [named[n] for n in no_decay], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=config.eps)
    optimizer = FlatOptimizer(ours, config)
    for step, (lr, scale) in enumerate([(0.1, 0.1), (0.2, 10.0), (0.05, 0.1)], start=1):
        optimizer.zero_grad()
        for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
            b.grad = scale * torch.randn(b.shape, generator=generator, dtype=b.dtype)
            a.grad.add_(7 * b.grad)  # of a sum over 7 target tokens
        norm = optimizer.norm(7)
        expected = torch.nn.utils.clip_grad_norm_(peer.parameters(), 30.0)
        assert float(norm) == pytest.approx(float(expected), rel=1e-13)
        assert (float(norm) > 30.0) == (step == 2)
        optimizer.step(step, lr, 7, norm)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        for (name, a), b in zip(ours.named_parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=name)
