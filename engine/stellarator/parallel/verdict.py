"""One rank says for all why a run cannot go on.

defines: Verdict

The ranks of a stuck run notice that it is stuck within moments of each other. The first one looks
into it; the others wait for its line, and stay until then: one that left early would look dead to
it. The files lie beside the journals, so each start of a run has its own.
"""

import os
import time
from pathlib import Path


class Verdict:
    """The line on which all ranks end.

    Args:
        folder: of the journals.
    """

    def __init__(self, folder: str | Path):
        self._claim, self._line = Path(folder, "verdict.claimed"), Path(folder, "verdict")

    def claim(self) -> bool:
        """Whether this process is the first of all that asks: it is to `tell` the others."""
        try:
            os.close(os.open(self._claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def tell(self, line: str) -> None:
        """Let the others go."""
        fresh = self._line.with_suffix(".new")
        fresh.write_text(line)
        os.replace(fresh, self._line)

    @property
    def line(self) -> str | None:
        """What was told; None: nothing yet."""
        try:
            return self._line.read_text()
        except FileNotFoundError:
            return None

    def wait(self, seconds: float) -> str | None:
        """What another rank tells within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.line is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.line
