"""Where the time of a step goes.

defines: Stopwatch
"""

import time
from itertools import pairwise

import torch


class Stopwatch:
    """Marks between the phases of a step; on a GPU they are events, so marking costs no wait."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, object]] = []

    def start(self) -> None:
        """Begin a step."""
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        """What ran since the last mark was `phase`."""
        self._marks.append((phase, self._now()))

    def split_ms(self) -> dict[str, float]:
        """Milliseconds per phase since `start`. On a GPU this waits for the last mark."""
        if self.on_gpu:
            self._marks[-1][1].synchronize()
        split: dict[str, float] = {}
        for (_, before), (phase, after) in pairwise(self._marks):
            ms = before.elapsed_time(after) if self.on_gpu else 1e3 * (after - before)
            split[phase] = split.get(phase, 0.0) + ms
        return split

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
