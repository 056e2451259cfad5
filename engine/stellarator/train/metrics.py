"""What a run says about itself: one line a step, metrics.jsonl, log.txt, TensorBoard, status.json.

defines: StepMetrics, step_line, ZScore, RunLog, write_status, peak_memory_bytes
"""

import contextlib
import json
import math
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from stellarator.files import replace_text
from stellarator.progress import show

_HUGGING_FACE_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/learning_rate",
    "tokens_per_second": "train/tokens_per_second",
    "mfu": "train/mfu",
}


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, as written to metrics.jsonl."""

    step: int
    loss: float  # nats per target token
    loss_z: float | None  # standard deviations from the mean of the last 128 steps; None at first
    grad_norm: float
    lr: float
    step_ms: float
    tokens: int  # target tokens in this step, over all ranks
    tokens_total: int
    tokens_per_second: float  # target tokens
    mfu: float | None  # model FLOPs over peak FLOPs, 0 to 1
    data_wait: float  # share of the step spent waiting for data
    time_ms: dict[str, float]  # data, forward, backward, reduce (over ranks), optimizer
    memory_bytes: int
    skipped: bool = False


def step_line(m: StepMetrics, total_steps: int, eta_seconds: float) -> str:
    """The line of one step, at most 120 columns."""
    mfu = "" if m.mfu is None else f" mfu {100 * m.mfu:.1f}%"
    score = "-" if m.loss_z is None else f"{m.loss_z:+.1f}z"
    width = len(str(total_steps))
    return (
        f"step {m.step:>{width}}/{total_steps} loss {m.loss:.4f} {score}"
        f" norm {m.grad_norm:.2g} lr {m.lr:.1e} {_milliseconds(m.step_ms)}"
        f" {_count(m.tokens_per_second)} tok/s{mfu} data {100 * m.data_wait:.0f}%"
        f" {m.memory_bytes / 2**30:.3g} GiB"
        + (" SKIPPED" if m.skipped else f" eta {duration(eta_seconds)}")
    )


def _count(value: float) -> str:
    """12,345 or, from a hundred thousand on, 123.4K and 12.3M."""
    if not math.isfinite(value):
        return "nan"
    for unit, size in (("M", 1e6), ("K", 1e3)):
        if value >= 1e5 and value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:,.0f}"


def _milliseconds(value: float) -> str:
    """In ms, or in s from ten seconds on."""
    return f"{value:.0f} ms" if value < 1e4 else f"{value / 1e3:.3g} s"


def duration(seconds: float) -> str:
    """h:mm:ss; hours and minutes from ten hours on, days and hours from two days on."""
    seconds = max(0, round(seconds))
    if seconds >= 48 * 3600:
        return f"{seconds // 86400}d{seconds % 86400 // 3600}h"
    if seconds >= 10 * 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


class ZScore:
    """How far a value lies from its last 128 predecessors, in their standard deviations."""

    def __init__(self, values=()):
        self.values: deque[float] = deque(values, maxlen=128)

    def __call__(self, value: float) -> float | None:
        """The z-score of `value` among its predecessors, which it then joins; None if there are
        fewer than eight, or all of them are the same."""
        score = None
        if len(self.values) >= 8:
            mean = sum(self.values) / len(self.values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in self.values) / len(self.values))
            score = (value - mean) / spread if spread > 0 else None
        if math.isfinite(value):
            self.values.append(value)
        return score


class RunLog:
    """The files and the terminal of one run. Ranks other than 0 write nothing."""

    def __init__(self, folder: Path, enabled: bool = True, tensorboard: bool = False):
        self.enabled = enabled
        self._metrics = self._text = self._board = None
        self._told = False
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._metrics = open(self._path, "a", encoding="utf-8", buffering=1)
        self._text = open(folder / "log.txt", "a", encoding="utf-8", buffering=1)
        self._board_folder = folder / "tensorboard" if tensorboard else None

    def say(self, text: str) -> None:
        """One line to the terminal and log.txt."""
        if self.enabled:
            show(text, sys.stdout)
            self._write(self._text, text + "\n")

    def warn(self, text: str) -> None:
        """One warning to the error stream and log.txt."""
        if self.enabled:
            show(f"warning: {text}", sys.stderr)
            self._write(self._text, f"warning: {text}\n")

    def _write(self, stream, text: str) -> None:
        """Write to a file of the run; a full disk costs the line, not the run."""
        try:
            stream.write(text)
        except OSError as error:
            if not self._told:
                show(f"warning: {stream.name}: {error.strerror}", sys.stderr)
            self._told = True

    def record(self, kind: str, values: dict) -> None:
        """One JSON line, and scalars to TensorBoard."""
        if not self.enabled:
            return
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self._write(self._metrics, json.dumps({"kind": kind} | finite, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if kind == "eval" and name == "loss":
                    self._board.add_scalar("eval/loss", value, values["step"])
                elif kind == "train" and name in _HUGGING_FACE_NAMES and value is not None:
                    self._board.add_scalar(_HUGGING_FACE_NAMES[name], value, values["step"])

    def step(self, metrics: StepMetrics) -> None:
        """Record one step."""
        self.record("train", asdict(metrics))

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, which will be written again, and a half-written line."""
        if not self.enabled:
            return
        self._metrics.close()
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the run was killed
        replace_text(self._path, "".join(kept))
        self._metrics = open(self._path, "a", encoding="utf-8", buffering=1)
        if self._board_folder is not None:
            self._board = _tensorboard(self._board_folder, step + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        for stream in (self._metrics, self._text, self._board):
            if stream is not None:
                with contextlib.suppress(OSError):  # what a full disk did not take was told before
                    stream.close()


def _tensorboard(folder: Path, first_step: int):
    """A TensorBoard writer that hides older records from `first_step` on; None if not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=max(0, first_step))


def write_status(folder: Path, status: str, step: int, reason: str = "") -> None:
    """status.json for schedulers: running, done, preempted, interrupted or failed.

    torchrun's exit code is 1 whatever a worker's was; this file says what happened.
    """
    content = {"status": status, "step": step, "reason": reason, "time": int(time.time())}
    replace_text(folder / "status.json", json.dumps(content) + "\n")


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory in use so far: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: its ru_maxrss starts at the peak of the process that started this one.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0
