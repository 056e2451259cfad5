"""From a checkpoint of a run to a model, and to a Hugging Face folder.

defines: model_from_checkpoint, export
"""

import sys
from pathlib import Path

import torch

from stellarator.config import ModelConfig
from stellarator.model import build_model, save_pretrained
from stellarator.train import checkpoint


def _find(path: str | Path) -> checkpoint.Checkpoint:
    """A checkpoint folder itself, or the newest good one of a run folder."""
    path = Path(path)
    if (path / "manifest.json").exists() and path.name.startswith("step_"):
        return checkpoint.load(path)
    problems: list[str] = []
    found = checkpoint.find(path / "checkpoints", problems.append)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if found is None:
        got = "only damaged ones" if problems else "neither"
        raise checkpoint.CheckpointError(
            f"{path}: expected a run folder with checkpoints, or a checkpoint, got {got}."
        )
    return found


def model_from_checkpoint(path: str | Path, dtype: torch.dtype = torch.float32, device="cpu"):
    """(model, its checkpoint): the weights are the masters, rounded once to `dtype`.

    Raises:
        CheckpointError: nothing that can be trusted is there.
    """
    found = _find(path)
    config = ModelConfig(**found.manifest["state"]["config"]["model"])
    model = build_model(config, device="meta").to_empty(device="cpu")
    master = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    found.load_into({f"master.{name}": tensor for name, tensor in master.items()}, partly=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(master[name])
    return model.to(device=device, dtype=dtype), found


def export(path: str | Path, output: str | Path, dtype: str = "bf16") -> Path:
    """Write the weights and the tokenizer of a run as a Hugging Face folder.

    Args:
        path: a run folder or one of its checkpoints.
        output: the folder to write; must not exist or be empty.
        dtype: "bf16" or "fp32".
    """
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model, found = model_from_checkpoint(path, kind)
    tokenizer = found.manifest["state"]["config"]["data"]["tokenizer"]
    save_pretrained(model, output, tokenizer_folder=tokenizer or None)
    print(f"exported {found.folder} to {output}")
    return Path(output)
