"""dk and dv of flash attention, for Hopper: one warp loads while two warpgroups multiply.

The formulas are those of backward.py. One program makes 128 keys of one key/value head, summed over
`part_heads` query heads of its group, in three partitions of its warps:

- one warp copies the blocks of q and dout (STEP rows each), and lse and delta of these rows, by TMA
  into rings of STAGES buffers, head by head.
- two warpgroups of 64 keys each, which keep k and v in shared memory. In a step a warpgroup starts
  k q^T and v dout^T, makes P^T beside the second, starts P^T dout, makes dS^T beside that, and
  starts dS^T q. Scores have a row for each key, so P^T and dS^T are operands in registers.

Only blocks at the edges are masked. Rows past T are read as zeros, keys past S are not written.
Reads k and v once, q, dout, lse and delta once per tile of keys, writes dk and dv. P and dS are
made in fp32 and rounded to the dtype of q before they are multiplied; the sums are fp32. No block
index is divided in the loop and no reduction crosses warps: each cost registers that are not there.

Source: FlashAttention-3, Shah et al. 2024, arXiv:2407.08608 (the partitions).

defines: dkdv_kernel
"""

from stellarator_kernels._gluon import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from stellarator_kernels.attention.gluon_tiles import mask_scores, query_interval, query_range


@gluon.jit
def _load_queries(
    q_desc, dout_desc, lse_desc, delta_desc, q_ring, dout_ring, lse_ring, delta_ring,
    q_full, q_empty, dout_full, dout_empty,
    batch, H, first_head, begin, blocks, steps, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: dout with delta, whose buffers come back first, then q with lse."""
    for i in range(steps):
        stage, parity = i % STAGES, (i // STAGES + 1) & 1
        head = first_head + i // blocks
        row = begin + i % blocks * STEP
        size: gl.constexpr = q_desc.block_type.nbytes + lse_desc.block_type.nbytes
        mbarrier.wait(dout_empty.index(stage), parity)
        mbarrier.expect(dout_full.index(stage), size)
        tma_load(dout_desc, [batch, head, row, 0], dout_full.index(stage), dout_ring.index(stage))
        row_place = [batch * H + head, row]
        tma_load(delta_desc, row_place, dout_full.index(stage), delta_ring.index(stage))
        mbarrier.wait(q_empty.index(stage), parity)
        mbarrier.expect(q_full.index(stage), size)
        tma_load(q_desc, [batch, head, row, 0], q_full.index(stage), q_ring.index(stage))
        tma_load(lse_desc, row_place, q_full.index(stage), lse_ring.index(stage))


@gluon.jit
def _sum_keys(
    dk_ptr, dv_ptr, bounds_ptr, k_tile, v_tile, q_ring, dout_ring, lse_ring, delta_ring,
    kv_full, q_full, q_empty, dout_full, dout_empty,
    key, place, stride, T, S, window, scale, begin, end, steps,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
    D: gl.constexpr, OWN: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: keys [key, key + OWN); rows [begin, end) of each head in turn."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, sum_layout, k_width=2)
    column_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    dtype: gl.constexpr = q_ring.dtype

    keys = key + gl.arange(0, OWN, layout=gl.SliceLayout(1, score_layout))
    columns = gl.arange(0, STEP, layout=column_layout)
    first, last = query_interval(keys, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    # Blocks in [inner, inner_end) need no mask.
    _, _, inner, inner_end = query_range(key, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED, OWN)
    scale_log2 = scale * 1.4426950408889634
    dk = gl.zeros([OWN, D], gl.float32, sum_layout)
    dv = gl.zeros([OWN, D], gl.float32, sum_layout)
    unused = gl.zeros([OWN, STEP], gl.float32, score_layout)

    mbarrier.wait(kv_full, 0)
    block = begin
    for i in range(steps):
        stage, parity = i % STAGES, (i // STAGES) & 1
        q, dout = q_ring.index(stage), dout_ring.index(stage)
        mbarrier.wait(q_full.index(stage), parity)
        scores = warpgroup_mma(k_tile, q.permute((1, 0)), unused, use_acc=False, is_async=True)
        mbarrier.wait(dout_full.index(stage), parity)
        dweights = warpgroup_mma(v_tile, dout.permute((1, 0)), unused, use_acc=False, is_async=True)
        lse = lse_ring.index(stage).load(column_layout)
        # A row that sees no key has lse -inf; all its scores are masked, and exp2(-inf - 0) is 0.
        lse_log2 = gl.where(lse == float("-inf"), 0.0, lse * 1.4426950408889634)
        scores = warpgroup_mma_wait(1, deps=[scores])
        if (block < inner) | (block + STEP > inner_end):
            scores = mask_scores(scores, first, last, block + columns)
        weights = gl.exp2(scores * scale_log2 - lse_log2[None, :])
        rounded = gl.convert_layout(weights.to(dtype), weight_layout)
        dv = warpgroup_mma(rounded, dout, dv, is_async=True)
        dweights = warpgroup_mma_wait(1, deps=[dweights])
        delta = delta_ring.index(stage).load(column_layout)
        dscores = weights * (dweights - delta[None, :])
        dscores = gl.convert_layout(dscores.to(dtype), weight_layout)
        dk = warpgroup_mma(dscores, q, dk, is_async=True)
        dv, rounded = warpgroup_mma_wait(1, deps=[dv, rounded])
        mbarrier.arrive(dout_empty.index(stage), count=1)
        dk, dscores = warpgroup_mma_wait(0, deps=[dk, dscores])
        mbarrier.arrive(q_empty.index(stage), count=1)
        block += STEP
        block = gl.where(block < end, block, begin)

    rows = key + gl.arange(0, OWN, layout=gl.SliceLayout(1, sum_layout))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, sum_layout))
    offsets = place + rows.to(gl.int64)[:, None] * stride + cols[None, :]
    inside = (rows < S)[:, None] & (cols < D)[None, :]
    gl.store(dk_ptr + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    gl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def dkdv_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, dk_ptr, dv_ptr, bounds_ptr,
    T, S, H, group, window, scale, part_heads,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
    D: gl.constexpr, OWN: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (G * splits, tiles of 2 OWN keys, B); dk and dv are (splits, B, S, G, D)."""
    splits = gl.cdiv(group, part_heads)
    G = gl.num_programs(0) // splits
    part = gl.program_id(0) // G
    kv_head = gl.program_id(0) % G
    batch = gl.program_id(2)
    key = gl.program_id(1) * (2 * OWN)
    begin, end, _, _ = query_range(key, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED, 2 * OWN)
    begin = begin // STEP * STEP
    blocks = gl.maximum(gl.cdiv(end - begin, STEP), 0)
    first_head = kv_head * group + part * part_heads
    steps = gl.minimum(part_heads, group - part * part_heads) * blocks
    place = ((gl.cast(part * gl.num_programs(2) + batch, gl.int64) * S) * G + kv_head) * D

    buffer: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    row_buffer: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=1)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [2, OWN, D], buffer)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [2, OWN, D], buffer)
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES, STEP, D], buffer)
    dout_ring = gl.allocate_shared_memory(dout_desc.dtype, [STAGES, STEP, D], buffer)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], row_buffer)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], row_buffer)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    dout_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(dout_empty.index(i), count=2)
    fence_async_shared()
    for i in gl.static_range(2):
        at = [batch, kv_head, key + i * OWN, 0]
        mbarrier.expect(kv_full.index(i), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma_load(k_desc, at, kv_full.index(i), k_tiles.index(i))
        tma_load(v_desc, at, kv_full.index(i), v_tiles.index(i))
    gl.warp_specialize(
        [
            (_sum_keys, (
                dk_ptr, dv_ptr, bounds_ptr, k_tiles.index(0), v_tiles.index(0),
                q_ring, dout_ring, lse_ring, delta_ring,
                kv_full.index(0), q_full, q_empty, dout_full, dout_empty,
                key, place, G * D, T, S, window, scale, begin, end, steps,
                CAUSAL, WINDOW, PACKED, D, OWN, STEP, STAGES,
            )),
            (_sum_keys, (
                dk_ptr, dv_ptr, bounds_ptr, k_tiles.index(1), v_tiles.index(1),
                q_ring, dout_ring, lse_ring, delta_ring,
                kv_full.index(1), q_full, q_empty, dout_full, dout_empty,
                key + OWN, place, G * D, T, S, window, scale, begin, end, steps,
                CAUSAL, WINDOW, PACKED, D, OWN, STEP, STAGES,
            )),
            (_load_queries, (
                q_desc, dout_desc, lse_desc, delta_desc, q_ring, dout_ring, lse_ring, delta_ring,
                q_full, q_empty, dout_full, dout_empty,
                batch, H, first_head, begin, blocks, steps, STEP, STAGES,
            )),
        ],
        [4, 1],  # warps; those of the first are the kernel's
        [240, 24],  # registers of a thread
    )  # fmt: skip
