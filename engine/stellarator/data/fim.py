"""Fill-in-the-middle: cut a piece of code in three at random characters and move the middle last.

defines:
    Fim(tokenizer, config)                          the transformation, with tables of the ids
    transform(ids, tokenizer, config, rng, budget)  the same for a single call
    inverse(ids, tokenizer)                         the original bytes, for tests and inspection
    infill_prompt(prefix, suffix, tokenizer, mode)  the prompt that asks a model for the middle

A piece is one document, or the part of one that lies in a row. With p, m, s the texts before,
between and after the cuts, each tokenized on its own as a user's prompt will be:

    PSM             <fim_prefix> p <fim_suffix> s <fim_middle> m
    SPM, variant 2  <fim_prefix> <fim_suffix> s <fim_middle> p m

followed by the `<|endoftext|>` of the piece if it had one. Cuts are uniform over the positions
between characters, both ends included, so every part can be empty. A special token counts as one
character: it is never divided and never becomes text. If a row divides a multi-byte character, the
tokens that hold its halves stay as they are, at the outer ends of p and s: bytes are never lost.

Repository context (`split_at_files`, StarCoder2): a piece with `<file_sep>` is a candidate with
probability `rate`; the files of a candidate are transformed one by one with probability
`fragment_rate`, every `<file_sep>` stays where it was. With `drop_empty_texts` it goes where
nothing stands before it, so the leading one of a candidate does, as in the public loader. With
`keep_metadata` a fragment that begins with `<repo_name>` is never transformed. The header of
StarCoder v1 (`<reponame>..<filename>..<gh_stars>..`) is part of the text that is cut, as in the
public loader: an editor puts it at the start of its prefix.

Tokenizing again, locally. A byte-level vocabulary of this family has no token in which white space
follows something else, because the pattern that splits words puts white space first. So wherever
the text changes from another character to white space, the tokens on both sides do not depend on
each other, and only the words that touch a cut are encoded again: the result is that of encoding p,
m and s whole (tested), for a few microseconds a cut whatever the length of the piece. The property
is checked on the vocabulary; without it everything up to the next special token is encoded again.

The target is never cut off. `budget` says how many tokens the piece may grow by: 3 sentinels and
what the divided words cost (2 on average, rarely more than 6). If a draw of the cuts grows more, or
its middle is longer than `max_middle_tokens`, the cuts are drawn again, at most MAX_DRAWS times in
all; then the last ones are moved left to the next boundary of a token, which grows by exactly 3.
A piece with a budget below 3 stays as it is; `packing` never gives so little to a document or file.

Source: Bavarian et al. 2022, arXiv:2207.14255; the data loader of bigcode-project/Megatron-LM.
"""

import re
from collections.abc import Sequence

import numpy as np

from stellarator.config import FimConfig

SENTINELS = 3  # tokens that any transformation adds
MAX_DRAWS = 8

_WHITE = (b" ", b"\t", b"\n", b"\r", b"\x0b", b"\x0c")
_WHITE_AFTER_OTHER = re.compile(rb"[\x21-\x7e][ \t\n\r\x0b\x0c]")


class Fim:
    """The transformation for one tokenizer and one configuration. Holds tables only: thread-safe.

    Args:
        tokenizer: a `stellarator.data.tokenizer.Tokenizer`.
        config: rates and rules.
    Raises:
        ValueError: a rate outside [0, 1], or `max_middle_tokens` below 1.
    Cost: one pass over the vocabulary, 0.1 s for 49,152 tokens.
    """

    def __init__(self, tokenizer, config: FimConfig):
        for name in ("rate", "fragment_rate", "spm_rate"):
            if not 0.0 <= getattr(config, name) <= 1.0:
                raise ValueError(
                    f"fim: expected {name} in [0, 1], got {getattr(config, name)}. "
                    "Give a probability."
                )
        if config.max_middle_tokens is not None and config.max_middle_tokens < 1:
            raise ValueError(
                f"fim: expected max_middle_tokens >= 1, got {config.max_middle_tokens}. "
                "Leave it out (None) for no limit."
            )
        self.config = config
        self.tokenizer = tokenizer
        self.file_sep = tokenizer.special.get("<file_sep>") if config.split_at_files else None
        keep = config.split_at_files and config.keep_metadata
        self.repo_name = tokenizer.special.get("<repo_name>") if keep else None
        self._build_tables(tokenizer)

    def _build_tables(self, tokenizer) -> None:
        """What a cut has to know about every token: (V,) arrays indexed by id."""
        self.bytes = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        self.special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.special[list(tokenizer.special.values())] = True
        words = [b"" if special else self.bytes[i] for i, special in enumerate(self.special)]
        separable = not any(_WHITE_AFTER_OTHER.search(word) for word in words)
        # Characters are counted where they begin, so a token of continuation bytes has none.
        self.num_characters = np.array([len(_leads(word)) for word in words], dtype=np.int64)
        self.num_characters[self.special] = 1
        self.starts_character = np.array([not word or not _continues(word[0]) for word in words])
        self.starts_white = np.array([separable and word[:1] in _WHITE for word in words])
        self.ends_other = np.array([separable and _ends_other(word) for word in words])

    def transform(
        self,
        ids: np.ndarray,
        rng: np.random.Generator,
        budget: int | None = None,
        *,
        starts_in_metadata: bool = False,
    ) -> np.ndarray:
        """One piece, transformed or (with probability 1 - rate) unchanged.

        Args:
            ids: (n,) integers, one piece; `<|endoftext|>` at most at its end.
            budget: tokens that may be added; None: any number.
            starts_in_metadata: the piece begins inside `<repo_name>...`, as a row can.
        Returns:
            (n',) int64 with n' <= n + budget. Rarely n' < n + 3: the merges of BPE are not optimal,
            so the parts of a divided word can have fewer tokens than the word.
        """
        return self.transform_all([(ids, starts_in_metadata)], rng, budget)[0]

    def transform_all(
        self,
        pieces: Sequence[tuple[np.ndarray, bool]],
        rng: np.random.Generator,
        budget: int | None = None,
    ) -> list[np.ndarray]:
        """`transform` of several pieces (ids, starts_in_metadata) that share one budget.

        Draws, in order, from `rng.random()`: which texts of all pieces are transformed; then for
        each of them the two cuts (again if they do not fit) and the mode. So it is known how many
        are to come, and each leaves 3 tokens of the budget to each later one.
        """
        budget = 1 << 62 if budget is None else budget
        chosen = [self._choose(np.asarray(ids, np.int64), rng, known) for ids, known in pieces]
        later = sum(choice for texts in chosen for _, choice in texts)
        result = []
        for texts in chosen:
            parts = []
            for text, choice in texts:
                if choice:
                    later -= 1
                    moved = self._permute(text, rng, budget - SENTINELS * later)
                    budget -= sum(map(len, moved)) - len(text)
                    parts += moved
                else:
                    parts.append(text)
            result.append(np.concatenate(parts))
        return result

    def ends_in_middle(self, ids: np.ndarray) -> bool:
        """Whether a transformed piece ends with a middle, and nothing says where that ends."""
        stops = np.flatnonzero(ids == self.file_sep) if self.file_sep is not None else []
        start = int(stops[-1]) + 1 if len(stops) else 0
        open_end = len(ids) > start and ids[-1] != self.tokenizer.eod
        return bool(open_end and ids[start] == self.tokenizer.fim_prefix)

    def _choose(self, ids, rng, starts_in_metadata: bool) -> list[tuple[np.ndarray, bool]]:
        """A piece as consecutive texts, and whether each is to be transformed."""
        size = len(ids) - int(len(ids) > 0 and ids[-1] == self.tokenizer.eod)
        body, end = ids[:size], (ids[size:], False)
        if not size:
            return [end]
        separators = np.flatnonzero(body == self.file_sep) if self.file_sep is not None else []
        if not len(separators):
            choice = not self._is_metadata(body, starts_in_metadata)
            return [(body, choice and rng.random() < self.config.rate), end]
        if rng.random() >= self.config.rate or len(separators) == len(body):
            return [(body, False), end]
        texts, after_nothing = [], False
        for k, text in enumerate(np.split(body, separators)):
            skip = int(k > 0)  # every text but the first begins with its separator
            name, text = text[:skip], text[skip:]
            choice = len(text) > 0 and not self._is_metadata(text, starts_in_metadata and k == 0)
            choice = choice and rng.random() < self.config.fragment_rate
            if not (self.config.drop_empty_texts and after_nothing):
                texts.append((name, False))
            texts.append((text, choice))
            after_nothing = not len(text)
        return [*texts, end]

    def _is_metadata(self, text: np.ndarray, starts_in_metadata: bool) -> bool:
        """Whether a text is (the rest of) `<repo_name>...`, to be left alone."""
        if self.repo_name is None:
            return False
        return starts_in_metadata or text[0] == self.repo_name

    def _permute(self, body, rng, budget: int) -> list[np.ndarray]:
        """One text as PSM or SPM. Its parts in their new order, or the text alone without room."""
        if budget < SENTINELS:
            return [body]
        text = _Text(body, self)
        for _ in range(MAX_DRAWS):
            cuts = self._draw(text, rng)
            parts = text.split(*cuts)
            if parts is not None and self._fits(parts, len(text.ids), budget):
                break
        else:
            parts = text.split_at_tokens(*cuts, self.config.max_middle_tokens)
        prefix, middle, suffix = parts
        t = self.tokenizer
        if rng.random() < self.config.spm_rate:
            order = [[t.fim_prefix, t.fim_suffix], suffix, [t.fim_middle], prefix, middle]
        else:
            order = [[t.fim_prefix], prefix, [t.fim_suffix], suffix, [t.fim_middle], middle]
        return [np.asarray(part, dtype=np.int64) for part in order]

    def _draw(self, text: "_Text", rng) -> tuple[int, int]:
        """Two sorted cuts, uniform; where the middle would be too long, a uniform start and end."""
        size = text.num_characters + 1
        first, second = sorted(int(rng.random() * size) for _ in range(2))
        limit = self.config.max_middle_tokens
        if limit is not None and text.reach(first, limit) < second:
            first = int(rng.random() * size)
            second = first + int(rng.random() * (text.reach(first, limit) - first + 1))
        return first, second

    def _fits(self, parts, size: int, budget: int) -> bool:
        """Whether the parts of a text of `size` tokens keep to the budget and to the limit."""
        prefix, middle, suffix = parts
        if len(prefix) + len(middle) + len(suffix) + SENTINELS - size > budget:
            return False
        limit = self.config.max_middle_tokens
        return limit is None or len(middle) <= limit


class _Text:
    """The characters of one text that is to be cut, without decoding it.

    The tokens that hold halves of a divided character, `head` and `tail`, are set aside; `core` is
    whole characters. Positions count the characters of the core.
    """

    def __init__(self, ids: np.ndarray, fim: Fim):
        self.ids = ids
        self.fim = fim
        head, tail = _whole_characters(ids, fim)
        self.head, self.tail = ids[:head], ids[tail:]
        core = self.core = ids[head:tail]
        self.before = np.zeros(len(core) + 1, dtype=np.int64)  # characters before each token
        np.cumsum(fim.num_characters[core], out=self.before[1:])
        self.num_characters = int(self.before[-1])
        # Boundaries between tokens where encoding the two sides apart changes nothing.
        special = fim.special[core]
        apart = fim.ends_other[core[:-1]] & fim.starts_white[core[1:]]
        apart |= special[:-1] | special[1:]
        self.apart = np.concatenate([[0], np.flatnonzero(apart) + 1, [len(core)]])

    def locate(self, position: int) -> tuple[int, int]:
        """The token that holds a character, and the byte of the token where it begins."""
        if position == self.num_characters:
            return len(self.core), 0
        token = int(np.searchsorted(self.before, position, side="right")) - 1
        character = position - int(self.before[token])
        if character == 0 and self.fim.starts_character[self.core[token]]:
            return token, 0
        return token, _leads(self.fim.bytes[self.core[token]])[character]

    def reach(self, position: int, num_tokens: int) -> int:
        """The furthest position that is at most `num_tokens` tokens after `position`."""
        token, _ = self.locate(position)
        return int(self.before[min(token + num_tokens, len(self.core))])

    def split(self, first: int, second: int) -> tuple[np.ndarray, ...] | None:
        """Prefix, middle and suffix for cuts at two positions, as if each were encoded whole.

        None where the bytes around a cut are not UTF-8, so that they cannot be encoded.
        """
        a, b = self.locate(first), self.locate(second)
        left1, right1 = self._apart_around(*a)
        left2, right2 = self._apart_around(*b)
        core = self.core
        try:
            prefix = [self.head, core[:left1], self._encode((left1, 0), a)]
            if right1 <= left2:
                middle = [self._encode(a, (right1, 0)), core[right1:left2]]
                middle.append(self._encode((left2, 0), b))
            else:  # no boundary between the cuts
                middle = [self._encode(a, b)]
            suffix = [self._encode(b, (right2, 0)), core[right2:], self.tail]
        except UnicodeDecodeError:
            return None
        return np.concatenate(prefix), np.concatenate(middle), np.concatenate(suffix)

    def split_at_tokens(self, first: int, second: int, limit: int | None) -> tuple[np.ndarray, ...]:
        """The same with each cut moved left to a boundary of tokens and of characters."""
        a = self._character_start(self.locate(first)[0])
        b = self._character_start(self.locate(second)[0])
        if limit is not None and b - a > limit:
            b = self._character_start(a + limit)
        prefix = np.concatenate([self.head, self.core[:a]])
        return prefix, self.core[a:b], np.concatenate([self.core[b:], self.tail])

    def _apart_around(self, token: int, byte: int) -> tuple[int, int]:
        """The nearest boundaries in `apart` at or before a cut, and at or after it."""
        left = np.searchsorted(self.apart, token, side="right") - 1
        right = np.searchsorted(self.apart, token + (byte > 0), side="left")
        return int(self.apart[left]), int(self.apart[right])

    def _encode(self, start: tuple[int, int], end: tuple[int, int]) -> np.ndarray:
        """The text between two places (token, byte), encoded on its own."""
        if start >= end:
            return self.core[:0]
        data = [self.fim.bytes[i] for i in self.core[start[0] : end[0] + (end[1] > 0)].tolist()]
        if end[1]:
            data[-1] = data[-1][: end[1]]
        data[0] = data[0][start[1] :]
        ids = self.fim.tokenizer.encode(b"".join(data).decode("utf-8"))
        return np.array(ids, dtype=np.int64)

    def _character_start(self, token: int) -> int:
        """The last token at or before `token` that begins with a character."""
        while 0 < token < len(self.core) and not self.fim.starts_character[self.core[token]]:
            token -= 1
        return token


def _whole_characters(ids: np.ndarray, fim: Fim) -> tuple[int, int]:
    """The bounds of the tokens between divided characters at the two ends of a text."""
    head, tail = 0, len(ids)
    while head < tail and not fim.starts_character[ids[head]]:
        head += 1
    start = tail
    while start > head:  # at most the 4 tokens that can hold the last character
        start -= 1
        if fim.starts_character[ids[start]]:
            break
    last = b"".join(fim.bytes[i] for i in ids[start:tail])
    return head, start if _is_divided(last) else tail


def _is_divided(data: bytes) -> bool:
    """Whether bytes end inside a UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if not _continues(byte):
            return back < (4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1)
    return False


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _leads(data: bytes) -> list[int]:
    """Where characters begin in bytes."""
    return [k for k, byte in enumerate(data) if not _continues(byte)]


def _ends_other(data: bytes) -> bool:
    """Whether bytes end with a whole character that is not white space."""
    if not data or _is_divided(data):
        return False
    leads = _leads(data)
    try:
        return bool(leads) and not data[leads[-1] :].decode("utf-8").isspace()
    except UnicodeDecodeError:
        return False


def transform(ids, tokenizer, config: FimConfig, rng, budget: int | None = None) -> np.ndarray:
    """`Fim(tokenizer, config).transform(ids, rng, budget)`; builds the tables for every call."""
    return Fim(tokenizer, config).transform(ids, rng, budget)


def infill_prompt(prefix: str, suffix: str, tokenizer, mode: str = "psm") -> list[int]:
    """The ids after which a model writes the text between `prefix` and `suffix`.

    Raises:
        ValueError: the mode is not "psm" or "spm".
    """
    t = tokenizer
    if mode == "psm":
        return [
            *(t.fim_prefix, *t.encode(prefix)),
            *(t.fim_suffix, *t.encode(suffix)),
            t.fim_middle,
        ]
    if mode == "spm":
        return [t.fim_prefix, t.fim_suffix, *t.encode(suffix), t.fim_middle, *t.encode(prefix)]
    raise ValueError(f'infill_prompt: expected mode "psm" or "spm", got {mode!r}. Choose one.')


def inverse(ids, tokenizer, *, split_at_files: bool = True) -> bytes:
    """The bytes that `transform` started from (special tokens as their names), padding left out.

    Args:
        ids: a piece or a whole row.
        split_at_files: what the configuration said when the ids were made.
    """
    t = tokenizer
    stops = {t.eod, t.special.get("<file_sep>", t.eod) if split_at_files else t.eod}
    out, fragment = [], []
    for token in [int(i) for i in ids if i != t.fim_pad]:
        if token in stops:
            out += [*_in_order(fragment, t), token]
            fragment = []
        else:
            fragment.append(token)
    return t.decode_bytes(out + _in_order(fragment, t))


def _in_order(fragment: list[int], t) -> list[int]:
    """The tokens of one text in their original order, without sentinels."""
    if fragment[:1] != [t.fim_prefix]:
        return fragment
    suffix, middle = fragment.index(t.fim_suffix), fragment.index(t.fim_middle)
    # SPM has an empty "prefix" here and its whole prefix-and-middle after the last sentinel.
    return fragment[1:suffix] + fragment[middle + 1 :] + fragment[suffix + 1 : middle]
