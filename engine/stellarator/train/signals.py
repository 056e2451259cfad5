"""Signals that ask a run to save and leave, and the lock that keeps two runs out of one folder.

defines: StopRequest, Stopped, folder_lock
"""

import contextlib
import fcntl
import os
import signal
import threading
from pathlib import Path

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Stopped(BaseException):
    """A signal came while there was nothing to save; no `Exception`, so that nobody handles it."""


class StopRequest:
    """Within the block, the first signal sets `received` and, until `defer()`, raises `Stopped`.

    After `defer()` signals do no more than that, so that the loop ends its step and saves; a second
    Ctrl-C interrupts at once. Batch systems and torchrun can deliver the same signal twice; that
    must not cut a save short.

    SIGTERM, SIGUSR1 and SIGUSR2 are what schedulers send before they take a machine away; SIGINT is
    Ctrl-C; SIGHUP is the end of the terminal, and stays ignored where it is (nohup). Outside the
    main thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        here = threading.current_thread() is threading.main_thread()
        for number in _SIGNALS if here else ():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if first and not self._deferred:
            raise Stopped

    def check(self) -> None:
        """Raise `Stopped` if a signal came, also where its own was lost, as in a callback of C."""
        if self.received is not None:
            raise Stopped

    def defer(self) -> None:
        """From here on there is something to save: signals wait until they are asked for."""
        self._deferred = True
        self.check()


@contextlib.contextmanager
def folder_lock(folder: Path):
    """Hold the run folder for this process; the system lets go of it when the process ends.

    Raises:
        ValueError: it is a file, or lies under one.
        RuntimeError: another process holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Without a buffer, which would fail on a full disk once more when it is closed.
            file = stack.enter_context(open(folder / ".lock", "ab+", buffering=0))
            _hold(file, folder)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"{folder}: expected a folder or nothing, got a file. Choose another `folder`."
            ) from None
        except OSError as error:
            raise RuntimeError(
                f"{folder}: expected a folder that can be written, got: {error.strerror}. "
                "Free some space or get permission there, or choose another `folder`."
            ) from None
        yield


def _hold(file, folder: Path) -> None:
    """Lock an open file and write into it who holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another process"
        raise RuntimeError(
            f"{folder}: expected a folder of its own, got one in use by {holder}. "
            "Wait for that run to end or choose another `folder`."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
