"""Peak memory of a call, and of a process of its own.

defines: peak_of_call, peak_memory_of, interrupts_held

On a GPU: what torch's allocator held at most during the call, less what it held before.

On a CPU: resident memory, as the kernel counts it, so that scratch memory of any library is in it
and not only tensors. Before the call the C library gives back what it has cached (malloc_trim) and
the high-water mark is reset (a 5 written to /proc/self/clear_refs); the result is the mark after
the call less the resident memory before it, the larger of two calls, as a few free pages may always
be left to the first. Pages that are never touched do not count. Those of the kernels' arena stay
resident between calls, so what lies in it is counted by the arena itself. The call has run before,
so that code that is loaded and caches that are filled once are not in it. Where
/proc/self/clear_refs cannot be written nothing is measured: None.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import torch

from stellarator_kernels.memory import arena, reset_peak


def _resident_bytes(key: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process."""
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def peak_of_call(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes that `call` needs at its peak beside what was there before; its result included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    peaks = [_resident_peak(call) for _ in range(2)]
    return None if None in peaks else max(peaks)


def _resident_peak(call: Callable[[], object]) -> int | None:
    """Bytes that become resident during one call, at most."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):  # not permitted, or another C library
        return None
    before, used = _resident_bytes("VmRSS"), arena()
    reset_peak()
    call()
    after = arena()
    # Pages that the arena touched for the first time are in both counts.
    grown = _resident_bytes("VmHWM") - before - (after["high"] - used["high"])
    return max(0, grown) + after["peak"] - used["used"]


def _measure(make: Callable, arguments: tuple, pipe) -> None:
    """Child process: what `make(*arguments)` and two calls of its result add to its memory."""
    before = _resident_bytes("VmRSS")
    call = make(*arguments)
    call()
    call()
    pipe.send(_resident_bytes("VmHWM") - before)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Within this block Ctrl-C waits; what is started there inherits that and never hears of it.

    So Ctrl-C is for this process alone, which has to end what it has started.
    """
    resource_tracker.ensure_running()  # or the first start begins it, and lets interrupts through
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def peak_memory_of(make: Callable, *arguments) -> int:
    """Peak memory in bytes of building something and calling it twice, in a process of its own.

    Args:
        make: a function of a module; it returns the function to call.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(make, arguments, there))
    with interrupts_held():
        process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured {make.__name__} died") from None
    except KeyboardInterrupt:
        process.kill()
        raise
    finally:
        process.join()
