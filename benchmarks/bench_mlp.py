"""mlp: both products of the MLP, tanh form, with pre kept and computed again.

Peers: eager (F.linear, F.gelu, F.linear: plain products with the gelu between them), pair (`linear`
and `bias_gelu_linear`). The plain product alone is `linear up`.
"""

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import bias_gelu_linear, cost, linear, mlp


def cases(shape: Shape, device: str) -> list[Case]:
    """Two cases of one shape."""
    return [_case(shape, "kept", False), _case(shape, "recompute", True)]


def _case(shape: Shape, variant: str, recompute: bool) -> Case:
    N, C, width = shape.N, shape.C, shape.F

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {
            "x": make.normal(N, C),
            "up": make.normal(width, C, scale=C**-0.5),
            "up_bias": make.normal(width, scale=0.1),
            "down": make.normal(C, width, scale=width**-0.5),
            "down_bias": make.normal(C),
        }

    return Case(
        op="mlp",
        variant=variant,
        sizes={"N": N, "C": C, "F": width},
        inputs=inputs,
        ours=lambda impl, *x: mlp(*x, recompute=recompute, impl=impl),
        peers={"eager": eager, "pair": pair},
        cost=lambda size: cost.mlp(N, C, width, size, recompute=recompute),
        reference_bytes=8 * 2 * (3 * N * C + 4 * N * width + 2 * C * width),
    )


def eager(x, up, up_bias, down, down_bias):
    """Plain torch."""
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)


def pair(x, up, up_bias, down, down_bias):
    """The bias in the gelu, which the backward computes again."""
    return bias_gelu_linear(linear(x, up), up_bias, down, down_bias)
