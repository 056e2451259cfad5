"""Kernels for code language models: forward and backward, each with its mathematics beside it.

defines:
    attention    flash_attention, decode_attention, projected_attention
    positions    rope, bias_rope
    layers       embedding, layer_norm, rms_norm, dropout, bias_gelu, swiglu
    products     linear, layer_norm_linear, bias_gelu_linear, mlp, layer_norm_mlp,
                 add_weight_gradient_
    losses       cross_entropy, linear_cross_entropy
    of a shard   cross_entropy_statistics, cross_entropy_of_statistics, cross_entropy_gradient_,
                 linear_cross_entropy_statistics, linear_cross_entropy_gradients
    optimizer    adamw_, grad_norm
    questions    explain, available

A function and its module share a name (rope.rope), so all are bound here at once: were they bound
on first use, importing `stellarator_kernels.rope` first would leave the module in the function's
place.
"""

from stellarator_kernels.adamw import adamw_
from stellarator_kernels.attention import (
    decode_attention,
    flash_attention,
    projected_attention,
)
from stellarator_kernels.bias_gelu import bias_gelu
from stellarator_kernels.bias_rope import bias_rope
from stellarator_kernels.cross_entropy import cross_entropy
from stellarator_kernels.cross_entropy_shard import (
    cross_entropy_gradient_,
    cross_entropy_of_statistics,
    cross_entropy_statistics,
)
from stellarator_kernels.dispatch import available, explain
from stellarator_kernels.dropout import dropout
from stellarator_kernels.embedding import embedding
from stellarator_kernels.grad_norm import grad_norm
from stellarator_kernels.layer_norm import layer_norm
from stellarator_kernels.layer_norm_mlp import layer_norm_mlp
from stellarator_kernels.linear import bias_gelu_linear, layer_norm_linear, linear
from stellarator_kernels.linear_cross_entropy import linear_cross_entropy
from stellarator_kernels.linear_cross_entropy_shard import (
    linear_cross_entropy_gradients,
    linear_cross_entropy_statistics,
)
from stellarator_kernels.mlp import mlp
from stellarator_kernels.rms_norm import rms_norm
from stellarator_kernels.rope import rope
from stellarator_kernels.swiglu import swiglu
from stellarator_kernels.weight_gradient import add_weight_gradient_

__all__ = [
    "adamw_",
    "add_weight_gradient_",
    "available",
    "bias_gelu",
    "bias_gelu_linear",
    "bias_rope",
    "cross_entropy",
    "cross_entropy_gradient_",
    "cross_entropy_of_statistics",
    "cross_entropy_statistics",
    "decode_attention",
    "dropout",
    "embedding",
    "explain",
    "flash_attention",
    "grad_norm",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_mlp",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_gradients",
    "linear_cross_entropy_statistics",
    "mlp",
    "projected_attention",
    "rms_norm",
    "rope",
    "swiglu",
]
