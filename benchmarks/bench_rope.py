"""rope: queries and keys rotated by their positions, from a table that is made once.

Peers: eager (transformers' formula, rotate_half, on (B, T, H, D), with its full-width table);
on CUDA Liger's kernel. ATen has no kernel of its own.
"""

import torch

from benchmarks import peers
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, rope
from stellarator_kernels.reference import rope_table


def cases(shape: Shape, device: str) -> list[Case]:
    """One case; models with learned positions are rotated all the same, for their widths."""
    B, T, H, G, D = shape.B, shape.T, shape.H, shape.G, shape.D
    positions = torch.arange(T, device=device).repeat(B, 1)

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        q, k = make.normal(B, T, H, D), make.normal(B, T, G, D)
        cos, sin = rope_table(positions, D, shape.rope_theta)
        return {"q": q, "k": k, "cos": cos, "sin": sin}

    def ours(impl, q, k, cos, sin):
        return rope(q, k, positions, shape.rope_theta, table=(cos.float(), sin.float()), impl=impl)

    return [
        Case(
            op="rope",
            variant="",
            sizes={"B": B, "T": T, "H": H, "G": G, "D": D},
            inputs=inputs,
            ours=ours,
            peers={"eager": rotate_both} | (peers.rope(B, T) if device == "cuda" else {}),
            cost=lambda size: cost.rope(B * T, H, G, D, size),
            reference_bytes=6 * 8 * B * T * (H + G) * D,
        )
    ]


def rotate_both(q, k, cos, sin):
    """Plain torch, the table in the dtype of q (B, T, H, D) as transformers has it."""
    shape = (*q.shape[:2], 1, q.shape[3])
    cos, sin = (torch.cat((x, x), -1).view(shape).to(q.dtype) for x in (cos, sin))
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
