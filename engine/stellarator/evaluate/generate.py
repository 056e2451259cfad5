"""Continue token sequences with a cache of keys and values: greedy, or sampled by nucleus.

defines: generate, Generation

Prompts of a batch are padded on the right for the first pass, where causality keeps the padding out
of sight, and then every row grows at its own length. Rows that have ended are left out as soon as
half of a batch has.

What a row draws depends on (seed, its index, its step) alone, never on its batch mates; the logits
of a row differ between batch sizes by rounding only.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stellarator.model.cache import KVCache
from stellarator.model.transformer import Transformer


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt."""

    ids: list[int]  # new tokens, without the stop token; those of a stop string are still here
    text: str | None  # decoded and cut before the stop string; None without a tokenizer
    finish: str  # "stop_id", "stop_string" or "length"


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    min_new_tokens: int = 0,
    tokenizer=None,
    batch_size: int = 16,
    rows: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue every prompt until a stop or `max_new_tokens`.

    Args:
        model: any decoder of this package; its mode and gradients are not touched.
        prompts: token ids, each at least one.
        max_new_tokens: per prompt.
        temperature: 0 takes the most probable token; else logits are divided by it and sampled.
        top_p: sample among the most probable tokens that together reach this probability.
        seed: of the sampling.
        stop_ids: tokens that end a row; `<|endoftext|>` of the tokenizer is added to them.
        stop_strings: texts that end a row (and are cut off); needs a tokenizer. Special tokens
            count as their names, such as "<file_sep>".
        min_new_tokens: tokens before which no stop token is taken; its probability goes to others.
        tokenizer: with `eod`, `vocab_size` and `decode_bytes`; None: ids only.
        batch_size: prompts at a time; changes speed and memory, not what is drawn.
        rows: index of each prompt for the random draws; None: 0, 1, ...
    Returns:
        one Generation per prompt, in order.
    Raises:
        ValueError: an empty prompt, a prompt and its continuation longer than the positions of the
            model, or an argument out of range.
    Cost: one pass over the prompts, then one over the weights for each new token of a batch.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, stop_strings, tokenizer, batch_size)
    rows = range(len(prompts)) if rows is None else rows
    if len(rows) != len(prompts):
        raise ValueError(
            f"generate: expected {len(prompts)} rows, got {len(rows)}. One per prompt."
        )
    stops = set(stop_ids) | ({tokenizer.eod} if tokenizer is not None else set())
    texts = [_Text(tokenizer, stops, stop_strings, max_new_tokens) for _ in prompts]
    pick = _greedy if temperature == 0 else _Sampler(temperature, top_p, seed, rows)
    # Rows of the embedding beyond the tokenizer are padding: nothing can be written with them.
    size = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
    banned = [i for i in stops if i < size]
    for start in range(0, len(prompts), batch_size):
        indices = list(range(start, min(start + batch_size, len(prompts))))
        rule = _Rule(size, banned, min_new_tokens)
        _generate_batch(model, prompts, indices, texts, pick, max_new_tokens, rule)
    return [text.result() for text in texts]


@torch.no_grad()
def _generate_batch(model, prompts, indices, texts, pick, max_new_tokens, rule) -> None:
    """Grow the texts of one batch until all have ended. `indices` are those of `prompts`."""
    weight = model.embedding.weight
    device = weight.device
    lengths = torch.tensor([len(prompts[i]) for i in indices], device=device)
    longest = int(lengths.max())
    tokens = torch.zeros(len(indices), longest, dtype=torch.int64)
    for row, i in enumerate(indices):
        tokens[row, : len(prompts[i])] = torch.as_tensor(prompts[i])
    cache = KVCache(model.config, len(indices), longest + max_new_tokens, weight.dtype, device)
    states = model.hidden(tokens.to(device), cache=cache)
    cache.truncate(lengths)
    last = states[torch.arange(len(indices), device=device), lengths - 1]  # (B, C)
    for count in itertools.count():
        chosen = pick(rule.allowed(model.logits(last), count), indices)
        for token, i in zip(chosen.tolist(), indices, strict=True):
            texts[i].add(token)
        alive = [row for row, i in enumerate(indices) if not texts[i].finish]
        if not alive:
            return
        if len(alive) <= len(indices) // 2:
            cache.keep(alive)
            chosen = chosen[torch.tensor(alive, device=device)]
            indices = [indices[row] for row in alive]
        last = model.hidden(chosen[:, None], cache=cache)[:, 0]


@dataclass(frozen=True)
class _Rule:
    """Which tokens may come: those of the tokenizer, and no stop before `min_new_tokens`."""

    size: int
    stops: list[int]
    min_new_tokens: int

    def allowed(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """(B, V) logits of the tokens that may come after `count` new ones."""
        logits = logits[:, : self.size]
        if count < self.min_new_tokens:
            logits[:, self.stops] = -torch.inf
        return logits


class _Text:
    """The new tokens of one row and whether it has ended."""

    def __init__(self, tokenizer, stops: set[int], stop_strings, max_new_tokens: int):
        self.tokenizer, self.stops, self.max_new_tokens = tokenizer, stops, max_new_tokens
        self.stop_bytes = [s.encode() for s in stop_strings]
        self.ids: list[int] = []
        self.finish = ""
        self.cut: int | None = None  # bytes of text that are kept

    def add(self, token: int) -> None:
        """Take one token; does nothing after the end."""
        if self.finish:
            return
        if token in self.stops:
            self.finish = "stop_id"
            return
        self.ids.append(token)
        if self._meets_stop_string():
            self.finish = "stop_string"
        elif len(self.ids) == self.max_new_tokens:
            self.finish = "length"

    def _meets_stop_string(self) -> bool:
        """Look for stop strings that end in the newest token."""
        if not self.stop_bytes:
            return False
        # A token has at least one byte, so a string of n bytes lies within the last n tokens.
        recent = self.tokenizer.decode_bytes(self.ids[-max(map(len, self.stop_bytes)) :])
        if not any(stop in recent for stop in self.stop_bytes):
            return False
        data = self.tokenizer.decode_bytes(self.ids)
        self.cut = min(at for stop in self.stop_bytes if (at := data.find(stop)) >= 0)
        return True

    def result(self) -> Generation:
        """What is handed out."""
        if self.tokenizer is None:
            return Generation(self.ids, None, self.finish)
        data = self.tokenizer.decode_bytes(self.ids)[: self.cut]
        return Generation(self.ids, data.decode("utf-8", errors="replace"), self.finish)


def _greedy(logits: torch.Tensor, indices) -> torch.Tensor:
    """(B, V) -> (B,), the most probable tokens."""
    return logits.argmax(-1)


class _Sampler:
    """Nucleus sampling, one uniform number per (seed, row, step)."""

    def __init__(self, temperature: float, top_p: float, seed: int, rows):
        self.temperature, self.top_p = temperature, top_p
        self.generators = [np.random.Generator(np.random.Philox(key=_key(seed, r))) for r in rows]

    def __call__(self, logits: torch.Tensor, indices) -> torch.Tensor:
        # A row that has ended draws on: nobody reads what it draws.
        uniform = torch.tensor([self.generators[i].random() for i in indices], dtype=torch.float64)
        return sample(logits, uniform.to(logits.device), self.temperature, self.top_p)


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Tokens at quantiles of the nucleus.

    Args:
        logits: (B, V).
        uniform: (B,) fp64 in [0, 1): the quantile of each row, from the most probable token down.
        temperature: above 0.
        top_p: the nucleus is the shortest list of most probable tokens whose sum reaches it.
    Returns:
        (B,) int64.
    """
    probabilities, order = (
        (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    )
    reached = probabilities.cumsum(-1)
    inside = reached - probabilities < top_p  # what comes before a token has not reached top_p yet
    inside[:, 0] = True
    nucleus = reached.masked_fill(~inside, 0.0).amax(-1)
    place = (reached <= (uniform * nucleus)[:, None]).sum(
        -1
    )  # of the token that covers the quantile
    last = inside.sum(-1) - 1
    return order.gather(1, torch.minimum(place, last)[:, None])[:, 0]


def _key(seed: int, row: int) -> np.ndarray:
    """Key of a row's generator."""
    digest = hashlib.blake2b(f"generate:{seed}:{row}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _check(model, prompts, max_new_tokens, temperature, top_p, stop_strings, tokenizer, batch_size):
    """Raise ValueError for the first argument out of range."""
    limit = model.config.max_positions
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(
                f"generate: expected at least one token in prompt {number}, got none. "
                "Begin with <|endoftext|>."
            )
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(
                f"generate: expected ids in [0, {model.config.vocab_size}), got {min(prompt)} to "
                f"{max(prompt)} in prompt {number}. Use the tokenizer of the model."
            )
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"generate: expected at most {limit} positions, got a prompt of {len(prompt)} and "
                f"{max_new_tokens} new tokens. Cut the start of the prompt, or ask for less."
            )
    rules = (
        (max_new_tokens >= 1, "max_new_tokens >= 1", max_new_tokens, "Ask for a token"),
        (batch_size >= 1, "batch_size >= 1", batch_size, "Pass the prompts of one pass"),
        (temperature >= 0, "temperature >= 0", temperature, "0 is greedy"),
        (0 < top_p <= 1, "0 < top_p <= 1", top_p, "1 keeps every token"),
        (tokenizer is not None or not stop_strings, "a tokenizer with stop_strings", "none",
         "Pass tokenizer="),
        (all(stop_strings), "stop strings of at least one character", list(stop_strings),
         "Leave out the empty one"),
    )  # fmt: skip
    for good, expected, got, todo in rules:
        if not good:
            raise ValueError(f"generate: expected {expected}, got {got}. {todo}.")
