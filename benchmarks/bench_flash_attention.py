"""flash_attention: causal, with a window, and packed documents, for grouped heads.

Peers: eager (scores, mask, softmax, product, heads expanded, as transformers' eager attention);
sdpa (F.scaled_dot_product_attention with enable_gqa; causal as such, a window as a dense mask, as
it has no other way); both one document after the other; on CUDA FlexAttention, SDPA by its flash
kernel alone and by cuDNN's, varlen_attn, flash-attn, our own backward without determinism
("any_order"), and for documents of equal length our own rows of a batch ("unpacked").
"""

import itertools
import math

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import cost, flash_attention
from stellarator_kernels.reference import visible_keys

_EQUAL = 32  # documents of equal length at most


def cases(shape: Shape, device: str) -> list[Case]:
    """The three masks; on a GPU also documents of equal length, to see what packing costs."""
    made = [
        _case(shape, device, "causal", None, None),
        _case(shape, device, f"window {shape.window}", shape.window, None),
        _case(shape, device, "packed", None, shape.documents()),
    ]
    if device == "cuda":
        count = math.gcd(shape.N, _EQUAL)
        made.append(_case(shape, device, "equal", None, [shape.N // count] * count))
    return made


def _case(shape: Shape, device: str, variant: str, window, lengths) -> Case:
    B, T, H, G, D = shape.B, shape.T, shape.H, shape.G, shape.D
    packed = lengths is not None
    ends = [0, *itertools.accumulate(lengths)] if packed else None
    rows, keys = (1, shape.N) if packed else (B, T)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device) if packed else None
    documents = lengths if packed else [T] * B
    pairs = sum(cost.visible_pairs(n, window=window) for n in documents)

    def inputs(make: Maker) -> dict[str, torch.Tensor]:
        longest = max(documents)
        visible = visible_keys(longest, longest, window=window, device=make.device)
        mask = torch.zeros(longest, longest, dtype=make.dtype, device=make.device)
        mask.masked_fill_(~visible, -torch.inf)
        leading = (shape.N,) if packed else (B, T)
        q, k, v = (make.normal(*leading, heads, D) for heads in (H, G, G))
        return {"q": q, "k": k, "v": v, "mask": mask}

    def ours(impl, q, k, v, mask):
        return flash_attention(q, k, v, window=window, cu_seqlens=cu_seqlens, impl=impl)

    if packed:
        others = {"eager": _each_document(eager, ends), "sdpa": _each_document(sdpa_causal, ends)}
    else:
        others = {"eager": eager, "sdpa": sdpa_causal if window is None else sdpa_masked}
    if device == "cuda":
        others |= peers.attention(keys, window, cu_seqlens)
        others["any_order"] = _any_order(window, cu_seqlens)
    if variant == "equal":
        others["unpacked"] = _unpacked(len(lengths))
    return Case(
        op="flash_attention",
        variant=variant,
        sizes={"B": rows, "T": keys, "H": H, "G": G, "D": D, "pairs": pairs},
        inputs=inputs,
        ours=ours,
        peers=others,
        cost=lambda size: cost.flash_attention(pairs, shape.N, shape.N, H, G, D, size),
        reference_bytes=5 * 8 * rows * H * keys * keys,
    )


def _any_order(window, cu_seqlens):
    def any_order(q, k, v, mask):
        """Ours, but the backward may add dq up in any order."""
        options = {"window": window, "cu_seqlens": cu_seqlens, "deterministic": False}
        return flash_attention(q, k, v, **options, impl="triton")

    return any_order


def _unpacked(count: int):
    def unpacked(q, k, v, mask):
        """Ours, documents of equal length as rows of a batch: the same work without packing."""
        rows = [x.unflatten(0, (count, -1)) for x in (q, k, v)]
        return flash_attention(*rows).flatten(0, 1)

    return unpacked


def eager(q, k, v, mask):
    """Plain torch; q (B, T, H, D), k and v (B, T, G, D), mask (T, T) additive."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    weights = scores.softmax(-1, dtype=torch.float32 if q.dtype.itemsize < 4 else None)
    return (weights.to(q.dtype) @ v).transpose(1, 2)


def sdpa_causal(q, k, v, mask):
    """ATen's flash kernel with its own causal flag."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def sdpa_masked(q, k, v, mask):
    """ATen's flash kernel with a dense mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def _each_document(function, ends: list[int]):
    """One document after the other, each a batch of one; the mask is causal for all of them."""

    def each_document(q, k, v, mask):
        parts = [
            function(*(x[None, a:b] for x in (q, k, v)), mask[: b - a, : b - a])[0]
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(parts)

    return each_document
