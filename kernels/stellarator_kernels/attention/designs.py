"""Which design of flash attention runs on a GPU: pure functions of the call and of tuned tables.

defines: forward_plan, backward_design

No GPU has raced the designs so far: where no table knows better, the portable ones run.
"""

import torch

from stellarator_kernels import tuned


def _entry(gpu: str, phase: str, D: int) -> dict | None:
    width = max(64, 1 << (D - 1).bit_length())
    return tuned.lookup(gpu, f"flash_attention {phase} {width}")


def forward_plan(
    D: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    softcap: bool,
    dropout: bool,
    gpu: str,
):
    """The `gluon_forward.Plan` of a call, or None where forward.py runs it."""
    entry = _entry(gpu, "forward design", D)
    if entry is None or entry["design"] != "gluon":
        return None
    from stellarator_kernels.attention import gluon_forward

    if gluon_forward.refusal(D, dtype, capability, softcap, dropout) is not None:
        return None
    return gluon_forward.Plan(entry["step"], entry["stages"], bool(entry["turns"]))


def backward_design(deterministic: bool, D: int, gpu: str) -> str:
    """Which backward runs, of those in backward.py."""
    phase = "backward" if deterministic else "backward in any order"
    default = {"design": "split" if deterministic else "atomic"}
    return (_entry(gpu, phase, D) or default)["design"]
