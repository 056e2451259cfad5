"""bias_gelu_linear: the bias of the first product of the MLP, its gelu, and the second product.

Peers: eager (x + bias, F.gelu, F.linear).
"""

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import bias_gelu_linear, cost


def cases(shape: Shape, device: str) -> list[Case]:
    """One case, with the tanh form."""
    N, K, M = shape.N, shape.F, shape.C

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {
            "x": make.normal(N, K),
            "gelu_bias": make.normal(K, scale=0.1),
            "weight": make.normal(M, K, scale=K**-0.5),
            "bias": make.normal(M),
        }

    return [
        Case(
            op="bias_gelu_linear",
            variant="tanh",
            sizes={"N": N, "K": K, "M": M},
            inputs=inputs,
            ours=lambda impl, *x: bias_gelu_linear(*x, impl=impl),
            peers={"eager": eager},
            cost=lambda size: cost.bias_gelu(N, K, size) + cost.linear(N, K, M, size),
            reference_bytes=8 * 2 * (4 * N * K + M * K + N * M),
        )
    ]


def eager(x, gelu_bias, weight, bias):
    """Plain torch."""
    return F.linear(F.gelu(x + gelu_bias, approximate="tanh"), weight, bias)
