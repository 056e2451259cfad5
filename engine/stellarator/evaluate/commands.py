"""What `stellarator generate` and `stellarator infill` do.

defines: generate_texts, infill_location
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from stellarator.data.tokenizer import Tokenizer
from stellarator.evaluate.generate import generate
from stellarator.evaluate.infilling import infill, parse_location
from stellarator.model import load_pretrained


def _load(folder: str, device: str):
    """(model, tokenizer) of a Hugging Face folder."""
    _check_folder(Path(folder))
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if device == "cuda" and not has_gpu:
        raise RuntimeError(
            "expected a GPU for --device cuda, got none that torch can use. "
            "`stellarator doctor` says why; --device cpu works everywhere."
        )
    return load_pretrained(folder, device=device).eval(), Tokenizer.load(folder)


def _check_folder(folder: Path) -> None:
    """Raise ValueError for a folder without a model; a run is easily taken for one."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        raise ValueError(
            f"{folder}: expected a folder with an exported model, got {got} there. "
            "Name one with --model; `stellarator export` and `stellarator demo` write them."
        )
    if (folder / "config.json").exists():
        return
    is_step = folder.parent.name == "checkpoints"
    source = folder.parent if folder.name == "checkpoints" else folder
    run = source.parent.parent if is_step else source
    got, todo = "one without config.json", "`stellarator export` writes them from a run."
    if (run / "checkpoints").is_dir():
        words = ["stellarator", "export", str(source), str(run / "model")]
        got = "a checkpoint" if is_step else "a run folder"
        todo = f"Export it first: {shlex.join(words)}"
        if not is_step and (run / "model" / "config.json").exists():
            todo = f"Its exported model is {run / 'model'}."
    raise ValueError(f"{folder}: expected a folder with an exported model, got {got}. {todo}")


def generate_texts(
    folder: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 0.95,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
    device: str = "auto",
) -> list[str]:
    """Continuations of prompts by the model in a Hugging Face folder.

    Prompts are text: a sentinel written in one stays text.

    Raises:
        ValueError: the folder holds no model of this family, or see `generate`.
        RuntimeError: no GPU for `device` "cuda".
    """
    model, tokenizer = _load(folder, device)
    found = generate(
        model,
        [tokenizer.encode(prompt) or [tokenizer.eod] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    return [generation.text for generation in found]


def infill_location(
    folder: str,
    location: str,
    *,
    mode: str = "psm",
    context: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """What the model writes in place of a line, given as FILE:LINE; see `infilling.infill`.

    Raises:
        ValueError: no such line, or the folder holds no model of this family.
        RuntimeError: no GPU for `device` "cuda".
    """
    hole = parse_location(location)
    model, tokenizer = _load(folder, device)
    return infill(
        model,
        tokenizer,
        hole.prefix,
        hole.suffix,
        mode=mode,
        context=context,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
