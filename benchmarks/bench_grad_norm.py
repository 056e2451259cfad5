"""grad_norm: the L2 norm over all gradients, here the engine's one flat fp32 buffer.

Peers: eager (torch.linalg.vector_norm of each tensor, then of the norms), aten
(torch.nn.utils.get_total_norm, which clip_grad_norm_ uses).
"""

import torch

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, grad_norm


def cases(shape: Shape, device: str) -> list[Case]:
    """One case."""
    n = shape.parameters

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        return {"grads": make.normal(n, grad=False, dtype=torch.float32)}

    def ours(impl, grads):
        return grad_norm([grads], impl=impl)

    return [
        Case(
            op="grad_norm",
            variant="",
            sizes={"n": n},
            inputs=inputs,
            ours=ours,
            peers={"eager": eager, "aten": aten},
            cost=lambda size: cost.grad_norm(n, 4),
            reference_bytes=3 * 8 * n,
        )
    ]


def eager(grads: torch.Tensor) -> torch.Tensor:
    """Plain torch."""
    norms = torch.stack([torch.linalg.vector_norm(x) for x in (grads,)])
    return torch.linalg.vector_norm(norms)


def aten(grads: torch.Tensor) -> torch.Tensor:
    """torch's own function."""
    return torch.nn.utils.get_total_norm([grads])
