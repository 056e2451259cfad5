"""Attention of the newest tokens to a cache of keys and values, for generation. No gradient.

Sizes: B rows, T new tokens per row, S cache slots, H query heads, G key/value heads, D head width.

The query heads that share a key/value head become rows of one matrix, so that each key is read
once for its whole group and nothing is expanded in memory. On a GPU the keys of a row are split
over programs (decode_kernel.py). On the CPU, slots that no row needs are not read: the cache is cut
at the longest row and, with a window, at the oldest key that any row sees. Softmax in float32
(float64 for float64); products in the dtype of the cache with fp32 accumulation.
"""

import math

import torch

from stellarator_kernels import checks, dispatch, reference
from stellarator_kernels.attention.api import check_window, checked_scale

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Causal attention of the newest T tokens of each row to its cache.

    Query t of row b is token lengths[b] - T + t of that row; its own key is in the cache already.

    Args:
        q: (B, T, H, D), the newest tokens, right-aligned with the end of each row.
        k_cache, v_cache: (B, S, G, D); slots from lengths[b] on are ignored, but must be
            finite (zeros, or old tokens).
        lengths: (B,) int64, tokens of each row in the cache, the T new ones included; T..S.
        window: visible keys per query, itself included; None: all.
        scale: of the scores, above 0; None: D**-0.5.
        impl: "auto", "triton" (D a multiple of 8 from 16 to 256), "torch" or "reference".
    Returns:
        (B, T, H, D) in the dtype of q. A query at a negative position (lengths[b] < T) gives 0.
    Raises:
        ValueError: shapes, dtypes or devices disagree.
    Cost: reads the used part of both caches once: 2 * B*S*G*D * itemsize bytes.
    """
    _validate(q, k_cache, v_cache, lengths, window)
    scale = checked_scale("decode_attention", scale, q.shape[-1])
    chosen = dispatch.choose("decode_attention", impl, q)
    run = {"triton": _run_kernel, "torch": _decode}.get(chosen, reference.decode_attention_ref)
    with torch.no_grad():
        return run(q, k_cache, v_cache, lengths, window, scale)


def _validate(q, k_cache, v_cache, lengths, window) -> None:
    """Shapes, dtypes and devices of one call."""
    op = "decode_attention"
    sizes = tuple(q.shape), tuple(k_cache.shape)
    checks.expect(
        q.dim() == 4
        and k_cache.dim() == 4
        and q.shape[0] == k_cache.shape[0]
        and q.shape[3] == k_cache.shape[3]
        and k_cache.shape[2] > 0
        and q.shape[2] % k_cache.shape[2] == 0,
        op,
        "q (B, T, H, D) and k_cache (B, S, G, D) with H a multiple of G",
        sizes,
        "Pass the cache of the same rows and heads",
    )
    checks.expect_shape(
        op, "v_cache", v_cache, "(B, S, G, D)", sizes[1], "Keys and values have one shape"
    )
    checks.expect_shape(op, "lengths", lengths, "(B,)", q.shape[:1], "Pass one length per row")
    checks.expect_dtype(op, "q", q, _FLOATS, "Cast it")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.expect_dtype(op, name, cache, (q.dtype,), "Give q and the caches one dtype")
    checks.expect_dtype(op, "lengths", lengths, (torch.int64,), "Count tokens in int64")
    checks.expect_same_device(op, q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    check_window(op, window)
    if lengths.device.type == "cpu" and len(lengths):  # on a GPU looking would wait for it
        S, longest = k_cache.shape[1], int(lengths.max())
        todo = "Make the cache larger, or drop its oldest tokens"
        checks.expect(longest <= S, op, f"lengths of at most S = {S} tokens", longest, todo)


def _run_kernel(q, k_cache, v_cache, lengths, window, scale):
    """The Triton kernels, whose module imports Triton."""
    if q.numel() == 0 or k_cache.shape[1] == 0:
        return torch.zeros_like(q)
    from stellarator_kernels.attention.decode_kernel import decode

    return decode(q, k_cache, v_cache, lengths, window, scale)


def _decode(q, k_cache, v_cache, lengths, window, scale):
    """Cut the caches to the slots in use, mark what each query does not see, attend."""
    B, T, H, D = q.shape
    if q.numel() == 0 or k_cache.shape[1] == 0:
        return torch.zeros_like(q)
    position = lengths[:, None] - T + torch.arange(T, device=q.device)  # (B, T)
    first, last = 0, k_cache.shape[1]
    if q.device.type == "cpu":  # on a GPU reading the lengths would wait for it
        last = max(1, min(last, int(lengths.max())))
        oldest = 0 if window is None else int(lengths.min()) - T + 1 - window
        first = min(max(0, oldest), last - 1)
    slot = torch.arange(first, last, device=q.device)
    visible = slot <= position[..., None]  # (B, T, S)
    if window is not None:
        visible &= slot > position[..., None] - window
    k, v = (cache[:, first:last].transpose(1, 2) for cache in (k_cache, v_cache))
    attend = _flash if q.device.type == "cpu" else _products
    out = attend(q, k, v, visible, scale)
    return out.masked_fill_(position[..., None, None] < 0, 0.0)


def _flash(q, k, v, visible, scale):
    """ATen's CPU flash kernel; k, v (B, G, S, D), visible (B, T, S).

    For one new token the heads of a group go in as query rows of one head, so that the kernel
    multiplies matrices, not vectors: three times faster in bf16 for H 24, G 2, D 128, six times in
    fp32. With more tokens it has matrices already.
    """
    B, T, H, D = q.shape
    G = k.shape[1]
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -math.inf)[:, None]
    if T == 1:
        rows, bias = q.reshape(B, G, H // G, D), bias.expand(B, 1, H // G, -1)
    else:
        rows = q.transpose(1, 2)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _ = kernel(rows, k, v, 0.0, False, attn_mask=bias, scale=scale)
    return out.reshape(B, 1, H, D) if T == 1 else out.transpose(1, 2).contiguous()


def _products(q, k, v, visible, scale):
    """Two batched matrix products, the heads of a group as rows; any device."""
    B, T, H, D = q.shape
    G, S = k.shape[1:3]
    rows = q.unflatten(2, (G, H // G)).transpose(1, 2).reshape(B, G, -1, D)  # token, then head
    scores = torch.matmul(rows, k.mT).to(reference.compute_dtype(q)) * scale
    scores = scores.view(B, G, T, H // G, S)
    weights = scores.masked_fill_(~visible[:, None, :, None], -math.inf).softmax(-1)
    out = torch.matmul(weights.to(q.dtype).view(B, G, -1, S), v)
    return out.view(B, G, T, H // G, D).transpose(1, 2).reshape(B, T, H, D)
