"""The two-matrix MLP with the norm in front of it: norm, up, gelu, down.

The bias of `up` is added in the gelu. Normalised and activated rows are not kept for the backward.

defines: Mlp
"""

from functools import partial

import torch

from stellarator.config import ModelConfig
from stellarator.model.layers import LayerNorm, Linear, RowLinear, fusible, norm_again
from stellarator.parallel.gradients import room_of
from stellarator.parallel.products import Again
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator_kernels import bias_gelu, bias_gelu_linear

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu_erf": "none"}


class Mlp(torch.nn.Module):
    """(branch, residual) -> (branch, residual), each (B, T, C); shape: (B, T)."""

    def __init__(
        self, config: ModelConfig, kernels: str, tp: TensorParallel = ALONE, *, device, dtype
    ):
        super().__init__()
        self.approximate, self.kernels = _APPROXIMATE[config.activation], kernels
        C, F, to = config.width, config.ffn_width, {"device": device, "dtype": dtype}
        self.up = Linear(tp.by_columns(F, C), tp.by_columns(F), tp, **to)
        self.down = RowLinear(F, C, tp, **to)

    def forward(
        self, norm: LayerNorm, branch, residual, shape: torch.Size, dropout: dict | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        up, down = self.up, self.down
        options = {"approximate": self.approximate, "impl": self.kernels}
        if fusible(norm, up, down):
            h, residual = norm.into(up.weight, None, branch, residual, dropout)
            options["room"] = room_of(down.weight)
            return bias_gelu_linear(h, up.bias, down.weight, down.bias, **options), residual
        y, residual = norm(branch, residual, dropout)
        h = up(y, shape, norm_again(norm, residual))
        gelu = partial(bias_gelu, bias=None, **options)
        return down(gelu(h), Again(gelu, (h,))), residual
