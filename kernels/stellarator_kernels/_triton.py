"""The one place that imports Triton, so that machines without it can still import every op.

defines: triton, tl, FAILURE, INTERPRETED

Kernel files write `from stellarator_kernels._triton import tl, triton`. Without Triton, or with one
that breaks while it is imported, `triton.jit` leaves a function as it is; `dispatch` never chooses
it and says why.
"""

import os

FAILURE = None  # why Triton cannot be imported, in one line; None: it can
try:
    import triton
    import triton.language as tl
except Exception as error:  # a broken or mismatched install raises more than ImportError
    FAILURE = f"{type(error).__name__}: {error}".splitlines()[0]

    class Absent:
        """Stands for `triton` and `tl` in decorators and annotations of kernels that never run."""

        constexpr = None

        @staticmethod
        def jit(function):
            return function

    triton = tl = Absent()

# Read when Triton decorates a kernel, so fixed from here on.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

__all__ = ["FAILURE", "INTERPRETED", "tl", "triton"]
