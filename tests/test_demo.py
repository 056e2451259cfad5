"""The demo in small: eight packages of the standard library, 40 steps, everything that a user gets.

The long form is `make demo`. The unigram loss is checked against a direct count.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from stellarator import demo as demo_module
from stellarator import recipes
from stellarator.cli import main
from stellarator.data.shards import Shard
from stellarator.evaluate.unigram import unigram_loss


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    stdlib, folder = Path(sysconfig.get_paths()["stdlib"]), tmp_path_factory.mktemp("demo")
    names = ("asyncio", "ctypes", "email", "http", "json", "logging", "unittest", "xml")
    sources = [str(stdlib / name) for name in names]
    output, recipe = folder / "demo", recipes.demo()
    fewer = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, eval_batches=4))
    with pytest.MonkeyPatch.context() as patch:  # shares of what takes the time
        patch.setattr(recipes, "demo", lambda: fewer)
        patch.setattr(demo_module, "_CALIBRATION_STEPS", 3)
        patch.setattr(demo_module, "_HOLES", {"short": 40, "token": 40, "line": 10})
        assert main(["demo", *sources, "--output", str(output), "--minutes", "0.01"]) == 0
    return output, sources


def test_everything_is_written(demo):
    output, _ = demo
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 40 and summary["tokens"] > 0
    assert summary["validation_loss"] < summary["untrained_loss"] - 0.5
    assert set(summary["infilling"]) == {"short", "token", "line"}
    assert json.loads((output / "status.json").read_text())["status"] == "done"
    html = (output / "report.html").read_text()
    assert html.count("<img") == 5 and "unigram" in html and "http" not in html.split("<style>")[0]
    for name in ("loss", "learning_rate", "gradient_norm", "throughput", "time_split"):
        assert (output / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_export_is_a_hugging_face_folder(demo, capsys):
    output, _ = demo
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    ids = tokenizer("import os", return_tensors="pt").input_ids
    assert (
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1]
        == ids.shape[1] + 4
    )
    capsys.readouterr()
    assert (
        main(["generate", "--model", str(output / "model"), "--max-new-tokens", "4", "import os"])
        == 0
    )
    assert main(["infill", "--model", str(output / "model"), f"{__file__}:8"]) == 0


def test_a_second_demo_goes_on_and_other_sources_are_refused(demo, capsys):
    output, sources = demo
    summary = (output / "summary.json").read_bytes()
    assert main(["demo", *sources, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "data of an earlier demo found" in said and "finished before" in said
    assert "infilling line: " in said and "evaluating" not in said
    assert (output / "summary.json").read_bytes() == summary  # with the seconds of that run
    assert main(["demo", sources[0], "--output", str(output)]) == 2
    assert "expected a new folder" in capsys.readouterr().err


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder to be in, with two repositories of code in src."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "m.py").write_text(f"{name} = 'some text'\n" * 20)
    return tmp_path / "src"


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_data_of_others_are_not_replaced(sources, capsys):
    """A data set, and a run, that are no demo's stay as they are."""
    command = ["data", "prepare", "src", "--output", "mine/data", "--vocab-size", "300"]
    assert main([*command, "--validation-fraction", "0.5"]) == 0
    Path("run").mkdir()
    Path("run/config.toml").write_text('name = "mine"\n')
    before = listing(Path.cwd())
    for output, found in (("mine", "mine/data"), ("run", "run/config.toml")):
        assert main(["demo", "src", "--output", output]) == 2
        error = capsys.readouterr().err
        assert f"{found} that no demo made" in error and "OUTPUT=" in error
    assert listing(Path.cwd()) == before


def test_a_demo_that_was_moved_is_not_trained_elsewhere(demo, tmp_path, capsys):
    output, sources = demo
    shutil.copytree(output, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    assert main(["demo", *sources, "--output", str(tmp_path / "copy")]) == 2
    assert "expected the configuration of a demo in" in capsys.readouterr().err
    assert not (tmp_path / "copy" / "checkpoints").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from stellarator import demo
from stellarator.data import prepare as module

original = module.prepare

def killed(*arguments, **options):
    if sys.argv[1] == "after":
        original(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

module.prepare = killed
demo._prepare_data(["src"], Path("out"))
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_demo_that_was_killed_while_preparing_goes_on(sources, monkeypatch, moment):
    from stellarator.data import prepare as module

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", KILLED, moment], env=environment)
    assert killed.returncode == -signal.SIGKILL and Path("out/sources.json").exists()
    original, calls = module.prepare, []
    monkeypatch.setattr(module, "prepare", lambda *a, **o: calls.append(o) or original(*a, **o))
    demo_module._prepare_data(["src"], Path("out"))
    assert len(calls) == (moment == "before") and Path("out/data/manifest.json").exists()


@pytest.mark.parametrize("output", ["out", "new/out", "file", "file/out"])
def test_a_demo_that_cannot_begin_leaves_nothing(sources, capsys, output):
    Path("file").touch()
    assert main(["demo", "absent", "--output", output]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(os.listdir()) == ["file", "src"]


def test_unigram_loss_is_that_of_a_direct_count(demo):
    output, _ = demo
    train, held = Shard(str(output / "data" / "train")), Shard(str(output / "data" / "validation"))
    size = 1024
    counts = Counter(t for document in train for t in document.tolist())
    tokens = [t for document in held for t in document.tolist()]
    total = sum(counts.values()) + size
    expected = -sum(math.log((counts[t] + 1) / total) for t in tokens) / len(tokens)
    assert unigram_loss([train], list(held), size) == pytest.approx(expected, rel=1e-9)
