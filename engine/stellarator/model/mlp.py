"""The two-matrix MLP with the norm in front of it: norm, up, gelu, down.

Normalised and activated rows are not kept for the backward, but by modules that are watched.

defines: Mlp
"""

import torch

from stellarator.config import ModelConfig
from stellarator.model.layers import (
    LayerNorm,
    Linear,
    RowLinear,
    fusible,
    norm_again,
    plain,
    recomputed,
)
from stellarator.parallel.gradients import room_of
from stellarator.parallel.products import Gelu, product_again, row_product
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator_kernels import bias_gelu, layer_norm_mlp

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu_erf": "none"}


class Mlp(torch.nn.Module):
    """(branch, residual) -> (branch, residual), each (B, T, C); shape: (B, T)."""

    def __init__(
        self, config: ModelConfig, kernels: str, tp: TensorParallel = ALONE, *, device, dtype
    ):
        super().__init__()
        self.tp, self.gelu = tp, Gelu(_APPROXIMATE[config.activation], kernels)
        C, F, to = config.width, config.ffn_width, {"device": device, "dtype": dtype}
        self.up = Linear(tp.by_columns(F, C), tp.by_columns(F), tp, **to)
        self.down = RowLinear(F, C, tp, **to)

    def forward(
        self,
        norm: LayerNorm,
        branch,
        residual,
        shape: torch.Size,
        dropout: dict | None = None,
        recompute: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """recompute: what `up` gives, the widest tensor of a layer, instead of keeping it."""
        up, down = self.up, self.down
        if fusible(norm, up, down):
            return layer_norm_mlp(
                *(branch, norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias),
                *(norm.eps, residual),
                approximate=self.gelu.approximate,
                recompute=recompute,
                rooms=(room_of(up.weight), room_of(down.weight)),
                impl=self.gelu.impl,
                **(dropout or {}),
            )
        if plain(norm, up, down):
            return self._in_parts(norm, branch, residual, shape, dropout, recompute)
        given = (self.tp.axis.layer, norm, branch, residual, shape, dropout)
        return recomputed(self._by_modules, *given) if recompute else self._by_modules(*given)

    def _in_parts(self, norm, branch, residual, shape, dropout, recompute):
        """Products that ranks share, or whose weight gradients are made apart."""
        up, down = self.up, self.down
        y, residual = norm(branch, residual, dropout)
        rows = norm_again(norm, residual)
        h = up(y, shape, rows)
        pre = product_again(rows, up.weight, up.bias, up.tp) if recompute else None
        product = (down.weight, down.bias, down.tp, down.deferred)
        return row_product(h, *product, gelu=self.gelu, again=pre), residual

    def _by_modules(self, layer, norm, branch, residual, shape, dropout):
        """Modules that others have changed, or watch. layer: for what is sent."""
        self.tp.axis.at(layer=layer)
        y, residual = norm(branch, residual, dropout)
        h = self.up(y, shape)
        gelu = self.gelu
        return self.down(bias_gelu(h, None, approximate=gelu.approximate, impl=gelu.impl)), residual
