"""Kernels of other projects on a GPU, where they can be imported; and which peers are asked for.

defines: attention, rope, layer_norm, rms_norm, swiglu, cross_entropy, linear_cross_entropy,
    compiled,
    forget_compiled, choose, absent, DEFAULT, OF_CUDA, OPTIONAL

Each function returns {name: peer}, empty where the project is not installed. A peer that is there
and fails is reported by the suite as one that cannot run; one that computes something else is
reported too and not compared. None of these has been run by us yet: there was no GPU.
"""

import importlib
import itertools
import sys
from collections.abc import Callable

import torch

OF_CUDA = (  # where they can be imported
    "flash", "flex", "cudnn", "varlen", "flash_attn", "any_order", "unpacked", "liger", "apex",
)  # fmt: skip
OPTIONAL = ("compile",)  # asked for by name, because compiling takes minutes
DEFAULT = "default"
_MODULES = {  # what a peer is imported from
    "varlen": "torch.nn.attention.varlen",
    "flash_attn": "flash_attn",
    "liger": "liger_kernel.transformers.functional",
    "apex": "apex.normalization.fused_layer_norm",
}


def _module(peer: str):
    """The module of a peer, or None. A broken install counts as none."""
    try:
        return importlib.import_module(_MODULES[peer])
    except Exception:  # whatever the project raises while it is imported
        return None


def absent() -> dict[str, str]:
    """Peers that cannot be imported here, and why."""
    found = {}
    for peer, name in _MODULES.items():
        try:
            importlib.import_module(name)
        except Exception as error:  # as in _module
            found[peer] = f"{type(error).__name__}: {error}"
    return found


def compiled(function: Callable) -> Callable:
    """A function under torch.compile, for these shapes."""
    return torch.compile(function, dynamic=False)


def forget_compiled() -> None:
    """Before a case: torch compiles a function for eight shapes and then no more, without a word.

    A peer would then be timed as plain code. Where nothing was compiled, nothing is imported.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def choose(wanted: str, available: dict[str, Callable]) -> dict[str, Callable]:
    """The peers that are asked for, in the order of the case.

    Args:
        wanted: names with commas between; "default" stands for all but the optional ones.
        available: those of a case.
    """
    names = set(wanted.split(","))
    found = {n: f for n, f in available.items() if DEFAULT in names or n in names}
    if "compile" in names:
        found["compile"] = compiled(available["eager"])
    return found


def attention(tokens: int, window: int | None, cu_seqlens: torch.Tensor | None) -> dict:
    """FlexAttention, SDPA by flash and cuDNN, varlen_attn, flash-attn; with the mask of a case."""
    found = {"flex": _flex(tokens, window, cu_seqlens)}
    if cu_seqlens is None and window is None:
        found["flash"] = _sdpa_by("FLASH_ATTENTION")
        found["cudnn"] = _sdpa_by("CUDNN_ATTENTION")
    if cu_seqlens is not None and _module("varlen") is not None:
        found["varlen"] = _varlen(window, cu_seqlens)
    module = _module("flash_attn")
    if module is not None:
        found["flash_attn"] = _flash_attn(module, window, cu_seqlens)
    return found


def _flex(tokens: int, window: int | None, cu_seqlens: torch.Tensor | None) -> Callable:
    """FlexAttention, compiled, with a block mask that is made once."""
    state = {}

    def visible(b, h, query, key):
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        if cu_seqlens is not None:
            document = state["document"]
            seen = seen & (document[query] == document[key])
        return seen

    def flex(q, k, v, mask):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not state:
            if cu_seqlens is not None:
                index = torch.arange(tokens, device=q.device)
                state["document"] = torch.bucketize(index, cu_seqlens[1:], right=True)
            state["mask"] = create_block_mask(visible, None, None, tokens, tokens, device=q.device)
            state["call"] = compiled(flex_attention)
        packed = q.dim() == 3
        q, k, v = ((x[None] if packed else x).transpose(1, 2) for x in (q, k, v))
        out = state["call"](q, k, v, block_mask=state["mask"], enable_gqa=True).transpose(1, 2)
        return out[0] if packed else out

    return flex


def _sdpa_by(backend: str) -> Callable:
    """SDPA by one of its backends; where that cannot run it raises."""

    def sdpa(q, k, v, mask):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
        return out.transpose(1, 2)

    return sdpa


def _longest(cu_seqlens: torch.Tensor | None) -> int:
    ends = [0] if cu_seqlens is None else cu_seqlens.tolist()
    return max((b - a for a, b in itertools.pairwise(ends)), default=0)


def _varlen(window: int | None, cu_seqlens: torch.Tensor) -> Callable:
    """torch's flash attention over packed documents; a window without a right side is causal."""
    longest = _longest(cu_seqlens)

    def varlen(q, k, v, mask):
        from torch.nn.attention.varlen import varlen_attn

        sides = (-1 if window is None else window - 1, 0)
        return varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=sides,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    return varlen


def _flash_attn(module, window: int | None, cu_seqlens: torch.Tensor | None) -> Callable:
    """flash-attn; its window counts the keys to the left of the query."""
    sides = (-1, -1) if window is None else (window - 1, 0)
    longest = _longest(cu_seqlens)

    def flash_attn(q, k, v, mask):
        if cu_seqlens is None:
            return module.flash_attn_func(q, k, v, causal=True, window_size=sides)
        return module.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, window_size=sides
        )

    return flash_attn


def rope(B: int, T: int) -> dict:
    """Liger's kernel, on heads first and a table of full width."""
    module = _module("liger")
    if module is None:
        return {}

    def liger(q, k, cos, sin):
        cos, sin = (torch.cat((x, x), -1).view(B, T, -1).to(q.dtype) for x in (cos, sin))
        rotated = module.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return tuple(x.transpose(1, 2) for x in rotated)

    return {"liger": liger}


def layer_norm(eps: float) -> dict:
    """Liger's and apex's kernels, behind the addition of the residual."""
    found = {}
    if (liger := _module("liger")) is not None:

        def with_liger(x, weight, bias, residual):
            summed = x + residual
            return liger.liger_layer_norm(summed, weight, bias, eps), summed

        found["liger"] = with_liger
    if (apex := _module("apex")) is not None:

        def with_apex(x, weight, bias, residual):
            summed = x + residual
            return apex.fused_layer_norm_affine(summed, weight, bias, x.shape[-1:], eps), summed

        found["apex"] = with_apex
    return found


def swiglu() -> dict:
    """Liger's kernel, on two tensors."""
    module = _module("liger")
    if module is None:
        return {}
    return {"liger": lambda x: module.liger_swiglu(*(half.contiguous() for half in x.chunk(2, -1)))}


def rms_norm(eps: float) -> dict:
    """Liger's kernel, behind the addition of the residual."""
    module = _module("liger")
    if module is None:
        return {}

    def liger(x, weight, residual):
        summed = x + residual
        return module.liger_rms_norm(summed, weight, eps), summed

    return {"liger": liger}


def cross_entropy() -> dict:
    """Liger's kernel. It writes the gradient over the logits, so it gets a copy."""
    module = _module("liger")
    if module is None:
        return {}

    def liger(logits, targets):
        return module.liger_cross_entropy(logits.clone(), targets, reduction="none")

    return {"liger": liger}


def linear_cross_entropy() -> dict:
    """Liger's kernel."""
    module = _module("liger")
    if module is None:
        return {}
    return {"liger": module.liger_fused_linear_cross_entropy}
