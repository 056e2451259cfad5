"""dq of flash attention, for Hopper: one warp loads while two warpgroups multiply.

The formulas are those of backward.py. One program makes 128 rows of one head in three partitions
of its warps: a warp that copies blocks of k and v (STEP keys each) by TMA into two rings of STAGES
buffers, and two warpgroups of 64 rows each, which keep q and dout in shared memory. In step i a
warpgroup starts q k_i^T, dout v_i^T and the product of dS of block i - 1 with k; it makes P of
block i beside the last two, and dS beside the last one. So k needs two buffers at least.

Only blocks at the edges are masked. Rows past T or S are read as zeros and not written. Reads q and
dout once and k, v once per tile of rows, writes dq. P and dS in fp32, dS is rounded to the dtype
of k; the sum is fp32.

defines: dq_kernel
"""

from stellarator_kernels._gluon import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from stellarator_kernels.attention.gluon_tiles import key_interval, key_range, mask_scores


@gluon.jit
def _load_keys(
    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    batch, kv_head, begin, blocks, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: v and k of each block. v first: its buffers come back a step earlier."""
    for i in range(blocks):
        stage, parity = i % STAGES, (i // STAGES + 1) & 1
        place = [batch, kv_head, begin + i * STEP, 0]
        mbarrier.wait(v_empty.index(stage), parity)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma_load(v_desc, place, v_full.index(stage), v_ring.index(stage))
        mbarrier.wait(k_empty.index(stage), parity)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma_load(k_desc, place, k_full.index(stage), k_ring.index(stage))


@gluon.jit
def _weights_of(scores, first, last, inner, inner_end, block, columns, lse_log2, scale_log2):
    """P of a block, masked where it is at an edge."""
    if (block < inner) | (block + columns.shape[0] > inner_end):
        scores = mask_scores(scores, first, last, block + columns)
    return gl.exp2(scores * scale_log2 - lse_log2[:, None])


@gluon.jit
def _sum_rows(
    dq_desc, lse_ptr, delta_ptr, bounds_ptr, q_tile, dout_tile, k_ring, v_ring,
    rows_full, k_full, k_empty, v_full, v_empty,
    batch, head, row, statistics, T, S, window, scale, begin, blocks,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
    D: gl.constexpr, OWN: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows [row, row + OWN) of a head."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, sum_layout, k_width=2)
    dtype: gl.constexpr = k_ring.dtype

    rows = row + gl.arange(0, OWN, layout=gl.SliceLayout(1, score_layout))
    columns = gl.arange(0, STEP, layout=gl.SliceLayout(0, score_layout))
    first, last = key_interval(rows, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    # Blocks in [inner, inner_end) need no mask.
    _, _, inner, inner_end = key_range(row, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED, OWN)
    delta = gl.load(delta_ptr + statistics + rows, mask=rows < T, other=0.0)
    # A row that sees no key has lse -inf; every score of it is masked, and exp2(-inf - 0) is 0.
    lse = gl.load(lse_ptr + statistics + rows, mask=rows < T, other=0.0)
    lse_log2 = gl.where(lse == float("-inf"), 0.0, lse * 1.4426950408889634)
    scale_log2 = scale * 1.4426950408889634
    dq = gl.zeros([OWN, D], gl.float32, sum_layout)
    unused = gl.zeros([OWN, STEP], gl.float32, score_layout)

    mbarrier.wait(rows_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    k = k_ring.index(0).permute((1, 0))
    scores = warpgroup_mma(q_tile, k, unused, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(0), 0)
    v = v_ring.index(0).permute((1, 0))
    dweights = warpgroup_mma(dout_tile, v, unused, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = _weights_of(
        scores, first, last, inner, inner_end, begin, columns, lse_log2, scale_log2
    )
    dweights = warpgroup_mma_wait(0, deps=[dweights])
    mbarrier.arrive(v_empty.index(0), count=1)
    dscores = weights * (dweights - delta[:, None])
    dscores = gl.convert_layout(dscores.to(dtype), operand_layout)
    for i in range(1, blocks):
        stage, before, parity = i % STAGES, (i - 1) % STAGES, (i // STAGES) & 1
        mbarrier.wait(k_full.index(stage), parity)
        k = k_ring.index(stage).permute((1, 0))
        scores = warpgroup_mma(q_tile, k, unused, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(stage), parity)
        v = v_ring.index(stage).permute((1, 0))
        dweights = warpgroup_mma(dout_tile, v, unused, use_acc=False, is_async=True)
        dq = warpgroup_mma(dscores, k_ring.index(before), dq, is_async=True)
        scores = warpgroup_mma_wait(2, deps=[scores])
        weights = _weights_of(
            scores, first, last, inner, inner_end, begin + i * STEP, columns, lse_log2, scale_log2
        )
        # The next step waits for this anyway. Here, its loop keeps ptxas from moving the waits for
        # the products above the softmax, which would then run beside nothing.
        after = (i + 1) % STAGES
        mbarrier.wait(v_full.index(after), ((i + 1) // STAGES) & 1, pred=i + 1 < blocks)
        dweights = warpgroup_mma_wait(1, deps=[dweights])
        mbarrier.arrive(v_empty.index(stage), count=1)
        new_dscores = weights * (dweights - delta[:, None])
        new_dscores = gl.convert_layout(new_dscores.to(dtype), operand_layout)
        dq, dscores = warpgroup_mma_wait(0, deps=[dq, dscores])
        mbarrier.arrive(k_empty.index(before), count=1)
        dscores = new_dscores

    dq = warpgroup_mma(dscores, k_ring.index((blocks - 1) % STAGES), dq, is_async=True)
    dq, dscores = warpgroup_mma_wait(0, deps=[dq, dscores])
    q_tile.store((dq * scale).to(dtype))  # every product with q is done
    fence_async_shared()
    tma_store(dq_desc, [batch, head, row, 0], q_tile)
    tma_store_wait(0)


@gluon.jit
def dq_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, lse_ptr, delta_ptr, bounds_ptr,
    T, S, H, group, window, scale,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
    D: gl.constexpr, OWN: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid of `row_grid`, tiles of 2 OWN rows, as of the forward. lse, delta are (B, H, T)."""
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    together = gl.num_programs(0)
    head = gl.program_id(2) % (H // together) * together + gl.program_id(0)
    batch = gl.program_id(2) // (H // together)
    row = tile * (2 * OWN)
    begin, end, _, _ = key_range(row, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED, 2 * OWN)
    begin = begin // STEP * STEP
    # At least one, all masked, where the rows see nothing: it gives them 0.
    blocks = gl.maximum(gl.cdiv(end - begin, STEP), 1)
    statistics = (gl.cast(batch, gl.int64) * H + head) * T

    buffer: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, OWN, D], buffer)
    dout_tiles = gl.allocate_shared_memory(dout_desc.dtype, [2, OWN, D], buffer)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, STEP, D], buffer)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, STEP, D], buffer)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    rows_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(rows_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    for i in gl.static_range(2):
        place = [batch, head, row + i * OWN, 0]
        mbarrier.expect(rows_full.index(i), q_desc.block_type.nbytes + dout_desc.block_type.nbytes)
        tma_load(q_desc, place, rows_full.index(i), q_tiles.index(i))
        tma_load(dout_desc, place, rows_full.index(i), dout_tiles.index(i))
    gl.warp_specialize(
        [
            (_sum_rows, (
                dq_desc, lse_ptr, delta_ptr, bounds_ptr, q_tiles.index(0), dout_tiles.index(0),
                k_ring, v_ring, rows_full.index(0), k_full, k_empty, v_full, v_empty,
                batch, head, row, statistics, T, S, window, scale, begin, blocks,
                CAUSAL, WINDOW, PACKED, D, OWN, STEP, STAGES,
            )),
            (_sum_rows, (
                dq_desc, lse_ptr, delta_ptr, bounds_ptr, q_tiles.index(1), dout_tiles.index(1),
                k_ring, v_ring, rows_full.index(1), k_full, k_empty, v_full, v_empty,
                batch, head, row + OWN, statistics, T, S, window, scale, begin, blocks,
                CAUSAL, WINDOW, PACKED, D, OWN, STEP, STAGES,
            )),
            (_load_keys, (
                k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                batch, head // group, begin, blocks, STEP, STAGES,
            )),
        ],
        [4, 1],  # warps; those of the first are the kernel's
        [240, 24],  # registers of a thread
    )  # fmt: skip
