"""The shell commands of README.md, run in their order as a new user would, in an empty folder.

Left out are `make`, which installs, and activating its environment: here `stellarator` and
`torchrun` are this interpreter's. The model of `make demo` is that of the tiny run, so what needs
it comes last. Not covered: the blocks of Python, which need a published model.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for block in TEXT.split("\n\n")
    if all(line.startswith("    ") for line in block.splitlines())
    for line in block.splitlines()
    if not line.strip().startswith(("make ", ". "))
]
PROGRAMS = {"stellarator": "stellarator", "torchrun": "torch.distributed.run"}


@pytest.fixture
def folder(tmp_path):
    """A folder with code of two repositories, a file to fill in, and the programs."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("json", "http", "email", "logging"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(stdlib / name, tmp_path / "SOURCE" / name, ignore=ignored)
    (tmp_path / "path" / "to").mkdir(parents=True)
    shutil.copy(stdlib / "json" / "decoder.py", tmp_path / "path" / "to" / "file.py")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, module in PROGRAMS.items():
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        program.chmod(0o755)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_run_in_their_order(folder):
    of_the_demo = [c for c in COMMANDS if {"infill", "generate"} & {*c.split()}]
    of_the_demo = [c for c in of_the_demo if "--model" not in c]
    commands = [c for c in COMMANDS if c not in of_the_demo] + of_the_demo
    assert {word for c in commands for word in c.split()} >= {"prepare", "train", "torchrun"}
    assert len(commands) >= 8
    paths = (str(ROOT / "engine"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {
        "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(paths),
    }
    for command in commands:
        if command in of_the_demo and not (folder / "runs" / "demo").exists():
            shutil.copytree(folder / "runs" / "tiny" / "model", folder / "runs" / "demo" / "model")
        done = subprocess.run(
            command.replace("SOURCE...", "SOURCE"),
            shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for run in ("tiny", "two"):
        assert '"status": "done"' in (folder / "runs" / run / "status.json").read_text()
