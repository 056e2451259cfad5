"""Infilling: prompts that fit, holes, the exact match rule, places in files.

Independent references: the dynamic programme of the longest common subsequence, the original text
(prefix + middle + suffix), and a scripted model whose answers are known, for the scores. Not
covered: the quality of a trained model (the demo measures it).
"""

import os
import random
from dataclasses import dataclass

import pytest
import torch

from stellarator.config import ModelConfig
from stellarator.data.tokenizer import Tokenizer
from stellarator.evaluate.infilling import (
    KINDS,
    Hole,
    edit_similarity,
    exact_match,
    fit_prompt,
    infill,
    make_holes,
    parse_location,
    trim_at_suffix,
)
from stellarator.model import build_model

SOURCE = '''import os

def first_line(path):
    """The first line of a file, or an empty string."""
    with open(path, encoding="utf-8") as file:
        return file.readline().rstrip("\\n")

def na\u00efve_sum(values):
    total = 0
    for value in values:
        total += value
    return total
'''


@dataclass
class _Document:
    text: str
    path: str


DOCUMENTS = [_Document(SOURCE, "a.py"), _Document("x = 1\n\n   \ny = longer_name + x\n", "b.py")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([SOURCE] * 3, vocab_size=360)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 8, num_layers=2, width=32, num_heads=4, num_kv_heads=2,
        ffn_width=48, max_positions=128, window=64, init_std=0.3,
    )  # fmt: skip
    return build_model(config)


class _Oracle(torch.nn.Module):
    """Answers a known prompt with known ids; one row at a time."""

    def __init__(self, model, answers):
        super().__init__()
        self.config, self.embedding = model.config, model.embedding
        self.answers = answers  # {tuple of prompt ids: answer ids}

    def hidden(self, tokens, *, cache):
        assert len(tokens) == 1
        if cache.empty:
            self.answer = iter(self.answers[tuple(tokens[0].tolist())])
        cache.advance(tokens.shape[1])
        return torch.zeros(*tokens.shape, 1)

    def logits(self, states):
        out = torch.zeros(1, self.config.vocab_size)
        out[0, next(self.answer)] = 1.0
        return out


def _oracle(model, tokenizer, holes, texts):
    answers = {}
    for hole, text in zip(holes, texts, strict=True):
        prompt = fit_prompt(model, tokenizer, hole.prefix, hole.suffix, "psm", 48, None)
        answers[tuple(prompt)] = [*tokenizer.encode(text), tokenizer.fim_pad]
    return _Oracle(model, answers)


@pytest.mark.parametrize("mode", ["psm", "spm"])
def test_prompts_fit_and_hold_what_is_nearest(model, tokenizer, mode):
    text = SOURCE * 6
    rng = random.Random(0)
    cuts = [0, len(text), *(rng.randrange(len(text)) for _ in range(30))]
    for at in cuts:
        prefix, suffix = text[:at], text[at:]
        for room in (0, 1, 7, 40):
            prompt = fit_prompt(model, tokenizer, prefix, suffix, mode, 20, room + 23)
            assert len(prompt) <= room + 3
            before, after = _parts(prompt, tokenizer, mode)
            assert prefix.endswith(before) and suffix.startswith(after)
            assert room < 40 or len(prompt) > 3 + room // 4  # room is used, but for parts of lines
    whole = fit_prompt(model, tokenizer, "a = ", "\nb = 2\n", mode, 20, None)
    assert _parts(whole, tokenizer, mode) == ("a = ", "\nb = 2\n")


def _parts(prompt, t, mode):
    """(prefix, suffix) as text."""
    suffix, middle = prompt.index(t.fim_suffix), prompt.index(t.fim_middle)
    assert prompt[0] == t.fim_prefix
    if mode == "psm":
        assert middle == len(prompt) - 1
        return t.decode(prompt[1:suffix]), t.decode(prompt[suffix + 1 : middle])
    assert suffix == 1
    return t.decode(prompt[middle + 1 :]), t.decode(prompt[2:middle])


def test_long_lines_and_wide_characters_fit(model, tokenizer):
    for text in ("x" * 50_000, "\u4e2d" * 5000, "1234567890" * 3000, " " * 40_000):
        prompt = fit_prompt(model, tokenizer, text, text, "psm", 20, 80)
        before, after = _parts(prompt, tokenizer, "psm")
        assert len(prompt) <= 60 and text.endswith(before) and text.startswith(after)
        assert before and after


def test_cut_text_keeps_whole_lines(model, tokenizer):
    lines = "".join(f"value_{i} = {i}\n" for i in range(100))
    prompt = fit_prompt(model, tokenizer, lines + "    ", "\n" + lines, "psm", 20, 100)
    before, after = _parts(prompt, tokenizer, "psm")
    assert before.startswith("value_") and after.endswith("\n")
    assert before.endswith("value_99 = 99\n    ")


def test_too_little_context_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="a context of at least 67 tokens .*got 66"):
        infill(model, tokenizer, "a", "b", max_new_tokens=64, context=66)
    for context, advice in ((66, "Lower --max-new-tokens, or raise --context."), (None, "okens.")):
        with pytest.raises(ValueError, match=f"{advice}$"):
            infill(model, tokenizer, "a", "b", max_new_tokens=10_000, context=context)
    with pytest.raises(ValueError, match='expected mode "psm" or "spm"'):
        infill(model, tokenizer, "a", "b", mode="mps")


def test_infill_returns_the_answer_without_special_tokens(model, tokenizer):
    hole = Hole(SOURCE[:60], "", SOURCE[90:], "span")
    oracle = _oracle(model, tokenizer, [hole], ["answer = na\u00efve\nnext"])
    assert infill(oracle, tokenizer, hole.prefix, hole.suffix, max_new_tokens=48) == (
        "answer = na\u00efve\nnext"
    )
    cut = infill(
        oracle, tokenizer, hole.prefix, hole.suffix, max_new_tokens=48, stop_strings=["\n"]
    )
    assert cut == "answer = na\u00efve"


def test_infill_of_a_real_model_repeats_itself(model, tokenizer):
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    texts = {
        infill(model, tokenizer, "def f(", "):\n", seed=seed, mode=mode, **options)
        for seed in (0, 1, 0, 1) for mode in ("psm", "spm")
    }  # fmt: skip
    assert 2 <= len(texts) <= 4
    assert not any(token in text for text in texts for token in tokenizer.special)


@pytest.mark.parametrize("kind", KINDS)
def test_holes(kind):
    holes = make_holes(DOCUMENTS, 12, seed=3, kind=kind)
    assert holes == make_holes(DOCUMENTS, 12, seed=3, kind=kind)
    assert holes != make_holes(DOCUMENTS, 12, seed=4, kind=kind)
    texts = {d.path: d.text for d in DOCUMENTS}
    for hole in holes:
        assert hole.prefix + hole.middle + hole.suffix == texts[hole.path]
        assert hole.kind == kind and hole.middle.strip() and "\n" not in hole.middle
        if kind == "line":
            assert hole.prefix[-1:] in ("", "\n") and hole.suffix[:1] in ("", "\n")
        elif kind in ("span", "short"):
            assert len(hole.middle) <= {"span": 24, "short": 6}[kind]
        else:
            assert hole.middle.isidentifier() and len(hole.middle) >= 3
            around = hole.prefix[-1:] + hole.suffix[:1]
            assert not any(c.isidentifier() or c.isdigit() for c in around)
    assert len({(h.path, len(h.prefix), h.middle) for h in holes}) == 12
    assert {h.path for h in holes} == set(texts)


def test_holes_need_places():
    assert len(make_holes(["a\nb\nc"], 3, 0, "line")) == 3
    for documents, kind in (
        ([], "line"),
        (["\n \n"], "span"),
        (["a\nb"], "line"),
        (["a1 b"], "token"),
    ):
        with pytest.raises(ValueError, match=f"at least 3 places for a {kind} in"):
            make_holes(documents, 3, 0, kind)
    with pytest.raises(ValueError, match="expected kind in"):
        make_holes([SOURCE], 1, 0, "word")


def test_exact_match_counts_what_it_says(model, tokenizer):
    holes = [
        Hole("total = ", "value", "\n", "token", "1"),
        Hole("def f():\n", "    return total", "\n", "line", "2"),
        Hole("if x:\n", "    pass", "\nelse:\n", "line", "3"),
        Hole("for value in ", "values", ":\n", "token", "4"),
    ]
    texts = ["value", "return total  \nvalue", "\n  return", "value"]
    result = exact_match(_oracle(model, tokenizer, holes, texts), tokenizer, holes, batch_size=1)
    assert result["predictions"] == texts
    assert result["count"] == 4
    assert result["exact_match"] == 0.25  # only the first: strip() == strip()
    assert result["first_line_match"] == 0.5  # the second too
    assert result["constant_match"] == 0.25  # no text stands in two holes
    token, line = result["by_kind"]["token"], result["by_kind"]["line"]
    assert (token["count"], token["exact_match"], line["exact_match"]) == (2, 0.5, 0.0)
    assert token["edit_similarity"] == (1.0 + 2 * 5 / 11) / 2
    with pytest.raises(ValueError, match="at least one hole"):
        exact_match(model, tokenizer, [])


def test_exact_match_in_batches_equals_one_by_one(model, tokenizer):
    holes = make_holes(DOCUMENTS, 9, seed=0, kind="span")
    results = [exact_match(model, tokenizer, holes, b, max_new_tokens=8) for b in (1, 4, 16)]
    assert results[0] == results[1] == results[2]


def test_edit_similarity_is_that_of_the_common_subsequence():
    rng = random.Random(1)
    for _ in range(300):
        a, b = ("".join(rng.choices("abcd\u00e9", k=rng.randrange(12))) for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                longest = max(table[i][j + 1], table[i + 1][j])
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else longest
        expected = 2 * table[-1][-1] / (len(a) + len(b)) if a or b else 1.0
        assert edit_similarity(a, b) == expected, (a, b)


def test_location_is_the_content_of_a_line(tmp_path):
    path = tmp_path / "a:b.py"  # the last colon counts
    path.write_bytes(b"one\r\ntwo \xc3\xa9\n\nfour")
    for line, middle in ((1, "one"), (2, "two \u00e9"), (3, ""), (4, "four")):
        hole = parse_location(f"{path}:{line}")
        assert hole.middle == middle and hole.kind == "line" and hole.path == str(path)
        assert (hole.prefix + middle + hole.suffix).encode() == path.read_bytes()
        assert hole.prefix.count("\n") == line - 1 and hole.prefix[-1:] in ("", "\n")
    path.write_text("x\n")
    assert parse_location(f"{path}:2") == Hole("x\n", "", "", "line", str(path))
    path.write_text("")
    assert parse_location(f"{path}:1").suffix == ""


def test_location_errors(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x\ny\n")
    for line in (0, 4, 999_999_999):
        with pytest.raises(ValueError, match=f"expected a line from 1 to 3, got {line}"):
            parse_location(f"{path}:{line}")
    bad = (
        "a.py",
        ":3",
        "a.py:",
        "a.py:x",
        "a.py:-1",
        "a.py:1.5",
        "a.py:\u0661",
        "a.py:" + "9" * 5000,
    )
    for text in bad:
        with pytest.raises(ValueError, match="expected FILE:LINE, got"):
            parse_location(text)
    with pytest.raises(ValueError, match="nothing.py: cannot be read: No such file"):
        parse_location(f"{tmp_path / 'nothing.py'}:1")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        parse_location(f"{tmp_path}:1")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo: expected a regular file, got another kind"):
        parse_location(f"{tmp_path / 'fifo'}:1")
    path.write_bytes(b"ok\n\xff\n")
    with pytest.raises(ValueError, match="expected UTF-8 text, got other bytes at 3"):
        parse_location(f"{path}:1")


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        ("self, data):", ", n):", "self"),
        ("size = 3\n", "\n    return", "size = 3\n"),
        ("name)", ")", "name"),
        ("value", "", "value"),
        ("x + total y", " total", "x +"),
        ("abc", "  ", "abc"),
    ],
)
def test_trimming_stops_where_the_suffix_begins(text, suffix, expected):
    assert trim_at_suffix(text, suffix) == expected
