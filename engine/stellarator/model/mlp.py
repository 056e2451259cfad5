"""The two-matrix MLP: up, gelu, down. The bias of the first product is added inside the gelu.

defines: Mlp
"""

import torch

from stellarator.config import ModelConfig
from stellarator.model.layers import Linear
from stellarator_kernels import bias_gelu

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu_erf": "none"}


class Mlp(torch.nn.Module):
    """x (B, T, C) -> (B, T, C) through width F."""

    def __init__(self, config: ModelConfig, kernels: str, *, device, dtype):
        super().__init__()
        self.approximate, self.kernels = _APPROXIMATE[config.activation], kernels
        self.up = Linear(config.width, config.ffn_width, device=device, dtype=dtype)
        self.down = Linear(config.ffn_width, config.width, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.linear(x, self.up.weight)
        h = bias_gelu(h, self.up.bias, approximate=self.approximate, impl=self.kernels)
        return self.down(h)
