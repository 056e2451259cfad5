"""layer_norm_linear: the norm, the residual addition and the product behind it, as a layer has it.

Peers: eager (x + residual, F.layer_norm, F.linear).
"""

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, layer_norm_linear

_EPS = 1e-5


def cases(shape: Shape, device: str) -> list[Case]:
    """The norm in front of the attention, and its projection."""
    N, C, M = shape.N, shape.C, (shape.H + 2 * shape.G) * shape.D

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {
            "x": make.normal(N, C),
            "norm_weight": make.normal(C, scale=0.1, shift=1.0),
            "norm_bias": make.normal(C, scale=0.1),
            "weight": make.normal(M, C, scale=C**-0.5),
            "bias": make.normal(M),
            "residual": make.normal(N, C),
        }

    def ours(impl, x, norm_weight, norm_bias, weight, bias, residual):
        return layer_norm_linear(x, norm_weight, norm_bias, weight, bias, _EPS, residual, impl=impl)

    return [
        Case(
            op="layer_norm_linear",
            variant="residual",
            sizes={"N": N, "K": C, "M": M},
            inputs=inputs,
            ours=ours,
            peers={"eager": eager},
            cost=lambda size: (
                cost.layer_norm(N, C, size, residual=True) + cost.linear(N, C, M, size)
            ),
            reference_bytes=8 * 2 * (6 * N * C + M * C + N * M),
        )
    ]


def eager(x, norm_weight, norm_bias, weight, bias, residual):
    """Plain torch."""
    summed = x + residual
    y = F.layer_norm(summed, x.shape[-1:], norm_weight, norm_bias, _EPS)
    return F.linear(y, weight, bias), summed
