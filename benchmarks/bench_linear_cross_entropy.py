"""linear_cross_entropy: the head's matrix product and the mean loss, without the logits.

Peers: eager (F.linear, logits cast to fp32, F.cross_entropy: transformers), aten
(F.linear_cross_entropy of torch 2.13, with its chunked path); on CUDA Liger's kernel.
Ours and the chunked peers compute the gradients in the forward pass, so only both phases together
are compared.
"""

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, linear_cross_entropy
from stellarator_kernels.linear_cross_entropy import chunk_rows
from stellarator_kernels.widened import widens


def cases(shape: Shape, device: str) -> list[Case]:
    """One case."""
    N, C, V = shape.N, shape.C, shape.V

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {
            "hidden": make.normal(N, C),
            "weight": make.normal(V, C, scale=C**-0.5),
            "targets": make.integers(V, N),
        }

    def ours(impl, hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, impl=impl)

    def costs(size: int):
        if size == 2 and widens(torch.bfloat16, torch.device(device)):
            size = 4
        chunks = -(-N // chunk_rows(N, C, V, size))
        return cost.linear_cross_entropy(N, C, V, size, chunks=chunks)

    others = {"eager": eager}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        others["aten"] = aten
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            others["aten chunked"] = aten_chunked
    return [
        Case(
            op="linear_cross_entropy",
            variant="",
            sizes={"N": N, "C": C, "V": V},
            inputs=inputs,
            ours=ours,
            peers=others | (peers.linear_cross_entropy() if device == "cuda" else {}),
            cost=costs,
            phases=("both",),
            reference_bytes=8 * (6 * N * V + 3 * V * C + 3 * N * C),
        )
    ]


def eager(hidden, weight, targets):
    """Plain torch; 16-bit logits are cast first."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float() if logits.dtype.itemsize == 2 else logits, targets)


def aten(hidden, weight, targets):
    """torch's own function as it comes."""
    return F.linear_cross_entropy(hidden, weight, targets)


def aten_chunked(hidden, weight, targets):
    """torch's own function with its chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, options=options)
