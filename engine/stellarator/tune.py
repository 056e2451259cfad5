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
_STEPS = 6  # entries of one head width


def run(
    output: str, tokens: int, heads: int, kv_heads: int, head_width: int, command: Sequence[str]
) -> int:
    """Print each entry as it is found; what is there already for other widths stays.

    Raises:
        ValueError: sizes that make no attention.
        RuntimeError: there is no GPU.
    """
    if head_width not in _WIDTHS:
        raise ValueError(f"tune: expected --head-width in {_WIDTHS}, got {head_width}.")
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
    with Progress("tune") as show:
        for number, (name, entry, ms) in enumerate(tuning.tune(shape), 1):
            show(number / _STEPS, name)
            print(f"{name}: {entry or 'nothing runs'}, {ms:.3f} ms", flush=True)
            if entry is not None:
                entries[name] = entry
    path = tuning.write(folder, entries, gpu, shlex.join(["stellarator", *command]))
    print(f"wrote {path}; {tuned.VARIABLE}={folder} makes the kernels use it")
    return 0
