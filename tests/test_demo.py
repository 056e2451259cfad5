"""The demo in small: four packages of the standard library, 40 steps, everything that a user gets.

The long form is `make demo`. The unigram loss is checked against a direct count.
"""

import json
import math
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from stellarator.cli import main
from stellarator.data.shards import Shard
from stellarator.evaluate.unigram import unigram_loss


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    stdlib, folder = Path(sysconfig.get_paths()["stdlib"]), tmp_path_factory.mktemp("demo")
    names = ("asyncio", "ctypes", "email", "http", "json", "logging", "unittest", "xml")
    sources = [str(stdlib / name) for name in names]
    output = folder / "demo"
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
    assert main(["demo", *sources, "--output", str(output)]) == 0
    assert "data of an earlier demo found" in capsys.readouterr().out
    assert main(["demo", sources[0], "--output", str(output)]) == 2
    assert "expected a new folder" in capsys.readouterr().err


def test_unigram_loss_is_that_of_a_direct_count(demo):
    output, _ = demo
    train, held = Shard(str(output / "data" / "train")), Shard(str(output / "data" / "validation"))
    size = 1024
    counts = Counter(t for document in train for t in document.tolist())
    tokens = [t for document in held for t in document.tolist()]
    total = sum(counts.values()) + size
    expected = -sum(math.log((counts[t] + 1) / total) for t in tokens) / len(tokens)
    assert unigram_loss([train], list(held), size) == pytest.approx(expected, rel=1e-9)
