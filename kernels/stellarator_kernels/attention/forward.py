"""Flash attention, forward.

out = softmax(s) v,  lse = log sum exp(s),  s = cap(scale q k^T), over the keys that a query sees.

One program makes OWN rows of one head: it walks over the keys that its rows see in blocks of STEP
with a running maximum and sum (online softmax). Only blocks at the edges are masked. A key/value
head is read in place by every query head of its group.

Reads q once and k, v once per tile of rows (mostly from L2), writes out and lse. Softmax in base 2
and fp32; the products have fp32 accumulators; weights are rounded to the dtype of v before the
second product. `lse` is in nats.

Source: FlashAttention-2, Dao 2023, arXiv:2307.08691; online softmax, Milakov & Gimelshein 2018,
arXiv:1805.02867.
"""

import torch

from stellarator_kernels import tuned
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.attention import tiles as shared
from stellarator_kernels.attention.tiles import (
    dot,
    head_and_batch,
    head_of,
    key_interval,
    load_tile,
    mask_scores,
    rows_of,
    scores_of,
    walk,
)
from stellarator_kernels.layout import aligned_rows, strides_in_units
from stellarator_kernels.random import kept_block


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bounds_ptr,
    q_stride_batch, q_stride_row, q_stride_head,
    k_stride_batch, k_stride_row, k_stride_head,
    v_stride_batch, v_stride_row, v_stride_head,
    T, S, H, group, window, scale,
    softcap, row_key_ptr, column_key_ptr, least, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Grid (`heads_together`, row tiles, B * the rest of H).

    The last tiles see most keys when causal, so they go first.
    """
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    head, batch = head_and_batch(H)
    kv_head = head // group
    start = tile * OWN
    if SPECIALIZE:
        # Triton (3.6 and 3.9) gives 64 rows each to two groups of warps. For the second one it adds
        # 64 to the start of q's load, and so to all that is made of that value: rows would move by
        # 128. Through int64 it is another value, which is not merged with that one.
        start = (tile.to(tl.int64) * OWN).to(tl.int32)
    rows = start + tl.arange(0, OWN)
    cols = tl.arange(0, BLOCK_D)
    k_ptr = head_of(k_ptr, batch, k_stride_batch, kv_head, k_stride_head)
    v_ptr = head_of(v_ptr, batch, v_stride_batch, kv_head, v_stride_head)
    q_ptr = head_of(q_ptr, batch, q_stride_batch, head, q_stride_head)
    q_rows = rows_of(q_ptr, T, D, q_stride_row, OWN, BLOCK_D, TMA)
    k_rows = rows_of(k_ptr, S, D, k_stride_row, STEP, BLOCK_D, TMA)
    v_rows = rows_of(v_ptr, S, D, v_stride_row, STEP, BLOCK_D, TMA)
    q = load_tile(q_rows, tile * OWN, 0, T, q_stride_row, cols, OWN, D, BLOCK_D, TMA)

    first, last = key_interval(rows, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    begin, end, inner, inner_end = walk(first, last, STEP)
    if DROPOUT:
        row_keys = tl.load(row_key_ptr + (batch * H + head) * T + rows, mask=rows < T, other=0)
    acc = tl.zeros((OWN, BLOCK_D), tl.float32)
    maximum = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    for block in tl.range(begin, end, STEP, warp_specialize=SPECIALIZE):
        keys = block + tl.arange(0, STEP)
        k = load_tile(k_rows, block, 0, S, k_stride_row, cols, STEP, D, BLOCK_D, TMA)
        scores = scores_of(dot(q, tl.trans(k), UPCAST), scale, softcap, SOFTCAP)
        if SPECIALIZE:  # a branch would keep the compiler from it
            scores = mask_scores(scores, first, last, keys)
        elif (block < inner) | (block + STEP > inner_end):
            scores = mask_scores(scores, first, last, keys)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row may have seen nothing yet, and -inf - -inf is NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(maximum - shift)
        total = total * correction + tl.sum(weights, 1)
        if DROPOUT:  # after the sum: it drops weights, not keys
            column_keys = tl.load(column_key_ptr + batch * S + keys, mask=keys < S, other=0)
            weights = tl.where(kept_block(row_keys, column_keys, least), weights * keep_scale, 0.0)
        v = load_tile(v_rows, block, 0, S, v_stride_row, cols, STEP, D, BLOCK_D, TMA)
        if not UPCAST:
            weights = weights.to(v.dtype)
        acc = acc * correction[:, None] + dot(weights, v, UPCAST)
        maximum = new_maximum

    # maximum is -inf and total 0 where no key was seen: out is then 0, and lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    lse = (maximum + tl.log2(total)) * 0.6931471805599453
    in_rows = rows < T
    tl.store(lse_ptr + (batch * H + head) * T + rows, lse, mask=in_rows)
    out_rows = ((batch * T + rows[:, None]) * H + head) * D
    tl.store(
        out_ptr + out_rows + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (cols < D)[None, :],
    )


@shared.with_scratch
def forward(
    q, k, v, cu_seqlens, causal, window, scale, softcap=None, dropout_p=0.0, dropout_keys=None
):
    """q (B, T, H, D), k and v (B, S, G, D), B = 1 if packed -> out (B, T, H, D), lse (B, H, T).

    dropout_keys: int32 of rows (B, H, T) and columns (B, S), contiguous; None: no dropout.
    """
    q, k, v = (aligned_rows(x) for x in (q, k, v))
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    tiles = shared.tile_sizes(
        "forward" if cu_seqlens is None else "forward packed",
        D,
        q.dtype,
        capability,
        softcap is not None,
        dropout_keys is not None,
        tuned.gpu_name(q.device),
    )
    # Without documents the kernel does not read `bounds`: any tensor will do.
    bounds = q if cu_seqlens is None else shared.document_bounds(cu_seqlens, T)
    with torch.cuda.device_of(q):
        _forward_kernel[shared.row_grid(q, k, tiles.own)](
            q, k, v, out, lse, bounds,
            *strides_in_units(q), *strides_in_units(k), *strides_in_units(v),
            T, S, H, H // G, window or 0, scale,
            **shared.extras(softcap, dropout_p, dropout_keys, q),
            CAUSAL=causal, WINDOW=window is not None, PACKED=cu_seqlens is not None,
            **shared.constants(D, q.dtype, tiles), **FUSED,
        )  # fmt: skip
    return out, lse
