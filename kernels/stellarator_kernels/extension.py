"""The C++ extensions: `stellarator_kernels._cpu`, and `stellarator_kernels._cuda` where nvcc was.

defines: failure, load, isa, address, rows, stream, ISA_VARIABLE

Both are optional. `dispatch` asks here, at first use, whether one loads: a file that is there may
be made for another machine or another Python. That a GPU is there is not asked: loading starts
nothing on it.
"""

import functools
import importlib
import os

import torch  # noqa: F401  before the extension, which borrows torch's threads

ISA_VARIABLE = "STELLARATOR_ISA"


@functools.cache
def failure(name: str = "_cpu") -> str | None:
    """Why the extension cannot be used, in one line; None if it can."""
    try:
        importlib.import_module(f"stellarator_kernels.{name}")
    except ImportError as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def load(name: str = "_cpu"):
    """The module `stellarator_kernels._cpu`, or the other one.

    Raises:
        RuntimeError: it is not built, or built for another machine; the message says what to do.
    """
    reason = failure(name)
    if reason is not None:
        raise RuntimeError(
            f"extension: expected stellarator_kernels.{name} to load, got {reason!r}. "
            "Run `stellarator doctor` for the command that builds it, or pass impl='torch'."
        )
    return importlib.import_module(f"stellarator_kernels.{name}")


def isa():
    """The instruction set that the kernels run on: the best of this machine, or the forced one.

    STELLARATOR_ISA=portable, avx2, avx512, avx512_bf16 or amx forces it, to compare or to find a
    fault. AdamW and the gradient norm have the same bits on all of them; the others differ in
    rounding. Large products of 16 bits, which are ATen's, follow it, too (widened.py).

    Raises:
        ValueError: STELLARATOR_ISA holds another word.
        RuntimeError: this machine does not have that instruction set.
    """
    module = load()
    best = module.best_isa()
    name = os.environ.get(ISA_VARIABLE, "")
    if not name:
        return best
    names = list(module.Isa.__members__)
    if name not in names:
        raise ValueError(
            f"extension: expected {ISA_VARIABLE} in {names}, got {name!r}. Unset it for the best."
        )
    forced = module.Isa.__members__[name]
    if int(forced) > int(best):
        raise RuntimeError(
            f"extension: expected {ISA_VARIABLE} up to {best.name!r}, the best of this machine, "
            f"got {name!r}. Unset it for the best."
        )
    return forced


def address(x: torch.Tensor | None) -> int:
    """Where the first element lies; 0 for None."""
    return 0 if x is None else x.data_ptr()


def rows(x: torch.Tensor | None) -> tuple[int, int]:
    """Address and stride of the rows of a matrix, whose elements are adjacent; zeros for None."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def stream(x: torch.Tensor) -> int:
    """The stream on which torch works on the device of `x`, as CUDA's runtime takes it."""
    return torch.cuda.current_stream(x.device).cuda_stream
