"""Whether what a run certainly holds fits into the memory of its machine.

defines: check, available_bytes

Weights, gradients and the two moments, and in bf16 the masters: see `FlatOptimizer`; of what ZeRO
shares out, a rank's part. Activations, buffers and what ZeRO gathers for a while come on top, so a
run that passes may still be too large; one that does not pass would only make the machine thrash
until it is killed.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from stellarator.sizes import bytes_per_parameter


def check(
    num_parameters: int,
    precision: str,
    device: torch.device,
    stage: int = 0,
    data_size: int = 1,
    weights: str = "masters",
    moments: str = "fp32",
) -> None:
    """Raise before the model is made. Every rank of a machine without GPUs holds its part.

    Args:
        num_parameters: of the model, on a tensor rank.
        precision: `train.precision`.
        device: of this rank.
        stage: of ZeRO, over `data_size` ranks.
        weights, moments: `optim.weights` and `optim.moments`.
    Raises:
        RuntimeError: it needs more than there is; the message has both figures.
    """
    each = bytes_per_parameter(precision, stage, data_size, weights, moments)
    ranks = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, available = ranks * num_parameters * each, available_bytes(device)
    if needed <= available:
        return
    where = "this GPU" if device.type == "cuda" else "this machine"
    processes = f" in each of {ranks} processes" if ranks > 1 else ""
    kept = precision == "bf16" and weights != "stochastic"
    masters = f", {weights}" if kept else ""
    raise RuntimeError(
        f"train: expected {needed / 2**30:,.1f} GiB of free memory for the weights{masters}, "
        f"gradients and moments of {num_parameters:,} parameters ({each:g} bytes each in "
        f"{precision}{processes}), got {available / 2**30:,.1f} GiB available on {where}. "
        "Choose a smaller model or a machine with more memory, or end what else runs there."
    )


def available_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that this process can still get: of its GPU, or of the machine and its cgroups.

    Args:
        device: of the run.
        root: where /proc and /sys are looked for.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    lines = (root / "proc/meminfo").read_text().splitlines()
    (free,) = (int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    return min([free, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The limits of the cgroups that this process is in, and of those around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder, name = "sys/fs/cgroup", "memory.max"
        if controllers:
            folder, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            try:
                yield int((root / folder / group / name).read_text())
            except (OSError, ValueError):  # the root has none; "max" is none
                continue
