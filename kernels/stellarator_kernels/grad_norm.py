"""The L2 norm over a list of tensors, the same to the bit for any number of threads.

norm = sqrt(sum over the tensors of weight * sum of x^2 over its elements)

The weights let a caller whose ranks hold some tensors several times count each once: a weight of
one over their number, or 1 on one rank and 0 on the others. It adds the squares of the ranks.

Moved: each element is read once. Accumulated in float64, in blocks of fixed length whose sums are
added in their order, so neither threads nor the size of the GPU change the result; the order
differs between implementations, by about 1e-16 relative before the result is rounded to float32
(it stays float64 for float64 tensors). A weight multiplies a finished sum, in float64.
The host does not wait for a GPU.
"""

import math
from collections.abc import Sequence

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels._triton import FUSED, tl, triton
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
def _total_kernel(sums_ptr, total_ptr, n, BLOCK: tl.constexpr):
    """total = sum of the n partial sums; one program, in order."""
    acc = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        acc += tl.load(sums_ptr + cols, mask=cols < n, other=0.0)
    tl.store(total_ptr, tl.sum(acc, axis=0))


def _sum_triton(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """One launch per tensor, one for each weight that is not 1, one more for the total."""
    counts = [triton.cdiv(x.numel(), _BLOCK * _BLOCKS_PER_PROGRAM) for x in tensors]
    sums = tensors[0].new_empty(sum(counts), dtype=torch.float64)
    total = tensors[0].new_empty((), dtype=torch.float64)
    with torch.cuda.device_of(total):
        start = 0
        for x, count, weight in zip(tensors, counts, weights, strict=True):
            _squares_kernel[(count,)](
                x,
                sums[start:],
                x.numel(),
                BLOCK=_BLOCK,
                BLOCKS=_BLOCKS_PER_PROGRAM,
                **FUSED,
            )
            if weight != 1.0:
                sums[start : start + count] *= weight
            start += count
        _total_kernel[(1,)](sums, total, sums.numel(), BLOCK=_BLOCK, **FUSED)
    return total


def _sum_cuda(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """One launch for each tensor and one for the total, on torch's stream."""
    module, first = extension.load("_cuda"), tensors[0]
    counts = [-(-x.numel() // module.squares_per_sum) for x in tensors]
    sums = first.new_empty(sum(counts), dtype=torch.float64)
    total = first.new_empty((), dtype=torch.float64)
    with torch.cuda.device_of(first):
        stream, start = extension.stream(first), 0
        for x, count, weight in zip(tensors, counts, weights, strict=True):
            module.sums_of_squares(
                x=x.data_ptr(),
                is_bfloat16=x.dtype == torch.bfloat16,
                n=x.numel(),
                weight=weight,
                sums=sums[start:].data_ptr(),
                stream=stream,
            )
            start += count
        module.total_of_sums(
            sums=sums.data_ptr(), n=sums.numel(), total=total.data_ptr(), stream=stream
        )
    return total


def _sum_cpu(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """The C++ kernel; the tensors' sums are added in the order of the list."""
    module, isa, threads = extension.load(), extension.isa(), torch.get_num_threads()
    total = 0.0
    for x, weight in zip(tensors, weights, strict=True):
        total += weight * module.sum_of_squares(
            x=x.data_ptr(),
            is_bfloat16=x.dtype == torch.bfloat16,
            n=x.numel(),
            threads=threads,
            isa=isa,
        )
    return torch.tensor(total, dtype=torch.float64)


def _sum_in_blocks(x: torch.Tensor) -> torch.Tensor:
    """Sum of a float64 vector, by blocks of fixed length."""
    while x.numel() > 1:
        x = torch.nn.functional.pad(x, (0, -x.numel() % _TORCH_BLOCK))
        x = x.view(-1, _TORCH_BLOCK).sum(dim=1)
    return x


def _sum_torch(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """ATen's sums over rows of fixed length, in slices that bound the float64 copies."""
    slices = [
        (part, w) for x, w in zip(tensors, weights, strict=True) for part in x.split(_TORCH_SLICE)
    ]
    sums = [_sum_in_blocks(part.double().square()) * w for part, w in slices]
    return _sum_in_blocks(torch.cat(sums)).reshape(())


_SUMS = {
    "triton": _sum_triton,
    "cuda": _sum_cuda,
    "cpu": _sum_cpu,
    "torch": _sum_torch,
    "reference": reference.sum_of_squares_ref,
}


@torch.library.custom_op("stellarator::grad_norm", mutates_args=())
def _grad_norm(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], squared: bool, impl: str
) -> torch.Tensor:
    deciding = narrowest(tensors)
    add, dtype = _SUMS[choose("grad_norm", impl, deciding)], reference.compute_dtype(deciding)
    counted = [
        (x.contiguous().view(-1), w)
        for x, w in zip(tensors, weights, strict=True)
        if x.numel() and w != 0.0
    ]
    total = tensors[0].new_zeros((), dtype=torch.float64)
    if counted:
        total = add(*map(list, zip(*counted, strict=True)))
    return total if squared else total.sqrt().to(dtype)


@_grad_norm.register_fake
def _(tensors, weights, squared, impl):
    dtype = torch.float64 if squared else reference.compute_dtype(narrowest(tensors))
    return tensors[0].new_empty((), dtype=dtype)


@torch.no_grad()
def grad_norm(
    tensors: Sequence[torch.Tensor],
    *,
    weights: Sequence[float] | None = None,
    squared: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """L2 norm over all elements of all tensors, as a 0-d tensor.

    norm = sqrt(sum weight * x^2)

    Args:
        tensors: at least one tensor of any shape on one device, floating-point, dtypes may differ.
            Those that are not contiguous are copied.
        weights: one finite number >= 0 for each tensor, by which its squares count; None: 1. A
            tensor of weight 0 is not read.
        squared: the sum without the root, to be added to that of other ranks.
    Returns:
        norm: () float32, or float64 if one of the tensors is, on their device; NaN if any element
            is NaN. Squared: () float64.
    Raises:
        ValueError: no tensors, another dtype, several devices; other weights.
        RuntimeError: `impl` cannot run here.
    Cost: reads each element once, 2 operations per element.
    """
    expect(len(tensors) > 0, "grad_norm", "at least one tensor", "an empty list", "Pass gradients")
    for i, x in enumerate(tensors):
        expect_dtype("grad_norm", f"tensors[{i}]", x, _DTYPES, "Pass floating-point tensors")
    devices = {str(x.device): x for x in tensors}
    expect_same_device("grad_norm", **devices)
    weights = [1.0] * len(tensors) if weights is None else [float(w) for w in weights]
    form = f"a weight for each tensor, {len(tensors)}"
    expect(len(weights) == len(tensors), "grad_norm", form, len(weights), "Pass one for each")
    for w in weights:
        expect(0.0 <= w < math.inf, "grad_norm", "weights >= 0", w, "Pass shares of a tensor")
    return _grad_norm(list(tensors), weights, squared, impl)
