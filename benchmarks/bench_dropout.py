"""dropout with a mask made from keys, which a peer has to read.

Peers: eager (a product with the same mask, made once and stored in the dtype of x): nothing else
gives the same values. F.dropout draws a mask of its own and so cannot be compared.
"""

import torch

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, dropout, random

_P = 0.1


def cases(shape: Shape, device: str) -> list[Case]:
    """One case."""
    N, C = shape.N, shape.C
    keys = random.matrix_keys(1, N, C, device)

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        mask = random.factors(keys, _P, make.dtype)
        return {"x": make.normal(N, C), "mask": mask}

    return [
        Case(
            op="dropout",
            variant="",
            sizes={"N": N, "C": C},
            inputs=inputs,
            ours=lambda impl, x, mask: dropout(x, _P, keys, impl=impl),
            peers={"eager": eager},
            cost=lambda size: cost.dropout(N, C, size),
            reference_bytes=5 * 8 * N * C,
        )
    ]


def eager(x, mask):
    """Plain torch."""
    return x * mask
