"""`stellarator tune`: race the launch configurations of attention on this GPU, write a table.

defines: run
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from stellarator.progress import Progress
from stellarator_kernels import tuned, tuning

_WIDTHS = (64, 128, 256)  # those that the kernels have tiles for; others are filled up


def run(
    output: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_width: int,
    phases: Sequence[str],
    command: Sequence[str],
) -> int:
    """Print and write each entry as it is found; what is there already beside them stays.

    Raises:
        ValueError: sizes that make no attention.
        RuntimeError: there is no GPU.
    """
    if head_width not in _WIDTHS:
        raise ValueError(f"tune: expected --head-width in {_WIDTHS}, got {head_width}.")
    unknown = [name for name in phases if name not in tuning.PHASES]
    if unknown:
        raise ValueError(f"tune: expected --phases of {tuning.PHASES}, got {unknown}.")
    if heads % kv_heads:
        raise ValueError(
            f"tune: expected --heads, a multiple of --kv-heads {kv_heads}, got {heads}."
        )
    if not torch.cuda.is_available():
        raise RuntimeError("tune: expected an NVIDIA GPU, found none. Run it where the GPU is.")
    gpu, folder = torch.cuda.get_device_name(), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    before = [table for p in folder.glob("*.json") if (table := tuned.read(p))["gpu"] == gpu]
    entries = dict(before[0]["entries"]) if before else {}
    shape = tuning.Shape(tokens, heads, kv_heads, head_width)
    command = shlex.join(["stellarator", *command])
    path = tuning.write(folder, entries, gpu, command)
    with Progress("tune") as show:
        found = tuning.tune(shape, phases=tuple(phases), entries=dict(entries))
        for number, (name, entry, ms) in enumerate(found, 1):
            show(min(1.0, number / (len(phases) + 2 * ("design" in phases))), name)
            print(f"{name}: {entry or 'nothing runs'}, {ms:.3f} ms", flush=True)
            if entry is not None:
                entries[name] = entry
                tuning.write(folder, entries, gpu, command)
    print(f"wrote {path}; {tuned.VARIABLE}={folder} makes the kernels use it")
    return 0
