"""Which design of flash attention runs on a GPU: pure functions of the call and of tuned tables.

defines: forward_plan, backward_plan, backward_design

No GPU has raced the designs so far: where no table knows better, the portable ones run.
"""

import torch

from stellarator_kernels import tuned


def _entry(gpu: str, phase: str, D: int) -> dict | None:
    width = max(64, 1 << (D - 1).bit_length())
    return tuned.lookup(gpu, f"flash_attention {phase} {width}")


def _in_gluon(D, dtype, capability, softcap, dropout) -> bool:
    """Whether the kernels in Gluon can serve a call."""
    from stellarator_kernels.attention import gluon_tiles

    return gluon_tiles.refusal(D, dtype, capability, softcap, dropout) is None


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
    if not _in_gluon(D, dtype, capability, softcap, dropout):
        return None
    from stellarator_kernels.attention import gluon_forward

    return gluon_forward.Plan(entry["step"], entry["stages"], bool(entry["turns"]))


def _backward_entry(deterministic: bool, D: int, gpu: str) -> dict:
    phase = "backward" if deterministic else "backward in any order"
    default = {"design": "split" if deterministic else "atomic"}
    return _entry(gpu, phase, D) or default


def backward_plan(
    deterministic: bool,
    D: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    softcap: bool,
    dropout: bool,
    gpu: str,
):
    """The `gluon_backward.Plan` of a call, or None where backward.py runs it."""
    entry = _backward_entry(deterministic, D, gpu)
    if entry["design"] != "gluon" or not _in_gluon(D, dtype, capability, softcap, dropout):
        return None
    from stellarator_kernels.attention import gluon_backward

    names = ("step", "stages", "dq_step", "dq_stages")
    return gluon_backward.Plan(*(entry[name] for name in names))


def backward_design(deterministic: bool, D: int, gpu: str) -> str:
    """Which backward runs, of those in backward.py; the split one where Gluon cannot."""
    design = _backward_entry(deterministic, D, gpu)["design"]
    return "split" if design == "gluon" else design
