"""Where a benchmark ran, and timing in turns.

defines: command, environment, CLOCKS, Quantiles, Stopwatch, take_turns, timed

Variants are timed in turns in one process, so that a slow moment of the machine hits all of them,
and each turn begins with another variant, so that none always follows the same neighbour.
Two clocks: "wall", and "cpu", the processor time of this process. The second is for one thread on a
machine with other work: time during which the process did not run is not in it.
"""

import datetime
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.usage import refusals

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_L2_BYTES = 256 * 2**20  # more than the L2 cache of any GPU
_QUEUE_CYCLES = 2_000_000  # about a millisecond, in which the host fills the launch queue


@dataclass(frozen=True)
class Quantiles:
    """Median with the 20th and 80th percentile of a few values, mostly timings in ms."""

    p20_ms: float
    p50_ms: float
    p80_ms: float

    @classmethod
    def of(cls, times_ms: list[float]) -> "Quantiles":
        """Nearest-rank quantiles of the given times."""
        ordered = sorted(times_ms)
        return cls(*(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)))


def _git(*words: str) -> str:
    """Output of git about this checkout; empty without git or a checkout."""
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return done.stdout.strip()


def command() -> str:
    """The command that this process was started with."""
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


def environment() -> dict:
    """Machine, versions, commit, command and date, for every result."""
    import numpy

    from stellarator_kernels import _triton, extension

    with open("/proc/cpuinfo") as file:
        names = [line for line in file if line.startswith("model name")]
    has_triton, has_extension = _triton.FAILURE is None, extension.failure() is None
    with refusals():  # STELLARATOR_ISA may hold any word
        isa = extension.isa().name if has_extension else None
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "isa": isa,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton.triton.__version__ if has_triton else None,
        "numpy": numpy.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "command": command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class Stopwatch:
    """Laps of one device: the host's clock on a CPU, events on a GPU.

    On a GPU `start` overwrites the L2 cache and keeps the GPU busy for a moment, so that the host
    queues all launches before the first of them runs and its own time is not measured.

    Args:
        device: "cpu" or "cuda".
        clock: of the CPU, a name of CLOCKS.
    """

    def __init__(self, device: str, clock: str = "wall"):
        self._on_gpu, self._now = device == "cuda", CLOCKS[clock]
        if self._on_gpu:
            self._flush = torch.empty(_L2_BYTES, dtype=torch.int8, device=device)
        self._marks: list = []

    def start(self) -> None:
        """Begin the first lap."""
        self._marks = []
        if self._on_gpu:
            self._flush.zero_()
            torch.cuda._sleep(_QUEUE_CYCLES)
        self.mark()

    def mark(self) -> None:
        """End a lap and begin the next."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(self._now())

    def laps_ms(self) -> list[float]:
        """Milliseconds of each lap."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]


def take_turns(
    samplers: dict[str, Callable[[], dict[str, float]]],
    repeats: int,
    *,
    seconds: float = float("inf"),
    warmup: int = 2,
    least: int = 3,
) -> dict[str, dict[str, list[float]]]:
    """{name: {phase: its times in ms, one a turn}} of several samplers in turns.

    Args:
        samplers: name -> function that runs one variant once and returns the ms of each phase.
        repeats: turns at most, after `warmup` turns that are not counted.
        seconds: no turn begins after this time, once there are `least` turns.
    """
    names, begun = list(samplers), time.monotonic()
    times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for turn in range(warmup + repeats):
        if turn >= warmup + least and time.monotonic() - begun > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            laps = samplers[name]()
            if turn >= warmup:
                for phase, value in laps.items():
                    times[name].setdefault(phase, []).append(value)
    return times


def timed(
    function: Callable[[], object], device: str = "cpu", clock: str = "wall"
) -> Callable[[], dict[str, float]]:
    """A sampler of one phase, "whole": the function from call to result, the host's work too."""

    def sample() -> dict[str, float]:
        start = CLOCKS[clock]()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return {"whole": 1e3 * (CLOCKS[clock]() - start)}

    return sample
