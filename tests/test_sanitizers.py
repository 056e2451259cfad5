"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The extension is built with both and loaded in place of the usual one; the tests of the ops then run
on it, in a process of their own. torch's memory goes through the sanitizer's allocator, so a kernel
that leaves a tensor is stopped. The guard is seen failing with a kernel that reads one element too
far. Not covered: leaks (Python and torch keep what they have), data races, loads and stores of
whole AMX tiles, which the compiler does not instrument.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"


def preload() -> str:
    """The sanitizer's library, which has to come first in a process; empty if there is none."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform != "linux":
        return ""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the second, or exceptions are not seen
        done = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        )
        found.append(done.stdout.strip())
    return ":".join(found) if all(os.path.isabs(path) for path in found) else ""


needs_sanitizers = pytest.mark.skipif(not preload(), reason="no compiler with sanitizers")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with stellarator_kernels and its extension built with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("csrc", "kernels", "engine"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def build(folder: Path):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS, "NVCC": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def run(folder: Path, *arguments: str, **variables: str):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(folder / name) for name in ("engine", "kernels")),
        "LD_PRELOAD": preload(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "OMP_NUM_THREADS": "1",  # tests that are about more set them; two wait long for a busy core
        "STELLARATOR_ARENA": "0",  # the sanitizer's own allocator sees every result
        **variables,
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@needs_sanitizers
@pytest.mark.timeout(900)  # it builds the extension first, which takes minutes beside other work
def test_the_tests_of_the_ops_pass_under_the_sanitizers(package):
    files = sorted(str(path) for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    done = run(
        *(package, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("-k", "(cpu or cpp) and not triton and not test_cuda", *files),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@needs_sanitizers
def test_the_arena_under_the_sanitizers(package):
    file = str(ROOT / "tests" / "ops" / "test_arena.py")
    words = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", file)
    words += ("-k", "not limited")  # the sanitizer wants addresses without a limit
    done = run(package, *words, STELLARATOR_ARENA="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


READ_TOO_FAR = """
import torch
from stellarator_kernels import extension
x = torch.ones(1000)
extension.load().sum_of_squares(
    x=x.data_ptr(), is_bfloat16=False, n=1001, threads=1, isa=extension.isa()
)
"""


@needs_sanitizers
def test_a_kernel_that_reads_too_far_is_stopped(package):
    done = run(package, "-c", READ_TOO_FAR)
    assert done.returncode == 99 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
