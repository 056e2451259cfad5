"""The one place that imports Gluon, the dialect of Triton with explicit layouts and barriers.

defines: gluon, gl, TensorDescriptor, fence_async_shared, mbarrier, tma_load, tma_store,
    tma_store_wait, warpgroup_mma, warpgroup_mma_wait, FAILURE

Gluon is experimental: names differ between Triton 3.6 and 3.9, and are made one here. Without it,
kernels become plain functions that nobody calls; `FAILURE` says why.
"""

from stellarator_kernels import _triton

FAILURE = _triton.FAILURE  # why Gluon cannot be imported, in one line; None: it can
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Triton 3.9 keeps the old names, which raise.
    tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    tma_store_wait = tma.store_wait
except Exception as error:  # a broken or mismatched install raises more than ImportError
    FAILURE = FAILURE or f"{type(error).__name__}: {error}".splitlines()[0]
    gluon = gl = _triton.Absent()
    TensorDescriptor = fence_async_shared = mbarrier = warpgroup_mma = warpgroup_mma_wait = None
    tma_load = tma_store = tma_store_wait = None

__all__ = [
    "FAILURE",
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
