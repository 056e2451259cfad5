"""What the machine can do, measured in the run itself, and whether it was quiet.

defines: Limits, measure_limits, Quietness

Shares of a peak in a result are shares of these two figures: the bandwidth of a copy (read plus
written bytes, between two arrays that are too large for the cache) and the rate of a large square
matrix product (`linear`) in the dtype of the run. Both are the best of a few tries, on the same
clock and threads as the timings.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy
import torch

from benchmarks.harness import Stopwatch
from stellarator_kernels import linear

# On a CPU of each thread, up to 16: with less than about 0.75 of the cache a thread, 128 MiB on one
# machine of ours, the C library no longer writes past the cache, and the copy is 40 % slower.
_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
_SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_TICKS = os.sysconf("SC_CLK_TCK")
# Shares above which a run is called loaded.
_OTHERS_LIMIT, _DRIFT_LIMIT = 0.1, 0.2


@dataclass(frozen=True)
class Limits:
    """Measured peaks of one device."""

    copy_gbps: float
    matmul_tflops: float


def _best_ms(call, watch: Stopwatch, tries: int) -> float:
    """Least time of a few calls, the first not counted."""
    best = float("inf")
    for number in range(tries + 1):
        watch.start()
        call()
        watch.mark()
        if number:
            best = min(best, watch.laps_ms()[0])
    return max(best, 1e-6)


def _sliced_copy(
    target: numpy.ndarray, source: numpy.ndarray, threads: ThreadPoolExecutor
) -> Callable[[], None]:
    """A copy by as many threads as torch has, a slice each: numpy copies without Python's lock."""
    num_slices = torch.get_num_threads()
    slices = [numpy.array_split(x, num_slices) for x in (target, source)]

    def copy() -> None:
        list(threads.map(numpy.copyto, *slices))

    return copy


def measure_limits(
    device: str, dtype: torch.dtype, clock: str = "wall", *, scale: int = 1
) -> Limits:
    """Copy bandwidth and matrix-product rate; `scale` divides the sizes, for a first try."""
    watch = Stopwatch(device, clock)
    size = _COPY_BYTES[device] * (min(16, torch.get_num_threads()) if device == "cpu" else 1)
    source = torch.ones(size // scale, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = _best_ms(lambda: target.copy_(source), watch, 8)
    if device == "cpu":  # the C library's copy does not read the target first
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            copy = _sliced_copy(target.numpy(), source.numpy(), threads)
            copied = min(copied, _best_ms(copy, watch, 8))
    rates = []
    for side in _SIDES[device]:
        side //= scale
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates.append(2e-9 * side**3 / _best_ms(lambda a=a, b=b: linear(a, b), watch, 5))
    return Limits(2e-6 * source.numel() / copied, max(rates))


def _processor_seconds() -> tuple[float, float]:
    """Busy seconds of all processors of the machine, and of this process and those it started."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:8])
    # Children count when they have ended and were waited for.
    return (user + nice + system + irq + softirq) / _TICKS, sum(os.times()[:4])


def _calibrate() -> list[float]:
    """Milliseconds of a fixed piece of arithmetic in the cache, a few times, by the wall."""
    x, times = torch.ones(128, 128), []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(8):
            torch.mm(x, x)
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)


class Quietness:
    """Whether other work disturbed a stretch of time: made at its beginning, asked at its end.

    Two signs: processor time of the machine that is not of this process, nor of those that it
    started and that have ended, as a share of all its processors; and a fixed piece of arithmetic
    whose typical time is above its least, or is not the same before and after. Processor time is
    counted in ticks of 10 ms, so a stretch of less than half a second is judged by the second sign
    alone.
    """

    def __init__(self):
        self._before = _calibrate()
        self._start, self._busy = time.monotonic(), _processor_seconds()

    def report(self) -> dict:
        """{"quiet": bool, "others": share of the processors, "drift": of the fixed arithmetic}."""
        elapsed = time.monotonic() - self._start
        total, own = (b - a for a, b in zip(self._busy, _processor_seconds(), strict=True))
        others = max(0.0, total - own) / elapsed / (os.cpu_count() or 1) if elapsed > 0.5 else 0.0
        after = _calibrate()
        middle = len(after) // 2
        least = min(self._before[0], after[0])
        drift = max(self._before[middle], after[middle]) / least - 1
        quiet = others <= _OTHERS_LIMIT and drift <= _DRIFT_LIMIT
        return {"quiet": quiet, "others": round(others, 3), "drift": round(drift, 3)}

    @staticmethod
    def warning(report: dict) -> str:
        """One line about a report that is not quiet; empty otherwise."""
        if report["quiet"]:
            return ""
        return (
            f"LOADED: other work took {report['others']:.0%} of the processors, and fixed "
            f"arithmetic took {report['drift']:.0%} longer than its best. Times are not to be kept."
        )
