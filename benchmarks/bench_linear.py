"""linear: the two products of the MLP, forward and backward.

Peers: eager (F.linear). The products of the forward and of the input gradient are ATen's in both;
the weight gradient is what differs.
"""

import torch.nn.functional as F

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, linear


def cases(shape: Shape, device: str) -> list[Case]:
    """Into the MLP without a bias, which its gelu adds, and out of it."""
    return [
        _case(shape.N, shape.C, shape.F, "up", False),
        _case(shape.N, shape.F, shape.C, "down", True),
    ]


def _case(N: int, K: int, M: int, variant: str, has_bias: bool) -> Case:
    def inputs(make: Maker) -> dict:
        bias = {"bias": make.normal(M)} if has_bias else {}
        return {"x": make.normal(N, K), "weight": make.normal(M, K, scale=K**-0.5)} | bias

    return Case(
        op="linear",
        variant=variant,
        sizes={"N": N, "K": K, "M": M},
        inputs=inputs,
        ours=lambda impl, *x: linear(*x, impl=impl),
        peers={"eager": F.linear},
        cost=lambda size: cost.linear(N, K, M, size),
        reference_bytes=8 * 2 * (N * K + M * K + N * M),
    )
