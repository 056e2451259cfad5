"""Cross entropy of hidden states whose output matrix is shared out by rows of the vocabulary.

defines: vocabulary_cross_entropy

Each rank keeps three numbers a token of its part of the logits, which are never whole: their
maximum, the sum of their exponentials, the target's logit if it is here. One gather of them makes
the loss, summed in one order on every rank. The backward makes the logits again, by chunks.

Letters: N tokens, C width, V_tp rows of this rank.
"""

import torch

from stellarator.parallel.gradients import room_of
from stellarator.parallel.mesh import Axis
from stellarator_kernels import (
    cross_entropy_of_statistics,
    linear_cross_entropy_gradients,
    linear_cross_entropy_statistics,
)


def vocabulary_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    vocab_size: int,
    axis: Axis,
    impl: str = "auto",
) -> torch.Tensor:
    """Loss of each token, the same on all ranks.

    Args:
        hidden: (N, C), the same on all ranks. Its gradient is this rank's share: `enter` sums it.
        weight: (V_tp, C): rows [first, first + V_tp) of the output matrix. Its gradient goes into
            the buffer of `room_of`, if there is one.
        targets: (N,) int64 in [0, vocab_size), or -100.
        first, vocab_size: see weight; rows of all ranks.
        axis: the ranks that share the vocabulary.
        impl: of the kernels.
    Returns:
        (N,) fp32 (fp64 for fp64), nats; 0 where the target is -100.
    Cost: 2*N*C*V_tp FLOPs forward and 6*N*C*V_tp backward; one gather of 12 N bytes a rank.
    """
    room = room_of(weight)
    return _Loss.apply(hidden, weight, targets, first, vocab_size, axis, impl, room)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, first, vocab_size, axis: Axis, impl, room):
        ctx.options = {"vocab_start": first, "vocab_size": vocab_size, "impl": impl}
        found = linear_cross_entropy_statistics(hidden, weight, targets, **ctx.options)
        of_all = axis.gather(found[None], "loss")
        loss, lse = cross_entropy_of_statistics(of_all, targets)
        ctx.room = room
        ctx.save_for_backward(hidden, weight, targets, lse)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        hidden, weight, targets, lse = ctx.saved_tensors
        total = None if ctx.room is None else ctx.room()
        dhidden, dweight, _ = linear_cross_entropy_gradients(
            dloss.contiguous(), hidden, weight, targets, lse, dweight=total, **ctx.options
        )
        return dhidden, dweight.to(weight.dtype) if total is None else None, *(None,) * 6
