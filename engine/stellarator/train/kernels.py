"""Whether `train.kernels` names an implementation that every op of a training step has.

But the embedding and the products, which have fewer: they are chosen by themselves.

defines: check
"""

import torch

from stellarator.config import ModelConfig, RunConfig
from stellarator_kernels import dispatch


def check(config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise before anything is read or made, and not in the middle of the first step.

    Args:
        config: of the run.
        device, dtype: of the parameters.
    Raises:
        ValueError: an op does not have that implementation, or not here; all of them are named.
    """
    impl = config.train.kernels
    if impl == "auto":
        return
    refused, model = [], config.model
    narrow = config.optim.weights != "masters" or config.optim.moments != "fp32"
    up = torch.empty(model.ffn_width, model.width, dtype=dtype, device="meta")
    for op, (shape, kind) in _deciding(config.model, dtype).items():
        dropout_p = model.attention_dropout if op == "flash_attention" else 0.0
        options = {"dropout_p": dropout_p, "narrow": narrow, "up_weight": up}
        given = dispatch.facts(op, torch.empty(shape, dtype=kind, device=device), options)
        if reason := dispatch.refusal(op, impl, given):
            refused.append(f"{op}: {reason}")
    if refused:
        raise ValueError(
            f"train.kernels: expected an implementation that every op has here, got {impl!r} "
            f"({'; '.join(refused)}). Pass train.kernels=auto."
        )


def _deciding(model: ModelConfig, dtype: torch.dtype) -> dict[str, tuple[tuple, torch.dtype]]:
    """Of each op of a training step the shape and dtype that its implementation depends on."""
    heads, width = (0, model.num_heads, model.head_width), (0, model.width)
    ops = {
        "flash_attention": (heads, dtype),
        "layer_norm": (width, dtype),
        "mlp": (width, dtype),
        "bias_gelu": ((0, model.ffn_width), dtype),
        "linear_cross_entropy": (width, dtype),
        "adamw_": ((0,), dtype),
        "grad_norm": ((0,), torch.promote_types(dtype, torch.float32)),
    }
    return ops | ({"rope": (heads, dtype)} if model.positions == "rope" else {})
