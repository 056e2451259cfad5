"""A run that was stopped, or killed at any moment, ends like one that was not.

The reference is the unbroken run; equality is to the bit, with FIM on. Not covered: another number
of ranks.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stellarator import settings
from stellarator.data.shards import ShardError, check_tokenizer
from stellarator.train import checkpoint, resume
from stellarator.train.checkpoint import CheckpointError
from stellarator.train.loop import Trainer
from stellarator.train.resume import TrainingError


class StoppedAfter(Trainer):
    """Receives a signal right after step `stop_at`."""

    stop_at = 0

    def _one_step(self):
        done = super()._one_step()
        if done.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return done


def train_records(folder) -> list[tuple]:
    """Everything of the training records that must repeat."""
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "loss_z", "grad_norm", "lr", "tokens_total")
    return [tuple(r[k] for k in keys) for r in records if r["kind"] == "train"]


def weights(folder, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "checkpoints", f"step_{step:08d}", "tensors.safetensors"))


def assert_same_run(one, other, steps: int) -> None:
    assert train_records(one) == train_records(other)
    a, b = weights(one, steps), weights(other, steps)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def unbroken(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, folder=str(tmp_path / "unbroken"))
    assert Trainer(config).run()["status"] == "done"
    return config.folder


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stopped_at_several_steps_and_resumed(tiny_config, tmp_path, precision):
    train = dataclasses.replace(tiny_config.train, precision=precision)
    config = dataclasses.replace(tiny_config, train=train, folder=str(tmp_path / "whole"))
    Trainer(config).run()
    for stop_at in (1, 5, 11):
        broken = dataclasses.replace(config, folder=str(tmp_path / f"stopped{stop_at}"))
        trainer = StoppedAfter(broken)
        trainer.stop_at = stop_at
        result = trainer.run()
        assert (result["status"], result["step"]) == ("preempted", stop_at)
        status = json.loads(Path(broken.folder, "status.json").read_text())
        assert status["status"] == "preempted"
        assert Trainer(broken).run()["status"] == "done"
        assert_same_run(config.folder, broken.folder, 12)


def test_killed_at_any_moment_and_resumed(tiny_config, unbroken, tmp_path):
    config = dataclasses.replace(
        tiny_config,
        folder=str(tmp_path / "killed"),
        checkpoint=dataclasses.replace(tiny_config.checkpoint, interval=1, keep=None),
    )
    path = tmp_path / "run.toml"
    path.write_text(settings.to_toml(config))
    command = [sys.executable, "-m", "stellarator.train", "--config", str(path)]
    checkpoints = Path(config.folder, "checkpoints")
    for kills, wanted in enumerate((1, 4, 8)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while len(list(checkpoints.glob("step_*"))) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(0.004 * kills)
        process.kill()
        process.wait()
    Trainer(config).run()
    assert_same_run(unbroken, config.folder, 12)


def test_a_damaged_newest_checkpoint_is_passed_over(tiny_config, unbroken, tmp_path, capfd):
    config = dataclasses.replace(
        tiny_config,
        folder=str(tmp_path / "damaged"),
        checkpoint=dataclasses.replace(tiny_config.checkpoint, interval=4),
    )
    trainer = StoppedAfter(config)
    trainer.stop_at = 9
    trainer.run()
    newest = Path(config.folder, "checkpoints", "step_00000009", "tensors.safetensors")
    newest.write_bytes(newest.read_bytes()[:-5])
    Trainer(config).run()
    assert "passed over a damaged checkpoint" in capfd.readouterr().err
    assert_same_run(unbroken, config.folder, 12)


def test_another_configuration_is_refused_with_both_values(tiny_config, tmp_path):
    Trainer(tiny_config).run()
    for section, change, part in (
        ("model", {"width": 64}, "model.width: 32 there, 64 here"),
        ("data", {"seed": 5}, "data.seed: 1234 there, 5 here"),
        ("train", {"global_batch_size": 16}, "train.global_batch_size: 8 there, 16 here"),
    ):
        other = dataclasses.replace(getattr(tiny_config, section), **change)
        config = dataclasses.replace(tiny_config, **{section: other})
        with pytest.raises(TrainingError, match=part):
            Trainer(config).run()
    none = dataclasses.replace(tiny_config.checkpoint, resume="none")
    with pytest.raises(TrainingError, match="expected no checkpoints"):
        Trainer(dataclasses.replace(tiny_config, checkpoint=none)).run()
    absent = dataclasses.replace(tiny_config.checkpoint, resume=str(tmp_path / "absent"))
    new = dataclasses.replace(tiny_config, checkpoint=absent, folder=str(tmp_path / "new"))
    with pytest.raises(TrainingError, match="absent: expected a checkpoint, got nothing there"):
        Trainer(new).run()


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(tiny_config, tmp_path):
    before = dataclasses.asdict(tiny_config)
    del before["data"]["fim"]["drop_empty_texts"], before["metrics"]["peak_tflops"]
    state = {"config": before, "data_fingerprint": "x"}
    found = checkpoint.Checkpoint(tmp_path, {"state": state})
    said = resume.compare(found, tiny_config, "x")
    assert said == ["changed since the checkpoint: metrics.peak_tflops: None -> 1.0"]
    fim = dataclasses.replace(tiny_config.data.fim, drop_empty_texts=True)
    data = dataclasses.replace(tiny_config.data, fim=fim)
    with pytest.raises(TrainingError, match="drop_empty_texts: False there, True here"):
        resume.compare(found, dataclasses.replace(tiny_config, data=data), "x")


def test_a_longer_run_continues_with_the_same_batches(tiny_config, tmp_path):
    constant = dataclasses.replace(tiny_config.optim, schedule="constant")
    config = dataclasses.replace(tiny_config, optim=constant, folder=str(tmp_path / "short"))
    Trainer(config).run()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=16))
    Trainer(longer).run()
    whole = dataclasses.replace(longer, folder=str(tmp_path / "long"))
    Trainer(whole).run()
    assert_same_run(longer.folder, whole.folder, 16)


def test_a_run_starts_from_exported_weights_whatever_their_dropout(tiny_config, tmp_path):
    """The first evaluation and the first step have the losses of the released weights."""
    from stellarator.model import build_model, save_pretrained

    released = dataclasses.replace(tiny_config.model, residual_dropout=0.1, init_std=0.1)
    source = build_model(released, dtype=torch.float32, seed=9)
    save_pretrained(source, tmp_path / "released")
    start = dataclasses.replace(
        tiny_config.train, init_from=str(tmp_path / "released"), precision="fp32", steps=3
    )
    config = dataclasses.replace(tiny_config, train=start)
    trainer = Trainer(config)
    trainer.run()

    def loss_of_source(batches) -> float:
        total = count = 0
        for batch in batches:
            bounds = {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens}
            total += float(source(batch.tokens, batch.targets, **bounds, reduction="sum"))
            count += batch.num_targets
        return total / count

    records = [json.loads(line) for line in Path(config.folder, "metrics.jsonl").open()]
    rows = start.eval_batches * start.global_batch_size
    with torch.no_grad():
        evaluated = loss_of_source(trainer.validation.evaluation(rows))
        stepped = loss_of_source(trainer.batches.micro_batches(0))
    assert records[0]["loss"] == pytest.approx(evaluated, rel=1e-6)
    assert train_records(config.folder)[0][1] == pytest.approx(stepped, rel=1e-6)
    assert abs(stepped - math.log(420)) > 0.1  # what fresh weights would give
    wrong = dataclasses.replace(tiny_config.model, window=8)
    config = dataclasses.replace(config, model=wrong, folder=str(tmp_path / "wrong"))
    with pytest.raises(TrainingError, match=r"Pass model\.window=24"):
        Trainer(config).run()


def test_a_run_goes_on_when_the_weights_it_began_with_are_gone(tiny_config, tmp_path):
    from stellarator.model import build_model, save_pretrained

    source = build_model(tiny_config.model, dtype=torch.float32, seed=9)
    save_pretrained(source, tmp_path / "released")
    start = dataclasses.replace(tiny_config.train, init_from=str(tmp_path / "released"))
    whole = dataclasses.replace(tiny_config, train=start)
    Trainer(whole).run()
    broken = dataclasses.replace(whole, folder=str(tmp_path / "broken"))
    trainer = StoppedAfter(broken)
    trainer.stop_at = 5
    trainer.run()
    shutil.rmtree(tmp_path / "released")
    assert Trainer(broken).run()["status"] == "done"
    assert_same_run(whole.folder, broken.folder, 12)


def test_a_step_that_was_saved_before_is_saved_again(tiny_config, unbroken, tmp_path):
    """The last checkpoint is damaged; the run that repairs it ends with a good one."""
    config = dataclasses.replace(
        tiny_config,
        folder=str(tmp_path / "repaired"),
        checkpoint=dataclasses.replace(tiny_config.checkpoint, interval=4),
    )
    Trainer(config).run()
    newest = Path(config.folder, "checkpoints", "step_00000012", "tensors.safetensors")
    newest.write_bytes(newest.read_bytes()[:-5])
    Trainer(config).run()
    assert_same_run(unbroken, config.folder, 12)
    assert len(list(newest.parent.parent.glob("damaged-*"))) == 1


def test_a_checkpoint_that_was_being_replaced_is_the_newest(tiny_config, unbroken, tmp_path, capfd):
    config = dataclasses.replace(
        tiny_config,
        folder=str(tmp_path / "killed"),
        checkpoint=dataclasses.replace(tiny_config.checkpoint, interval=4),
    )
    trainer = StoppedAfter(config)
    trainer.stop_at = 10
    trainer.run()
    newest = Path(config.folder, "checkpoints", "step_00000010")
    newest.rename(newest.parent / ".tmp-old-00000010-0123abcd")
    Trainer(config).run()
    assert f"resumed {newest} at step 10" in capfd.readouterr().out
    assert_same_run(unbroken, config.folder, 12)


def test_an_older_checkpoint_is_not_continued_beside_newer_ones(tiny_config, tmp_path):
    config = dataclasses.replace(
        tiny_config, checkpoint=dataclasses.replace(tiny_config.checkpoint, interval=4)
    )
    Trainer(config).run()
    older = str(Path(config.folder, "checkpoints", "step_00000004"))
    again = dataclasses.replace(config.checkpoint, resume=older)
    with pytest.raises(TrainingError, match="expected no checkpoints after step_00000004"):
        Trainer(dataclasses.replace(config, checkpoint=again)).run()
    elsewhere = dataclasses.replace(config, checkpoint=again, folder=str(tmp_path / "other"))
    Trainer(elsewhere).run()
    assert_weights(config.folder, elsewhere.folder, 12)


def test_a_run_that_began_at_another_checkpoint_goes_on_from_its_own(tiny_config, tmp_path, capfd):
    """The same command after a stop: what was trained since, and its records, stay as they are."""
    config = dataclasses.replace(
        tiny_config, checkpoint=dataclasses.replace(tiny_config.checkpoint, interval=4)
    )
    Trainer(config).run()
    first = str(Path(config.folder, "checkpoints", "step_00000004"))
    again = dataclasses.replace(config.checkpoint, resume=first)
    branch = dataclasses.replace(config, checkpoint=again, folder=str(tmp_path / "branch"))
    trainer = StoppedAfter(branch)
    trainer.stop_at = 7
    assert trainer.run()["step"] == 7
    metrics = Path(branch.folder, "metrics.jsonl")
    before = metrics.read_text()
    capfd.readouterr()
    assert Trainer(branch).run()["status"] == "done"
    output = capfd.readouterr()
    own = Path(branch.folder, "checkpoints", "step_00000007")
    assert f"resumed {own} at step 7" in output.out
    assert f"{first} was for the first start" in output.err
    assert metrics.read_text().startswith(before)
    assert [r[0] for r in train_records(branch.folder)] == list(range(5, 13))
    assert_weights(config.folder, branch.folder, 12)
    for damaged in own.parent.glob("step_*/manifest.json"):
        damaged.write_text("{")
    with pytest.raises(TrainingError, match="expected a checkpoint that can be read"):
        Trainer(branch).run()  # not from the beginning again, over its own records


def assert_weights(one, other, step: int) -> None:
    a, b = weights(one, step), weights(other, step)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_unreadable_checkpoints_do_not_start_the_run_again(tiny_config):
    Trainer(tiny_config).run()
    before = train_records(tiny_config.folder)
    manifest = Path(tiny_config.folder, "checkpoints", "step_00000012", "manifest.json")
    manifest.write_text("{")
    with pytest.raises(TrainingError, match="expected a checkpoint that can be read"):
        Trainer(tiny_config).run()
    assert train_records(tiny_config.folder) == before


def test_training_goes_on_when_the_disk_is_full(tiny_config, tmp_path, capfd, monkeypatch):
    save, failures = checkpoint.save, []

    def full(folder, step, *rest):
        if step == 4:
            failures.append(step)
            raise CheckpointError(f"{folder}: cannot be saved: No space left on device.")
        return save(folder, step, *rest)

    class FullDisk(Trainer):
        def _build(self):
            super()._build()
            self.log._text.close()
            self.log._text = open("/dev/full", "w", buffering=1)

    monkeypatch.setattr(checkpoint, "save", full)
    config = dataclasses.replace(
        tiny_config, checkpoint=dataclasses.replace(tiny_config.checkpoint, interval=4)
    )
    assert FullDisk(config).run()["status"] == "done"
    errors = capfd.readouterr().err
    assert failures == [4] and "Training goes on" in errors
    assert "/dev/full: No space left on device" in errors
    assert weights(config.folder, 12)


def test_other_tokens_of_equal_lengths_are_another_data_set(tiny_config, tiny_corpus, tmp_path):
    for name in ("train.bin", "train.idx"):
        shutil.copy(tiny_corpus / name, tmp_path / name)
    data = dataclasses.replace(tiny_config.data, train=(str(tmp_path / "train"),))
    train = dataclasses.replace(tiny_config.train, steps=3)
    config = dataclasses.replace(tiny_config, data=data, train=train)
    Trainer(config).run()
    tokens = bytearray((tmp_path / "train.bin").read_bytes())
    tokens[100] ^= 1
    (tmp_path / "train.bin").write_bytes(tokens)
    longer = dataclasses.replace(config, train=dataclasses.replace(train, steps=4))
    with pytest.raises(TrainingError, match=r"data\.train or data\.tokenizer: other content"):
        Trainer(longer).run()


def test_the_fingerprint_of_old_checkpoints(tiny_corpus):
    """Another rule would end every run that is under way."""
    prefix = str(tiny_corpus / "train")
    tokens = Path(prefix + ".bin").read_bytes()
    whole = b"f00d" + Path(prefix + ".idx").read_bytes() + str(len(tokens)).encode()
    blocks = [tokens[k * len(tokens) // 256 :][:4096] for k in range(256)]
    expected = hashlib.sha256(whole + b"".join(blocks)).hexdigest()
    assert resume.fingerprint([prefix], "f00d") == expected


def test_shards_of_another_tokenizer_are_refused(tiny_config, tiny_corpus, tmp_path):
    from stellarator.data.tokenizer import Tokenizer

    for name in ("train.bin", "train.idx"):
        shutil.copy(tiny_corpus / name, tmp_path / name)
    data = dataclasses.replace(tiny_config.data, train=(str(tmp_path / "train"),))
    train = dataclasses.replace(tiny_config.train, steps=3)
    config = dataclasses.replace(tiny_config, data=data, train=train)
    manifest = tmp_path / "manifest.json"
    sha256 = Tokenizer.load(tiny_corpus / "tokenizer").sha256
    manifest.write_text(json.dumps({"tokenizer": {"sha256": "0" * 64}}))
    with pytest.raises(ShardError, match="expected shards of the tokenizer that was given"):
        Trainer(config).run()
    manifest.write_text(json.dumps({"tokenizer": {"sha256": sha256}}))
    assert Trainer(config).run()["status"] == "done"


FOREIGN = [b"[1]", b"5", b'{"tokenizer": "x"}', b'{"tokenizer": {"sha256": 5}}', b"{", b"\xff",
           b"[" * 50_000, b"{}"]  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: repr(content[:20]))
def test_a_manifest_that_is_not_ours_says_nothing(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    check_tokenizer([str(tmp_path / "train")], "0" * 64)


def test_export_says_which_checkpoint_it_took(tiny_config, tmp_path, capfd):
    from stellarator.train.export import export

    config = dataclasses.replace(
        tiny_config, checkpoint=dataclasses.replace(tiny_config.checkpoint, interval=4)
    )
    Trainer(config).run()
    newest = Path(config.folder, "checkpoints", "step_00000012", "tensors.safetensors")
    newest.write_bytes(newest.read_bytes()[:-5])
    export(config.folder, tmp_path / "model")
    output = capfd.readouterr()
    assert "step_00000008 to" in output.out and "passed over a damaged" in output.err


def test_a_run_folder_that_is_a_file_is_one_clear_line(tiny_config, tmp_path):
    (tmp_path / "file").write_text("x")
    config = dataclasses.replace(tiny_config, folder=str(tmp_path / "file"))
    with pytest.raises(ValueError, match="expected a folder or nothing, got a file"):
        Trainer(config).run()


def test_mistakes_of_use_exit_with_2_and_damage_with_1(tiny_config, tmp_path, capsys):
    """What the same command meets again is told apart from what went wrong on the way."""
    from stellarator.cli import main

    def code(*overrides: str) -> tuple[int, str]:
        path = tmp_path / "run.toml"
        path.write_text(settings.to_toml(tiny_config))
        got = main(["train", "--config", str(path), *overrides])
        return got, capsys.readouterr().err

    assert code()[0] == 0
    checkpoints = Path(tiny_config.folder, "checkpoints")
    newer = shutil.copytree(checkpoints / "step_00000012", checkpoints / "step_00000011")
    for overrides, part in (
        (["data.seed=5"], "is of another configuration"),
        (["model.vocab_size=300"], "expected at least the tokenizer's"),
        (["checkpoint.resume=none"], "expected no checkpoints"),
        ([f"checkpoint.resume={newer}"], "expected no checkpoints after step_00000011"),
        (["checkpoint.resume=absent", f"folder={tmp_path / 'new'}"], "absent: expected a checkp"),
    ):
        got, error = code(*overrides)
        assert got == 2 and part in error, (overrides, error)
    for manifest in checkpoints.glob("*/manifest.json"):
        manifest.write_text("{")
    got, error = code()
    assert got == 1 and "expected a checkpoint that can be read" in error
    got, error = code(f"checkpoint.resume={newer}", f"folder={tmp_path / 'new'}")
    assert got == 1 and "damaged" in error
