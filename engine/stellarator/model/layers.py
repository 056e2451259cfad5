"""Parameters without a rule for their initial values, and the two layers made of nothing else.

defines: parameter, fusible, Linear, LayerNorm

Values come from `init.initialize` or from a file, so nothing is drawn here: torch's own layers draw
random weights when they are made, which costs minutes for a large model and moves its random state.
"""

import torch

from stellarator_kernels import layer_norm, layer_norm_linear, linear


def parameter(*shape: int, device, dtype) -> torch.nn.Parameter:
    """A parameter whose values are not set yet."""
    return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def fusible(*modules: torch.nn.Module) -> bool:
    """Whether ops that span these modules may run in place of their `forward`.

    Not if one is of another class (an adapter, a sharded layer) or somebody watches it by hooks.
    """
    return all(
        type(module) in (Linear, LayerNorm)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        for module in modules
    )


class Linear(torch.nn.Module):
    """y = x @ weight^T + bias; weight (out, in), bias (out,)."""

    def __init__(self, in_width: int, out_width: int, *, device, dtype):
        super().__init__()
        self.weight = parameter(out_width, in_width, device=device, dtype=dtype)
        self.bias = parameter(out_width, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(torch.nn.Module):
    """LayerNorm with bias over the last dimension, with the residual addition in front of it."""

    def __init__(self, width: int, eps: float, kernels: str, *, device, dtype):
        super().__init__()
        self.eps, self.kernels = eps, kernels
        self.weight = parameter(width, device=device, dtype=dtype)
        self.bias = parameter(width, device=device, dtype=dtype)

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
        options = {"impl": self.kernels}
        if branch is None:
            return layer_norm_linear(residual, *norm, weight, bias, self.eps, **options), residual
        options |= dropout or {}
        return layer_norm_linear(branch, *norm, weight, bias, self.eps, residual, **options)
