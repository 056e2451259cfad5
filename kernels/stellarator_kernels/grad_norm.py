"""The L2 norm over a list of tensors, the same to the bit for any number of threads.

norm = sqrt(sum of x^2 over all elements of all tensors)

Moved: each element is read once. Accumulated in float64, in blocks of fixed length whose sums are
added in their order, so neither threads nor the size of the GPU change the result; the order
differs between implementations, by about 1e-16 relative before the result is rounded to float32
(it stays float64 for float64 tensors).
The host does not wait for a GPU.
"""

import math
from collections.abc import Sequence

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels._triton import tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device
from stellarator_kernels.dispatch import choose, narrowest

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK = 2048
_BLOCKS_PER_PROGRAM = 16
# ATen splits a sum to one number among threads above 32768 elements; below, the order is fixed.
_TORCH_BLOCK = 16384
_TORCH_SLICE = 1 << 24


@triton.jit
def _squares_kernel(x_ptr, sums_ptr, n, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """sums[program] = sum of squares of the program's BLOCK * BLOCKS elements, in float64."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    acc = tl.zeros((BLOCK,), dtype=tl.float64)
    for i in range(BLOCKS):
        cols = start + i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < n, other=0.0).to(tl.float32).to(tl.float64)
        acc += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(acc, axis=0))


@triton.jit
def _root_kernel(sums_ptr, norm_ptr, n, BLOCK: tl.constexpr):
    """norm = sqrt(sum of the n partial sums); one program, in order."""
    acc = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        acc += tl.load(sums_ptr + cols, mask=cols < n, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(acc, axis=0)).to(tl.float32))


def _norm_triton(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One launch per tensor, one more for the root."""
    counts = [triton.cdiv(x.numel(), _BLOCK * _BLOCKS_PER_PROGRAM) for x in tensors]
    sums = tensors[0].new_empty(sum(counts), dtype=torch.float64)
    norm = tensors[0].new_empty((), dtype=torch.float32)
    with torch.cuda.device_of(norm):
        start = 0
        for x, count in zip(tensors, counts, strict=True):
            _squares_kernel[(count,)](
                x, sums[start:], x.numel(), BLOCK=_BLOCK, BLOCKS=_BLOCKS_PER_PROGRAM
            )
            start += count
        _root_kernel[(1,)](sums, norm, sums.numel(), BLOCK=_BLOCK)
    return norm


def _norm_cpu(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The C++ kernel; the tensors' sums are added in the order of the list."""
    module, isa, threads = extension.load(), extension.isa(), torch.get_num_threads()
    total = 0.0
    for x in tensors:
        total += module.sum_of_squares(
            x=x.data_ptr(),
            is_bfloat16=x.dtype == torch.bfloat16,
            n=x.numel(),
            threads=threads,
            isa=isa,
        )
    return torch.tensor(math.sqrt(total), dtype=torch.float32)


def _sum_in_blocks(x: torch.Tensor) -> torch.Tensor:
    """Sum of a float64 vector, by blocks of fixed length."""
    while x.numel() > 1:
        x = torch.nn.functional.pad(x, (0, -x.numel() % _TORCH_BLOCK))
        x = x.view(-1, _TORCH_BLOCK).sum(dim=1)
    return x


def _norm_torch(tensors: list[torch.Tensor]) -> torch.Tensor:
    """ATen's sums over rows of fixed length, in slices that bound the float64 copies; float64."""
    slices = [part for x in tensors for part in x.split(_TORCH_SLICE)]
    sums = [_sum_in_blocks(part.double().square()) for part in slices]
    return _sum_in_blocks(torch.cat(sums)).sqrt().reshape(())


_NORMS = {
    "triton": _norm_triton,
    "cpu": _norm_cpu,
    "torch": _norm_torch,
    "reference": reference.grad_norm_ref,
}


@torch.library.custom_op("stellarator::grad_norm", mutates_args=())
def _grad_norm(tensors: Sequence[torch.Tensor], impl: str) -> torch.Tensor:
    deciding = narrowest(tensors)
    norm, dtype = _NORMS[choose("grad_norm", impl, deciding)], reference.compute_dtype(deciding)
    flat = [x.contiguous().view(-1) for x in tensors if x.numel()]
    if not flat:
        return tensors[0].new_zeros((), dtype=dtype)
    return norm(flat).to(dtype)


@_grad_norm.register_fake
def _(tensors, impl):
    return tensors[0].new_empty((), dtype=reference.compute_dtype(narrowest(tensors)))


@torch.no_grad()
def grad_norm(tensors: Sequence[torch.Tensor], *, impl: str = "auto") -> torch.Tensor:
    """L2 norm over all elements of all tensors, as a 0-d tensor.

    norm = sqrt(sum x^2)

    Args:
        tensors: at least one tensor of any shape on one device, floating-point, dtypes may differ.
            Those that are not contiguous are copied.
    Returns:
        norm: () float32, or float64 if one of the tensors is, on their device; NaN if any element
            is NaN.
    Raises:
        ValueError: no tensors, another dtype, several devices.
        RuntimeError: `impl` cannot run here.
    Cost: reads each element once, 2 operations per element.
    """
    expect(len(tensors) > 0, "grad_norm", "at least one tensor", "an empty list", "Pass gradients")
    for i, x in enumerate(tensors):
        expect_dtype("grad_norm", f"tensors[{i}]", x, _DTYPES, "Pass floating-point tensors")
    devices = {str(x.device): x for x in tensors}
    expect_same_device("grad_norm", **devices)
    return _grad_norm(list(tensors), impl)
