"""What a run must remember to go on exactly, and what may not change in between.

defines: TrainingError, RefusedError, Progress, fingerprint, find, compare, model_difference, flat
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from stellarator.config import ModelConfig, RunConfig
from stellarator.data.shards import hash_shard
from stellarator.train import checkpoint

# With another value the weights do not fit, or the batches to come are not the continuation.
_MUST_MATCH = (
    "model.",
    "data.seed",
    "data.seq_length",
    "data.fim.",
    "data.weights",
    "data.attend_across_documents",
    "train.global_batch_size",
    "train.precision",
)
_OF_THE_RUN = ("init_std", "residual_dropout", "embedding_dropout", "attention_dropout")
_MAY_DIFFER_SILENTLY = ("name", "folder", "data.train", "data.validation", "data.tokenizer")


class TrainingError(RuntimeError):
    """The run cannot go on; the message says what to do."""


class RefusedError(TrainingError, ValueError):
    """The run cannot be done as it was asked for: the same command fails again."""


@dataclasses.dataclass
class Progress:
    """Everything of a run that is not a tensor and not a function of the step number."""

    step: int = 0
    skipped: int = 0  # steps whose update was left out because they were not finite
    tokens_total: int = 0
    recent_losses: list[float] = dataclasses.field(default_factory=list)
    last_eval: float | None = None


def fingerprint(shards: Sequence[str], tokenizer_sha256: str) -> str:
    """A hash of what the rows of a run are made of: the tokenizer, and each shard."""
    whole = hashlib.sha256(tokenizer_sha256.encode())
    for prefix in shards:
        hash_shard(whole, prefix)
    return whole.hexdigest()


def find(config: RunConfig, warn: Callable[[str], None]) -> checkpoint.Checkpoint | None:
    """The checkpoint that `checkpoint.resume` asks for; None to start afresh.

    A run that has checkpoints of its own goes on from those: a path elsewhere is for its first
    start, so that the same command goes on after a stop.

    Raises:
        RefusedError: resume=none in a folder with checkpoints, a path to an older one of them or to
            nothing.
        TrainingError: none of the checkpoints of the run can be read.
        CheckpointError: the named checkpoint cannot be trusted.
    """
    folder, resume = Path(config.folder) / "checkpoints", config.checkpoint.resume
    own = sorted(folder.glob("step_*"))
    if resume == "none":
        if own:
            raise RefusedError(
                f"{folder}: expected no checkpoints with checkpoint.resume=none, got some. "
                "Choose another `folder`, or checkpoint.resume=auto to go on."
            )
        return None
    if resume != "auto":
        path = Path(resume)
        if not own or path.resolve().parent == folder.resolve():
            return _named(path, own)
        warn(f"{path} was for the first start: going on from the checkpoints in {folder}")
    found = checkpoint.find(folder, warn)
    if found is None and own:
        raise TrainingError(
            f"{folder}: expected a checkpoint that can be read, got none among those there. "
            "Repair or remove them, or choose another `folder`; nothing was changed."
        )
    return found


def _named(path: Path, beside: list[Path]) -> checkpoint.Checkpoint:
    """The checkpoint at `path`, which must be the newest of those beside it."""
    if not path.is_dir():
        raise RefusedError(
            f"{path}: expected a checkpoint, got nothing there. Pass the folder of one, such as "
            "RUN/checkpoints/step_00000100."
        )
    found = checkpoint.load(path)
    if newer := [f.name for f in beside if f.name > path.name]:
        raise RefusedError(
            f"{path.parent}: expected no checkpoints after {path.name}, got {newer[-1]}. "
            "Choose another `folder` for a second continuation, remove the newer ones, or pass "
            "checkpoint.resume=auto to go on from them."
        )
    return found


def compare(found: checkpoint.Checkpoint, config: RunConfig, data_fingerprint: str) -> list[str]:
    """One line for every setting that changed since the checkpoint and may change.

    A setting that the checkpoint does not know yet had its default: that is what there was before.

    Raises:
        RefusedError: a setting changed that would make this another run; all of them are named.
    """
    state = found.manifest["state"]
    now = flat(dataclasses.asdict(config))
    before = flat(dataclasses.asdict(RunConfig())) | flat(state["config"])
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    fatal = [
        f"{k}: {before.get(k)} there, {now.get(k)} here"
        for k in changed
        if k.startswith(_MUST_MATCH)
    ]
    if state["data_fingerprint"] != data_fingerprint:
        fatal.append("data.train or data.tokenizer: other content")
    if fatal:
        raise RefusedError(
            f"{found.folder}: is of another configuration ({'; '.join(fatal)}). Choose another "
            "`folder`, or the values of that run; train.init_from starts from exported weights."
        )
    return [
        f"changed since the checkpoint: {k}: {before.get(k)} -> {now.get(k)}"
        for k in changed
        if k not in _MAY_DIFFER_SILENTLY and not k.startswith("checkpoint.")
    ]


def model_difference(folder: str, there: ModelConfig, here: ModelConfig) -> str:
    """What to pass so that the configuration is that of the model in `folder`; empty if it is.

    Dropout rates and the spread of initial weights belong to a training run, not to the weights:
    those of the folder are not asked for.
    """
    a, b = dataclasses.asdict(there), dataclasses.asdict(here)
    for name in _OF_THE_RUN:
        del a[name], b[name]
    differences = " ".join(f"model.{k}={a[k]}" for k in a if a[k] != b[k])
    return (
        f"{folder}: holds another model than configured. Pass {differences}" if differences else ""
    )


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one with dotted keys; tuples as lists, as JSON gives them back."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found
