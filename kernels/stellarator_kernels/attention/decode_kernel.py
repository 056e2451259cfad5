"""Attention of the newest tokens to a cache, in Triton: the keys of a row split over programs.

One new token gives each key/value head a matrix of only H/G query rows: far too little work for a
GPU, unless the keys are shared out. So each row's visible keys (its length and the window decide,
on the device) are cut into `splits` parts of equal size. A program attends one part with all query
heads of the group at once, so that a key is read from memory once; it leaves its result and its
lse in fp32. A second kernel merges the parts in their order: no atomics, the same bits every time.

Bound by reading the cache: 2 * G * D * itemsize bytes for each visible key. The partial results
are splits * H * (D + 1) * 4 bytes for each token, written and read once.

Source: the split over keys of Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
"""

import torch

from stellarator_kernels import _triton
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.attention.tiles import dot, head_of, load_tile, mask_scores
from stellarator_kernels.layout import aligned_rows, strides_in_units

_MOST_ROWS = 64  # query rows of a program: tokens times heads of the group
_PROGRAMS_PER_SM = 4
_LEAST_KEYS = 256  # of a part: below that merging costs more than sharing gains


@triton.jit
def _parts_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, lse_ptr,
    q_stride_batch, q_stride_row, q_stride_head,
    k_stride_batch, k_stride_row, k_stride_head,
    v_stride_batch, v_stride_row, v_stride_head,
    T, S, H, group, window, scale_log2, splits,
    WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (splits * row blocks, G, B). out (B, splits, T, H, D) fp32, lse (B, splits, T, H)."""
    split = tl.program_id(0) % splits
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)  # token, then head of the group
    inside = rows < T * group
    token = tl.minimum(rows // group, T - 1)
    head = kv_head * group + rows % group
    cols = tl.arange(0, BLOCK_D)
    q_rows = head_of(q_ptr, batch, q_stride_batch, head, q_stride_head)
    q_rows += token.to(tl.int64) * q_stride_row * 8
    wanted = inside[:, None] & (cols < D)[None, :]
    q = tl.load(q_rows[:, None] + cols[None, :], mask=wanted, other=0.0)
    k_ptr = head_of(k_ptr, batch, k_stride_batch, kv_head, k_stride_head)
    v_ptr = head_of(v_ptr, batch, v_stride_batch, kv_head, v_stride_head)

    length = tl.minimum(tl.load(lengths_ptr + batch), S).to(tl.int32)
    last = tl.maximum(length - T + token + 1, 0)  # [first, last): the keys that a row sees
    first = tl.zeros_like(last)
    if WINDOW:
        first = tl.maximum(last - window, 0)
    low, high = tl.min(first), tl.max(last)
    part = tl.cdiv(tl.cdiv(high - low, splits), STEP) * STEP
    begin = low + split * part
    end = tl.minimum(begin + part, high)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for block in range(begin, end, STEP):
        keys = block + tl.arange(0, STEP)
        k = load_tile(k_ptr, block, 0, end, k_stride_row, cols, STEP, D, BLOCK_D, False)
        v = load_tile(v_ptr, block, 0, end, v_stride_row, cols, STEP, D, BLOCK_D, False)
        scores = dot(q, tl.trans(k), UPCAST) * scale_log2
        scores = mask_scores(scores, first, tl.minimum(last, end), keys)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # nothing seen yet
        weights = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(maximum - shift)
        total = total * correction + tl.sum(weights, 1)
        if not UPCAST:
            weights = weights.to(v.dtype)
        acc = acc * correction[:, None] + dot(weights, v, UPCAST)
        maximum = new_maximum
    total = tl.where(total == 0.0, 1.0, total)
    places = ((batch * splits + split) * T + token) * H + head
    tl.store(lse_ptr + places, maximum + tl.log2(total), mask=inside)
    tl.store(out_ptr + places[:, None] * D + cols[None, :], acc / total[:, None], mask=wanted)


@triton.jit
def _merge_kernel(
    part_ptr, lse_ptr, out_ptr, heads, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (T * H, B): the parts of one head of one token, weighted by their sums of weights."""
    place = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    parts, cols = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    rows = (batch * splits + parts) * heads + place
    lse = tl.load(lse_ptr + rows, mask=parts < splits, other=float("-inf"))
    maximum = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(maximum == float("-inf"), 0.0, maximum))
    weights /= tl.maximum(tl.sum(weights, 0), 1e-30)  # a query at a negative position gives 0
    inside = (parts < splits)[:, None] & (cols < D)[None, :]
    out = tl.load(part_ptr + rows[:, None] * D + cols[None, :], mask=inside, other=0.0)
    out = tl.sum(out * weights[:, None], 0)
    place = (batch * heads + place) * D + cols
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=cols < D)


def plan(B: int, T: int, S: int, H: int, G: int, window: int | None, num_sms: int) -> dict:
    """How the work is shared out; depends on the cache's size, not on what is in it. Pure.

    Returns ROWS and row_blocks, of tokens times heads of a group, and `splits` of the keys.
    """
    rows = T * H // G
    ROWS = min(_MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    row_blocks = triton.cdiv(rows, ROWS)
    visible = S if window is None else min(S, window + T - 1)
    wanted = triton.cdiv(_PROGRAMS_PER_SM * num_sms, B * G * row_blocks)
    splits = max(1, min(wanted, triton.cdiv(visible, _LEAST_KEYS)))
    return {"ROWS": ROWS, "row_blocks": row_blocks, "splits": splits}


def step(D: int, ROWS: int) -> dict:
    """Keys of a step and launch options: loads of 32 KB of keys and values run ahead. Pure."""
    STEP = 64 if D <= 128 else 32
    return {"STEP": STEP, "num_warps": 4 if ROWS <= 32 else 8, "num_stages": 3 if D <= 128 else 2}


def decode(q, k_cache, v_cache, lengths, window, scale):
    """(B, T, H, D); arguments as in `decode_attention`, none empty."""
    q, k, v = (aligned_rows(x) for x in (q, k_cache, v_cache))
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    num_sms = 2  # of the interpreter: a few parts
    if q.is_cuda:
        num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    shared = plan(B, T, S, H, G, window, num_sms)
    splits, BLOCK_D = shared["splits"], max(16, triton.next_power_of_2(D))
    parts = torch.empty((B, splits, T, H, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((B, splits, T, H), dtype=torch.float32, device=q.device)
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        _parts_kernel[(splits * shared["row_blocks"], G, B)](
            q, k, v, lengths.contiguous(), parts, lse,
            *strides_in_units(q), *strides_in_units(k), *strides_in_units(v),
            T, S, H, H // G, window or 0, scale * 1.4426950408889634, splits,
            WINDOW=window is not None, D=D, BLOCK_D=BLOCK_D, ROWS=shared["ROWS"],
            UPCAST=_triton.INTERPRETED and q.dtype != torch.float32, **step(D, shared["ROWS"]),
            **FUSED,
        )  # fmt: skip
        _merge_kernel[(T * H, B)](
            parts, lse, out, T * H, splits,
            D=D, BLOCK_D=BLOCK_D, SPLITS=triton.next_power_of_2(splits), **FUSED,
        )  # fmt: skip
    return out
