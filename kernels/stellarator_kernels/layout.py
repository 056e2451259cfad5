"""Memory layout that the kernels ask for.

defines: dense_rows, aligned_rows
"""

import torch


def dense_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x`, copied only if the elements of its last dimension are apart."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` (B, T, H, D), copied if it is dense otherwise than in rows that loads can take whole.

    A launch tells Triton which addresses and strides are multiples of 16. Of others it loads single
    elements, none ahead of the products, and the dq kernel spills (36 to 44 bytes for bf16 heads of
    128 on sm_90, measured with Triton 3.9). A copy is cheaper; slices of one (B, T, (H + 2G) * D)
    projection need none.
    """
    aligned = x.stride(-1) == 1 and x.stride(1) % 16 == 0 and x.data_ptr() % 16 == 0
    return x if aligned else x.contiguous()
