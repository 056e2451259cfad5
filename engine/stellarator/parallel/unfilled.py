"""Parameters whose values are made when somebody takes them over, one after the other.

defines: Fill, without_memory, values_of

A model that is to be shared out is never whole on a rank: it is made on "meta", gets parameters
without memory, and each bucket of the optimizer asks for the values of its own parameters.
"""

from collections.abc import Callable
from functools import partial

import torch

from stellarator.parallel.shard import Shard, shards_of

# (name, what part of the parameter is wanted, a tensor for it): sets its values.
Fill = Callable[[str, Shard, torch.Tensor], None]


def without_memory(model: torch.nn.Module, device: torch.device, fill: Fill) -> None:
    """Move a model from "meta" to a device, where its parameters have no memory yet.

    fill: gives `values_of` each of them; once.
    """
    shards = shards_of(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            empty.untyped_storage().resize_(0)
            there = torch.nn.Parameter(empty)
            whole = f"{path}.{name}" if path else name
            there.fill = partial(fill, whole, shards[whole])
            setattr(module, name, there)


@torch.no_grad()
def values_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values, in memory of their own where the parameter has none."""
    if not hasattr(parameter, "fill"):
        return parameter.detach()
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    parameter.fill(values)
    del parameter.fill  # it may keep a file open
    return values
