"""ATen's products of 16-bit matrices on a CPU, in fp32 where it has no instructions for them.

defines: FEWEST, widens, operands, multiply, add

Without AVX-512-BF16 or AMX oneDNN widens bf16 inside its loops and multiplies at a quarter of the
rate of fp32; without AVX-512 ATen's own loop takes over, at a twelfth. There the operands are
widened in chunks, fp32 is multiplied, and the sum is rounded once: the same precision. AMX stands
for AVX-512-FP16, too: fp16 is widened wherever it is missing. STELLARATOR_ISA decides here as it
does for the kernels in C++: one below this machine's also makes these products fp32.

A chunk is cut from the longest of the three sides, so that besides it only the small operand, or
the result, exists in fp32. linear_cross_entropy.py, which multiplies by one matrix again and again,
widens it whole and keeps its logits in fp32. Below `FEWEST` rows or columns reading the operands
is what takes the time, and they are multiplied as they are.
"""

import platform

import torch

from stellarator_kernels import extension
from stellarator_kernels.memory import empty

FEWEST = 16  # rows and columns of a result
_CHUNK_ELEMENTS = 1 << 22  # of what is widened at one time, and its result
_LEAST_CHUNK = 256  # rows
_NEEDED = {torch.bfloat16: "avx512_bf16", torch.float16: "amx"}


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether large products are made in fp32. Known of x86-64, where the C++ extension loads."""
    if device.type != "cpu" or dtype not in _NEEDED or extension.failure() is not None:
        return False
    needed = extension.load().Isa.__members__[_NEEDED[dtype]]
    return platform.machine() in ("x86_64", "AMD64") and int(extension.isa()) < int(needed)


def operands(*matrices: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Copies in fp32 of those whose products are widened, the others themselves."""
    return [
        _wide(x, torch.float32) if x is not None and widens(x.dtype, x.device) else x
        for x in matrices
    ]


def multiply(
    left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor
) -> torch.Tensor:
    """out (N, M) = left (N, K) @ right (K, M) + bias (M,), of any strides; returns out.

    Widened it takes the smaller operand or the result in fp32 and chunks beside it, of 16 MiB or of
    256 rows.
    """
    alike = right.dtype == left.dtype and (bias is None or bias.dtype == left.dtype)
    if min(out.shape) >= FEWEST and alike and widens(left.dtype, left.device):
        bias = None if bias is None else bias.float().expand(out.shape)
        _multiply_widened(left, right, bias, out)
    elif bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)
    return out


def add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (N, M) += left (N, K) @ right (K, M), in the dtype of total."""
    K, rows = left.shape[1], _chunk(sum(total.shape))
    for start in range(0, K, rows):
        stop = min(K, start + rows)
        total.addmm_(_wide(left[:, start:stop], total.dtype), _wide(right[start:stop], total.dtype))


def _multiply_widened(left, right, bias, out):
    """`multiply` in fp32; the bias is fp32 and (N, M)."""
    (N, K), M = left.shape, right.shape[1]
    if K >= max(N, M):
        sums = _like(out, torch.float32)
        sums.zero_() if bias is None else sums.copy_(bias)
        add(sums, left, right)
        out.copy_(sums)
    elif M > N:
        _multiply_rows(right.t(), left.t(), None if bias is None else bias.t(), out.t())
    else:
        _multiply_rows(left, right, bias, out)


def _multiply_rows(left, right, bias, out):
    """The same in chunks of rows."""
    right = _wide(right, torch.float32)
    rows = _chunk(sum(right.shape))
    for start in range(0, len(left), rows):
        index = slice(start, start + rows)
        _multiply_chunk(left[index], right, None if bias is None else bias[index], out[index])


def _multiply_chunk(left, right, bias, out):
    """A function, so that what it allocates is free before the next one."""
    sums = _like(out, torch.float32)
    if bias is None:
        torch.mm(_wide(left, torch.float32), right, out=sums)
    else:
        torch.addmm(bias, _wide(left, torch.float32), right, out=sums)
    out.copy_(sums)


def _chunk(width):
    """Rows of a chunk that are `width` elements wide in all."""
    return max(_LEAST_CHUNK, _CHUNK_ELEMENTS // max(1, width))


def _wide(x, dtype):
    """x in another dtype."""
    return x if x.dtype == dtype else _like(x, dtype).copy_(x)


def _like(x, dtype):
    """Memory for x in another dtype; by columns where x is, so that no pass transposes."""
    if x.dim() == 2 and x.stride(0) < x.stride(1):
        return empty(x.shape[::-1], dtype, x.device).t()
    return empty(x.shape, dtype, x.device)
