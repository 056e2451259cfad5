"""The suite's own instruments, on work whose figures are known: turns, memory, noise, copies.

Not covered: whether the times and bandwidths themselves are right, for which there is no second
clock.
"""

import contextlib
import multiprocessing
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

from benchmarks import machine
from benchmarks.harness import Quantiles, take_turns
from benchmarks.machine import Quietness
from benchmarks.memory import interrupts_held, peak_memory_of, peak_of_call
from stellarator_kernels.memory import arena, empty

# Linux adds up the resident pages of a process in batches per processor, so that VmRSS and VmHWM
# may each lag behind by some dozens of pages (68 KiB were missing once).
COUNTED_LATE = 512 * 1024


def samplers(order: list[str], seconds: float = 0.0) -> dict:
    """Three variants that note when they run; the nth run of each takes n ms."""
    counts = dict.fromkeys("abc", 0)

    def sampler(name: str):
        def sample() -> dict[str, float]:
            order.append(name)
            counts[name] += 1
            time.sleep(seconds)
            return {"whole": float(counts[name])}

        return sample

    return {name: sampler(name) for name in counts}


def test_each_turn_begins_with_another_variant():
    order: list[str] = []
    times = take_turns(samplers(order), repeats=4, warmup=2)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc" + "bca" + "cab"
    # The two turns that warm up are not counted.
    assert times == {name: {"whole": [3.0, 4.0, 5.0, 6.0]} for name in "abc"}


def test_turns_end_with_the_time_but_not_before_the_least():
    order: list[str] = []
    times = take_turns(samplers(order, 0.01), repeats=100, seconds=0.05, warmup=1, least=3)
    assert {len(found["whole"]) for found in times.values()} == {3}


def test_quantiles_are_those_of_the_nearest_rank():
    assert Quantiles.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Quantiles(2.0, 3.0, 5.0)
    assert Quantiles.of([7.0]) == Quantiles(7.0, 7.0, 7.0)


def test_other_work_is_noticed():
    """One process that is busy, as a share of all processors; whoever else runs adds to it."""
    quietness = Quietness()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(2.0)
        found = quietness.report()
        busy.kill()
    assert found["others"] > 0.6 / machine.os.cpu_count()
    if machine.os.cpu_count() <= 4:
        assert not found["quiet"] and "LOADED: other work took" in Quietness.warning(found)


def test_the_work_of_a_process_that_was_started_is_own_work():
    before = machine._processor_seconds()[1]
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert machine._processor_seconds()[1] - before >= 0.5


def test_the_own_work_of_a_process_is_not_that_of_others(monkeypatch):
    busy = iter([(100.0, 10.0), (104.0, 13.0)])  # all, own
    clock = iter([0.0, 4.0])
    monkeypatch.setattr(machine, "_processor_seconds", lambda: next(busy))
    monkeypatch.setattr(machine, "_calibrate", lambda: [1.0, 1.1, 1.2])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    found = Quietness().report()
    assert found == {"quiet": False, "others": 0.125, "drift": 0.1}


def test_a_copy_in_slices_copies_everything(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen = []
    monkeypatch.setattr(
        machine.numpy, "copyto", lambda to, x: seen.append(x.size) or to.__setitem__(..., x)
    )
    source, target = numpy.arange(1000, dtype=numpy.int8), numpy.zeros(1000, numpy.int8)
    with ThreadPoolExecutor(3) as threads:
        machine._sliced_copy(target, source, threads)()
    assert (target == source).all() and sorted(seen) == [333, 333, 334]


def test_limits_are_measured():
    found = machine.measure_limits("cpu", torch.float32, scale=16)
    assert found.copy_gbps > 0.1 and found.matmul_tflops > 1e-4


def make_64_mib():
    """Allocates and touches 64 MiB, and 32 MiB more in each call."""
    kept = numpy.ones(64 * 2**20, numpy.int8)
    return lambda: kept[:1] + numpy.ones(32 * 2**20, numpy.int8)[:1]


def test_peak_memory_of_a_process_is_that_of_making_and_calling():
    found = peak_memory_of(make_64_mib)
    assert 96 * 2**20 - COUNTED_LATE <= found < 1.1 * 96 * 2**20


def make_none():
    """Dies."""
    raise SystemExit(3)


def test_a_process_that_dies_is_named():
    with pytest.raises(RuntimeError, match="the process that measured make_none died"):
        peak_memory_of(make_none)


def test_peak_memory_is_that_of_the_call():
    def call() -> float:
        large = torch.ones(24 * 2**20 // 4)
        return float(large.sum() + torch.ones(8 * 2**20 // 4).sum())

    call()
    found = peak_of_call(call)
    if found is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 32 * 2**20 - COUNTED_LATE <= found < 34 * 2**20


def test_peak_memory_counts_an_arena_that_grows_once():
    """The pages that it touches for the first time are resident and in its own count."""

    def call() -> float:
        # Larger than what the tests before have used, so that the arena must grow.
        size = arena()["high"] + 24 * 2**20
        sizes.append(size)
        return float(empty((size // 4,), torch.float32, "cpu").fill_(1)[0])

    sizes: list[int] = []
    found = peak_of_call(call)
    if found is None or arena()["reserved"] == 0:
        pytest.skip("no /proc/self/clear_refs, or no arena")
    assert max(sizes) - COUNTED_LATE <= found < max(sizes) + 2 * 2**20


def test_peak_memory_counts_what_lies_in_the_arena():
    def call() -> float:
        large = empty((24 * 2**20 // 4,), torch.float32, "cpu").fill_(1)
        return float(large.sum() + empty((8 * 2**20 // 4,), torch.float32, "cpu").fill_(2).sum())

    call()
    for _ in range(2):  # its pages are resident from the first call on
        found = peak_of_call(call)
        if found is None or arena()["reserved"] == 0:
            pytest.skip("no /proc/self/clear_refs, or no arena")
        assert 32 * 2**20 - COUNTED_LATE <= found < 34 * 2**20


@pytest.mark.parametrize(("held", "code"), [(contextlib.nullcontext, 1), (interrupts_held, 0)])
def test_what_is_started_while_interrupts_are_held_never_hears_of_one(held, code):
    """Not even the first process, before which multiprocessing starts one of its own."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=signal.raise_signal, args=(signal.SIGINT,))
    # In a job of a shell's background it is ignored, which would be inherited as well.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with held():
            process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    process.join(60)
    assert process.exitcode == code
