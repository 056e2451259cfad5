"""Text between a prefix and a suffix, and how often it is the text that stood there.

defines:
    infill                  fill one hole
    Hole, make_holes        holes cut into documents: lines, words, spans within a line
    exact_match             share of holes that come back exactly, and edit similarity
    edit_similarity         2 * longest common subsequence / both lengths
    trim_at_suffix          cut where the text begins to repeat the suffix
    parse_location          "FILE:LINE" as a hole, for the command line

The rule of exact match is that of the SantaCoder FIM task: the text up to the first special token,
`strip() == strip()`. Nothing else is cut off, so a model has to know where to stop. Beside it
stands the share whose first line is right: what an editor with single-line completion shows.
"""

import os
import random
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stellarator.data.fim import SENTINELS, infill_prompt
from stellarator.evaluate.generate import generate
from stellarator.model.transformer import Transformer

KINDS = ("line", "short", "span", "token")
_WORD = re.compile(r"[^\W\d]\w{2,}")  # names and keywords of three characters or more
_BEGIN = re.compile(r"\s*(\w+|[^\w\s])")  # a word or a sign, with the white space before it
_LONGEST = {"short": 6, "span": 24}  # characters of a span
_ATTEMPTS = 200  # draws for one hole before a document is given up
_CHARACTERS_PER_TOKEN = 16  # at most this much text is tokenized per token of room


@dataclass(frozen=True)
class Hole:
    """prefix + middle + suffix is a document."""

    prefix: str
    middle: str
    suffix: str
    kind: str
    path: str = ""


def infill(
    model: Transformer,
    tokenizer,
    prefix: str,
    suffix: str,
    *,
    mode: str = "psm",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
    context: int | None = None,
) -> str:
    """The text that the model puts between `prefix` and `suffix`: at least one token.

    Args:
        model, tokenizer: trained together, with fill-in-the-middle.
        prefix, suffix: cut to what fits, at line ends where there are any; the far ends go first.
        mode: "psm" or "spm".
        max_new_tokens, temperature, top_p, seed, stop_strings: see `generate`. Any special token
            stops as well.
        context: tokens of prompt and answer together, for example the length that the model was
            trained at; None: all of its positions.
    Raises:
        ValueError: the context has no room for the prompt's sentinels, or see `generate`.
    """
    prompt = fit_prompt(model, tokenizer, prefix, suffix, mode, max_new_tokens, context)
    (answer,) = generate(
        model,
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=tuple(tokenizer.special.values()),
        stop_strings=stop_strings,
        min_new_tokens=1,
        tokenizer=tokenizer,
    )
    return answer.text


def fit_prompt(model, tokenizer, prefix, suffix, mode, max_new_tokens, context) -> list[int]:
    """The ids of a prompt that leaves room for the answer; arguments as in `infill`."""
    limit = model.config.max_positions if context is None else context
    limit = min(limit, model.config.max_positions)
    room = limit - max_new_tokens - SENTINELS
    if room < 0:
        raise ValueError(
            f"infill: expected a context of at least {max_new_tokens + SENTINELS} tokens "
            f"({max_new_tokens} new ones and {SENTINELS} sentinels), got {limit}. "
            "Lower --max-new-tokens" + (", or raise --context." if context is not None else ".")
        )
    prefix, suffix = _fit(prefix, suffix, tokenizer, room)
    return infill_prompt(prefix, suffix, tokenizer, mode)


def _fit(prefix: str, suffix: str, tokenizer, room: int) -> tuple[str, str]:
    """The end of the prefix and the start of the suffix that take `room` tokens together.

    Each gets half, and what the other leaves.
    """
    characters = room * _CHARACTERS_PER_TOKEN
    prefix, suffix = prefix[max(0, len(prefix) - characters) :], suffix[:characters]
    target = room
    while True:
        before, after = tokenizer.encode(prefix), tokenizer.encode(suffix)
        excess = len(before) + len(after) - room
        if excess <= 0:
            return prefix, suffix
        for_before = min(len(before), max(target // 2, target - len(after)))
        for_after = min(len(after), target - for_before)
        if for_before < len(before):
            prefix = _tail(tokenizer.decode_bytes(before[len(before) - for_before :]))
        if for_after < len(after):
            suffix = _head(tokenizer.decode_bytes(after[:for_after]))
        target = max(0, target - 1)  # text that is cut is tokenized anew and may get longer


def _tail(data: bytes) -> str:
    """Text from the first whole line on; from the first whole character where lines are long."""
    text = data.decode("utf-8", errors="ignore")
    line = text.find("\n") + 1
    return text[line:] if line <= len(text) // 2 else text


def _head(data: bytes) -> str:
    """Text up to the last whole line; to the last whole character where lines are long."""
    text = data.decode("utf-8", errors="ignore")
    line = text.rfind("\n") + 1
    return text[:line] if line > len(text) // 2 else text


def make_holes(documents: Sequence, count: int, seed: int, kind: str = "line") -> list[Hole]:
    """Holes at random places of random documents; a function of its arguments.

    Args:
        documents: strings, or objects with `text` and perhaps `path`.
        count: holes; no two are the same.
        kind: "line": the content of a line that is not blank; "span": 1 to 24 characters within a
            line, not only white space; "short": the same with at most 6; "token": a name or
            keyword.
    Raises:
        ValueError: an unknown kind, or the documents have fewer places than `count`.
    """
    if kind not in KINDS:
        raise ValueError(f"make_holes: expected kind in {KINDS}, got {kind!r}. Choose one.")
    cut = {"line": _line, "token": _token}.get(kind) or partial(_span, longest=_LONGEST[kind])
    texts = [d if isinstance(d, str) else d.text for d in documents]
    paths = [getattr(d, "path", "") for d in documents]
    rng = random.Random(f"holes:{seed}:{kind}")
    holes, seen, failures = [], set(), 0
    while len(holes) < count:
        number = rng.randrange(len(texts)) if texts else -1
        bounds = cut(texts[number], rng) if texts else None
        if bounds is None or (number, bounds) in seen:
            failures += 1
            if failures > _ATTEMPTS * count or not texts:
                raise ValueError(
                    f"make_holes: expected at least {count} places for a {kind} in documents, got "
                    f"{len(holes)} in {len(texts)} documents. Ask for fewer or bring more text."
                )
            continue
        seen.add((number, bounds))
        start, end = bounds
        text = texts[number]
        holes.append(Hole(text[:start], text[start:end], text[end:], kind, paths[number]))
    return holes


def _line(text: str, rng: random.Random) -> tuple[int, int] | None:
    """The bounds of a line without its end, None if it is blank."""
    at = rng.randrange(len(text)) if text else 0
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    end = len(text) if end < 0 else end
    return (start, end) if text[start:end].strip() else None


def _span(text: str, rng: random.Random, longest: int) -> tuple[int, int] | None:
    """The bounds of 1 to `longest` characters within a line, None if they are white space."""
    start = rng.randrange(len(text)) if text else 0
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    end = start + rng.randint(1, max(1, min(longest, end - start)))
    middle = text[start:end]
    return (start, end) if middle.strip() and "\n" not in middle else None


def _token(text: str, rng: random.Random) -> tuple[int, int] | None:
    """The bounds of a name or keyword, None if there is none after the drawn place."""
    found = _WORD.search(text, rng.randrange(len(text)) if text else 0)
    if found is None:
        return None
    start = found.start()
    while start and (text[start - 1].isalnum() or text[start - 1] == "_"):
        start -= 1  # the place was inside a word
    found = _WORD.match(text, start)
    return found.span() if found else None


def exact_match(
    model: Transformer,
    tokenizer,
    holes: Sequence[Hole],
    batch_size: int = 16,
    *,
    mode: str = "psm",
    max_new_tokens: int = 48,
    context: int | None = None,
) -> dict:
    """Fill holes greedily and compare with what stood there.

    Args:
        holes: from `make_holes`; their document should not have been trained on.
        batch_size: holes at a time.
        mode, max_new_tokens, context: see `infill`.
    Returns:
        {"count", "exact_match", "trimmed_match", "first_line_match", "edit_similarity"} with means
        over the holes, "constant_match", "by_kind": the means for each kind, and "predictions": the
        texts, in the order of `holes`.
        trimmed_match: exact after `trim_at_suffix`.
        constant_match: exact match of the one text that fills most of these very holes, the most
        that a model which does not look at them can reach.
        first_line_match compares the first lines that are not blank.
    Raises:
        ValueError: no holes, or see `infill`.
    """
    if not holes:
        raise ValueError("exact_match: expected at least one hole, got none. Use make_holes.")
    answers = generate(
        model,
        [
            fit_prompt(model, tokenizer, h.prefix, h.suffix, mode, max_new_tokens, context)
            for h in holes
        ],
        max_new_tokens=max_new_tokens,
        stop_ids=tuple(tokenizer.special.values()),
        min_new_tokens=1,  # a hole is never empty
        tokenizer=tokenizer,
        batch_size=batch_size,
    )
    predictions = [answer.text for answer in answers]
    scores = [_score(p, h.middle, h.suffix) for p, h in zip(predictions, holes, strict=True)]
    kinds = dict.fromkeys(h.kind for h in holes)
    by_kind = {
        k: _mean([s for s, h in zip(scores, holes, strict=True) if h.kind == k]) for k in kinds
    }
    (_, most), *_ = Counter(h.middle.strip() for h in holes).most_common(1)
    return {
        **_mean(scores),
        "constant_match": most / len(holes),
        "by_kind": by_kind,
        "predictions": predictions,
    }


def trim_at_suffix(text: str, suffix: str) -> str:
    """`text` up to where it goes on as the suffix begins: with its first word or sign.

    What an editor does with a model that does not know where to stop, and wrong where the hole
    itself holds that word or sign.
    """
    begin = _BEGIN.match(suffix)
    at = text.find(begin[0]) if begin else -1
    return text if at < 0 else text[:at]


def _score(prediction: str, truth: str, suffix: str) -> dict[str, float]:
    """The figures of one hole."""
    return {
        "exact_match": float(prediction.strip() == truth.strip()),
        "trimmed_match": float(trim_at_suffix(prediction, suffix).strip() == truth.strip()),
        "first_line_match": float(_first_line(prediction) == _first_line(truth)),
        "edit_similarity": edit_similarity(prediction.strip(), truth.strip()),
    }


def _first_line(text: str) -> str:
    """The first line that is not blank, without white space around it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _mean(scores: list[dict[str, float]]) -> dict:
    """Means of the figures, and how many."""
    means = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
    return {"count": len(scores), **means}


def edit_similarity(a: str, b: str) -> float:
    """2 * LCS / (len(a) + len(b)), 1.0 for two empty texts: the ratio of RapidFuzz, as a fraction.

    Cost: len(b) operations on integers of len(a) bits.
    Source: the bit-parallel recurrence of Hyyro 2004 for the longest common subsequence.
    """
    if not a and not b:
        return 1.0
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    mask = (1 << len(a)) - 1
    row = mask  # a zero bit where the longest common subsequence grows
    for character in b:
        matched = row & places.get(character, 0)
        row = ((row + matched) | (row - matched)) & mask
    return 2 * (len(a) - row.bit_count()) / (len(a) + len(b))


def parse_location(location: str) -> Hole:
    """The hole that "FILE:LINE" names: the content of that line, counted from 1.

    The prefix ends with the end of the line before, the suffix begins with the end of this one. The
    line after the last line end counts: a cursor can stand there.

    Raises:
        ValueError: not of that form, no such file, not UTF-8, or no such line.
    """
    path, colon, number = location.rpartition(":")
    if not colon or not path or not re.fullmatch("[0-9]{1,9}", number):
        raise ValueError(
            f"infill: expected FILE:LINE, got {location!r}. For example src/main.py:12."
        )
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe waits for a writer
            raise ValueError(f"{path}: expected a regular file, got another kind. Save it as one.")
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got other bytes at {error.start}. Convert the file."
        ) from None
    lines = text.split("\n")
    if not 1 <= int(number) <= len(lines):
        raise ValueError(f"{path}: expected a line from 1 to {len(lines)}, got {number}.")
    start = sum(len(line) + 1 for line in lines[: int(number) - 1])
    content = lines[int(number) - 1].removesuffix("\r")
    end = start + len(content)
    return Hole(text[:start], content, text[end:], "line", path)
