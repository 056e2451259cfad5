"""add_weight_gradient_: the gradient of both weights of the MLP, added to an fp32 buffer.

Peers: eager (a product with an fp32 result, then the addition), and on a GPU addmm (cuBLAS adds to
its fp32 result). A product in 16 bits computes something else: it is rounded before it is added.
"""

import torch

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import add_weight_gradient_, cost


def cases(shape: Shape, device: str) -> list[Case]:
    """Of the weight into the MLP and of the one out of it."""
    sizes = {"up": (shape.F, shape.C), "down": (shape.C, shape.F)}
    return [_case(shape.N, *size, variant, device) for variant, size in sizes.items()]


def _case(N: int, M: int, K: int, variant: str, device: str) -> Case:
    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        total = make.normal(M, K, grad=False, dtype=torch.float32)
        dy, x = (make.normal(N, width, grad=False) for width in (M, K))
        return {"total": total, "dy": dy, "x": x}

    return Case(
        op="add_weight_gradient_",
        variant=variant,
        sizes={"N": N, "M": M, "K": K},
        inputs=inputs,
        ours=lambda impl, *x: add_weight_gradient_(*x, impl=impl),
        peers={"eager": eager} | ({"addmm": addmm} if device == "cuda" else {}),
        cost=lambda size: cost.add_weight_gradient(N, M, K, size),
        reference_bytes=8 * 2 * (N * M + N * K + M * K),
        in_place=True,
    )


def eager(total, dy, x):
    """Plain torch; on a CPU only fp32 products have fp32 results."""
    if dy.is_cuda and dy.dtype.itemsize == 2:
        return total.add_(torch.mm(dy.t(), x, out_dtype=total.dtype))
    return total.add_(dy.t().to(total.dtype) @ x.to(total.dtype))


def addmm(total, dy, x):
    """One call of cuBLAS."""
    return torch.addmm(total, dy.t(), x, out_dtype=total.dtype, out=total)
