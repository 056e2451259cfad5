"""Parameters without a rule for their initial values, and the two layers made of nothing else.

defines: parameter, plain, fusible, recomputed, Linear, RowLinear, LayerNorm, norm_again

Values come from `init.initialize` or from a file, so nothing is drawn here: torch's own layers draw
random weights when they are made, which costs minutes for a large model and moves its random state.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from stellarator.parallel.gradients import room_of
from stellarator.parallel.pipeline.deferred import Deferred
from stellarator.parallel.products import Again, column_product, row_product
from stellarator.parallel.shard import Shard
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator_kernels import layer_norm, layer_norm_linear, linear


def parameter(shard: Shard, *, device, dtype) -> torch.nn.Parameter:
    """This rank's part of a parameter, whose values are not set yet."""
    return torch.nn.Parameter(torch.empty(shard.local_shape, device=device, dtype=dtype))


def plain(*modules: torch.nn.Module) -> bool:
    """Whether these modules do what they are written to do, and nobody looks.

    Not if one is of another class (an adapter) or somebody watches it by hooks.
    """
    return all(
        type(module) in (Linear, RowLinear, LayerNorm)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        for module in modules
    )


def fusible(*modules: torch.nn.Module) -> bool:
    """Whether ops that span these modules may run in place of their `forward`.

    Not if one is not `plain`, ranks share it, or its weight gradient is made apart.
    """
    return plain(*modules) and all(
        module.tp.alone and getattr(module, "deferred", None) is None for module in modules
    )


def recomputed(function: Callable, *inputs):
    """What a function gives; for the backward it is called again instead of keeping anything."""
    # Masks of dropout are functions of their keys, so there is no random state to keep.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Linear(torch.nn.Module):
    """y = x @ weight^T + bias; weight (out, in), bias (out,): the outputs that this rank makes."""

    deferred: Deferred | None = None  # of a schedule that makes weight gradients apart

    def __init__(self, weight: Shard, bias: Shard, tp: TensorParallel, *, device, dtype):
        super().__init__()
        self.tp = tp
        self.shards = {"weight": weight, "bias": bias}
        self.weight = parameter(weight, device=device, dtype=dtype)
        self.bias = parameter(bias, device=device, dtype=dtype)

    def forward(
        self, x: torch.Tensor, shape: torch.Size, again: Again | None = None
    ) -> torch.Tensor:
        """x: (B, T, in), or the tokens that this rank has between products; shape: (B, T).

        again: makes x, where ranks share the product or its weight gradient is made apart; else,
            and for None, x is kept for the backward.
        """
        if _whole(self):
            return linear(x, self.weight, self.bias, room=room_of(self.weight))
        return column_product(x, self.weight, self.bias, shape, self.tp, self.deferred, again)


class RowLinear(torch.nn.Module):
    """y = x @ weight^T + bias of the inputs that this rank has, summed over the tensor ranks."""

    deferred: Deferred | None = None

    def __init__(self, in_width: int, out_width: int, tp: TensorParallel, *, device, dtype):
        super().__init__()
        self.tp = tp
        self.shards = {"weight": tp.by_rows(out_width, in_width), "bias": tp.whole(out_width)}
        self.weight = parameter(self.shards["weight"], device=device, dtype=dtype)
        self.bias = parameter(self.shards["bias"], device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, in_tp)."""
        if _whole(self):
            return linear(x, self.weight, self.bias, room=room_of(self.weight))
        return row_product(x, self.weight, self.bias, self.tp, self.deferred)


def _whole(module: Linear | RowLinear) -> bool:
    """Whether its product is nobody else's, and its weight gradient made with its input's."""
    return module.tp.alone and module.deferred is None


class LayerNorm(torch.nn.Module):
    """LayerNorm with bias over the last dimension, with the residual addition in front of it."""

    def __init__(
        self, width: int, eps: float, kernels: str, tp: TensorParallel = ALONE, *, device, dtype
    ):
        super().__init__()
        self.eps, self.kernels, self.tp = eps, kernels, tp
        self.shards = {"weight": tp.whole(width), "bias": tp.whole(width)}
        self.weight = parameter(tp.whole(width), device=device, dtype=dtype)
        self.bias = parameter(tp.whole(width), device=device, dtype=dtype)

    def forward(
        self, branch: torch.Tensor | None, residual: torch.Tensor, dropout: dict | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised, summed) of summed = branch + residual; without a branch, of the residual.

        dropout: of the branch, from `Masks.residual`.
        """
        norm = (self.weight, self.bias, self.eps)
        if branch is None:
            return layer_norm(residual, *norm, impl=self.kernels), residual
        return layer_norm(branch, *norm, residual, **(dropout or {}), impl=self.kernels)

    def into(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        branch: torch.Tensor | None,
        residual: torch.Tensor,
        dropout: dict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised @ weight^T + bias, summed); the normalised rows are not kept.

        Only where the norm and the product are `fusible`.
        """
        norm = (self.weight, self.bias)
        options = {"room": room_of(weight), "impl": self.kernels}
        if branch is None:
            return layer_norm_linear(residual, *norm, weight, bias, self.eps, **options), residual
        options |= dropout or {}
        return layer_norm_linear(branch, *norm, weight, bias, self.eps, residual, **options)


def norm_again(norm: torch.nn.Module, summed: torch.Tensor) -> Again | None:
    """How the normalised rows of these sums are made a second time; None: keep them."""
    if not plain(norm):
        return None
    make = partial(layer_norm, eps=norm.eps, impl=norm.kernels)
    return Again(make, (summed, norm.weight, norm.bias))
