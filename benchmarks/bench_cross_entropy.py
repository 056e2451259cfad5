"""cross_entropy from logits, a loss for each token.

Peers: eager (logits cast to fp32, then F.cross_entropy, as transformers has it), aten
(F.cross_entropy in the dtype of the logits); on CUDA Liger's kernel.
"""

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, cross_entropy


def cases(shape: Shape, device: str) -> list[Case]:
    """One case."""
    N, V = shape.N, shape.V

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {"logits": make.normal(N, V, scale=2.0), "targets": make.integers(V, N)}

    def ours(impl, logits, targets):
        return cross_entropy(logits, targets, impl=impl)

    others = {"eager": eager, "aten": aten}
    return [
        Case(
            op="cross_entropy",
            variant="",
            sizes={"N": N, "V": V},
            inputs=inputs,
            ours=ours,
            peers=others | (peers.cross_entropy() if device == "cuda" else {}),
            cost=lambda size: cost.cross_entropy(N, V, size),
            reference_bytes=6 * 8 * N * V,
        )
    ]


def eager(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Plain torch; 16-bit logits are cast first."""
    wide = logits.float() if logits.dtype.itemsize == 2 else logits
    return F.cross_entropy(wide, targets, reduction="none")


def aten(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """ATen's kernels in the dtype of the logits."""
    return F.cross_entropy(logits, targets, reduction="none")
