"""swiglu: silu(gate) * up, both out of one product; with two thirds of the inner width of gelu.

Peers: eager (F.silu and a product), liger (its kernel, on two tensors).
"""

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, swiglu


def cases(shape: Shape, device: str) -> list[Case]:
    """One case."""
    N, width = shape.N, shape.F * 2 // 3 // 8 * 8

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {"gate_and_up": make.normal(N, 2 * width)}

    return [
        Case(
            op="swiglu",
            variant="",
            sizes={"N": N, "F": width},
            inputs=inputs,
            ours=lambda impl, x: swiglu(x, impl=impl),
            peers={"eager": eager} | peers.swiglu(),
            cost=lambda size: cost.swiglu(N, width, size),
            reference_bytes=10 * 8 * N * width,
        )
    ]


def eager(x: torch.Tensor) -> torch.Tensor:
    """Plain torch."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
