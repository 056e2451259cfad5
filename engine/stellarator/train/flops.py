"""Model FLOPs of a batch and the peak of the machine, for the MFU figure.

defines: batch_flops, peak_flops, device_name

The formula is `stellarator.sizes.FORMULA`; pairs are counted exactly from causality, window and
document boundaries. Padding (about 1% of a row with FIM) is computed like any token and counted as
such.
"""

import time

import torch

from stellarator.config import ModelConfig
from stellarator.sizes import model_flops
from stellarator_kernels import linear
from stellarator_kernels.cost import visible_pairs

# Dense bf16 peak of the data sheets, FLOP/s.
_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def batch_flops(model: ModelConfig, document_lengths: list[int]) -> int:
    """FLOPs of one forward and backward pass over documents of these lengths."""
    pairs = sum(visible_pairs(length, window=model.window) for length in document_lengths)
    return model_flops(model, sum(document_lengths), pairs)


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None):
    """(peak in FLOP/s, where the figure comes from).

    Args:
        device: of the run.
        dtype: of the matrix products.
        given_tflops: `metrics.peak_tflops`; wins over everything.
    """
    if given_tflops is not None:
        return given_tflops * 1e12, "given"
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in _PEAKS.items():
            if key in name:
                return peak, f"data sheet of {key}, dense bf16"
    return _measure(device, dtype), "best matrix product measured at the start"


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _measure(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of the best of a few square matrix products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
