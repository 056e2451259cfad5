"""A short form of `python -m benchmarks parity --fuzz`: random runs beside one process.

Another seed each time, of the clock or STELLARATOR_FUZZ_SEED; the summary of pytest shows it. Not
covered: more than four processes, whole minutes (the verb has them); NCCL.
"""

import dataclasses
import os
import random
import time

from runs import changed

from benchmarks import fuzz
from benchmarks.__main__ import main
from stellarator import settings
from stellarator.config import RunConfig

SECONDS = 12  # and what runs then is finished
PROCESSES = 4


def test_random_layouts_train_the_same_model(tmp_path, record_property):
    seed = int(os.environ.get("STELLARATOR_FUZZ_SEED") or time.time()) % 1_000_000
    fuzz.corpora(tmp_path)
    count, wrong = 0, []
    for result in fuzz.fuzz(tmp_path, seed, PROCESSES, range(1000), SECONDS):
        count += 1
        if not result.right:
            wrong.append(fuzz.described(result, seed, PROCESSES))
    line = f"fuzz: {count} random layouts, STELLARATOR_FUZZ_SEED={seed}"
    record_property("summary", line)
    assert count and not wrong, "\n".join([line, *wrong])


def test_what_is_planted_is_found(tmp_path, monkeypatch):
    """Other first weights, another update, a rank that fails; the pool goes on behind it.

    In a run of two processes that another layout has begun.
    """
    right = next(
        trial
        for trial in (fuzz.draw(tmp_path, 0, number, 2) for number in range(1000))
        if trial.processes == 2 and trial.many.train.global_batch_size < 6 and trial.earlier
        if trial.many.model.num_layers < 3
    )
    planted = [
        {"train": {"seed": right.many.train.seed + 1}},
        {"optim": {"lr": right.many.optim.lr * (1 + 1e-6)}},
        {"data": {"tokenizer": str(tmp_path / "nowhere")}},
        {},
    ]

    def draw(folder, seed, number, most):
        earlier, count = right.earlier
        many, earlier = (changed(config, **planted[number]) for config in (right.many, earlier))
        return dataclasses.replace(right, many=many, earlier=(earlier, count))

    monkeypatch.setattr(fuzz, "draw", draw)
    fuzz.corpora(tmp_path)
    seeded, updated, failed, last = fuzz.fuzz(tmp_path, 0, 3, range(4), 600)
    assert not seeded.right and not seeded.same_first and not seeded.error
    assert not updated.right and updated.same_first and updated.state > 1e-9
    assert not failed.right and "nowhere" in failed.error
    assert last.right, last


def test_the_verb_says_what_repeats_a_failure(tmp_path, monkeypatch, capsys):
    trials = [fuzz.draw(tmp_path, 7, number, 3) for number in range(2)]
    found = [
        fuzz.Result(0, trials[0], "", True, 1e-16, 1e-14),
        fuzz.Result(1, trials[1], "", True, 1e-11, 1e-14),
    ]
    monkeypatch.setattr(fuzz, "fuzz", lambda *given: found)
    words = ["parity", "--fuzz", "9", "--seed", "7", "--processes", "3"]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert said.startswith("seed 7, at most 3 processes, float64\ntrial 1: ")
    assert "\n  python -m benchmarks parity --fuzz 60 --seed 7 --processes 3 --trial 1\n" in said
    for config in (trials[1].one, trials[1].many):
        assert settings.resolve(RunConfig(), None, fuzz.overrides(config)) == config
    assert "1 of 2 random runs train the same model" in said and "trial 0" not in said
    del found[1]
    assert main(words) == 0


def test_broken_layouts_are_refused(tmp_path):
    """Each rule, in turn; and a layout that is not broken counts as a fault."""
    seen = set()
    for number in range(60):
        trial = fuzz.draw(tmp_path, 1, number, 8)
        config, processes, named = fuzz.broken(trial, random.Random(number))
        assert fuzz.not_refused(config, processes, named) == ""
        seen.add(named)
    assert len(seen) == 10
    found = fuzz.not_refused(trial.many, trial.processes, "parallel.tp")
    assert found.startswith("expected a refusal that names parallel.tp, got nothing: ")


def test_a_trial_is_a_function_of_its_number(tmp_path):
    """And trials differ, in each of the things that are drawn."""
    trials = [fuzz.draw(tmp_path, 5, number) for number in range(40)]
    assert trials == [fuzz.draw(tmp_path, 5, number) for number in range(40)]
    assert trials[0] != fuzz.draw(tmp_path, 6, 0)
    for section, names in {
        "model": ("family", "num_heads", "num_kv_heads", "window", "tie_embeddings", "num_layers"),
        "data": ("seq_length", "train", "attend_across_documents"),
        "train": ("global_batch_size", "micro_batch_size", "recompute"),
        "parallel": ("tp", "sp", "pp", "schedule", "stages_per_rank", "zero", "bucket_mib"),
    }.items():
        for name in names:
            assert len({getattr(getattr(t.many, section), name) for t in trials}) > 1, name
    assert any(t.one.train.micro_batch_size != t.many.train.micro_batch_size for t in trials)
    assert {t.earlier is None for t in trials} == {True, False}
