"""`stellarator tune`: race the launch configurations of the kernels on this GPU, write a table.

defines: Heads, Widths, run
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stellarator.progress import Progress
from stellarator_kernels import tuned, tuning, tuning_matmul

_HEAD_WIDTHS = (64, 128, 256)  # those that the kernels have tiles for; others are filled up
_PHASES = (*tuning.PHASES, *tuning_matmul.PHASES)


@dataclass(frozen=True)
class Heads:
    """Of attention: query heads, key/value heads, the width of one."""

    num: int
    num_kv: int
    width: int


@dataclass(frozen=True)
class Widths:
    """Of the products: the model's, and that inside the MLP."""

    model: int
    ffn: int


def run(
    output: str,
    tokens: int,
    heads: Heads,
    widths: Widths,
    phases: Sequence[str],
    command: Sequence[str],
) -> int:
    """Print and write each entry as it is found; what is there already beside them stays.

    Raises:
        ValueError: sizes that make no attention or no product.
        RuntimeError: there is no GPU.
    """
    _check(heads, widths, phases)
    if not torch.cuda.is_available():
        raise RuntimeError("tune: expected an NVIDIA GPU, found none. Run it where the GPU is.")
    gpu, folder = torch.cuda.get_device_name(), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    before = [table for p in folder.glob("*.json") if (table := tuned.read(p))["gpu"] == gpu]
    entries = dict(before[0]["entries"]) if before else {}
    command = shlex.join(["stellarator", *command])
    path = tuning.write(folder, entries, gpu, command)
    with Progress("tune") as show:
        races = _races(tokens, heads, widths, phases, dict(entries))
        for number, found in enumerate(races, 1):
            show(min(1.0, number / (len(phases) + 2 * ("design" in phases))), found.name)
            print(_line(found), flush=True)
            if found.entry is not None:
                entries[found.name] = found.entry
                tuning.write(folder, entries, gpu, command)
    print(f"wrote {path}; {tuned.VARIABLE}={folder} makes the kernels use it")
    return 0


def _check(heads: Heads, widths: Widths, phases: Sequence[str]) -> None:
    """Raise what `run` says of sizes and phases."""
    if heads.width not in _HEAD_WIDTHS:
        raise ValueError(f"tune: expected --head-width in {_HEAD_WIDTHS}, got {heads.width}.")
    unknown = [name for name in phases if name not in _PHASES]
    if unknown:
        raise ValueError(f"tune: expected --phases of {_PHASES}, got {unknown}.")
    if heads.num % heads.num_kv:
        raise ValueError(
            f"tune: expected --heads, a multiple of --kv-heads {heads.num_kv}, got {heads.num}."
        )
    for option, width in (("--width", widths.model), ("--ffn-width", widths.ffn)):
        if width < 8 or width % 8:
            raise ValueError(f"tune: expected {option}, a multiple of 8, got {width}.")


def _races(
    tokens: int, heads: Heads, widths: Widths, phases: Sequence[str], entries: dict
) -> Iterator[tuning.Found]:
    """What is found for attention, then for the products."""
    for module, shape, more in (
        (tuning, tuning.Shape(tokens, heads.num, heads.num_kv, heads.width), {"entries": entries}),
        (tuning_matmul, tuning_matmul.Shape(tokens, widths.model, widths.ffn), {}),
    ):
        chosen = tuple(name for name in phases if name in module.PHASES)
        if chosen:
            yield from module.tune(shape, phases=chosen, **more)


def _line(found: tuning.Found) -> str:
    """What is printed of an entry."""
    if found.entry is None:
        return f"{found.name}: nothing runs"
    line = f"{found.name}: {found.entry}, {found.ms:.3f} ms"
    if found.plain_ms is None:
        return line
    ratio = found.plain_ms / found.ms
    return f"{line}, {ratio:.2f}x the speed of the plain product ({found.plain_ms:.3f} ms)"
