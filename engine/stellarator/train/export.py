"""From a checkpoint of a run to a model, and to a Hugging Face folder.

defines: model_from_checkpoint, export
"""

import sys
from pathlib import Path

import torch

from stellarator.config import ModelConfig
from stellarator.model import build_model, save_pretrained
from stellarator.model.transformer import Transformer
from stellarator.train import checkpoint


def _find(path: str | Path) -> checkpoint.Checkpoint:
    """A checkpoint folder itself, or the newest good one of a run folder."""
    path = Path(path)
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing"
        raise ValueError(f"{path}: expected a run folder, or a checkpoint in one, got {got} there.")
    if (path / "manifest.json").exists() and path.name.startswith("step_"):
        return checkpoint.load(path)
    problems: list[str] = []
    found = checkpoint.find(path / "checkpoints", problems.append)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if found is None and problems:
        raise checkpoint.CheckpointError(
            f"{path}: expected a checkpoint that can be read, got only damaged ones."
        )
    if found is None:
        raise ValueError(
            f"{path}: expected a run folder with checkpoints, or a checkpoint in one, got neither. "
            "Training writes them to FOLDER/checkpoints."
        )
    return found


def model_from_checkpoint(path: str | Path, dtype: torch.dtype = torch.float32, device="cpu"):
    """(model, its checkpoint): the weights are the masters, rounded once to `dtype`.

    Raises:
        ValueError: no run folder and no checkpoint.
        CheckpointError: nothing that can be trusted is there.
    """
    found = _find(path)
    return _model(found).to(device=device, dtype=dtype), found


def _model(found: checkpoint.Checkpoint) -> Transformer:
    """The model with the masters of a checkpoint, in fp32."""
    config = ModelConfig(**found.manifest["state"]["config"]["model"])
    model = build_model(config, device="meta").to_empty(device="cpu")
    master = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    found.load_into({f"master.{name}": tensor for name, tensor in master.items()}, partly=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(master[name])
    return model


def export(path: str | Path, output: str | Path, dtype: str = "bf16") -> Path:
    """Write the weights and the tokenizer of a run as a Hugging Face folder.

    Args:
        path: a run folder or one of its checkpoints.
        output: the folder to write; must not exist or be empty.
        dtype: "bf16" or "fp32".
    Raises:
        as `model_from_checkpoint`, and ValueError: the run's tokenizer is not where it was, or
            `output` holds other files.
    """
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    found = _find(path)
    tokenizer = found.manifest["state"]["config"]["data"]["tokenizer"]
    if tokenizer and not Path(tokenizer).is_dir():  # said before weights of gigabytes are read
        raise ValueError(
            f"export: expected the tokenizer of the run in {tokenizer}, got nothing there. "
            "Put it back, or start this in the folder in which the training was started."
        )
    save_pretrained(_model(found).to(kind), output, tokenizer_folder=tokenizer or None)
    print(f"exported {found.folder} to {output}")
    return Path(output)
