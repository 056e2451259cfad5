"""Flash attention, forward, for Hopper: one warp loads while two warpgroups multiply by turns.

The formulas, and which call means what, are those of forward.py. One program makes 128 rows of one
head in three partitions of its warps, which meet at barriers in shared memory only:

- one warp copies the blocks of k and v (STEP keys each) by TMA into two rings of STAGES buffers. A
  `full` barrier says that a block has come, an `empty` one that both warpgroups have read it.
- two warpgroups of 64 rows each. In step i a warpgroup starts q k_i^T and after it the product of
  the weights of block i - 1 with v, and while the second runs it makes the weights of block i out
  of the first. The two take turns at starting products, so that one's softmax falls into the
  other's products.

Only blocks at the edges are masked. Rows past T or S are read as zeros and not written: TMA knows
the sizes. Reads q once and k, v once per tile of rows, writes out and lse. Softmax in base 2 and
fp32; fp32 accumulators; weights are rounded to the dtype of v. `lse` is in nats.

Gluon is compiled only, and has no interpreter: tests/ops/gluon_emulator.py runs these functions.

Source: FlashAttention-3, Shah et al. 2024, arXiv:2407.08608 (the partitions, the turns, the order
of the products).

defines: Plan, PLANS, constants, descriptor_types, forward
"""

from dataclasses import dataclass

import torch

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
from stellarator_kernels._triton import FUSED
from stellarator_kernels.attention import gluon_tiles
from stellarator_kernels.attention import tiles as shared
from stellarator_kernels.attention.gluon_tiles import descriptor, key_interval, mask_scores
from stellarator_kernels.layout import aligned_rows


@dataclass(frozen=True)
class Plan:
    """One launch: keys of a block, blocks in each ring, and whether products go by turns."""

    step: int
    stages: int
    turns: bool


# By head width: what shared memory holds. Compiled, not raced.
PLANS = {64: Plan(step=128, stages=4, turns=True), 128: Plan(step=128, stages=2, turns=True)}


@gluon.jit
def _load_blocks(
    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    batch, kv_head, begin, blocks, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: k of block i, then v of block i - 1, in the order of their use."""
    for i in range(blocks + 1):
        if i < blocks:
            stage = i % STAGES
            mbarrier.wait(k_empty.index(stage), (i // STAGES + 1) & 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            place = [batch, kv_head, begin + i * STEP, 0]
            tma_load(k_desc, place, k_full.index(stage), k_ring.index(stage))
        if i > 0:
            j = i - 1
            stage = j % STAGES
            mbarrier.wait(v_empty.index(stage), (j // STAGES + 1) & 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            place = [batch, kv_head, begin + j * STEP, 0]
            tma_load(v_desc, place, v_full.index(stage), v_ring.index(stage))


@gluon.jit
def _softmax_step(scores, maximum, total, scale_log2):
    """Weights of a block; maximum and total with it; the factor for what was summed before."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1))
    # A row may have seen nothing yet, and -inf - -inf is NaN.
    shift = gl.where(new_maximum == float("-inf"), 0.0, new_maximum * scale_log2)
    weights = gl.exp2(scores * scale_log2 - shift[:, None])
    correction = gl.exp2(maximum * scale_log2 - shift)
    return weights, new_maximum, total * correction + gl.sum(weights, 1), correction


@gluon.jit
def _attend(
    out_desc, lse_ptr, bounds_ptr, q_tile, k_ring, v_ring,
    q_full, k_full, k_empty, v_full, v_empty, my_turn, other_turn,
    batch, head, row, lse_row, T, S, window, scale, begin, blocks,
    SECOND: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
    D: gl.constexpr, OWN: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows [row, row + OWN) of a head. SECOND is 0 for the one that starts."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    dtype: gl.constexpr = v_ring.dtype

    rows = row + gl.arange(0, OWN, layout=row_layout)
    columns = gl.arange(0, STEP, layout=gl.SliceLayout(0, score_layout))
    first, last = key_interval(rows, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    inner, inner_end = gl.max(first, 0), gl.min(last, 0)  # blocks inside need no mask
    scale_log2 = scale * 1.4426950408889634
    maximum = gl.full([OWN], float("-inf"), gl.float32, row_layout)
    total = gl.zeros([OWN], gl.float32, row_layout)
    acc = gl.zeros([OWN, D], gl.float32, out_layout)
    unused = gl.zeros([OWN, STEP], gl.float32, score_layout)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    k = k_ring.index(0).permute((1, 0))
    scores = warpgroup_mma(q_tile, k, unused, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0), count=1)
    if (begin < inner) | (begin + STEP > inner_end):
        scores = mask_scores(scores, first, last, begin + columns)
    weights, maximum, total, correction = _softmax_step(scores, maximum, total, scale_log2)
    weights = gl.convert_layout(weights.to(dtype), weight_layout)
    for i in range(1, blocks):
        stage, before = i % STAGES, (i - 1) % STAGES
        block = begin + i * STEP
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        if TURNS:
            mbarrier.wait(my_turn, (i - SECOND) & 1)
        k = k_ring.index(stage).permute((1, 0))
        scores = warpgroup_mma(q_tile, k, unused, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        acc = warpgroup_mma(weights, v_ring.index(before), acc, is_async=True)
        if TURNS:
            mbarrier.arrive(other_turn, count=1)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if (block < inner) | (block + STEP > inner_end):
            scores = mask_scores(scores, first, last, block + columns)
        new_weights, maximum, total, correction = _softmax_step(scores, maximum, total, scale_log2)
        new_weights = gl.convert_layout(new_weights.to(dtype), weight_layout)
        # The next step waits for this anyway. Here, its loop keeps ptxas from moving the wait for
        # the product above the softmax, which would then run beside nothing.
        after = (i + 1) % STAGES
        mbarrier.wait(k_full.index(after), ((i + 1) // STAGES) & 1, pred=i + 1 < blocks)
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(correction, out_row_layout)[:, None]
        weights = new_weights

    stage = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(stage), ((blocks - 1) // STAGES) & 1)
    acc = warpgroup_mma(weights, v_ring.index(stage), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])

    # maximum is -inf and total 0 where no key was seen: out is then 0, and lse -inf.
    total = gl.where(total == 0.0, 1.0, total)
    lse = maximum * scale + gl.log2(total) * 0.6931471805599453
    gl.store(lse_ptr + lse_row + rows, lse, mask=rows < T)
    acc = acc / gl.convert_layout(total, out_row_layout)[:, None]
    q_tile.store(acc.to(dtype))  # every product with q is done
    fence_async_shared()
    tma_store(out_desc, [batch, head, row, 0], q_tile)
    tma_store_wait(0)


@gluon.jit
def _gluon_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, bounds_ptr, T, S, H, group, window, scale,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
    D: gl.constexpr, OWN: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """Grid of `row_grid`, tiles of 2 OWN rows. The last see most keys when causal, so go first."""
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    together = gl.num_programs(0)
    head = gl.program_id(2) % (H // together) * together + gl.program_id(0)
    batch = gl.program_id(2) // (H // together)
    row = tile * (2 * OWN)
    row_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    rows = row + gl.arange(0, 2 * OWN, layout=row_layout)
    first, last = key_interval(rows, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    begin = gl.min(first, 0) // STEP * STEP
    # At least one, all masked, where the rows see nothing: it gives them 0 and -inf.
    blocks = gl.maximum(gl.cdiv(gl.max(last, 0) - begin, STEP), 1)
    lse_row = (gl.cast(batch, gl.int64) * H + head) * T

    buffer: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, OWN, D], buffer)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, STEP, D], buffer)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, STEP, D], buffer)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    for i in gl.static_range(2):
        mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
        tma_load(q_desc, [batch, head, row + i * OWN, 0], q_full.index(i), q_tiles.index(i))
    gl.warp_specialize(
        [
            (_attend, (
                out_desc, lse_ptr, bounds_ptr, q_tiles.index(0), k_ring, v_ring,
                q_full.index(0), k_full, k_empty, v_full, v_empty, turns.index(0), turns.index(1),
                batch, head, row, lse_row, T, S, window, scale, begin, blocks,
                0, CAUSAL, WINDOW, PACKED, D, OWN, STEP, STAGES, TURNS,
            )),
            (_attend, (
                out_desc, lse_ptr, bounds_ptr, q_tiles.index(1), k_ring, v_ring,
                q_full.index(1), k_full, k_empty, v_full, v_empty, turns.index(1), turns.index(0),
                batch, head, row + OWN, lse_row, T, S, window, scale, begin, blocks,
                1, CAUSAL, WINDOW, PACKED, D, OWN, STEP, STAGES, TURNS,
            )),
            (_load_blocks, (
                k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                batch, head // group, begin, blocks, STEP, STAGES,
            )),
        ],
        [4, 1],  # warps; those of the first are the kernel's
        [240, 24],  # registers of a thread
    )  # fmt: skip


def constants(D: int, plan: Plan) -> dict:
    """Compile-time arguments, but for the masks."""
    return {
        "D": D,
        "OWN": gluon_tiles.OWN,
        "STEP": plan.step,
        "STAGES": plan.stages,
        "TURNS": plan.turns,
    }


def descriptor_types(D: int, dtype: str, plan: Plan) -> dict[str, str]:
    """Types of the descriptors, as a launch names them; dtype is Triton's, "bf16" or "fp16"."""
    rows = {"q_desc": gluon_tiles.OWN, "k_desc": plan.step, "v_desc": plan.step}
    rows["out_desc"] = gluon_tiles.OWN
    return {
        name: gluon_tiles.descriptor_type(dtype, gluon_tiles.block(n, D))
        for name, n in rows.items()
    }


def forward(q, k, v, cu_seqlens, causal, window, scale, plan: Plan | None = None):
    """q (B, T, H, D), k and v (B, S, G, D), B = 1 if packed -> out (B, T, H, D), lse (B, H, T).

    For calls that `gluon_tiles.refusal` does not refuse.
    """
    q, k, v = (aligned_rows(x) for x in (q, k, v))
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    plan = plan or PLANS[D]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    # Without documents the kernel does not read `bounds`: any tensor will do.
    bounds = lse if cu_seqlens is None else shared.document_bounds(cu_seqlens, T)
    with torch.cuda.device_of(q):
        _gluon_forward_kernel[shared.row_grid(q, k, 2 * gluon_tiles.OWN)](
            descriptor(q, gluon_tiles.OWN), descriptor(k, plan.step), descriptor(v, plan.step),
            descriptor(out, gluon_tiles.OWN), lse, bounds, T, S, H, H // G, window or 0, scale,
            CAUSAL=causal, WINDOW=window is not None, PACKED=cu_seqlens is not None,
            **constants(D, plan), num_warps=4, **FUSED,
        )  # fmt: skip
    return out, lse
