"""Flash attention, backward, for Hopper: the launcher of two kernels in Gluon.

The formulas, and which call means what, are those of backward.py, and so is the split in two: dq by
tiles of rows, dk and dv by tiles of keys, seven products for five. No atomics, the same bits every
time; dk and dv come out compact, summed over a group in registers, or in parts that are added in
fp32 and in one order where programs would be too few. delta comes first, from Triton.

Gluon is compiled only, and has no interpreter: tests/ops/gluon_emulator.py runs the kernels.

defines: Plan, PLANS, constants, descriptor_types, backward
"""

from dataclasses import dataclass

import torch

from stellarator_kernels._triton import FUSED, triton
from stellarator_kernels.attention import gluon_tiles
from stellarator_kernels.attention import tiles as shared
from stellarator_kernels.attention.backward import row_deltas
from stellarator_kernels.attention.gluon_dkdv import dkdv_kernel
from stellarator_kernels.attention.gluon_dq import dq_kernel
from stellarator_kernels.attention.gluon_tiles import descriptor, row_descriptor
from stellarator_kernels.layout import aligned_rows


@dataclass(frozen=True)
class Plan:
    """Rows of a block and blocks in each ring of both launches: of dk and dv, and of dq."""

    step: int
    stages: int
    dq_step: int
    dq_stages: int

    def __post_init__(self):
        if self.dq_stages < 2:  # with one, the kernel would wait for ever
            raise ValueError(f"Plan: expected dq_stages of 2 or more, got {self.dq_stages}")


# By head width: what shared memory and registers hold. Compiled, not raced.
PLANS = {64: Plan(64, 4, 64, 4), 128: Plan(64, 2, 64, 3)}


def constants(phase: str, D: int, plan: Plan) -> dict:
    """Compile-time arguments of "dq" or "dkdv", but for the masks."""
    step, stages = (plan.dq_step, plan.dq_stages) if phase == "dq" else (plan.step, plan.stages)
    return {"D": D, "OWN": gluon_tiles.OWN, "STEP": step, "STAGES": stages}


def descriptor_types(phase: str, D: int, dtype: str, plan: Plan) -> dict[str, str]:
    """Types of the descriptors, as a launch names them; dtype is Triton's, "bf16" or "fp16"."""
    own, step = gluon_tiles.OWN, constants(phase, D, plan)["STEP"]
    if phase == "dq":
        rows = {"q": own, "dout": own, "dq": own, "k": step, "v": step}
    else:
        rows = {"q": step, "dout": step, "k": own, "v": own}
    types = {
        f"{name}_desc": gluon_tiles.descriptor_type(dtype, gluon_tiles.block(n, D))
        for name, n in rows.items()
    }
    if phase == "dkdv":
        of_rows = gluon_tiles.descriptor_type("fp32", gluon_tiles.row_block(step))
        types |= {"lse_desc": of_rows, "delta_desc": of_rows}
    return types


def backward(
    dout, dlse, q, k, v, out, lse, cu_seqlens, causal, window, scale, plan: Plan | None = None
):
    """Gradients dq (B, T, H, D), dk and dv (B, S, G, D), contiguous; dlse (B, H, T) or None.

    For calls that `gluon_tiles.refusal` does not refuse.
    """
    q, k, v, out, dout = (aligned_rows(x) for x in (q, k, v, out, dout))
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    plan, own = plan or PLANS[D], gluon_tiles.OWN
    grid_tiles = triton.cdiv(S, 2 * own)
    splits = shared.group_splits(grid_tiles * G * B, H // G, shared.chip(q.device).num_sms)
    kind = {"dtype": q.dtype if splits == 1 else torch.float32, "device": q.device}
    dk, dv = (torch.empty((splits, B, S, G, D), **kind) for _ in range(2))
    dq = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = lse.contiguous()
    # Without documents the kernels do not read `bounds`: any tensor will do.
    bounds = lse if cu_seqlens is None else shared.document_bounds(cu_seqlens, T)
    sizes = T, S, H, H // G, window or 0, scale
    flags = {"CAUSAL": causal, "WINDOW": window is not None, "PACKED": cu_seqlens is not None}
    with torch.cuda.device_of(q):
        delta = row_deltas(out, dout, dlse)
        dq_kernel[shared.row_grid(q, k, 2 * own)](
            descriptor(q, own), descriptor(k, plan.dq_step), descriptor(v, plan.dq_step),
            descriptor(dout, own), descriptor(dq, own), lse, delta, bounds, *sizes,
            **flags, **constants("dq", D, plan), num_warps=4, **FUSED,
        )  # fmt: skip
        dkdv_kernel[(G * splits, grid_tiles, B)](
            descriptor(q, plan.step), descriptor(k, own), descriptor(v, own),
            descriptor(dout, plan.step), row_descriptor(lse, plan.step),
            row_descriptor(delta, plan.step), dk, dv, bounds, *sizes, triton.cdiv(H // G, splits),
            **flags, **constants("dkdv", D, plan), num_warps=4, **FUSED,
        )  # fmt: skip
    dk, dv = (x[0] if splits == 1 else x.sum(0).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv
