"""The two-matrix MLP: up, gelu, down.

The norm in front of it multiplies by `up.weight`; the bias of that product is added in the gelu.

defines: Mlp
"""

import torch

from stellarator.config import ModelConfig
from stellarator.model.layers import Linear
from stellarator_kernels import bias_gelu_linear

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu_erf": "none"}


class Mlp(torch.nn.Module):
    """x @ up.weight^T (B, T, F) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, kernels: str, *, device, dtype):
        super().__init__()
        self.approximate, self.kernels = _APPROXIMATE[config.activation], kernels
        self.up = Linear(config.width, config.ffn_width, device=device, dtype=dtype)
        self.down = Linear(config.ffn_width, config.width, device=device, dtype=dtype)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        down, options = self.down, {"approximate": self.approximate, "impl": self.kernels}
        return bias_gelu_linear(h, self.up.bias, down.weight, down.bias, **options)
