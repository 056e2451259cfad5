"""Which implementation runs: a pure function of (op, impl, facts), and its reasons.

defines: Facts, choose, explain, available, IMPLEMENTATIONS

There is no silent fallback. `impl="auto"` takes the first implementation of the op's list that can
run, and `explain` prints the reason for which every other one was refused. An explicit `impl` that
cannot run raises `RuntimeError` with that reason.

Implementations: `triton` (GPU kernels, or Triton's interpreter on CPU tensors), `cpu` (C++ of this
project), `torch` (ATen's own fused kernels), `reference` (the formulas in `reference.py`).
"""

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

IMPLEMENTATIONS = ("triton", "cpu", "torch", "reference")

# What each op has. `torch` is left out where ATen has no kernel of its own to call.
_OPS = {
    "flash_attention": ("triton", "torch", "reference"),
    "decode_attention": ("torch", "reference"),
    "rope": ("triton", "torch", "reference"),
    "layer_norm": ("triton", "torch", "reference"),
    "bias_gelu": ("triton", "torch", "reference"),
    "cross_entropy": ("triton", "torch", "reference"),
    "linear_cross_entropy": ("triton", "torch", "reference"),
    "adamw_": ("triton", "cpu", "torch", "reference"),
    "grad_norm": ("triton", "cpu", "torch", "reference"),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Facts:
    """All that the choice depends on."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype
    capability: tuple[int, int] | None = None  # of the GPU
    triton: bool = False  # importable
    interpreter: bool = False  # TRITON_INTERPRET=1
    extension: bool = False  # stellarator_kernels._cpu is built
    note: str = ""  # reason for which the op's own limits rule out `triton` and `cpu`; empty: none


@functools.cache
def available() -> dict[str, bool]:
    """Which back ends this machine has: {"triton", "interpreter", "extension", "cuda"}."""
    return {
        "triton": importlib.util.find_spec("triton") is not None,
        "interpreter": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "extension": importlib.util.find_spec("stellarator_kernels._cpu") is not None,
        "cuda": torch.cuda.is_available(),
    }


def facts(tensor: torch.Tensor, note: str = "") -> Facts:
    """The facts about one tensor on this machine."""
    have = available()
    capability = None
    if tensor.device.type == "cuda":
        capability = torch.cuda.get_device_capability(tensor.device)
    return Facts(
        tensor.device.type,
        tensor.dtype,
        capability,
        have["triton"],
        have["interpreter"],
        have["extension"],
        note,
    )


def refusal(op: str, impl: str, given: Facts) -> str | None:
    """Why `impl` cannot run `op` on these facts; None if it can."""
    if impl not in _OPS[op]:
        return f"there is no {impl} implementation of {op}"
    if impl == "triton":
        return _refuse_triton(given)
    if impl == "cpu":
        if not given.extension:
            return "the C++ extension is not built (see `stellarator doctor`)"
        if given.device != "cpu":
            return f"the tensors are on {given.device}"
        if given.dtype not in (torch.float32, torch.bfloat16):
            return f"it is written for float32 and bfloat16, not {given.dtype}"
        return given.note or None
    return None


def _refuse_triton(given: Facts) -> str | None:
    """Why the Triton kernels cannot run."""
    if not given.triton:
        return "triton is not installed"
    if given.dtype not in _FLOATS:
        return f"the kernels are written for 16 and 32-bit floats, not {given.dtype}"
    if given.device == "cpu" and not given.interpreter:
        return "the tensors are on the CPU and TRITON_INTERPRET is not 1"
    if given.device not in ("cpu", "cuda"):
        return f"the tensors are on {given.device}"
    if given.capability is not None and given.capability < (8, 0):
        return f"the GPU has compute capability {given.capability}, 8.0 is needed"
    return given.note or None


def choose(op: str, impl: str, given: Facts) -> str:
    """Name of the implementation that runs. Pure.

    Raises:
        ValueError: unknown `impl`.
        RuntimeError: an explicit `impl` cannot run here; the message says why.
    """
    if impl == "auto":
        # The interpreter is for tests: it is taken only when it is asked for by name.
        order = [name for name in _OPS[op] if not (name == "triton" and given.device == "cpu")]
        return next(name for name in order if refusal(op, name, given) is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: expected impl in {('auto',) + IMPLEMENTATIONS}, got {impl!r}. "
            "Pass impl='auto' to let the dispatcher choose."
        )
    reason = refusal(op, impl, given)
    if reason is not None:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run: {reason}. Pass impl='auto'.")
    return impl


def explain(op: str, tensor: torch.Tensor | Facts, impl: str = "auto") -> str:
    """Which implementation of `op` runs for this tensor and why each other one does not.

    Args:
        op: name of a public op, for example "layer_norm".
        tensor: the op's first argument, or `Facts`.
    Returns:
        one line per implementation; the chosen one is marked with `->`.
    """
    if op not in _OPS:
        raise ValueError(f"explain: expected an op of {sorted(_OPS)}, got {op!r}.")
    given = tensor if isinstance(tensor, Facts) else facts(tensor)
    chosen = choose(op, impl, given)
    lines = []
    for name in _OPS[op]:
        reason = refusal(op, name, given)
        if name == chosen:
            lines.append(f"-> {op}: {name}")
        elif reason is None:
            lines.append(f"   {op}: {name}: can run, but comes later in the order or needs asking")
        else:
            lines.append(f"   {op}: {name}: {reason}")
    return "\n".join(lines)
