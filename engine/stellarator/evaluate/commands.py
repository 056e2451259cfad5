"""What `stellarator generate` and `stellarator infill` do.

defines: generate_texts, infill_location
"""

from collections.abc import Sequence

import torch

from stellarator.data.tokenizer import Tokenizer
from stellarator.evaluate.generate import generate
from stellarator.evaluate.infilling import infill, parse_location
from stellarator.model import load_pretrained


def _load(folder: str, device: str):
    """(model, tokenizer) of a Hugging Face folder."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_pretrained(folder, device=device).eval(), Tokenizer.load(folder)


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
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """What the model writes in place of a line, given as FILE:LINE.

    Raises:
        ValueError: no such line, or the folder holds no model of this family.
    """
    hole = parse_location(location)
    model, tokenizer = _load(folder, device)
    return infill(
        model,
        tokenizer,
        hole.prefix,
        hole.suffix,
        mode=mode,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
