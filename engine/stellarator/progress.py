"""A progress line with an ETA: redrawn in place on a terminal, a line now and then in a log.

defines: Progress, show
"""

import errno
import os
import sys
import time
from typing import TextIO


def show(text: str, stream: TextIO) -> None:
    """Print a line. Where it cannot be written that costs the line, and not what is going on.

    Where the terminal or the pipe is gone, all lines to come are dropped as well.
    """
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno in (errno.EIO, errno.EPIPE):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class Progress:
    """Call it with the share done and what is going on; use it as a context manager.

    Args:
        title: first word of the line.
        stream: where to write; a bar is drawn only if it is a terminal, else one line every 10 s.
    """

    def __init__(self, title: str, stream: TextIO | None = None):
        self.title, self.stream = title, stream or sys.stderr
        self.on_terminal = self.stream.isatty()
        self._started = self._written = time.monotonic()
        self._width = 0

    def __call__(self, done: float, text: str = "") -> None:
        """Show that the share `done` (0 to 1) is finished; `text` says what runs now."""
        now = time.monotonic()
        if now - self._written < (0.2 if self.on_terminal else 10.0) and done < 1.0:
            return
        self._written = now
        line = f"{self.title} {100 * done:3.0f}% {text}{self._eta(now - self._started, done)}"
        if self.on_terminal:
            self.stream.write("\r" + line.ljust(self._width)[:118])
            self._width = min(118, len(line))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    @staticmethod
    def _eta(spent: float, done: float) -> str:
        if not 0.02 < done < 1.0 or spent < 1.0:
            return ""
        left = round(spent * (1 - done) / done)
        return f" eta {left // 60}:{left % 60:02d}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self.on_terminal and self._width:
            self.stream.write("\n")
            self.stream.flush()
