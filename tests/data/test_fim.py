"""Fill-in-the-middle against a plain implementation on strings, and its promises by counting.

Reference: `plain`, which decodes a piece, cuts the string and encodes the three parts whole, with
the same draws: the local encoding of `Fim` must give the same ids. Texts are Python's own library
and mixed scripts. Not covered: equality with Megatron's random numbers, which differ by design.
"""

import dataclasses
import json
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from stellarator.config import FimConfig
from stellarator.data.fim import MAX_DRAWS, Fim, infill_prompt, inverse, transform
from stellarator.data.permutation import generator
from stellarator.data.tokenizer import SPECIAL_TOKENS_STARCODER2, Tokenizer

MIXED = (
    "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d \u65e5\u672c\u8a9e\u306e\u30b3\u30e1"
    " \U0001f642\U0001f469\u200d\U0001f4bb\r\n\tx = 1234567  # \u03b1\u03b2\u03b3\n\n\n   \t "
    "y='don\\'t'\u00a0 \u2003end   \n    if(a){b}[0x1F]\x0b\x0c\x00\x1f z\u0301 \u200b.\n"
)
ALWAYS = FimConfig(rate=1.0, fragment_rate=1.0)


def python_sources() -> list[str]:
    modules = (json, dataclasses, textwrap)
    return [Path(m.__file__).read_text(encoding="utf-8") for m in modules]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A trained vocabulary of StarCoder2."""
    return Tokenizer.train([*python_sources(), MIXED * 3], 1500, "starcoder2")


@pytest.fixture(scope="module")
def single_bytes() -> Tokenizer:
    """No merges: every byte is a token, so nothing depends on the version of the library."""
    return Tokenizer.train([], 256 + len(SPECIAL_TOKENS_STARCODER2), "starcoder2")


@pytest.fixture(scope="module")
def crossing() -> Tokenizer:
    """One merge: the last byte of some arrows and the bracket after them."""
    texts = ["\u2192(", "\u21d2(", "\u2292(", "\u2712("] * 5
    t = Tokenizer.train(texts, 257 + len(SPECIAL_TOKENS_STARCODER2), "starcoder2")
    assert t.decode_bytes([t.vocab_size - 1]) == b"\x92("
    return t


def document(tokenizer, text: str) -> np.ndarray:
    return np.array([*tokenizer.encode(text), tokenizer.eod])


def plain(text: str, tokenizer, config: FimConfig, rng) -> list[int]:
    """The definition, on a string."""
    if rng.random() >= config.rate:
        return tokenizer.encode(text)
    a, b = sorted(int(rng.random() * (len(text) + 1)) for _ in range(2))
    prefix, middle, suffix = map(tokenizer.encode, (text[:a], text[a:b], text[b:]))
    t = tokenizer
    if rng.random() < config.spm_rate:
        return [t.fim_prefix, t.fim_suffix, *suffix, t.fim_middle, *prefix, *middle]
    return [t.fim_prefix, *prefix, t.fim_suffix, *suffix, t.fim_middle, *middle]


def test_local_encoding_equals_encoding_the_parts_whole(words):
    fim = Fim(words, ALWAYS)
    texts = [*python_sources(), MIXED, MIXED * 2, " ", "\n", "x", "\u65e5", "a b", " a", "7 "]
    for number, text in enumerate(texts):
        text = text[:6000]
        ids = document(words, text)
        for k in range(150):
            new = fim.transform(ids, generator(0, number, k))
            want = plain(text, words, ALWAYS, generator(0, number, k))
            assert new.tolist() == [*want, words.eod], (number, k)


def test_cuts_inside_tokens_that_hold_parts_of_two_characters(crossing):
    text = "a\u2192(b\u21d2(\u2292(c"
    fim, ids = Fim(crossing, ALWAYS), document(crossing, text)
    for k in range(300):
        want = plain(text, crossing, ALWAYS, generator(18, 0, k))
        assert fim.transform(ids, generator(18, 0, k)).tolist() == [*want, crossing.eod]


@pytest.mark.parametrize("head", [0, 1, 2, 3])
@pytest.mark.parametrize("tail", [0, 1, 2, 3])
def test_halves_of_characters_stay_outside(single_bytes, head, tail):
    """Where a row divides a character, the rest of the piece is cut as ever."""
    t, text = single_bytes, "\u65e5\u672cx\u03b1\U0001f642"
    emoji = t.encode("\U0001f642")
    front, back = emoji[4 - head :], emoji[:tail]
    fim, piece = Fim(t, ALWAYS), np.array([*front, *t.encode(text), *back])
    for k in range(100):
        want = plain(text, t, ALWAYS, generator(19, 0, k))
        suffix, middle = want.index(t.fim_suffix), want.index(t.fim_middle)
        if suffix == 1:  # SPM, or PSM without a prefix
            new = fim.transform(piece, generator(19, 0, k)).tolist()
            assert inverse(new, t) == t.decode_bytes(piece)
            assert [i for i in new if i not in (*front, *back)] == [
                i for i in want if i not in (*front, *back)
            ]
        else:
            want = [t.fim_prefix, *front, *want[1:middle], *back, *want[middle:]]
            assert fim.transform(piece, generator(19, 0, k)).tolist() == want


def test_only_the_words_at_a_cut_are_encoded_again(words, monkeypatch):
    encoded = []
    original = words.encode
    monkeypatch.setattr(words, "encode", lambda text: encoded.append(text) or original(text))
    fim, ids = Fim(words, ALWAYS), document(words, python_sources()[1])
    encoded.clear()
    for k in range(100):
        fim.transform(ids, generator(1, 0, k))
    assert len(encoded) <= 4 * 100
    assert np.mean([len(text) for text in encoded]) < 40


def test_a_vocabulary_that_joins_words_is_encoded_whole():
    """Without the regular expression merges cross white space, and nothing may be kept."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(SPECIAL_TOKENS_STARCODER2),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = python_sources()[1].splitlines(keepends=True)
    backend.train_from_iterator(lines, trainer)
    joined = Tokenizer(backend, "starcoder2")
    text = "".join(lines[100:110])
    fim, ids = Fim(joined, ALWAYS), document(joined, text)
    for k in range(200):
        want = plain(text, joined, ALWAYS, generator(2, 0, k))
        assert fim.transform(ids, generator(2, 0, k)).tolist() == [*want, joined.eod]


def test_golden(single_bytes):
    """Any change here changes what every run is trained on."""
    ids = document(single_bytes, "def f(x):\n    return x\u00b2\n")
    half = FimConfig(rate=0.5)
    found = [
        single_bytes.decode(transform(ids, single_bytes, half, generator(1234, 3, k)))
        for k in (3, 4, 5, 7, 10)
    ]
    assert found == [
        "<fim_prefix><fim_suffix>turn x\u00b2\n<fim_middle>def f(x):\n    re<|endoftext|>",
        "def f(x):\n    return x\u00b2\n<|endoftext|>",
        "<fim_prefix><fim_suffix> return x\u00b2\n<fim_middle>def f(x):\n   <|endoftext|>",
        "<fim_prefix>def f(x):\n   <fim_suffix>eturn x\u00b2\n<fim_middle> r<|endoftext|>",
        "<fim_prefix>def f(x):\n  <fim_suffix>  return x\u00b2\n<fim_middle><|endoftext|>",
    ]


def test_inverse_restores_windows_that_divide_characters(words):
    fim = Fim(words, ALWAYS)
    ids = document(words, MIXED * 3)
    divided = 0
    rng = np.random.default_rng(0)
    for k in range(1500):
        a, b = sorted(rng.integers(0, len(ids) + 1, size=2))
        piece = ids[a:b]
        new = fim.transform(piece, generator(3, 0, k))
        assert inverse(new, words) == words.decode_bytes(piece)
        data = words.decode_bytes(piece)
        divided += data.decode("utf-8", "ignore").encode() != data
    assert divided > 200


def test_inverse_restores_tokens_that_are_no_text(words):
    """Random ids: invalid UTF-8 everywhere, specials in between. Cuts then move to tokens."""
    fim = Fim(words, FimConfig(rate=1.0, split_at_files=False))
    outside = [words.fim_prefix, words.fim_middle, words.fim_suffix, words.fim_pad, words.eod]
    allowed = np.setdiff1d(np.arange(words.vocab_size), outside)
    for k in range(500):
        piece = allowed[np.random.default_rng(k).integers(0, len(allowed), size=k % 40)]
        new = fim.transform(piece, generator(4, 0, k))
        assert inverse(new, words, split_at_files=False) == words.decode_bytes(piece)
        for token in words.special_ids:
            if token not in outside:
                assert (new == token).sum() == (piece == token).sum()


def within_three_sigma(count: int, draws: int, rate: float) -> bool:
    return abs(count - draws * rate) < 3 * np.sqrt(draws * rate * (1 - rate))


def test_rate_and_mode_over_ten_thousand_draws(single_bytes):
    t, ids = single_bytes, document(single_bytes, "abcdef")
    fim = Fim(t, FimConfig(rate=0.3, spm_rate=0.4))
    news = [fim.transform(ids, generator(5, 0, k)) for k in range(10_000)]
    changed = [new for new in news if new[0] == t.fim_prefix]
    assert all(new.tolist() == ids.tolist() for new in news if new[0] != t.fim_prefix)
    assert within_three_sigma(len(changed), 10_000, 0.3)
    # <fim_suffix> comes second in SPM, and in PSM with an empty prefix: 13 of 49 pairs of cuts.
    second = sum(int(new[1] == t.fim_suffix) for new in changed)
    assert within_three_sigma(second, len(changed), 0.4 + 0.6 * 13 / 49)


@pytest.mark.parametrize("mode", ["psm", "spm"])
def test_the_prompt_is_what_the_model_was_trained_on(words, mode):
    """Up to the middle, ids are those of `infill_prompt`; then the middle and the end follow."""
    text = MIXED
    fim = Fim(words, FimConfig(rate=1.0, spm_rate=float(mode == "spm")))
    for k in range(200):
        rng = generator(6, 0, k)
        new = fim.transform(document(words, text), rng).tolist()
        rng = generator(6, 0, k)
        a, b = sorted(int(x * (len(text) + 1)) for x in rng.random(3)[1:])
        prompt = infill_prompt(text[:a], text[b:], words, mode)
        assert new == [*prompt, *words.encode(text[a:b]), words.eod]


def test_cuts_are_uniform(single_bytes):
    """All 21 pairs of positions in five characters, by chi-square: 45.3 has a p of 0.001."""
    fim = Fim(single_bytes, FimConfig(rate=1.0, spm_rate=0.0))
    text = "a\u00e9\u65e5\U0001f642b"
    ids, counts = document(single_bytes, text), Counter()
    for k in range(7200):
        new = single_bytes.decode(fim.transform(ids, generator(7, 0, k)))
        prefix, rest = new.removeprefix("<fim_prefix>").split("<fim_suffix>")
        counts[len(prefix), len(text) - len(rest.split("<fim_middle>")[0])] += 1
    expected = {(a, b): 200 * (2 - (a == b)) for a in range(6) for b in range(a, 6)}
    assert counts.keys() == expected.keys()
    assert sum((counts[pair] - n) ** 2 / n for pair, n in expected.items()) < 45.3


@pytest.mark.parametrize("budget", [3, 4, 5, 8])
def test_growth_keeps_to_the_budget(words, budget):
    fim, ids = Fim(words, ALWAYS), document(words, python_sources()[0][:800])
    growth = [len(fim.transform(ids, generator(8, 0, k), budget)) - len(ids) for k in range(300)]
    assert max(growth) == budget
    assert min(growth) <= 3  # a cut can also save a token: the merges of BPE are not optimal


def test_without_room_for_sentinels_nothing_changes(words):
    fim, ids = Fim(words, ALWAYS), document(words, "x = 1")
    for budget in (2, 0, -5):
        assert fim.transform(ids, generator(8, 1), budget).tolist() == ids.tolist()


@pytest.mark.parametrize("limit", [None, 1, 2, 6])
@pytest.mark.parametrize("name", ["words", "single_bytes", "crossing"])
def test_the_last_resort_cuts_between_tokens_and_characters(name, limit, request, monkeypatch):
    """No draw fits: the cuts move left to where both a token and a character begin."""
    words = request.getfixturevalue(name)
    fim = Fim(words, dataclasses.replace(ALWAYS, max_middle_tokens=limit))
    ids, draws = document(words, MIXED + "a\u2192(b\u21d2("), []
    original = Fim._draw
    monkeypatch.setattr(Fim, "_fits", lambda *_: False)
    monkeypatch.setattr(Fim, "_draw", lambda *a: draws.append(original(*a)) or draws[-1])
    for k in range(200):
        draws.clear()
        new = fim.transform(ids, generator(9, 0, k)).tolist()
        assert len(draws) == MAX_DRAWS and len(new) == len(ids) + 3
        assert inverse(new, words) == words.decode_bytes(ids)
        last = new[new.index(words.fim_middle) + 1 : -1]
        suffix = new[new.index(words.fim_suffix) + 1 : new.index(words.fim_middle)]
        for part in (last, suffix):
            words.decode_bytes(part).decode("utf-8")  # raises if a character were divided
        if new[1] != words.fim_suffix and limit is not None:  # PSM, so `last` is the middle
            assert len(last) <= limit


@pytest.mark.parametrize("limit", [1, 5, 40])
def test_middles_keep_to_the_limit(words, limit):
    config = dataclasses.replace(ALWAYS, max_middle_tokens=limit, spm_rate=0.0)
    fim, text = Fim(words, config), python_sources()[0][:1500]
    ids, lengths, starts = document(words, text), [], []
    for k in range(400):
        new = fim.transform(ids, generator(10, 0, k)).tolist()
        lengths.append(len(new) - new.index(words.fim_middle) - 2)
        starts.append(new.index(words.fim_suffix) / len(ids))
        assert inverse(new, words) == words.decode_bytes(ids)
    assert max(lengths) == limit and min(lengths) == 0
    assert 0.4 < np.mean(starts) < 0.6  # a limit does not push the middle to one end


def repository(tokenizer, num_files: int, name: str | None = "org/name") -> list[int]:
    special = tokenizer.special
    ids = [special["<repo_name>"], *tokenizer.encode(name)] if name else []
    for k in range(num_files):
        ids += [special["<file_sep>"], *tokenizer.encode(f"src/f{k}.py\nx_{k} = {k} * y\n")]
    return [*ids, tokenizer.eod]


def fragments(ids, tokenizer) -> list[list[int]]:
    """Split at `<file_sep>`."""
    bounds = [-1, *np.flatnonzero(np.array(ids) == tokenizer.special["<file_sep>"]), len(ids)]
    return [list(ids[a + 1 : b]) for a, b in zip(bounds[:-1], bounds[1:])]


@pytest.mark.parametrize("name", ["org/name", None])
def test_files_of_candidate_repositories_one_by_one(words, name):
    """Half of the repositories, half of their files; metadata and separators as they were."""
    ids, repositories, files = repository(words, 7, name), 2000, 7
    fim, candidates, transformed = Fim(words, FimConfig()), 0, 0
    for k in range(repositories):
        new = fim.transform(ids, generator(11, 0, k))
        before, after = fragments(ids, words), fragments(new, words)
        assert len(after) == len(before) == files + 1
        assert after[0] == before[0]  # `<repo_name>org/name`, or nothing before a leading separator
        changed = [a[:1] == [words.fim_prefix] for a in after]
        assert all(c or a == b for c, a, b in zip(changed, after, before))
        assert new[-1] == words.eod and inverse(new, words) == words.decode_bytes(ids)
        candidates += any(changed)
        transformed += sum(changed)
    assert within_three_sigma(candidates, repositories, 0.5 * (1 - 0.5**files))
    # Files of one repository are chosen together, so the deviation is that of repositories.
    deviation = files * np.sqrt(0.25 * (1 / 4 + 1 / (2 * files))) / np.sqrt(repositories)
    assert abs(transformed / repositories - files / 4) < 3 * deviation
    assert 0.23 < transformed / (repositories * files) < 0.27


def public_loader(ids: list[int], separator: int) -> list[int]:
    """What is left of a chosen repository there: an empty text goes with the separator after it."""
    out, start = [], 0
    for at in [k for k, token in enumerate(ids) if token == separator]:
        if at > start:
            out += [*ids[start:at], separator]
        start = at + 1
    return out + ids[start:]


@pytest.mark.parametrize("fragment_rate", [0.0, 1.0])
def test_separators_of_empty_texts_go_as_in_the_public_loader_on_request(words, fragment_rate):
    separator, name = words.special["<file_sep>"], words.special["<repo_name>"]
    x, y = words.encode("a.py\nx = 1\n"), words.encode("b.py\n")
    drop = FimConfig(rate=1.0, fragment_rate=fragment_rate, drop_empty_texts=True)
    fim, keep = Fim(words, drop), Fim(words, dataclasses.replace(drop, drop_empty_texts=False))
    for ids in (
        [separator, *x, separator, *y],
        [separator, separator, *x, separator, separator, *y, separator],
        [name, *y, separator, *x],
        [*x, separator],
    ):
        for end in ([], [words.eod]):
            piece = np.array([*ids, *end])
            new = fim.transform(piece, generator(8, 1))
            wanted = [*public_loader(ids, separator), *end]
            assert inverse(new, words) == words.decode_bytes(wanted)
            assert (new.tolist() == wanted) == (fragment_rate == 0.0)
            unchanged = inverse(keep.transform(piece, generator(8, 1)), words)
            assert unchanged == words.decode_bytes(piece)
    for ids in ([separator, separator], [separator, separator, words.eod]):  # never nothing
        assert fim.transform(np.array(ids), generator(8, 1)).tolist() == ids
    never = Fim(words, dataclasses.replace(drop, rate=0.0))
    assert never.transform(np.array([separator, *x]), generator(8, 1)).tolist() == [separator, *x]


def test_metadata(words):
    special = words.special
    name = [special["<repo_name>"], *words.encode("org/name")]
    fim = Fim(words, ALWAYS)
    assert fim.transform(name, generator(12, 0)).tolist() == name
    # The rest of a name that an earlier row began is recognised when the caller says so.
    rest = [*words.encode("/name"), *repository(words, 2, None)]
    new = fim.transform(rest, generator(12, 1), starts_in_metadata=True)
    assert fragments(new, words)[0] == words.encode("/name")
    assert [f[0] == words.fim_prefix for f in fragments(new, words)[1:]] == [True, True]
    assert fragments(fim.transform(rest, generator(12, 1)), words)[0][0] == words.fim_prefix
    free = Fim(words, dataclasses.replace(ALWAYS, keep_metadata=False))
    assert free.transform(name, generator(12, 2))[0] == words.fim_prefix


def test_a_repository_is_one_text_in_the_first_generation(words):
    ids = repository(words, 3)
    fim = Fim(words, dataclasses.replace(ALWAYS, split_at_files=False))
    for k in range(100):
        new = fim.transform(ids, generator(13, 0, k)).tolist()
        assert new[0] == words.fim_prefix and new.count(words.fim_prefix) == 1
        assert inverse(new, words, split_at_files=False) == words.decode_bytes(ids)


def test_special_tokens_of_a_header_are_never_divided():
    """StarCoder v1: the header is part of the text, its tokens count as one character each."""
    t = Tokenizer.train(python_sources(), 600, "starcoder")
    ids = [t.special["<reponame>"], *t.encode("a/b"), t.special["<filename>"]]
    ids += [*t.encode("c.py\nx\n"), t.eod]
    fim, starts = Fim(t, FimConfig(rate=1.0, spm_rate=0.0)), Counter()
    for k in range(2000):
        new = fim.transform(ids, generator(14, 0, k)).tolist()
        assert inverse(new, t) == t.decode_bytes(ids)
        assert new.count(t.special["<reponame>"]) == new.count(t.special["<filename>"]) == 1
        starts[new.index(t.fim_suffix)] += 1
    # 12 characters, 13 positions: the first cut is at the very start in 25 of 169 cases.
    assert within_three_sigma(starts[1], 2000, 25 / 169)


def test_files_share_one_budget(words):
    """However little there is, every chosen file gets its three tokens."""
    ids, files = repository(words, 9), 9
    fim = Fim(words, ALWAYS)
    for extra in (0, 1, 6):
        for k in range(100):
            new = fim.transform(ids, generator(15, extra, k), 3 * files + extra)
            assert (new == words.fim_middle).sum() == files
            assert 3 * files <= len(new) - len(ids) <= 3 * files + extra


def test_pieces_share_one_budget(words):
    pieces = [(document(words, "x = y + zzz"), False)] * 5
    fim = Fim(words, ALWAYS)
    for k in range(100):
        news = fim.transform_all(pieces, generator(16, 0, k), 17)
        assert sum(map(len, news)) <= 17 + sum(len(ids) for ids, _ in pieces)
        assert all((new == words.fim_middle).sum() == 1 and new[-1] == words.eod for new in news)


def test_the_smallest_pieces(words):
    fim = Fim(words, ALWAYS)
    t = words
    for piece in ([], [t.eod]):
        assert fim.transform(np.array(piece, dtype=np.uint16), generator(17, 0)).tolist() == piece
    separators = [t.special["<file_sep>"]] * 3
    assert fim.transform(separators, generator(17, 0)).tolist() == separators
    one = t.encode("x")
    for k in range(50):
        new = fim.transform(np.array(one, dtype=np.uint16), generator(17, 1, k)).tolist()
        assert sorted(new) == sorted([t.fim_prefix, t.fim_suffix, t.fim_middle, *one])
    half = t.encode("\U0001f642")[:1]  # a divided character and nothing else
    if t.decode_bytes(half) != "\U0001f642".encode():
        assert inverse(fim.transform(half, generator(17, 2)), t) == t.decode_bytes(half)


def test_errors(words):
    for wrong, match in (
        (FimConfig(rate=1.5), r"fim: expected rate in \[0, 1\], got 1.5"),
        (FimConfig(fragment_rate=-0.1), "expected fragment_rate in"),
        (FimConfig(spm_rate=float("nan")), "expected spm_rate in"),
        (FimConfig(max_middle_tokens=0), "expected max_middle_tokens >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            Fim(words, wrong)
    with pytest.raises(ValueError, match="expected mode"):
        infill_prompt("a", "b", words, "middle")
