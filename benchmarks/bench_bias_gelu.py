"""bias_gelu: gelu(x + bias), tanh form, over the inner width of the MLP.

Peers: eager (x + bias, then F.gelu, which is ATen's own kernel).
"""

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import bias_gelu, cost


def cases(shape: Shape, device: str) -> list[Case]:
    """One case."""
    N, width = shape.N, shape.F

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {"x": make.normal(N, width), "bias": make.normal(width)}

    def ours(impl, x, bias):
        return bias_gelu(x, bias, impl=impl)

    return [
        Case(
            op="bias_gelu",
            variant="",
            sizes={"N": N, "F": width},
            inputs=inputs,
            ours=ours,
            peers={"eager": eager},
            cost=lambda size: cost.bias_gelu(N, width, size),
            reference_bytes=10 * 8 * N * width,
        )
    ]


def eager(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Plain torch."""
    return F.gelu(x + bias, approximate="tanh")
