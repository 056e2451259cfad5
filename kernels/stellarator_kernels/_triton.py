"""The one place that imports Triton, so that machines without it can still import every op.

defines: triton, tl, INTERPRETED

Kernel files write `from stellarator_kernels._triton import tl, triton`. Without Triton `triton.jit`
leaves a function as it is; `dispatch` never chooses it.
"""

import os

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Stands for `triton` and `tl` in decorators and annotations of kernels that never run."""

        constexpr = None

        @staticmethod
        def jit(function):
            return function

    triton = tl = _Absent()

# Read when Triton decorates a kernel, so fixed from here on.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

__all__ = ["INTERPRETED", "tl", "triton"]
