"""decode_attention: one new token a row against a cache of T tokens, rows of uneven length.

Eight rows, or as many as the micro-batch has.

Peers: eager (scores, mask, softmax, product, heads expanded), sdpa (a dense mask, enable_gqa).
"""

import torch
import torch.nn.functional as F

from benchmarks.bench_flash_attention import eager as attend
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, decode_attention

_LEAST_ROWS = 8


def cases(shape: Shape, device: str) -> list[Case]:
    """From half to all of the cache in use."""
    S, H, G, D = shape.T, shape.H, shape.G, shape.D
    rows = max(_LEAST_ROWS, shape.B)
    used = [S - row * (S // 2) // rows for row in range(rows)]
    lengths = torch.tensor(used, device=device)

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        q = make.normal(rows, 1, H, D, grad=False)
        k, v = (make.normal(rows, S, G, D, grad=False) for _ in range(2))
        mask = torch.zeros(rows, 1, 1, S, dtype=make.dtype, device=make.device)
        hidden = torch.arange(S, device=make.device) >= lengths[:, None]
        mask.masked_fill_(hidden[:, None, None], -torch.inf)
        return {"q": q, "k": k, "v": v, "mask": mask}

    def ours(impl, q, k, v, mask):
        return decode_attention(q, k, v, lengths, impl=impl)

    return [
        Case(
            op="decode_attention",
            variant="",
            sizes={"B": rows, "S": S, "H": H, "G": G, "D": D},
            inputs=inputs,
            ours=ours,
            peers={"eager": eager, "sdpa": sdpa},
            cost=lambda size: cost.flash_attention(sum(used), rows, sum(used), H, G, D, size),
            reference_bytes=4 * 8 * rows * S * (H + G * D),
        )
    ]


@torch.no_grad()
def eager(q, k, v, mask):
    """Plain torch."""
    return attend(q, k, v, mask)


@torch.no_grad()
def sdpa(q, k, v, mask):
    """ATen's kernel with a dense mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)
