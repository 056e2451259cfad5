"""The table "Who may import whom" of the architecture page, kept with `ast`; imports do nothing.

The rules apply to whatever files exist. Not covered: imports made with importlib from strings.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTAINERS = {"stellarator": ROOT / "engine", "stellarator_kernels": ROOT / "kernels"}
# Read from the path of a byte: nothing above imports these.
TOP = [
    f"stellarator.{name}"
    for name in ("cli", "demo", "doctor", "plan", "train.loop", "train.__main__")
]
TOP += [f"stellarator.{name}" for name in ("serve", "evaluate", "finetune")]
TRAINING = ["stellarator.train.optimizer", "stellarator.train.checkpoint"]
# Module or package -> what it must not import, wherever in the file the import stands.
FORBIDDEN = {
    "stellarator_kernels": ["stellarator", "torch.distributed", "transformers"],
    "stellarator.data": ["stellarator.model", "stellarator.parallel", "stellarator.train", *TOP],
    "stellarator.parallel": ["stellarator.data", "stellarator.model", "stellarator.train", *TOP],
    "stellarator.model": ["stellarator.data", "stellarator.train", *TOP],
    "stellarator.train.loss": ["stellarator.data", *TRAINING, *TOP],
    "stellarator.train.optimizer": ["stellarator.data", "stellarator.model", *TOP],
}
# Module -> all of this project that it may import, beside the standard library and (last column)
# other packages.
ALLOWED = {
    "stellarator.config": ([], []),
    "stellarator.sizes": (["stellarator.config"], []),
    "stellarator.files": ([], []),  # so that data, model and train may all import it
    "stellarator.recipes": (["stellarator.config"], []),
    "stellarator.settings": (
        ["stellarator.config", "stellarator.recipes", "stellarator.parallel.layout"],
        [],
    ),
    "stellarator.parallel.pipeline.schedules": ([], []),
    "stellarator.parallel.layout": (
        ["stellarator.config", "stellarator.parallel.pipeline.schedules"],
        [],
    ),
    "stellarator.train.schedule": (["stellarator.config"], []),
    "stellarator.train.checkpoint": (
        [f"stellarator.{name}" for name in ("config", "files", "parallel.mesh", "parallel.shard")],
        ["torch", "safetensors", "numpy"],
    ),
}
TORCH_IN_DATA = {"stellarator.data.batches"}
WITHOUT_TORCH = ["stellarator", "stellarator.config", "stellarator.cli", "stellarator.recipes"]
WITHOUT_TORCH += ["stellarator.settings", "stellarator.train.schedule", "stellarator.doctor"]
WITHOUT_TORCH += ["stellarator.files", "stellarator.sizes", "stellarator.parallel.layout"]
WITHOUT_TORCH += [
    f"stellarator.parallel.pipeline.{name}" for name in ("schedules", "simulate", "split")
]
WITHOUT_TORCH += ["stellarator.plan", "stellarator.plan.command"]


def python_files():
    """{module name: path} of both packages."""
    found = {}
    for package, container in CONTAINERS.items():
        for path in sorted((container / package).rglob("*.py")):
            parts = path.relative_to(container).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = python_files()


def imported(tree):
    """Every module named in an import, with its line; `from a import b` gives a and a.b.

    Uses such as `torch.distributed.init()` after `import torch` count as imports of what is named.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module, node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "torch" and node.attr == "distributed":
                yield "torch.distributed", node.lineno


def under(module, prefix):
    """`module` is `prefix` or inside it."""
    return module == prefix or module.startswith(prefix + ".")


def violations(files):
    """One line for each broken rule."""
    found = []
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, line in imported(tree):
            where = f"{module}:{line}: {name}"
            for part, forbidden in FORBIDDEN.items():
                if under(module, part):
                    found += [
                        f"{where}: {part} must not import {x}"
                        for x in forbidden
                        if under(name, x) and not under(module, x)
                    ]
            if module in ALLOWED:
                found += _not_allowed(name, *ALLOWED[module], where)
            if under(module, "stellarator.data") and module not in TORCH_IN_DATA:
                found += [f"{where}: torch in batches.py only"] * under(name, "torch")
            if name.split(".")[0] in ("tests", "benchmarks"):
                found.append(f"{where}: nobody imports it")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    found.append(f"{module}:{node.lineno}: relative import")
                if any(alias.name == "*" for alias in node.names):
                    found.append(f"{module}:{node.lineno}: import *")
    return found


def _not_allowed(name, own, others, where):
    """The line for a module that may import `own`, `others` and the standard library only."""
    root = name.split(".")[0]
    if root in sys.stdlib_module_names or any(under(name, x) for x in own + others):
        return []
    if any(under(x, name) for x in own):  # `from stellarator.parallel import mesh`
        return []
    return [f"{where}: only {own + others} and the standard library"]


def test_who_may_import_whom():
    assert violations(FILES) == []


@pytest.mark.parametrize(
    "module, source, broken",
    [
        ("stellarator_kernels.x", "import stellarator.config", True),
        ("stellarator_kernels.x", "import torch\ntorch.distributed.barrier()", True),
        ("stellarator_kernels.x", "def f():\n    from transformers import AutoModel", True),
        ("stellarator.config", "import torch", True),
        ("stellarator.config", "from dataclasses import dataclass", False),
        ("stellarator.recipes", "from stellarator.config import RunConfig", False),
        ("stellarator.files", "import torch", True),
        ("stellarator.files", "from stellarator.config import RunConfig", True),
        ("stellarator.data.shards", "from stellarator.files import sync", False),
        ("stellarator.model.hf", "from stellarator.files import sync", False),
        ("stellarator.train.checkpoint", "from stellarator.files import sync", False),
        ("stellarator_kernels.x", "from stellarator.files import sync", True),
        ("stellarator.data.shards", "import torch", True),
        ("stellarator.data.batches", "import torch", False),
        ("stellarator.data.fim", "from stellarator import model", True),
        ("stellarator.parallel.mesh", "from stellarator.train import loop", True),
        ("stellarator.model.mlp", "from stellarator.parallel.mesh import Mesh", False),
        ("stellarator.model.mlp", "from stellarator.train.optimizer import FlatOptimizer", True),
        ("stellarator.train.checkpoint", "from stellarator.parallel import mesh", False),
        ("stellarator.train.checkpoint", "from stellarator.model import transformer", True),
        ("stellarator.train.loop", "from stellarator.data.batches import Batches", False),
        ("stellarator.train.loop", "from tests import helpers", True),
        ("stellarator.train.loop", "from stellarator.config import *", True),
        ("stellarator.train.loop", "from . import schedule", True),
    ],
)
def test_the_rules_can_fail(tmp_path, module, source, broken):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert bool(violations({module: path})) == broken


def test_containers_are_not_packages():
    """`kernels` is also the name of a package that transformers imports."""
    for folder in ("engine", "kernels"):
        assert not (ROOT / folder / "__init__.py").exists(), folder
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    for container in CONTAINERS.values():
        packages = [p.parent.relative_to(container) for p in container.rglob("__init__.py")]
        assert [p for p in packages if "kernels" in p.parts] == []
        assert {p.parts[0] for p in packages} <= set(CONTAINERS)
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names)), "pytest needs unique file names"


def test_csrc_has_no_torch_headers():
    for path in (ROOT / "csrc").rglob("*.*"):
        for line in path.read_text(encoding="utf-8").splitlines():
            header = line.replace(" ", "").removeprefix("#include").lstrip('<"')
            assert not header.startswith(("torch/", "ATen/", "c10/")), path


REPORT = """
import importlib, json, logging, os, signal, sys
environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps({
    "modules": [n for n in ("torch", "triton", "transformers", "numpy") if n in sys.modules],
    "environment": dict(os.environ) == environment,
    "signals": signal.getsignal(signal.SIGTERM) == handler,
    "logging": logging.getLogger().handlers == [],
    "cuda": "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized(),
}))
"""


def import_in_process(modules):
    """What importing `modules` in a fresh interpreter leaves behind."""
    path = ":".join(str(folder) for folder in CONTAINERS.values())
    command = [sys.executable, "-c", REPORT, json.dumps(modules)]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_configuration_and_command_line_import_no_torch():
    modules = [name for name in WITHOUT_TORCH if name in FILES]
    assert import_in_process(modules)["modules"] == []


def test_imports_do_nothing():
    """All modules of both packages at once, except those that are programs."""
    state = import_in_process([name for name in FILES if not name.endswith("__main__")])
    assert state["environment"] and state["signals"] and state["logging"] and not state["cuda"]
    assert "transformers" not in state["modules"]
