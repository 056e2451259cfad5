"""Signals that ask a run to save and leave, and the lock that keeps two runs out of one folder.

defines: StopRequest, folder_lock
"""

import contextlib
import fcntl
import os
import signal
import threading
from pathlib import Path

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Within the block, signals only set `received`; a second Ctrl-C interrupts at once.

    Batch systems and torchrun can deliver the same signal twice; that must not cut a save short.

    SIGTERM, SIGUSR1 and SIGUSR2 are what schedulers send before they take a machine away; SIGINT is
    Ctrl-C. Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        here = threading.current_thread() is threading.main_thread()
        for number in _SIGNALS if here else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)


@contextlib.contextmanager
def folder_lock(folder: Path):
    """Hold the run folder for this process; the system lets go of it when the process ends.

    Raises:
        ValueError: it is a file, or lies under one.
        RuntimeError: another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"{folder}: expected a folder or nothing, got a file. Choose another `folder`."
        ) from None
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RuntimeError(
                f"{folder}: expected a folder of its own, got one in use by {holder}. "
                "Wait for that run to end or choose another `folder`."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
