"""The command line as a user meets it: help, wrong flags, one-line errors, exit codes."""

import subprocess
import sys

import pytest

from stellarator.cli import main


def run(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stellarator", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_help_lists_every_verb_and_needs_no_torch():
    code = (
        "import sys\nfrom stellarator.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("train", "data", "export", "generate", "infill", "doctor", "report", "demo"):
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["trian"], 2, "invalid choice: 'trian'"),
        (["doctor", "--verbose"], 2, "unrecognized arguments: --verbose"),
        (["train", "--recipe", "starcoder2-3"], 1, "Did you mean 'starcoder2_3b'"),
        (["train", "--config", "absent.toml"], 2, "absent.toml: cannot be read"),
        (["train", "optim.lr=fast"], 2, "expected float, got 'fast'"),
        (["train"], 2, "data.train: expected prefixes of token shards"),
        (["data", "prepare", "absent-folder", "--output", "out"], 1, "absent-folder"),
        (["data", "inspect", "absent", "--tokenizer", "absent"], 1, "absent"),
        (["infill", "nowhere"], 1, "expected FILE:LINE"),
        (["generate", "--model", "absent", "x"], 1, "absent"),
        (["export", "absent", "out"], 1, "expected a run folder"),
        (["report", "absent"], 1, "expected metrics.jsonl"),
    ],
)
def test_mistakes_are_one_clear_message(words, code, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        got = main(words)
    except SystemExit as stop:
        got = stop.code
    output = capsys.readouterr()
    assert got == code and part in output.err, output
    assert "Traceback" not in output.err


def test_print_config_is_complete_and_can_be_read_back(tmp_path, capsys):
    assert main(["train", "--recipe", "starcoder2_3b", "--print-config", "optim.lr=1e-4"]) == 0
    text = capsys.readouterr().out
    assert "rope_theta" in text and "lr = 0.0001" in text
    path = tmp_path / "all.toml"
    path.write_text(text)
    assert main(["train", "--config", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == text


def test_no_verb_prints_help_and_fails():
    done = run()
    assert done.returncode == 2 and "verbs" in done.stdout
    done = run("recipes", "starcoderbase")
    assert done.returncode == 0 and "15,517,456,384" in done.stdout


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m stellarator train --print-config | head -1",
        shell=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.startswith("name =") and "Traceback" not in done.stderr
