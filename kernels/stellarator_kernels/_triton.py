"""The one place that imports Triton, so that machines without it can still import every op.

defines: triton, tl, FAILURE, INTERPRETED, FUSED, UNFUSED

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

# Options of a launch, told because Triton 3.10 changes the default: a product and the sum behind it
# become one operation that rounds once; or stay two, where kernels are to round as one another, or
# as the C++ does.
FUSED, UNFUSED = {"enable_fp_fusion": True}, {"enable_fp_fusion": False}

__all__ = ["FAILURE", "FUSED", "INTERPRETED", "UNFUSED", "tl", "triton"]
