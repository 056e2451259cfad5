"""Cross entropy of hidden states whose output matrix is shared out by rows of the vocabulary.

defines: vocabulary_cross_entropy

Each rank makes the logits of its part, a chunk of tokens at a time, and keeps three numbers a
token: their maximum, the sum of their exponentials, the target's logit if it is here. One maximum
and one sum over the ranks make the loss of them. The backward makes the logits again.

Letters: N tokens, C width, V_tp rows of this rank.
"""

import torch

from stellarator.parallel.mesh import Axis

_CHUNK_BYTES = 1 << 26  # of the logits of a chunk


def vocabulary_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    axis: Axis,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Loss of each token, the same on all ranks.

    Args:
        hidden: (N, C), the same on all ranks. Its gradient is this rank's share: `enter` sums it.
        weight: (V_tp, C): rows [first, first + V_tp) of the output matrix.
        targets: (N,) int64 in [0, V), or `ignore_index`.
        first: see weight.
        axis: the ranks that share the vocabulary.
    Returns:
        (N,) fp32 (fp64 for fp64), nats; 0 where ignored.
    Cost: 2*N*C*V_tp FLOPs forward and 6*N*C*V_tp backward; two reductions of 4 N and 8 N bytes.
    """
    return _Loss.apply(hidden, weight, targets, first, axis, ignore_index)


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(n, V_tp) in fp32, or fp64 for fp64."""
    logits = hidden @ weight.T
    return logits if logits.dtype == torch.float64 else logits.float()


def _chunks(N: int, V_tp: int) -> list[slice]:
    rows = max(1, _CHUNK_BYTES // (4 * max(1, V_tp)))
    return [slice(start, min(start + rows, N)) for start in range(0, N, rows)]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, first: int, axis: Axis, ignore_index: int):
        N, V_tp = hidden.shape[0], weight.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        maximum = hidden.new_full((N,), -torch.inf, dtype=dtype)
        sums = hidden.new_zeros((2, N), dtype=dtype)  # of exponentials; the target's logit
        local = targets - first
        here = (local >= 0) & (local < V_tp) & (targets != ignore_index)
        local = torch.where(here, local, 0)
        for rows in _chunks(N, V_tp):
            logits = _logits(hidden[rows], weight)
            maximum[rows] = logits.amax(1)
            sums[0, rows] = (logits - maximum[rows, None]).exp().sum(1)
            sums[1, rows] = logits.gather(1, local[rows, None])[:, 0] * here[rows]
        of_all = axis.max_(maximum.clone())
        sums[0] *= (maximum - of_all).exp()
        axis.sum_(sums)
        lse = of_all + sums[0].log()
        kept = targets != ignore_index
        ctx.save_for_backward(hidden, weight, local, here, kept, lse)
        return torch.where(kept, lse - sums[1], 0.0)

    @staticmethod
    def backward(ctx, dloss):
        hidden, weight, local, here, kept, lse = ctx.saved_tensors
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=lse.dtype)
        dloss = torch.where(kept, dloss, 0.0)
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            dlogits = (_logits(hidden[rows], weight) - lse[rows, None]).exp()
            dlogits.scatter_add_(1, local[rows, None], -here[rows, None].to(dlogits.dtype))
            dlogits = (dlogits * dloss[rows, None]).to(hidden.dtype)
            dhidden[rows] = dlogits @ weight
            dweight += dlogits.T @ hidden[rows]
        return dhidden, dweight.to(weight.dtype), None, None, None, None
