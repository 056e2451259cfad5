"""One run of `python -m benchmarks parity`: training that also hashes its first weights.

python -m benchmarks.parity_run config.toml, alone or under torchrun; rank 0 writes first.json,
{parameter: SHA-256 of its bytes}, into the run folder.
"""

import hashlib
import json
import sys
from pathlib import Path

from stellarator import settings
from stellarator.config import RunConfig
from stellarator.train.loop import Trainer


class Recording(Trainer):
    """A run that writes down the weights of step 0."""

    def _loop(self, started: float) -> float:
        if self.mesh.dp.rank == 0:
            wholes, found = self.wholes(), {}
            for name in wholes.described:
                tensor = wholes.read(name)
                if name.startswith("master."):
                    data = tensor.detach().cpu().contiguous().numpy().tobytes()
                    found[name] = hashlib.sha256(data).hexdigest()
            if self.mesh.main:
                Path(self.folder, "first.json").write_text(json.dumps(found))
        return super()._loop(started)


if __name__ == "__main__":
    Recording(settings.resolve(RunConfig(), sys.argv[1])).run()
