"""projected_attention: RoPE and causal attention of a fused projection, its gradient in one piece.

Peers: sdpa (split, RoPE in plain torch, F.scaled_dot_product_attention with enable_gqa); eager (the
same with the matrix of weights).
"""

import torch

from benchmarks.bench_flash_attention import eager as attend
from benchmarks.bench_flash_attention import sdpa_causal
from benchmarks.bench_rope import rotate_both
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, projected_attention
from stellarator_kernels.rope import rope_table


def cases(shape: Shape, device: str) -> list[Case]:
    """One case."""
    B, T, H, G, D = shape.B, shape.T, shape.H, shape.G, shape.D
    positions = torch.arange(T, device=device).repeat(B, 1)
    pairs = B * cost.visible_pairs(T)

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        cos, sin = rope_table(positions, D, shape.rope_theta)
        mask = torch.zeros(T, T, dtype=make.dtype, device=make.device)
        mask.masked_fill_(torch.ones_like(mask).triu(1).bool(), -torch.inf)
        return {"qkv": make.normal(B, T, (H + 2 * G) * D), "cos": cos, "sin": sin, "mask": mask}

    def ours(impl, qkv, cos, sin, mask):
        return projected_attention(qkv, H, G, (cos.float(), sin.float()), impl=impl)

    def peer(attention):
        def run(qkv, cos, sin, mask):
            q, k, v = qkv.unflatten(-1, (H + 2 * G, D)).split([H, G, G], dim=2)
            return attention(*rotate_both(q, k, cos, sin), v, mask)

        return run

    return [
        Case(
            op="projected_attention",
            variant="causal",
            sizes={"B": B, "T": T, "H": H, "G": G, "D": D, "pairs": pairs},
            inputs=inputs,
            ours=ours,
            peers={"eager": peer(attend), "sdpa": peer(sdpa_causal)},
            cost=lambda size: (
                cost.rope(B * T, H, G, D, size)
                + cost.flash_attention(pairs, B * T, B * T, H, G, D, size)
            ),
            reference_bytes=5 * 8 * B * H * T * T,
        )
    ]
