"""What the tests of the ops share: where Triton runs, and the dtypes of each implementation.

`pytest tests/ops` on a machine with a GPU (8.0 or newer) runs the Triton kernels there, on tensors
that are made there. Elsewhere they run in Triton's interpreter; so they do in a run of all tests,
because Triton reads TRITON_INTERPRET once, when the first of them imports it. With
CUDA_VISIBLE_DEVICES= (empty) a machine with a GPU is like any other.

`STELLARATOR_EMULATED_GPU=sm_90 pytest tests/ops` (or sm_80) runs what would run on a GPU, compiled
for that one, in ptx_machine/; `STELLARATOR_EMULATED_SEED=1` gives another order of events.

defines: NATIVE, EMULATED, COMPILED, TRITON, INTERPRETED, EXTENSION, CPU, CPU_CASES, CUDA, IMPLS,
KERNELS, IMPLS_ON_CPU, CASES, levels, threads, generator
"""

import contextlib
import os
import sys

import pytest
import torch

# Before the kernels, which import Triton.
EMULATED = os.environ.get("STELLARATOR_EMULATED_GPU") or None  # the architecture
NATIVE = (
    EMULATED is None
    and "triton" not in sys.modules
    and torch.cuda.is_available()
    and torch.cuda.get_device_capability() >= (8, 0)
)
COMPILED = NATIVE or EMULATED is not None
if COMPILED:
    os.environ["TRITON_INTERPRET"] = "0"

from stellarator_kernels import extension  # noqa: E402

# Marks of a test that runs a Triton kernel: anywhere; in the interpreter only.
INTERPRETED = pytest.mark.interpret
TRITON = pytest.mark.gpu if NATIVE else pytest.mark.emulated if EMULATED else INTERPRETED

# Mark of a test of the C++ kernels, and their parameters.
EXTENSION = pytest.mark.skipif(
    extension.failure() is not None, reason=f"no C++ extension: {extension.failure()}"
)
CPU = pytest.param("cpu", marks=EXTENSION)
CPU_CASES = [
    pytest.param("cpu", dtype, marks=EXTENSION) for dtype in (torch.bfloat16, torch.float32)
]

# The CUDA C++ is there on a GPU only; on a CPU test_cuda.py runs it.
BUILT = pytest.mark.skipif(
    extension.failure("_cuda") is not None, reason=f"no nvcc: {extension.failure('_cuda')}"
)
ON_GPU = [pytest.mark.gpu, BUILT]
CUDA = [pytest.param("cuda", marks=ON_GPU)] if NATIVE else []
CUDA_CASES = [
    pytest.param("cuda", dtype, marks=ON_GPU) for dtype in (torch.bfloat16, torch.float32) if NATIVE
]

IMPLS = ["torch", "reference", pytest.param("triton", marks=TRITON)]
KERNELS = [IMPLS[0], IMPLS[2]]  # without the plain formulas
IMPLS_ON_CPU = ["torch", "reference", pytest.param("triton", marks=INTERPRETED)]
CASES = [
    (impl, dtype) for impl in ("torch", "reference") for dtype in (torch.bfloat16, torch.float32)
]
CASES += [
    pytest.param("triton", dtype, marks=TRITON)
    for dtype in (torch.float16, torch.float32, torch.bfloat16)
    if COMPILED or dtype != torch.bfloat16  # the interpreter's casts to bf16 truncate
]


def levels() -> list[str]:
    """Instruction sets of the C++ kernels that run here."""
    if extension.failure() is not None:
        return []
    module = extension.load()
    best = int(module.best_isa())
    return [name for name, isa in module.Isa.__members__.items() if int(isa) <= best]


@contextlib.contextmanager
def threads(count: int):
    """torch's number of threads, which the C++ kernels take, is `count` within this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generator(seed: int) -> torch.Generator:
    """Random numbers for tensors on the device of the test."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
