"""bias_rope: the bias of a fused projection, its heads and their rotation, from a table made once.

Peers: eager (the sum, divided, and transformers' formula on queries and keys); on CUDA Liger's
rotation behind the same sum.
"""

import torch

from benchmarks import peers
from benchmarks.bench_rope import rotate_both
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import bias_rope, cost
from stellarator_kernels.reference import rope_table


def cases(shape: Shape, device: str) -> list[Case]:
    """One case; models with learned positions are rotated all the same, for their widths."""
    B, T, H, G, D = shape.B, shape.T, shape.H, shape.G, shape.D
    positions = torch.arange(T, device=device).repeat(B, 1)

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        width = (H + 2 * G) * D
        cos, sin = rope_table(positions, D, shape.rope_theta)
        qkv, bias = make.normal(B, T, width), make.normal(width, scale=0.1)
        return {"qkv": qkv, "bias": bias, "cos": cos, "sin": sin}

    def ours(impl, qkv, bias, cos, sin):
        table = (cos.float(), sin.float())
        return bias_rope(qkv, bias, positions, None, H, G, table=table, impl=impl)

    def peer(rotate):
        def run(qkv, bias, cos, sin):
            q, k, v = (qkv + bias).unflatten(-1, (H + 2 * G, D)).split((H, G, G), 2)
            return *rotate(q, k, cos, sin), v

        return run

    rotations = {"eager": rotate_both} | (peers.rope(B, T) if device == "cuda" else {})
    return [
        Case(
            op="bias_rope",
            variant="",
            sizes={"B": B, "T": T, "H": H, "G": G, "D": D},
            inputs=inputs,
            ours=ours,
            peers={name: peer(rotate) for name, rotate in rotations.items()},
            cost=lambda size: cost.bias_rope(B * T, H, G, D, size),
            reference_bytes=8 * 8 * B * T * (H + 2 * G) * D,
        )
    ]
