"""Micro-batches as the model of this rank takes them.

defines: Inputs, inputs_of
"""

from dataclasses import dataclass

import torch

from stellarator.data.batches import Batch
from stellarator.model.dropout import Dropout
from stellarator.parallel.rows import ContextParallel


@dataclass(frozen=True)
class Inputs:
    """tokens and targets: (B, T), or the (B, T/P) of a context rank; on its device.

    options: the other arguments of `Transformer.forward` and `Transformer.stage`.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    options: dict


def inputs_of(
    batch: Batch, cp: ContextParallel, device: torch.device, dropout: Dropout | None = None
) -> Inputs:
    """What of a micro-batch is here.

    Args:
        batch: of whole rows, on the host.
        cp: the ranks that share its tokens.
        device: where the tensors go.
        dropout: what the model drops.
    """
    cut = cp.cut(batch.tokens.shape, batch.cu_seqlens)  # on a GPU its numbers would be waited for
    batch = batch.to(device, non_blocking=True)
    if cut is None:
        options = {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens}
        return Inputs(batch.tokens, batch.targets, options | {"dropout": dropout})
    tokens, targets, positions = map(cut.own, (batch.tokens, batch.targets, batch.positions))
    return Inputs(tokens, targets, {"positions": positions, "cut": cut, "dropout": dropout})
