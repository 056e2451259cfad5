"""layer_norm with the residual addition in front of it, as every block of the model has it.

Peers: eager (x + residual, then F.layer_norm, which is ATen's own kernel); on CUDA Liger's and
apex's kernels behind the same addition.
"""

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, layer_norm

_EPS = 1e-5


def cases(shape: Shape, device: str) -> list[Case]:
    """One case."""
    N, C = shape.N, shape.C

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {
            "x": make.normal(N, C),
            "weight": make.normal(C, scale=0.1, shift=1.0),
            "bias": make.normal(C, scale=0.1),
            "residual": make.normal(N, C),
        }

    def ours(impl, x, weight, bias, residual):
        return layer_norm(x, weight, bias, _EPS, residual, impl=impl)

    return [
        Case(
            op="layer_norm",
            variant="residual",
            sizes={"N": N, "C": C},
            inputs=inputs,
            ours=ours,
            peers={"eager": eager} | (peers.layer_norm(_EPS) if device == "cuda" else {}),
            cost=lambda size: cost.layer_norm(N, C, size, residual=True),
            reference_bytes=10 * 8 * N * C,
        )
    ]


def eager(x, weight, bias, residual):
    """Plain torch."""
    summed = x + residual
    return F.layer_norm(summed, x.shape[-1:], weight, bias, _EPS), summed
