"""Clocks, power and temperature of the GPU, as its driver tells them.

defines: State, UNKNOWN, REASONS, parse, read

They come from `nvidia-smi`; where that program is not there, what torch can ask NVML for (it needs
the package nvidia-ml-py). What neither tells is None.
"""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FIELDS = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu",
)  # fmt: skip
# The new name, then that of drivers before 535.
_THROTTLE = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of nvmlClocksEventReasons, from nvml.h.
REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown",
    0x10: "sync boost", 0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """Of one GPU at one moment; None is unknown."""

    driver: str | None = None
    sm_mhz: float | None = None
    sm_max_mhz: float | None = None
    memory_mhz: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature_c: float | None = None
    throttled_by: tuple[str, ...] | None = None  # (): by nothing


UNKNOWN = State()


def parse(line: str) -> State:
    """The state in one line of `nvidia-smi --format=csv,noheader,nounits`; see `_FIELDS`."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_FIELDS) + 1:
        return UNKNOWN
    driver, *numbers, reasons = cells
    known = None if driver.startswith("[") else driver
    return State(known, *map(_number, numbers), _reasons(reasons))


def _number(cell: str) -> float | None:
    """A number; None for [N/A] and the like."""
    try:
        return float(cell)
    except ValueError:
        return None


def _reasons(cell: str) -> tuple[str, ...] | None:
    """Names of the bits; those without a name by their value."""
    try:
        bits = int(cell, 16)
    except ValueError:
        return None
    each = (1 << n for n in range(bits.bit_length()))
    return tuple(REASONS.get(bit, hex(bit)) for bit in each if bits & bit)


def read(work: Callable[[], object] = lambda: None) -> State:
    """The state of the current GPU while `work` is called over and over, so that it is not idle."""
    if not torch.cuda.is_available():
        return UNKNOWN
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    for throttle in _THROTTLE:
        query = f"--query-gpu={','.join((*_FIELDS, throttle))}"
        command = ["nvidia-smi", f"--id=GPU-{gpu.uuid}", query, "--format=csv,noheader,nounits"]
        try:
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                while process.poll() is None:
                    work()
                found = parse(process.stdout.read())
        except OSError:  # no such program
            return _by_torch(work)
        if found != UNKNOWN:
            return found
    return _by_torch(work)


def _by_torch(work: Callable[[], object]) -> State:
    """What torch asks NVML for, if it can."""
    work()
    try:
        return State(
            sm_mhz=float(torch.cuda.clock_rate()),
            power_watts=torch.cuda.power_draw() / 1e3,
            temperature_c=float(torch.cuda.temperature()),
        )
    except Exception:  # no nvidia-ml-py, or a driver that does not tell
        return UNKNOWN
