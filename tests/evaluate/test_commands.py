"""`generate` and `infill` on an exported folder: answers, and folders that are taken for one.

The reference for answers is `generate` itself on the model that was exported. Not covered: a GPU.
"""

import pytest
import torch

from stellarator.config import ModelConfig
from stellarator.data.tokenizer import Tokenizer
from stellarator.evaluate.commands import generate_texts, infill_location
from stellarator.evaluate.generate import generate
from stellarator.model import build_model, save_pretrained

TEXT = "def add(left, right):\n    return left + right\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, model, tokenizer) of a model that writes the first token again and again, or ends.

    Its logits are a constant row: the final norm has weight 0 and the embedding of one token as its
    bias.
    """
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = Tokenizer.train([TEXT] * 3, vocab_size=320)
    tokenizer.save(folder / "tokenizer")
    config = ModelConfig(
        vocab_size=320, num_layers=1, width=16, num_heads=2, num_kv_heads=1, ffn_width=32,
        max_positions=96,
    )  # fmt: skip
    model = build_model(config, seed=1)
    return folder, model, tokenizer


def export_writer_of(exported, token: int):
    """A folder with the model made to write `token` whatever it reads."""
    folder, model, tokenizer = exported
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(model.embedding.weight[token] * 100)
    target = folder / f"writes_{token}"
    save_pretrained(model, target, tokenizer_folder=folder / "tokenizer")
    return target


def test_answers_are_those_of_generate(exported):
    _, model, tokenizer = exported
    (token,) = tokenizer.encode("x")
    folder = export_writer_of(exported, token)
    assert generate_texts(str(folder), ["a = ", ""], max_new_tokens=3, device="cpu") == ["xxx"] * 2
    (wanted,) = generate(
        model, [tokenizer.encode("a")], max_new_tokens=5, temperature=1.0, seed=3,
        top_p=0.9, tokenizer=tokenizer,
    )  # fmt: skip
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3, "top_p": 0.9}
    assert generate_texts(str(folder), ["a"], device="cpu", **options) == [wanted.text]


def test_an_empty_answer_is_an_empty_line_and_a_note(exported, tmp_path, capsys):
    from stellarator.cli import main

    tokenizer = exported[2]
    folder = str(export_writer_of(exported, tokenizer.eod))
    assert main(["generate", "--model", folder, "a", "--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert output.out == "\n"
    assert output.err == "note: the answer is empty: the model ended at once\n"
    assert main(["generate", "--model", folder, "a", "b", "--stop", "c", "--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert output.out == "\n\n" and output.err.splitlines() == [
        f"note: the answer of prompt {number} is empty: the model ended at once, or began with "
        "a --stop text"
        for number in (1, 2)
    ]
    (tmp_path / "a.py").write_text(TEXT)
    assert main(["infill", "--model", folder, f"{tmp_path / 'a.py'}:1", "--device", "cpu"]) == 0
    output = capsys.readouterr()  # a hole is never filled with nothing
    assert len(output.out) >= 2 and output.err == ""
    folder = str(export_writer_of(exported, tokenizer.encode("x")[0]))
    words = ["generate", "--model", folder, "a", "--max-new-tokens", "2", "--device", "cpu"]
    assert main(words) == 0
    assert capsys.readouterr() == ("xx\n", "")


@pytest.mark.parametrize(
    ("model", "got"),
    [
        ("absent", "got nothing there"),
        ("file", "got a file there"),
        ("empty", "got one without config.json"),
        ("run", "got a run folder. Export it first: stellarator export {run} {run}/model$"),
        ("run/checkpoints", "got a run folder. Export it first: stellarator export {run} {run}/m"),
        (
            "run/checkpoints/step_00000003",
            "got a checkpoint. Export it first: "
            "stellarator export {run}/checkpoints/step_00000003 {run}/model$",
        ),
        ("done", "got a run folder. Its exported model is {done}/model."),
    ],
)
def test_folders_that_are_no_model_say_what_to_do(tmp_path, model, got):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "done" / "checkpoints").mkdir(parents=True)
    (tmp_path / "done" / "model").mkdir()
    (tmp_path / "done" / "model" / "config.json").touch()
    (tmp_path / "a.py").write_text(TEXT)
    message = "expected a folder with an exported model, " + got.format(
        run=tmp_path / "run", done=tmp_path / "done"
    )
    with pytest.raises(ValueError, match=message):
        generate_texts(str(tmp_path / model), ["x"])
    with pytest.raises(ValueError, match=message):
        infill_location(str(tmp_path / model), f"{tmp_path / 'a.py'}:1")


def test_the_advice_is_a_command_that_works(tiny_config, tmp_path, capsys):
    import dataclasses
    import shlex

    from stellarator.cli import main
    from stellarator.train.loop import Trainer

    folder = tmp_path / "my run"  # with a space, so that quoting counts
    train = dataclasses.replace(tiny_config.train, steps=3, eval_interval=None)
    Trainer(dataclasses.replace(tiny_config, folder=str(folder), train=train)).run()
    capsys.readouterr()
    words = ["generate", "--model", str(folder), "a", "--max-new-tokens", "1", "--device", "cpu"]
    assert main(words) == 2
    error = capsys.readouterr().err
    command = shlex.split(error.partition("Export it first: stellarator ")[2])
    assert main(command) == 0
    words[2] = command[-1]
    assert main(words) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_clear_line(exported):
    folder = str(export_writer_of(exported, 7))
    with pytest.raises(RuntimeError, match="expected a GPU for --device cuda, got none"):
        generate_texts(folder, ["x"], device="cuda")
