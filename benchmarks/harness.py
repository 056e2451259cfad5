"""What every benchmark needs: where it ran, interleaved timing, peak memory of a child process.

defines: environment, interleave, Quantiles, peak_memory_of
"""

import multiprocessing
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quantiles:
    """Median with the 20th and 80th percentile of a few timings, in ms."""

    p20_ms: float
    p50_ms: float
    p80_ms: float

    @classmethod
    def of(cls, times_ms: list[float]) -> "Quantiles":
        """Nearest-rank quantiles of the given times."""
        ordered = sorted(times_ms)
        return cls(*(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)))


def environment() -> dict:
    """Machine, versions and commit, for every result."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True)
        return done.stdout.strip()

    names = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
    }


def interleave(
    functions: dict[str, Callable], repeats: int, warmup: int = 2
) -> dict[str, Quantiles]:
    """Time several functions in turn, so that a slow moment of the machine hits all of them.

    Args:
        functions: name -> call without arguments.
        repeats: timed calls of each, after `warmup` calls that are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: Quantiles.of(values) for name, values in times.items()}


def _resident_bytes(key: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process."""
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def _measure(make: Callable, arguments: tuple, pipe) -> None:
    """Child process: what `make(*arguments)` and two calls of its result add to its memory."""
    before = _resident_bytes("VmRSS")
    call = make(*arguments)
    call()
    call()
    pipe.send(_resident_bytes("VmHWM") - before)


def peak_memory_of(make: Callable, *arguments) -> int:
    """Peak memory in bytes of building something and calling it twice, in a process of its own.

    Args:
        make: a function of a module; it returns the function to call.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(make, arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured {make.__name__} died") from None
    finally:
        process.join()
