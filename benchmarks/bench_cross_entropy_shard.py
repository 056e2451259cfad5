"""cross_entropy_statistics: of logits of one of two shards of the vocabulary, the numbers to merge.

Peers: eager (maximum, sum of exponentials and gather, one after the other, of fp32 logits, as
Megatron-LM's vocabulary-parallel loss has it). The linear form is the statistics of chunks and the
products of linear_cross_entropy, which has a benchmark of its own.
"""

import torch

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, cross_entropy_statistics


def cases(shape: Shape, device: str) -> list[Case]:
    """One case: the second shard, so half of the targets are elsewhere."""
    N, V = shape.N, shape.V // 2

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        logits = make.normal(N, V, scale=2.0, grad=False)
        return {"logits": logits, "targets": make.integers(2 * V, N)}

    def ours(impl, logits, targets):
        found = cross_entropy_statistics(
            logits, targets, vocab_start=V, vocab_size=2 * V, impl=impl
        )
        return tuple(found)

    return [
        Case(
            op="cross_entropy_statistics",
            variant="",
            sizes={"N": N, "V_tp": V},
            inputs=inputs,
            ours=ours,
            peers={"eager": eager},
            cost=lambda size: cost.cross_entropy(N, V, size),
            reference_bytes=4 * 8 * N * V,
        )
    ]


def eager(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Plain torch; 16-bit logits are cast first."""
    x = logits.float() if logits.dtype.itemsize == 2 else logits
    largest = x.amax(1)
    local = targets - x.shape[1]
    picked = x.gather(1, local.clamp(min=0)[:, None])[:, 0]
    total = (x - largest[:, None]).exp().sum(1)
    return largest, total, torch.where(local >= 0, picked, 0.0)
