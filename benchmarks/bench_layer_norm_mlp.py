"""layer_norm_mlp: the norm, the residual addition and the MLP behind it, as a layer has it.

Peers: eager (x + residual, F.layer_norm, F.linear, F.gelu, F.linear), pair (`layer_norm_linear` and
`bias_gelu_linear`: the same in two functions).
"""

import torch
import torch.nn.functional as F

from benchmarks import bench_mlp
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import bias_gelu_linear, cost, layer_norm_linear, layer_norm_mlp

_EPS = 1e-5


def cases(shape: Shape, device: str) -> list[Case]:
    """Two cases of one shape."""
    return [_case(shape, "kept", False), _case(shape, "recompute", True)]


def _case(shape: Shape, variant: str, recompute: bool) -> Case:
    N, C, width = shape.N, shape.C, shape.F

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {
            "x": make.normal(N, C),
            "norm_weight": make.normal(C, scale=0.1, shift=1.0),
            "norm_bias": make.normal(C, scale=0.1),
            "up": make.normal(width, C, scale=C**-0.5),
            "up_bias": make.normal(width, scale=0.1),
            "down": make.normal(C, width, scale=width**-0.5),
            "down_bias": make.normal(C),
            "residual": make.normal(N, C),
        }

    return Case(
        op="layer_norm_mlp",
        variant=variant,
        sizes={"N": N, "C": C, "F": width},
        inputs=inputs,
        ours=lambda impl, *x: layer_norm_mlp(*x[:7], _EPS, x[7], recompute=recompute, impl=impl),
        peers={"eager": eager, "pair": pair},
        cost=lambda size: (
            cost.layer_norm(N, C, size, residual=True)
            + cost.mlp(N, C, width, size, recompute=recompute)
        ),
        reference_bytes=8 * 2 * (6 * N * C + 4 * N * width + 2 * C * width),
    )


def eager(x, norm_weight, norm_bias, up, up_bias, down, down_bias, residual):
    """Plain torch."""
    summed = x + residual
    y = F.layer_norm(summed, x.shape[-1:], norm_weight, norm_bias, _EPS)
    return bench_mlp.eager(y, up, up_bias, down, down_bias), summed


def pair(x, norm_weight, norm_bias, up, up_bias, down, down_bias, residual):
    """What goes into the gelu is kept; norm and gelu are computed again."""
    h, summed = layer_norm_linear(x, norm_weight, norm_bias, up, None, _EPS, residual)
    return bias_gelu_linear(h, up_bias, down, down_bias), summed
