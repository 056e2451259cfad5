"""Memory layout that the kernels ask for, and how many programs run at once.

defines: UNIT, dense_rows, aligned_rows, strides_in_units, multiprocessors
"""

import torch

UNIT = 8  # elements: 16 bytes of a 16-bit dtype, the most that one load takes


def dense_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x`, copied only if the elements of its last dimension are apart."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` (..., D), copied if it is dense otherwise than in rows that loads can take whole.

    Slices of one (B, T, (H + 2G) * D) projection need no copy where D is a multiple of UNIT.
    """
    strides = [s for s, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    whole = all(s % UNIT == 0 for s in strides)
    return x if x.stride(-1) == 1 and whole and x.data_ptr() % 16 == 0 else x.contiguous()


def strides_in_units(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of the first three dimensions of an `aligned_rows` tensor, in UNITs.

    A launch tells Triton only which arguments are multiples of 16. A kernel that multiplies these
    by UNIT says of all others, too, that loads can be whole and run ahead of the products: single
    elements are loaded otherwise, and heads of 72 spill 92 bytes (forward on sm_90, Triton 3.9).
    """
    return tuple(s // UNIT if n > 1 else 0 for s, n in zip(x.stride(), x.shape[:3], strict=False))


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter plays a machine with two."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
