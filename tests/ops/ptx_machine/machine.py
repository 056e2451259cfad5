"""Builds the machine of machine.cpp and runs kernels on it.

defines: COMPILER, EmulationError, library, run
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from ptx_machine import instructions, reader

FOLDER = Path(__file__).resolve().parent
COMPILER = shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fwrapv", "-fPIC"]
FLAGS += ["-Wall", "-Wno-sign-compare"]


class EmulationError(RuntimeError):
    """A kernel does what it must not: block, warp and instruction are in the message."""


@functools.cache
def library() -> ctypes.CDLL:
    """The machine, compiled once for each version of its sources."""
    numbers = {
        "OPS": ", ".join(f"o_{name}" for name in instructions.OPERATIONS),
        "TYPES": ", ".join(f"t_{name}" for name in instructions.TYPES),
    }
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in numbers.items())]
    sources = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])
    text = " ".join([COMPILER, *flags, *(path.read_text() for path in sources)])
    name = f"ptx_machine_{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    path = Path(tempfile.gettempdir()) / f"stellarator_{os.getuid()}" / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    assert path.parent.stat().st_uid == os.getuid(), f"{path.parent} is somebody else's"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / name
            words = [COMPILER, *flags, "-shared", "-o", str(made)]
            words += [str(source) for source in sources if source.suffix == ".cpp"]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == 0 and not done.stderr, done.stderr
            made.replace(path)
    found = ctypes.CDLL(str(path))
    found.emulate.restype = ctypes.c_int
    return found


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def run(
    kernel: reader.Kernel,
    grid: tuple[int, int, int],
    params: bytes,
    shared_bytes: int,
    threads: int,
    ranges: list[tuple[int, int]] = (),
    seed: int = 0,
    limit: int = 10**9,
) -> int:
    """Run every block; returns the number of instructions, each of a whole warp.

    Args:
        params: as they lie in the parameter space.
        shared_bytes: of dynamic shared memory; that which the kernel declares comes on its own.
        ranges: begin and end of the memory that the kernel may touch; none: all.
        seed: of the order in which warps and copies take turns.
        limit: instructions.
    Raises:
        EmulationError: see machine.cpp.
    """
    # Tensor maps are parameters, and lie at multiples of 64.
    room = np.zeros(len(params) + 64, np.uint8)
    view = room[-room.ctypes.data % 64 :][: max(1, len(params))]
    view[: len(params)] = np.frombuffer(params, np.uint8)
    message, counts = ctypes.create_string_buffer(1000), np.zeros(2, np.int64)
    ends = np.array([x for pair in ranges for x in pair] or [0], np.uint64)
    sizes = np.array(grid, np.uint32)
    failed = library().emulate(
        _pointer(kernel.code), _pointer(kernel.operands), _pointer(kernel.constants),
        kernel.register_bytes, max(shared_bytes, kernel.shared_bytes), kernel.local_bytes, threads,
        _pointer(sizes), _pointer(view), _pointer(ends), len(ranges), ctypes.c_uint64(seed),
        ctypes.c_int64(limit), message, _pointer(counts),
    )  # fmt: skip
    if failed:
        raise EmulationError(
            f"{kernel.name}, {message.value.decode()}, at {kernel.lines[counts[1]]!r}"
        )
    return int(counts[0])
