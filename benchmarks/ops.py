"""The table of ops: each name and the module of its cases.

defines: OPS, cases
"""

import importlib

from benchmarks.cases import Case
from benchmarks.shapes import Shape

OPS = {
    "flash_attention": "bench_flash_attention",
    "projected_attention": "bench_projected_attention",
    "decode_attention": "bench_decode_attention",
    "embedding": "bench_embedding",
    "rope": "bench_rope",
    "bias_rope": "bench_bias_rope",
    "layer_norm": "bench_layer_norm",
    "rms_norm": "bench_rms_norm",
    "dropout": "bench_dropout",
    "bias_gelu": "bench_bias_gelu",
    "linear": "bench_linear",
    "layer_norm_linear": "bench_layer_norm_linear",
    "bias_gelu_linear": "bench_bias_gelu_linear",
    "mlp": "bench_mlp",
    "layer_norm_mlp": "bench_layer_norm_mlp",
    "add_weight_gradient_": "bench_weight_gradient",
    "swiglu": "bench_swiglu",
    "cross_entropy": "bench_cross_entropy",
    "cross_entropy_statistics": "bench_cross_entropy_shard",
    "linear_cross_entropy": "bench_linear_cross_entropy",
    "adamw_": "bench_adamw",
    "grad_norm": "bench_grad_norm",
}


def cases(op: str, shape: Shape, device: str) -> list[Case]:
    """The cases of one op at one shape."""
    if op not in OPS:
        raise ValueError(f"benchmarks: expected an op of {', '.join(OPS)}, got {op!r}.")
    return importlib.import_module(f"benchmarks.{OPS[op]}").cases(shape, device)
