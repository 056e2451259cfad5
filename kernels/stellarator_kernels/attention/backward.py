"""Flash attention, backward: three designs.

With s = cap(scale q k^T), P = exp(s - lse), factors M of dropout (or 1), and
delta = rowsum(dout * out) - dlse:
dv = (P M)^T dout,  dS = P * (M dout v^T - delta) * cap',  dq = scale dS k,  dk = scale dS^T q.

delta comes first, from a kernel of its own: 2 * D * itemsize bytes a row, about 1 % of the time.

"split": two kernels, no atomics, the same bits every time. `_dq_kernel` has a program for each
tile of query rows and query head; it walks over the keys for dq. `_dkdv_kernel` has one for each
tile of keys and key/value head; it walks over the query heads of its group and over the rows that
see its keys: dk and dv are summed in registers and come out compact, (B, S, G, D). Where such
programs are too few for the GPU, the heads of a group are shared out to several, whose sums are
added in fp32 in one order. Seven products for five: P and dS are made twice.

"ordered": `_dkdv_kernel` alone, which adds its share of dq to fp32 sums in memory. Five products.
The tiles of keys add to a block of rows in one order, last keys first: each waits for its turn at a
counter, so the bits are the same every time. When causal the tile at the diagonal reaches a block
of rows first, the one before it a step later: in that order hardly anyone waits. A tile never waits
for one that was started after it, so none can block another.

"atomic": the same with atomic additions in any order, so dq differs by rounding from run to run.

Saved from the forward: q, k, v, out and lse. P and dS are computed in fp32 and rounded to the input
dtype before they are multiplied; all accumulators are fp32.

Source: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2; the order of additions is that of
FlashAttention-3's deterministic backward with the shortest tiles first (its pull request 1893).
"""

import torch

from stellarator_kernels import _triton, tuned
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.attention import tiles as shared
from stellarator_kernels.attention.tiles import (
    dot,
    head_and_batch,
    head_of,
    key_interval,
    load_tile,
    mask_scores,
    query_interval,
    rows_of,
    scores_of,
    slope_of,
    walk,
)
from stellarator_kernels.layout import aligned_rows, strides_in_units
from stellarator_kernels.random import kept_block

_SPLIT, _ORDERED, _ATOMIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DESIGNS = {"split": 0, "ordered": 1, "atomic": 2}
DELTA_ROWS = 64


@triton.jit
def wait_for(counter_ptr, value):
    """Return when the counter is `value` or more; every thread then sees what was stored before.

    In PTX, because a loop in a loop would keep Triton from loading ahead of the products.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred %waits;
        AGAIN:
        ld.acquire.gpu.global.s32 $0, [$1];
        setp.lt.s32 %waits, $0, $2;
        @%waits bra AGAIN;
        }""",
        "=r,l,r",
        [counter_ptr, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def count_one(counter_ptr, INTERPRETED: tl.constexpr):
    """Add 1 to the counter after all threads of the program have stored what they had to."""
    if INTERPRETED:
        tl.atomic_add(counter_ptr, 1)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred %first;
            .reg .u32 %thread;
            bar.sync 0;
            mov.u32 %thread, %tid.x;
            setp.eq.u32 %first, %thread, 0;
            @%first red.release.gpu.global.add.s32 [$1], 1;
            mov.u32 $0, 0;
            }""",
            "=r,l",
            [counter_ptr],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr,
    out_stride_batch, out_stride_row, out_stride_head,
    dout_stride_batch, dout_stride_row, dout_stride_head,
    T, H, HAS_DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, H, B). delta (B, H, T) = rowsum(dout * out) - dlse."""
    start = tl.program_id(0) * ROWS
    rows = start + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    out_ptr = head_of(out_ptr, batch, out_stride_batch, head, out_stride_head)
    dout_ptr = head_of(dout_ptr, batch, dout_stride_batch, head, dout_stride_head)
    out = load_tile(out_ptr, start, 0, T, out_stride_row, cols, ROWS, D, BLOCK_D, False)
    dout = load_tile(dout_ptr, start, 0, T, dout_stride_row, cols, ROWS, D, BLOCK_D, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    statistics = (batch * H + head) * T + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + statistics, mask=rows < T, other=0.0)
    tl.store(delta_ptr + statistics, delta, mask=rows < T)


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, bounds_ptr,
    q_stride_batch, q_stride_row, q_stride_head,
    k_stride_batch, k_stride_row, k_stride_head,
    v_stride_batch, v_stride_row, v_stride_head,
    dout_stride_batch, dout_stride_row, dout_stride_head,
    T, S, H, group, window, scale,
    softcap, row_key_ptr, column_key_ptr, least, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Grid as of the forward, longest tiles first."""
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    head, batch = head_and_batch(H)
    kv_head = head // group
    rows = tile * OWN + tl.arange(0, OWN)
    cols = tl.arange(0, BLOCK_D)
    in_rows = rows < T
    q_ptr = head_of(q_ptr, batch, q_stride_batch, head, q_stride_head)
    dout_ptr = head_of(dout_ptr, batch, dout_stride_batch, head, dout_stride_head)
    q_rows = rows_of(q_ptr, T, D, q_stride_row, OWN, BLOCK_D, TMA)
    dout_rows = rows_of(dout_ptr, T, D, dout_stride_row, OWN, BLOCK_D, TMA)
    q = load_tile(q_rows, tile * OWN, 0, T, q_stride_row, cols, OWN, D, BLOCK_D, TMA)
    dout = load_tile(dout_rows, tile * OWN, 0, T, dout_stride_row, cols, OWN, D, BLOCK_D, TMA)
    statistics = (batch * H + head) * T + rows
    delta = tl.load(delta_ptr + statistics, mask=in_rows, other=0.0)
    # A row that sees no key has lse -inf; every score of it is masked, and exp2(-inf - 0) is 0.
    lse = tl.load(lse_ptr + statistics, mask=in_rows, other=0.0)
    lse_log2 = tl.where(lse == float("-inf"), 0.0, lse * 1.4426950408889634)
    k_ptr = head_of(k_ptr, batch, k_stride_batch, kv_head, k_stride_head)
    v_ptr = head_of(v_ptr, batch, v_stride_batch, kv_head, v_stride_head)
    k_rows = rows_of(k_ptr, S, D, k_stride_row, STEP, BLOCK_D, TMA)
    v_rows = rows_of(v_ptr, S, D, v_stride_row, STEP, BLOCK_D, TMA)
    first, last = key_interval(rows, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    begin, end, inner, inner_end = walk(first, last, STEP)
    if DROPOUT:
        row_keys = tl.load(row_key_ptr + statistics, mask=in_rows, other=0)
    acc = tl.zeros((OWN, BLOCK_D), tl.float32)
    for block in tl.range(begin, end, STEP, warp_specialize=SPECIALIZE):
        keys = block + tl.arange(0, STEP)
        k = load_tile(k_rows, block, 0, S, k_stride_row, cols, STEP, D, BLOCK_D, TMA)
        v = load_tile(v_rows, block, 0, S, v_stride_row, cols, STEP, D, BLOCK_D, TMA)
        scores = scores_of(dot(q, tl.trans(k), UPCAST), scale, softcap, SOFTCAP)
        if SOFTCAP:
            slope = slope_of(scores, softcap)
        if SPECIALIZE:  # a branch would keep the compiler from it
            scores = mask_scores(scores, first, last, keys)
        elif (block < inner) | (block + STEP > inner_end):
            scores = mask_scores(scores, first, last, keys)
        weights = tl.exp2(scores - lse_log2[:, None])
        dweights = dot(dout, tl.trans(v), UPCAST)
        if DROPOUT:
            column_keys = tl.load(column_key_ptr + batch * S + keys, mask=keys < S, other=0)
            dweights = tl.where(
                kept_block(row_keys, column_keys, least), dweights * keep_scale, 0.0
            )
        dscores = weights * (dweights - delta[:, None])
        if SOFTCAP:
            dscores *= slope
        if not UPCAST:
            dscores = dscores.to(k.dtype)
        acc += dot(dscores, k, UPCAST)
    dq_rows = ((batch * T + rows[:, None]) * H + head) * D
    tl.store(
        dq_ptr + dq_rows + cols[None, :],
        (acc * scale).to(dq_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (cols < D)[None, :],
    )


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dq_ptr, turn_ptr, bounds_ptr,
    q_stride_batch, q_stride_row, q_stride_head,
    k_stride_batch, k_stride_row, k_stride_head,
    v_stride_batch, v_stride_row, v_stride_head,
    dout_stride_batch, dout_stride_row, dout_stride_head,
    T, S, H, group, window, scale,
    softcap, row_key_ptr, column_key_ptr, least, keep_scale, part_heads,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
    DESIGN: tl.constexpr, TURNED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (G * splits, key tiles, B). When causal, most rows see the first keys: longest first.

    Not so if the tiles take turns, last keys first. dq (B, T, H, D) fp32 and, for that, turn
    (B, H, row blocks) int32 are zero before. dk and dv are (splits, B, S, G, D), one of each for
    `part_heads` query heads of a group.
    """
    tile = tl.program_id(1)
    if DESIGN == _ORDERED:
        tile = tl.num_programs(1) - 1 - tile
    splits = tl.cdiv(group, part_heads)
    G = tl.num_programs(0) // splits
    part = tl.program_id(0) // G
    kv_head = (tl.program_id(0) % G).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    keys = tile * OWN + tl.arange(0, OWN)
    cols = tl.arange(0, BLOCK_D)
    k_ptr = head_of(k_ptr, batch, k_stride_batch, kv_head, k_stride_head)
    v_ptr = head_of(v_ptr, batch, v_stride_batch, kv_head, v_stride_head)
    k_rows = rows_of(k_ptr, S, D, k_stride_row, OWN, BLOCK_D, TMA)
    v_rows = rows_of(v_ptr, S, D, v_stride_row, OWN, BLOCK_D, TMA)
    k = load_tile(k_rows, tile * OWN, 0, S, k_stride_row, cols, OWN, D, BLOCK_D, TMA)
    v = load_tile(v_rows, tile * OWN, 0, S, v_stride_row, cols, OWN, D, BLOCK_D, TMA)
    # All heads of a batch row in one matrix: each is some columns of it.
    q_ptr += batch * q_stride_batch * 8
    dout_ptr += batch * dout_stride_batch * 8
    q_rows = rows_of(q_ptr, T, (H - 1) * q_stride_head * 8 + D, q_stride_row, STEP, BLOCK_D, TMA)
    dout_rows = rows_of(
        dout_ptr, T, (H - 1) * dout_stride_head * 8 + D, dout_stride_row, STEP, BLOCK_D, TMA
    )

    first, last = query_interval(keys, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    begin, end, inner, inner_end = walk(first, last, STEP)
    num_blocks = tl.cdiv(end - begin, STEP)
    if DROPOUT:
        column_keys = tl.load(column_key_ptr + batch * S + keys, mask=keys < S, other=0)
    dk = tl.zeros((OWN, BLOCK_D), tl.float32)
    dv = tl.zeros((OWN, BLOCK_D), tl.float32)
    # One loop: loads run ahead into the next head.
    first_head = kv_head * group + part * part_heads
    num_heads = tl.minimum(part_heads, group - part * part_heads)
    for step in tl.range(0, num_heads * num_blocks, warp_specialize=SPECIALIZE):
        head = first_head + step // num_blocks
        block = begin + step % num_blocks * STEP
        rows = block + tl.arange(0, STEP)
        q_column = (head * q_stride_head * 8).to(tl.int32)
        dout_column = (head * dout_stride_head * 8).to(tl.int32)
        q = load_tile(q_rows, block, q_column, T, q_stride_row, cols, STEP, D, BLOCK_D, TMA)
        dout = load_tile(
            dout_rows, block, dout_column, T, dout_stride_row, cols, STEP, D, BLOCK_D, TMA
        )
        statistics = (batch * H + head) * T + rows
        lse = tl.load(lse_ptr + statistics, mask=rows < T, other=0.0)
        delta = tl.load(delta_ptr + statistics, mask=rows < T, other=0.0)
        # (keys, rows): transposed
        scores = scores_of(dot(k, tl.trans(q), UPCAST), scale, softcap, SOFTCAP)
        if SOFTCAP:
            slope = slope_of(scores, softcap)
        if SPECIALIZE:
            scores = mask_scores(scores, first, last, rows)
        elif (block < inner) | (block + STEP > inner_end):
            scores = mask_scores(scores, first, last, rows)
        lse_log2 = tl.where(lse == float("-inf"), 0.0, lse * 1.4426950408889634)  # as above
        weights = tl.exp2(scores - lse_log2[None, :])
        dweights = dot(v, tl.trans(dout), UPCAST)
        if DROPOUT:
            row_keys = tl.load(row_key_ptr + statistics, mask=rows < T, other=0)
            kept = kept_block(column_keys, row_keys, least)
            dweights = tl.where(kept, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - delta[None, :])
        if DROPOUT:
            weights = tl.where(kept, weights * keep_scale, 0.0)
        if SOFTCAP:
            dscores *= slope
        if not UPCAST:
            weights, dscores = weights.to(dout.dtype), dscores.to(q.dtype)
        dv += dot(weights, dout, UPCAST)
        dk += dot(dscores, q, UPCAST)
        if DESIGN != _SPLIT:
            if TURNED:
                dq = tl.trans(dot(tl.trans(k), dscores, UPCAST)) * scale
            else:
                dq = dot(tl.trans(dscores), k, UPCAST) * scale
            dq_places = dq_ptr + ((batch * T + rows[:, None]) * H + head) * D + cols[None, :]
            dq_inside = (rows < T)[:, None] & (cols < D)[None, :]
            if DESIGN == _ATOMIC:
                tl.atomic_add(dq_places, dq, mask=dq_inside, sem="relaxed")
            else:
                # Each tile from the last that these rows see down to the first adds once.
                seen = key_interval(rows, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)[1]
                my_turn = (tl.max(seen) - 1) // OWN - tile
                turn = turn_ptr + (batch * H + head) * tl.cdiv(T, STEP) + block // STEP
                if INTERPRETED:  # programs run one after the other: a turn out of order is wrong
                    dq = tl.where(tl.load(turn) == my_turn, dq, float("nan"))
                else:
                    wait_for(turn, my_turn)
                dq += tl.load(dq_places, mask=dq_inside, other=0.0, cache_modifier=".cg")
                tl.store(dq_places, dq, mask=dq_inside)
                count_one(turn, INTERPRETED)
    rows = (part * tl.num_programs(2) + batch) * S + keys[:, None]
    places = (rows * G + kv_head) * D + cols[None, :]
    inside = (keys < S)[:, None] & (cols < D)[None, :]
    tl.store(dk_ptr + places, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + places, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def row_deltas(out, dout, dlse):
    """delta (B, H, T) fp32; out and dout `aligned_rows`, dlse (B, H, T) or None."""
    B, T, H, D = out.shape
    delta = torch.empty((B, H, T), dtype=torch.float32, device=out.device)
    has_dlse = dlse is not None
    dlse = dlse.float().contiguous() if has_dlse else delta  # not read
    _delta_kernel[(triton.cdiv(T, DELTA_ROWS), H, B)](
        out, dout, dlse, delta, *strides_in_units(out), *strides_in_units(dout), T, H,
        HAS_DLSE=has_dlse, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), ROWS=DELTA_ROWS,
        **FUSED,
    )  # fmt: skip
    return delta


@shared.with_scratch
def backward(
    dout, dlse, q, k, v, out, lse, cu_seqlens, causal, window, scale,
    softcap=None, dropout_p=0.0, dropout_keys=None, design="split",
):  # fmt: skip
    """Gradients dq (B, T, H, D), dk and dv (B, S, G, D), contiguous; dlse (B, H, T) or None."""
    q, k, v, out, dout = (aligned_rows(x) for x in (q, k, v, out, dout))
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None

    def tiles_of(phase: str) -> shared.Tiles:
        options = softcap is not None, dropout_keys is not None, tuned.gpu_name(q.device)
        return shared.tile_sizes(phase, D, q.dtype, capability, *options)

    tiles = tiles_of("dkdv" if design == "split" else "dqdkdv")
    if tiles.tma:  # all heads are columns of one matrix
        q, dout = (x if x.stride(2) <= x.stride(1) else x.contiguous() for x in (q, dout))
    grid_tiles = triton.cdiv(S, tiles.own)
    splits = shared.group_splits(grid_tiles * G * B, H // G, shared.chip(q.device).num_sms)
    kind = {"dtype": q.dtype if splits == 1 else torch.float32, "device": q.device}
    dk, dv = (torch.empty((splits, B, S, G, D), **kind) for _ in range(2))
    lse = lse.contiguous()
    bounds = q if cu_seqlens is None else shared.document_bounds(cu_seqlens, T)
    strides = *strides_in_units(q), *strides_in_units(k), *strides_in_units(v)
    dout_strides = strides_in_units(dout)
    sizes = T, S, H, H // G, window or 0, scale
    flags = {"CAUSAL": causal, "WINDOW": window is not None, "PACKED": cu_seqlens is not None}
    flags.update(shared.extras(softcap, dropout_p, dropout_keys, q))
    with torch.cuda.device_of(q):
        delta = row_deltas(out, dout, dlse)
        if design == "split":
            dq, turn = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device), lse  # not read
            dq_tiles = tiles_of("dq")
            _dq_kernel[shared.row_grid(q, k, dq_tiles.own)](
                q, k, v, dout, lse, delta, dq, bounds, *strides, *dout_strides, *sizes,
                **flags, **shared.constants(D, q.dtype, dq_tiles), **FUSED,
            )  # fmt: skip
        else:
            dq = torch.zeros((B, T, H, D), dtype=torch.float32, device=q.device)
            blocks = triton.cdiv(T, tiles.step)
            turn = torch.zeros((B, H, blocks), dtype=torch.int32, device=q.device)
        _dkdv_kernel[(G * splits, grid_tiles, B)](
            q, k, v, dout, lse, delta, dk, dv, dq, turn, bounds,
            *strides, *dout_strides, *sizes, part_heads=triton.cdiv(H // G, splits),
            **flags, **shared.constants(D, q.dtype, tiles), DESIGN=DESIGNS[design],
            TURNED=shared.turns_dq(tiles.step, capability), INTERPRETED=_triton.INTERPRETED,
            **FUSED,
        )  # fmt: skip
    dk, dv = (x[0] if splits == 1 else x.sum(0).to(q.dtype) for x in (dk, dv))
    return dq.to(q.dtype), dk, dv
