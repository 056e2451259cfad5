"""Runs of `python -m benchmarks parity`: training that also hashes its first weights.

python -m benchmarks.parity_run PORT=config.toml ..., one run after the other; as many processes as
WORLD_SIZE says do this, each with its RANK. Rank 0 writes first.json, {parameter: SHA-256 of its
bytes}, into each run folder. To start Python and import torch once saves most of the time.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from stellarator import settings
from stellarator.config import RunConfig
from stellarator.train.loop import Trainer


class Recording(Trainer):
    """A run that writes down the weights of step 0."""

    def _loop(self, started: float) -> float:
        if (wholes := self.wholes()) is not None:
            found = {}
            for name in wholes.described:
                tensor = wholes.read(name)
                if name.startswith("master."):
                    data = tensor.detach().cpu().contiguous().numpy().tobytes()
                    found[name] = hashlib.sha256(data).hexdigest()
            if self.mesh.main:
                Path(self.folder, "first.json").write_text(json.dumps(found))
        return super()._loop(started)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        os.environ["MASTER_PORT"], path = word.split("=", 1)  # a new port for each group
        Recording(settings.resolve(RunConfig(), path)).run()
