"""Configurations: what is accepted, and that all mistakes are named at once, with suggestions."""

import dataclasses
import subprocess
import sys

import pytest

from stellarator import settings
from stellarator.config import FimConfig, ModelConfig, RunConfig
from stellarator.settings import ConfigError, check, resolve, to_toml


def problems_of(*overrides: str, toml: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig(), toml, overrides)
    return caught.value.problems


def test_defaults_are_valid():
    assert check(RunConfig()) == []


def test_overrides_win_over_the_file_and_the_file_over_the_base(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[optim]\nlr = 1e-4\nmin_lr = 1e-5\n[data.fim]\nrate = 0.25\n")
    config = resolve(RunConfig(), str(path), ["--optim.lr=2e-4", "data.train=a,b", "--name=x"])
    assert config.name == "x"
    assert config.optim.lr == 2e-4 and config.optim.min_lr == 1e-5
    assert config.data.fim.rate == 0.25 and config.data.train == ("a", "b")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.window=none", None),
        ("model.window=64", 64),
        ("model.tie_embeddings=false", False),
        ("train.steps=2e3", 2000),
        ("data.train=", ()),
    ],
)
def test_values_are_read_by_the_type_of_the_field(override, value):
    config = resolve(RunConfig(), None, [override])
    section, name = override.split("=")[0].split(".")
    assert getattr(getattr(config, section), name) == value
    assert type(getattr(getattr(config, section), name)) is type(value)


def test_toml_round_trip_keeps_every_value():
    config = RunConfig(
        name='quote " back\\slash\nline',
        model=ModelConfig(window=None, rope_theta=999999.4420358813),
        data=dataclasses.replace(
            RunConfig().data, train=("a b", "c"), weights=(0.25, 0.75), fim=FimConfig(rate=0.1)
        ),
    )

    def read_back(text, folder):
        path = folder / "config.toml"
        path.write_text(text)
        return resolve(RunConfig(), str(path))

    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        assert read_back(to_toml(config), Path(folder)) == config


def test_misspelt_names_do_not_hide_broken_rules():
    found = "\n".join(problems_of("optim.lrr=1", "model.width=100", "train.steps=many"))
    for part in ("Did you mean 'lr'", "model.width", "expected int, got 'many'"):
        assert part in found


def test_all_problems_are_reported_together():
    found = problems_of("model.width=100", "model.num_kv_heads=4", "data.seed=-1", "optim.min_lr=1")
    text = "\n".join(found)
    for part in ("model.width", "model.num_kv_heads", "data.seed", "optim.min_lr"):
        assert part in text
    assert len(found) == 4


def test_layouts_are_among_them():
    """Values that are wrong in themselves hide no layout, unless no numbers are left to compare."""
    base = RunConfig()
    parallel = dataclasses.replace(base.parallel, tp=5, pp=9, zero=7, schedule="foo")
    train = dataclasses.replace(base.train, global_batch_size=5, micro_batch_size=2)
    wrong = dataclasses.replace(base, parallel=parallel, train=train)
    found = settings.check_run(wrong, 45)
    for part in (
        "data.train: expected prefixes", "parallel.schedule: expected one of", "parallel.zero: exp",
        "parallel.tp: expected a divisor of num_heads", "expected at most num_layers",
        "train.global_batch_size: expected a multiple of micro_batch_size * dp = 2 * 1, got 5",
    ):  # fmt: skip
        assert sum(part in problem for problem in found) == 1, (part, found)
    nothing = dataclasses.replace(wrong, parallel=dataclasses.replace(parallel, tp=0))
    assert sum("parallel.tp: expected" in x for x in settings.check_run(nothing, 45)) == 1
    empty = dataclasses.replace(base, model=dataclasses.replace(base.model, num_heads=0))
    assert not [x for x in settings.check_run(empty, 1) if x.startswith("parallel")]


TYPOS = {
    "model.widht=3": "width",
    "modle.width=3": "model",
    "optim.learning_rate=3": None,
    "optim.lr_min=3": "min_lr",
    "train.step=3": "steps",
    "data.fim.rat=1": "rate",
    "data.seqlength=3": "seq_length",
    "checkpoint.intervall=3": "interval",
    "train.micro_batchsize=3": "micro_batch_size",
    "metrics.log_intreval=3": "log_interval",
}


@pytest.mark.parametrize("typo", TYPOS)
def test_unknown_names_get_the_nearest_valid_one(typo):
    (problem,) = problems_of(typo)
    expected = TYPOS[typo]
    assert (f"Did you mean {expected!r}" in problem) if expected else ("unknown name" in problem)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--lr", "3"], "unknown option --lr; values are written optim.lr=3"),
        (["--lr=3"], "unknown option --lr; values are written optim.lr=3"),
        (["--lr"], "unknown option --lr; values are written optim.lr=VALUE"),
        (["--optim.lr", "3"], "unknown option --optim.lr; values are written optim.lr=3"),
        (["--absurd"], "`stellarator train --help` shows how values are written"),
        (["--step", "9"], "unknown option --step; values are written train.steps=9"),
        (["--folder", "x"], "unknown option --folder; values are written folder=x"),
        (["--micro-batch-size", "2"], "values are written train.micro_batch_size=2"),
        (["--seed", "1"], "values are written data.seed=1 or train.seed=1"),
    ],
)
def test_options_as_other_programs_have_them_are_shown_as_values(words, problem):
    (got,) = problems_of(*words)
    assert got.endswith(problem)
    first, second = problems_of(*words, "optim.lrr=2")
    assert "Did you mean 'lr'" in second


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.width=wide", "expected int"),
        ("model.width=3.5", "expected int"),
        ("model=3", "is a section"),
        ("name.x=3", "is a value"),
        ("optim.lr", "expected section.key=value"),
        ("optim.schedule=linear", "expected one of cosine, wsd, constant"),
        ("optim.warmup_steps=1000", "fewer than train.steps"),
        ("optim.decay_steps=50", "more than warmup_steps"),
        ("checkpoint.keep=1", "at least 2"),
        ("data.seq_length=99999", "model.max_positions"),
        ("data.weights=1.0", "one per shard"),
        ("model.attention_dropout=1.0", "attention_dropout: expected a rate in [0, 1), got 1.0"),
        ("model.positions=learned", "starcoder2 has rope"),
        ("data.fim.rate=1.5", "[0.0, 1.0]"),
        ("data.fim.rate=nan", "[0.0, 1.0]"),
        ("metrics.peak_tflops=0", "metrics.peak_tflops: expected a finite number above 0, got 0.0"),
        ("metrics.peak_tflops=-1", "metrics.peak_tflops"),
        ("metrics.peak_tflops=nan", "metrics.peak_tflops"),
        ("metrics.peak_tflops=inf", "metrics.peak_tflops"),
        ("model.rope_theta=0", "model.rope_theta: expected a finite number above 0"),
        ("model.rope_theta=nan", "model.rope_theta"),
        ("model.init_std=-0.1", "model.init_std: expected a finite number of at least 0"),
        ("model.init_std=inf", "model.init_std"),
        ("model.norm_eps=0", "model.norm_eps: expected a finite number above 0"),
        ("data.seed=-1", "data.seed: expected a value in [0, 18446744073709551615], got -1"),
        ("train.seed=18446744073709551616", "train.seed: expected a value in [0, "),
        ("optim.lr=nan", "optim.lr: expected a finite number of at least 0, got nan"),
        ("optim.lr=inf", "optim.lr"),
        (f"optim.lr={10**400}", "optim.lr: expected float"),
        ("optim.min_lr=nan", "optim.min_lr"),
        ("optim.weight_decay=inf", "optim.weight_decay"),
        ("optim.weight_decay=nan", "optim.weight_decay"),
        ("optim.clip_norm=nan", "optim.clip_norm"),
        ("optim.eps=inf", "optim.eps: expected a finite number above 0"),
        ("optim.beta1=nan", "optim.beta1"),
    ],
)
def test_each_rule_is_named(override, part):
    assert any(part in problem for problem in problems_of(override))


def test_numbers_that_break_rules_do_not_hide_each_other():
    found = problems_of(
        "model.family=gpt", "model.num_layers=0", "model.rope_theta=nan", "model.norm_eps=-1",
        "data.train=a,b,c,d", "data.weights=1,nan,inf,-1", "data.seed=-1", "train.seed=-1",
        "optim.lr=inf", "optim.eps=nan", "metrics.peak_tflops=0", "train.kernels=magic",
    )  # fmt: skip
    assert [problem.split(":")[0] for problem in found] == [
        "model.family", "model.num_layers", "model.rope_theta", "model.norm_eps", "data.weights",
        "data.seed", "optim.lr", "optim.eps", "train.kernels", "train.seed", "metrics.peak_tflops",
    ]  # fmt: skip


@pytest.mark.parametrize("weights", [(1.0, float("nan")), (float("inf"), 1.0), (0.0, 1.0)])
def test_weights_are_positive_and_finite(weights):
    data = dataclasses.replace(RunConfig().data, train=("a", "b"), weights=weights)
    (problem,) = check(dataclasses.replace(RunConfig(), data=data))
    assert "data.weights: expected positive finite numbers" in problem


def test_limits_themselves_are_allowed():
    most = str(2**64 - 1)
    config = resolve(
        RunConfig(), None,
        [f"data.seed={most}", f"train.seed={most}", "model.init_std=0", "optim.lr=0",
         "optim.min_lr=0", "optim.weight_decay=0", "optim.clip_norm=none"],
    )  # fmt: skip
    assert config.data.seed == config.train.seed == 2**64 - 1


def test_file_errors_name_file_and_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nnum_layers = 2\n\n[optim]\nlrr = 1.0\n")
    (problem,) = problems_of(toml=str(path))
    assert f"{path}:5" in problem and "Did you mean 'lr'" in problem
    path.write_text("[model\n")
    assert "not valid TOML" in problems_of(toml=str(path))[0]
    path.write_bytes(b"\xff\xfe")
    assert "UTF-8" in problems_of(toml=str(path))[0]
    assert "cannot be read" in problems_of(toml=str(tmp_path / "absent.toml"))[0]


def test_a_typo_is_answered_without_importing_torch():
    code = (
        "import sys\nfrom stellarator.cli import main\n"
        "code = main(['train', 'optim.lrr=1'])\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Did you mean 'lr'" in done.stderr and "Traceback" not in done.stderr
