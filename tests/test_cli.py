"""The command line as a user meets it: help, wrong flags, one-line errors, exit codes."""

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest

from stellarator import cli
from stellarator.arguments import make_parser
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
    for verb in "train plan data export generate infill doctor report demo".split():
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["trian"], 2, "invalid choice: 'trian'"),
        (["doctor", "--verbose"], 2, "usage: stellarator doctor [-h]\nstellarator doctor: error: "),
        (["doctor", "--verbose"], 2, "error: unrecognized arguments: --verbose\n"),
        (["infill", "--max-tokens", "9", "f:1"], 2, "Did you mean --max-new-tokens for --max-to"),
        (["data", "inspect", "s", "--tokenizer", "t", "--row=9"], 2, "--rows for --row=9?"),
        (["train", "--lr", "3"], 2, "\n  unknown option --lr; values are written optim.lr=3\n"),
        (["train", "--recipe", "starcoder2-3"], 2, "Did you mean 'starcoder2_3b'"),
        (["train", "--config", "absent.toml"], 2, "absent.toml: cannot be read"),
        (["train", "optim.lr=fast"], 2, "expected float, got 'fast'"),
        (["train"], 2, "data.train: expected prefixes of token shards"),
        (["train", "data.train=absent", "data.tokenizer=absent"], 2, "absent"),
        (["data", "prepare", "absent-folder", "--output", "out"], 2, "absent-folder"),
        (["data", "prepare", ".", "--output", "file"], 2, "which is a file"),
        (["data", "prepare", ".", "--output", "x", "--vocab-size", "9"], 2, "vocab_size in [294"),
        (["data", "prepare", ".", "--output", "x", "--vocab-size", "0"], 2, "at least 1, got '0'"),
        (["data", "prepare", ".", "--output", "x", "--seed", "-1"], 2, "at least 0, got '-1'"),
        (["data", "prepare", ".", "--output", "x", "--validation-fraction", "nan"], 2, "0 to 0.5"),
        (
            ["data", "prepare", ".", "--output", "x", "--tokenizer", "t", "--vocab-size", "999"],
            2,
            "expected --tokenizer or --vocab-size, got both",
        ),
        (["data", "inspect", "absent", "--tokenizer", "absent"], 2, "absent"),
        (["data", "inspect", "s", "--tokenizer", "t", "--rows", "0"], 2, "at least 16, got '0'"),
        (["data", "inspect", "s", "--tokenizer", "t", "--rows", "-5"], 2, "at least 16, got '-5'"),
        (["data", "inspect", "s", "--tokenizer", "t", "--rows", "x"], 2, "at least 16, got 'x'"),
        (["data", "inspect", "s", "--tokenizer", "t", "--count", "0"], 2, "at least 1, got '0'"),
        (["infill", "nowhere"], 2, "expected FILE:LINE"),
        (["infill", "file:0"], 2, "expected a line from 1 to 1, got 0"),
        (["infill", "file:2"], 2, "expected a line from 1 to 1, got 2"),
        (["infill", "absent:1"], 2, "absent: cannot be read"),
        (["generate", "--model", "absent", "x"], 2, "absent: expected a folder with an exported"),
        (["generate", "x", "--max-new-tokens", "0"], 2, "at least 1, got '0'"),
        (["generate", "x", "--temperature", "-1"], 2, "a number of at least 0, got '-1'"),
        (["generate", "x", "--temperature", "inf"], 2, "a number of at least 0, got 'inf'"),
        (["generate", "x", "--top-p", "1.5"], 2, "above 0 and up to 1, got '1.5'"),
        (["demo", "--minutes", "0"], 2, "a number above 0, got '0'"),
        (["export", "absent", "out"], 2, "expected a run folder"),
        (["report", "absent"], 2, "expected metrics.jsonl"),
        (["recipes", "absent"], 2, "expected the name of a recipe"),
    ],
)
def test_mistakes_are_one_clear_message(words, code, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    try:
        got = main(words)
    except SystemExit as stop:
        got = stop.code
    output = capsys.readouterr()
    assert got == code and part in output.err, output
    assert "Traceback" not in output.err and "Errno" not in output.err
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["file"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("expected a, got b. Do c."), 2, "expected a, got b. Do c."),
        (RuntimeError("no memory"), 1, "no memory"),
        (RuntimeError(), 1, "RuntimeError"),
        (PermissionError(13, "Permission denied", "some/path"), 1, "Permission denied: some/path"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (OSError("a name is too long"), 1, "a name is too long"),
        (
            ModuleNotFoundError("No module named 'torch'"),
            1,
            "No module named 'torch'. `stellarator doctor` shows what is installed.",
        ),
    ],
)
def test_exit_code_and_line_of_every_kind_of_error(error, code, line, capsys, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setitem(cli._VERBS, "doctor", fail)
    assert main(["doctor"]) == code
    assert capsys.readouterr() == ("", f"error: {line}\n")
    monkeypatch.setenv("STELLARATOR_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["doctor"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_cleans_up_as_ctrl_c_does(tmp_path, monkeypatch, number):
    from stellarator.data.tokenizer import Tokenizer

    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "a.py").write_text(f"{name} = 'some text'\n" * 9)
    written = []

    def stop(*arguments):
        written.extend(os.listdir("new/out"))
        os.kill(os.getpid(), number)
        time.sleep(0.01)

    monkeypatch.setattr(Tokenizer, "save", stop)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        main(["data", "prepare", "src", "--output", "new/out", "--vocab-size", "300"])
    assert stopped.value.code == 128 + number and ".partial" in written
    assert os.listdir() == ["src"] and signal.getsignal(number) == before


def test_the_version_is_that_of_the_package(capsys, monkeypatch):
    import stellarator

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", {"stellarator": "1.2.3"}.__getitem__)
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, "stellarator 1.2.3\n")
    assert stellarator.__version__ == "1.2.3"
    monkeypatch.setattr(metadata, "version", absent)
    assert stellarator.__version__ == "unknown (not installed)"


def test_a_prompt_that_is_no_utf8_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "stellarator", "generate", "-"],
        input=b"caf\xe9", capture_output=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr.decode()) == (
        2,
        "error: generate: expected UTF-8 text on standard input, got other bytes at 3. "
        "Convert it.\n",
    )


def test_ctrl_c_is_one_word(capsys, monkeypatch):
    def fail(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._VERBS, "doctor", fail)
    assert main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_ctrl_c_within_an_exec_of_text_ends_as_elsewhere(tmp_path):
    """Imports are full of such exec, and `python -m` would end by the signal itself."""
    (tmp_path / "torch.py").write_text("exec('raise KeyboardInterrupt')\n")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "stellarator", "doctor"],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def parsers(parser=None):
    """The parser of every verb, by its words."""
    parser = parser or make_parser()
    yield parser.prog, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


@pytest.mark.parametrize("name", [name for name, _ in parsers()])
def test_help_of_every_option_has_its_default(name):
    parser = dict(parsers())[name]
    shown = " ".join(parser.format_help().split())
    assert "None" not in shown and "[]" not in shown and "False" not in shown
    for action in parser._actions:
        if action.default is not argparse.SUPPRESS and not isinstance(
            action, argparse._SubParsersAction
        ):
            assert action.help, f"{name}: {action.dest} has no help"
            if action.default not in (None, False, []):
                assert f"(default: {action.default})" in action.help % vars(action), action.dest


def test_every_verb_has_a_function_and_every_function_a_verb():
    verbs = {parser.get_default("verb") for _, parser in parsers()} - {None}
    assert verbs == cli._VERBS.keys()


def test_data_is_prepared_and_looked_at_as_a_user_does(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        path = tmp_path / "src" / f"package{number}" / "a.py"
        path.parent.mkdir(parents=True)
        path.write_text(f"def function{number}(value):\n    return value + {number}\n" * 3)
    prepare = ["data", "prepare", "src", "--output", "out", "--vocab-size", "300"]
    assert main(prepare) == 0
    assert capsys.readouterr().out.startswith("train: 5 repositories, 5 documents, ")
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert main([*prepare, "--seed", "7"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds a data set" in error and "--overwrite" in error
    assert (tmp_path / "out" / "manifest.json").read_bytes() == manifest
    assert main([*prepare, "--seed", "7", "--overwrite"]) == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() != manifest
    capsys.readouterr()
    given = ["data", "prepare", "src", "--output", "other", "--tokenizer", "out/tokenizer"]
    assert main([*given, "--generation", "starcoder"]) == 2
    assert "expected the format of the tokenizer, 'starcoder2'" in capsys.readouterr().err
    assert main(given) == 0
    capsys.readouterr()
    for name in ("out/train", "out/train.bin", "out/train.idx"):
        assert main(["data", "inspect", name, "--tokenizer", "out/tokenizer"]) == 0
        assert capsys.readouterr().out.startswith("# out/train: 5 documents, ")


def test_what_was_left_out_and_how_it_was_split_is_said(tmp_path, capsys, monkeypatch):
    """One repository, whose folders are divided; one folder in it is not entered."""
    monkeypatch.chdir(tmp_path)
    rows = [
        f'{{"repo_name": "o/n", "path": "{part}/a.py", "content": "{part} = 1234"}}\n'
        for part in ("first", "second")
    ]
    (tmp_path / "src" / "node_modules").mkdir(parents=True)
    (tmp_path / "src" / "d.jsonl").write_text("".join(rows))
    prepare = ["data", "prepare", "src", "--output", "out", "--vocab-size", "300"]
    assert main([*prepare, "--validation-fraction", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 1 repository, 1 document, ")
    assert lines[1].startswith("validation: 1 repository, 1 document, ")
    assert lines[2:] == [
        "folders not entered: 1 hidden or foreign",
        "note: there is one repository only, so what is held out is chosen by the first part of "
        "the path",
    ]


def test_a_source_that_cannot_be_divided_names_the_option_that_helps(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n")
    prepare = ["data", "prepare", "a.py", "--output", "out", "--vocab-size", "300"]
    assert main(prepare) == 2
    assert capsys.readouterr().err.endswith("or hold out nothing: --validation-fraction 0.\n")
    assert main([*prepare, "--validation-fraction", "0"]) == 0


def test_a_tokenizer_of_the_first_generation_needs_no_other_option(tmp_path, capsys, monkeypatch):
    from stellarator.data.tokenizer import Tokenizer

    monkeypatch.chdir(tmp_path)
    Tokenizer.train(["x = 1"], 300, "starcoder").save("t")
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "a.py").write_text(f"{name} = 'some text'\n")
    assert main(["data", "prepare", "src", "--output", "out", "--tokenizer", "t"]) == 0
    assert '"format": "starcoder"' in (tmp_path / "out" / "manifest.json").read_text()


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
    assert recipes_into(subprocess.PIPE, closed=True) == (1, "")


def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        assert recipes_into(full) == (1, "error: No space left on device\n")


def recipes_into(stdout, closed: bool = False) -> tuple[int, str]:
    """(exit code, stderr) of a short output, which stays in Python's buffer until the end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-m", "stellarator", "recipes"],
        env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if closed:
        process.stdout.close()
    with process:
        return process.wait(60), process.stderr.read()


def test_tuning_wants_a_gpu_and_sizes_that_fit(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune", "--output", str(tmp_path / "t")]) == 1
    assert "expected an NVIDIA GPU, found none" in capsys.readouterr().err
    for given, message in (
        (["--head-width", "72"], "expected --head-width in (64, 128, 256), got 72"),
        (["--heads", "5", "--kv-heads", "2"], "expected --heads, a multiple of --kv-heads 2"),
        (["--phases", "up,x"], "'weight gradient'), got ['x']"),
        (["--width", "100"], "expected --width, a multiple of 8, got 100"),
        (["--ffn-width", "0"], "expected --ffn-width, a multiple of 8, got 0"),
    ):
        assert main(["tune", *given]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_table_is_tuned_and_written(capsys, monkeypatch, tmp_path):
    """The races themselves are tested beside the kernels; here entries come out of them."""
    from stellarator_kernels import tuned, tuning, tuning_matmul

    Found, asked = tuning.Found, []
    found = [Found("a 128", {"own": 64}, 1.25), Found("b 128", None, float("inf"))]
    products = [Found("matmul up", {"rows": 64}, 1.0, 0.9)]
    products += [Found("matmul down gradient", None, float("inf"), 0.9)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "GPU One")
    for module, result in ((tuning, found), (tuning_matmul, products)):
        monkeypatch.setattr(
            module, "tune", lambda s, phases, r=result, **_: asked.append((s, phases)) or iter(r)
        )
    assert main(["tune", "--output", str(tmp_path), "--width", "64", "--tokens", "32"]) == 0
    attention, mlp = tuning.Shape(32, 24, 2, 128), tuning_matmul.Shape(32, 64, 12288)
    assert asked == [(attention, tuning.PHASES), (mlp, tuning_matmul.PHASES)]
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == [
        "a 128: {'own': 64}, 1.250 ms",
        "b 128: nothing runs",
        "matmul up: {'rows': 64}, 1.000 ms, 0.90x the speed of the plain product (0.900 ms)",
        "matmul down gradient: nothing runs",
    ]
    assert "gpu_one.json" in out[4] and "STELLARATOR_TABLES" in out[4]
    found[:] = [Found("a 64", {"own": 32}, 1.0)]
    asked.clear()
    phases = ["--phases", "forward,dq"]
    assert main(["tune", "--output", str(tmp_path), "--head-width", "64", *phases]) == 0
    assert asked == [(tuning.Shape(8192, 24, 2, 64), ("forward", "dq"))]
    entries = tuned.read(tmp_path / "gpu_one.json")["entries"]
    assert entries == {"a 128": {"own": 64}, "a 64": {"own": 32}, "matmul up": {"rows": 64}}
