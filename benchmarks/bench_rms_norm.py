"""rms_norm with the residual addition in front of it.

Peers: eager (x + residual, then F.rms_norm); on CUDA Liger's kernel behind the same addition.
"""

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, rms_norm

_EPS = 1e-5


def cases(shape: Shape, device: str) -> list[Case]:
    """One case."""
    N, C = shape.N, shape.C

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        weight = make.normal(C, scale=0.1, shift=1.0)
        return {"x": make.normal(N, C), "weight": weight, "residual": make.normal(N, C)}

    def ours(impl, x, weight, residual):
        return rms_norm(x, weight, _EPS, residual, impl=impl)

    return [
        Case(
            op="rms_norm",
            variant="residual",
            sizes={"N": N, "C": C},
            inputs=inputs,
            ours=ours,
            peers={"eager": eager} | (peers.rms_norm(_EPS) if device == "cuda" else {}),
            cost=lambda size: cost.rms_norm(N, C, size, residual=True),
            reference_bytes=10 * 8 * N * C,
        )
    ]


def eager(x, weight, residual):
    """Plain torch."""
    summed = x + residual
    return F.rms_norm(summed, x.shape[-1:], weight, _EPS), summed
