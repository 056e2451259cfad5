"""Builds stellarator_kernels._cuda for the CPU: csrc/cuda as it is, over cuda_emulator/.

The module takes addresses of CPU memory. Vectors that are not aligned end the process, as they
would fault on a GPU. defines: COMPILER, build, load
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parents[1] / "csrc"
COMPILER = shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Icuda"]
KERNELS = [f"-I{TESTS / 'cuda_emulator'}", "-O1", "-Wall", "-Wno-unknown-pragmas"]
KERNELS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]


def build(folder: Path, bugs=(), base: Path | None = None) -> Path:
    """Compile into `folder`; returns the library.

    Args:
        bugs: (file of csrc/cuda, expression that occurs once, another one). The environment's
            PLANTED_BUG says which of them is made, counted from 1; they are compiled at once.
        base: folder of a build whose bindings are taken.
    """
    import pybind11

    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("cpu"))
    for number, (name, old, new) in enumerate(bugs, start=1):
        path = folder / "csrc" / "cuda" / name
        assert (CSRC / "cuda" / name).read_text().count(old) == 1, (name, old)
        text = path.read_text().replace(old, f"(planted({number}) ? {new} : {old})")
        path.write_text(text)
    bindings = (base or folder) / "bindings.o"
    if base is None:
        python = [f"-isystem{x}" for x in (pybind11.get_include(), sysconfig.get_path("include"))]
        words = [*FLAGS, "-O0", *python, "-c", "bindings/cuda/cuda.cpp", "-o", str(bindings)]
        compile_one(words, folder / "csrc")
    objects = [bindings]
    for source in sorted(CSRC.glob("cuda/*.cu")):
        objects.append(folder / f"{source.stem}.o")
        words = ["-x", "c++", "-c", f"cuda/{source.name}", "-o", str(objects[-1])]
        compile_one([*FLAGS, *KERNELS, *words], folder / "csrc")
    library = folder / "_cuda.so"
    compile_one(["-shared", *map(str, objects), "-o", str(library)], folder)
    return library


def compile_one(words: list[str], folder: Path) -> None:
    """Run the compiler; its warnings are errors of the tests."""
    done = subprocess.run([COMPILER, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def load(library: Path):
    """The module of a library; pybind11 would give those of one name the first one's module."""
    spec = importlib.util.spec_from_file_location(f"{library.parent.name}._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
