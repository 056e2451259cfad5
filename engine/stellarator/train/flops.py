"""Model FLOPs of a batch and the peak of the machine, for the MFU figure.

defines: FORMULA, batch_flops, matmul_parameters, peak_flops, device_name

MFU counts what the model needs, not what is recomputed: 6 FLOPs per token and parameter of a matrix
product, and for attention 12 * D * H * L per visible (query, key) pair (forward 4, backward 8);
pairs are counted exactly from causality, window and document boundaries. Padding (about 1% of a
row with FIM) is computed like any token and counted as such.
"""

import time

import torch

from stellarator.config import ModelConfig
from stellarator_kernels.cost import visible_pairs

FORMULA = "6*N_matmul*tokens + 12*D*H*L*visible_pairs"

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


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that take part in a matrix product: layers and head, not embeddings or norms."""
    C, D, F = model.width, model.head_width, model.ffn_width
    qkv = C * (model.num_heads + 2 * model.num_kv_heads) * D
    return model.num_layers * (qkv + C * C + 2 * C * F) + C * model.vocab_size


def batch_flops(model: ModelConfig, document_lengths: list[int]) -> int:
    """FLOPs of one forward and backward pass over documents of these lengths."""
    pairs = sum(visible_pairs(length, window=model.window) for length in document_lengths)
    attention = 12 * model.head_width * model.num_heads * model.num_layers * pairs
    return 6 * matmul_parameters(model) * sum(document_lengths) + attention


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
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
