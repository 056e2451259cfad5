"""embedding: rows of a table; back, their gradients added up by row, in fp32.

Peers: eager (F.embedding, which adds in the dtype of the table). The ids of a text are far from
even: few rows take most of the additions, as here.
"""

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, embedding


def cases(shape: Shape, device: str) -> list[Case]:
    """The rows alone, and with learned positions."""
    N, V, C, P = shape.N, shape.V, shape.C, shape.T
    positions = torch.arange(P, device=device).repeat(N // P)

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        uniform = make.integers(2**20, N).double() / 2**20
        return {"ids": (V**uniform - 1).long(), "weight": make.normal(V, C)}

    return [
        Case(
            op="embedding",
            variant="",
            sizes={"N": N, "V": V, "C": C},
            inputs=inputs,
            ours=lambda impl, ids, weight: embedding(ids, weight, impl=impl),
            peers={"eager": eager},
            cost=lambda size: cost.embedding(N, V, C, size),
            reference_bytes=8 * C * (2 * N + 2 * V),
        ),
        Case(
            op="embedding",
            variant="positions",
            sizes={"N": N, "V": V, "C": C, "P": P},
            inputs=lambda make: inputs(make) | {"table": make.normal(P, C)},
            ours=lambda impl, ids, weight, table: embedding(
                ids, weight, positions=positions, position_weight=table, impl=impl
            ),
            peers={"eager": lambda ids, weight, table: eager(ids, weight) + table[positions]},
            cost=lambda size: cost.embedding(N, V, C, size, P=P),
            reference_bytes=8 * C * (3 * N + 2 * V + 2 * P),
        ),
    ]


def eager(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Plain torch."""
    return F.embedding(ids, weight)
