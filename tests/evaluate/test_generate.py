"""Generation: with the cache as without, batches as single rows, sampling, stops.

Independent references: the full pass over the whole text for every token (no cache, no padding),
transformers' `generate` for greedy tokens, and the closed form of the nucleus for sampling. Not
covered: speed, GPU.
"""

import numpy as np
import pytest
import torch

from stellarator.config import ModelConfig
from stellarator.evaluate.generate import generate, sample
from stellarator.model import build_model, save_pretrained

_SMALL = {
    "vocab_size": 256, "num_layers": 2, "width": 48, "num_heads": 6, "ffn_width": 80,
    "max_positions": 64, "init_std": 0.3,
}  # fmt: skip
MODELS = {
    "starcoder2, window 6": ModelConfig(**_SMALL, num_kv_heads=2, window=6),
    "starcoder": ModelConfig(
        **_SMALL, family="gpt_bigcode", num_kv_heads=1, positions="learned", window=None
    ),
}
PROMPTS = [[5, 9, 200, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [99, 98, 97]]


class Bytes:
    """A tokenizer whose tokens are bytes; 0 ends a document."""

    eod, vocab_size = 0, 256

    def decode_bytes(self, ids):
        return bytes(ids)


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request):
    return build_model(request.param, seed=2)


def _without_cache(model, prompt, count):
    """Greedy tokens by a whole pass for every one."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_pass_without_a_cache(model):
    count = 25  # well beyond the window
    expected = [_without_cache(model, prompt, count) for prompt in PROMPTS]
    assert len({tuple(e) for e in expected}) == len(PROMPTS) and len(set(expected[0])) > 4
    for batch_size in (1, 3, 16):
        answers = generate(model, PROMPTS, max_new_tokens=count, batch_size=batch_size)
        assert [a.ids for a in answers] == expected
        assert all(a.finish == "length" and a.text is None for a in answers)


def test_greedy_equals_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save_pretrained(model, tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    answers = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[0])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        out = peer.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        expected = out[0, len(prompt) :].tolist()
        assert answer.ids == (expected[: expected.index(0)] if 0 in expected else expected)


def test_a_sampled_row_does_not_depend_on_its_batch_mates(model):
    options = {"max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 11}
    together = generate(model, PROMPTS, **options)
    assert generate(model, PROMPTS, batch_size=2, **options) == together
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], rows=[row], **options) == [together[row]]
    assert generate(model, PROMPTS, **(options | {"seed": 12})) != together
    same = generate(model, [PROMPTS[0]] * 4, **options)
    assert len({tuple(a.ids) for a in same}) == 4  # rows with one prompt draw differently


def test_rows_that_end_early_leave_the_others_alone(model):
    plain = generate(model, PROMPTS, max_new_tokens=20)
    # For every row but the last a token that stops it early; the batch shrinks twice.
    for row in range(len(PROMPTS)):
        stop = plain[row].ids[3]
        stopped = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[stop])
        for before, after in zip(plain, stopped, strict=True):
            expected = before.ids[: before.ids.index(stop)] if stop in before.ids else before.ids
            assert after.ids == expected
            assert after.finish == ("stop_id" if stop in before.ids else "length")


def test_end_of_document_stops(model):
    plain = generate(model, PROMPTS[:1], max_new_tokens=10)[0]

    class EndsThere(Bytes):
        eod = plain.ids[4]

    answer = generate(model, PROMPTS[:1], max_new_tokens=10, tokenizer=EndsThere())[0]
    assert answer.ids == plain.ids[: plain.ids.index(EndsThere.eod)] and answer.finish == "stop_id"
    assert answer.text == bytes(answer.ids).decode("utf-8", "replace")


class _Scripted(torch.nn.Module):
    """A model that continues every prompt with a given text, to test what happens around it."""

    def __init__(self, text: bytes):
        super().__init__()
        self.config = MODELS["starcoder"]
        self.embedding = torch.nn.Embedding(256, 1)
        self.text, self.start = text, 0

    def hidden(self, tokens, *, cache):
        at = cache.longest
        if cache.empty:
            self.start = tokens.shape[1]
        cache.advance(tokens.shape[1])
        place = torch.arange(at, at + tokens.shape[1]) - self.start + 1
        return place.clamp(0, len(self.text) - 1)[None, :, None].expand(len(tokens), -1, 1)

    def logits(self, states):
        next_ids = torch.tensor(list(self.text))[states[:, 0]]
        return torch.nn.functional.one_hot(next_ids, 256).float()


@pytest.mark.parametrize(
    "stops, text",
    [
        ((), "def f(x):\n    return \u00e9\nend"),
        (("\nend",), "def f(x):\n    return \u00e9"),
        (("\u00e9\n", "zzz"), "def f(x):\n    return "),
        (("return", ":\n"), "def f(x)"),
        (("d",), ""),
        (("never",), "def f(x):\n    return \u00e9\nend"),
    ],
)
def test_stop_strings_are_found_across_tokens_and_cut_off(stops, text):
    script = "def f(x):\n    return \u00e9\nend".encode()
    model, options = _Scripted(script + b" " * 40), {"stop_strings": stops, "tokenizer": Bytes()}
    (answer,) = generate(model, [[1, 2]], max_new_tokens=len(script), **options)
    ends = [n for n in range(len(script) + 1) if any(s.encode() in script[:n] for s in stops)]
    assert answer.text == text
    assert answer.finish == ("stop_string" if ends else "length")
    assert bytes(answer.ids) == script[: ends[0] if ends else None]


def test_half_a_character_is_shown_as_such():
    (answer,) = generate(_Scripted("\u00e9".encode()), [[1]], max_new_tokens=1, tokenizer=Bytes())
    assert answer.text == "\ufffd" and answer.ids == [0xC3]


def test_padding_of_the_vocabulary_is_never_chosen(model):
    class Small(Bytes):
        vocab_size = 40

    for temperature in (0.0, 5.0):
        answers = generate(
            model, PROMPTS, max_new_tokens=20, temperature=temperature, tokenizer=Small()
        )
        assert max(i for a in answers for i in a.ids) < 40
    assert max(i for a in generate(model, PROMPTS, max_new_tokens=20) for i in a.ids) >= 40


def test_sample_follows_the_nucleus():
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = p.log().repeat(20_000, 1)
    uniform = torch.from_numpy((np.arange(20_000) + 0.5) / 20_000)
    for top_p, kept in ((1.0, [1, 3, 4, 0, 2]), (0.75, [1, 3, 4]), (0.69, [1, 3]), (0.2, [1])):
        drawn = sample(logits, uniform, 1.0, top_p).bincount(minlength=5) / 20_000
        expected = torch.zeros(5)
        expected[kept] = p[kept] / p[kept].sum()
        torch.testing.assert_close(drawn.float(), expected, rtol=0, atol=2e-4)
    warm = sample(logits, uniform, 2.0, 1.0).bincount(minlength=5) / 20_000
    torch.testing.assert_close(warm.float(), p.sqrt() / p.sqrt().sum(), rtol=0, atol=2e-4)


def test_sample_at_its_edges():
    logits = torch.tensor([[0.0, 50.0, 0.0], [1.0, 1.0, 1.0]])
    for u in (0.0, 0.5, 1 - 2**-53):
        ids = sample(logits, torch.tensor([u, u], dtype=torch.float64), 1.0, 1.0)
        assert ids[0] == 1 and ids[1] == int(3 * u)
    tiny = sample(logits, torch.tensor([0.9, 0.9], dtype=torch.float64), 1.0, 1e-12)
    assert tiny.tolist() == [1, 0]


def test_sampled_shares_over_many_rows():
    """Draws of rows and steps are independent: shares of a flat distribution, chi-square."""
    flat = _Scripted(b" ")
    flat.logits = lambda states: torch.zeros(len(states), 256)[:, :8]
    answers = generate(flat, [[1]] * 200, max_new_tokens=20, temperature=1.0, batch_size=64)
    counts = np.bincount([i for a in answers for i in a.ids], minlength=8)
    assert counts.sum() == 4000
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # 99.9 % point of chi-square with 7 degrees


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[]], {}, "at least one token in prompt 0"),
        ([[1], [256]], {}, r"ids in \[0, 256\), got 256 to 256 in prompt 1"),
        ([[1] * 60], {}, "at most 64 positions, got a prompt of 60 and 5 new tokens"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens >= 1, got 0"),
        ([[1]], {"temperature": -1.0}, "temperature >= 0"),
        ([[1]], {"top_p": 0.0}, "0 < top_p <= 1"),
        ([[1]], {"batch_size": 0}, "batch_size >= 1"),
        ([[1]], {"stop_strings": ["a"]}, "a tokenizer with stop_strings"),
        ([[1]], {"stop_strings": [""], "tokenizer": Bytes()}, "at least one character"),
        ([[1]], {"rows": [1, 2]}, "1 rows, got 2"),
    ],
)
def test_errors(prompts, options, message):
    model = build_model(MODELS["starcoder"], device="meta")
    with pytest.raises(ValueError, match="^generate: expected .*" + message):
        generate(model, prompts, **{"max_new_tokens": 5, **options})


def test_no_prompts_no_answers(model):
    assert generate(model, [], max_new_tokens=3) == []


def test_bf16_and_training_mode_are_left_alone(model):
    half = build_model(model.config, dtype=torch.bfloat16, seed=2).train()
    answers = generate(half, PROMPTS, max_new_tokens=5)
    assert all(len(a.ids) == 5 for a in answers)
    assert half.training and all(p.grad is None and p.requires_grad for p in half.parameters())


def test_no_stop_before_the_least_number_of_tokens(model):
    """With every likely token a stop, a row takes the best of the others, then ends."""
    free = generate(model, PROMPTS, max_new_tokens=4)
    stops = sorted({i for answer in free for i in answer.ids})
    ended = generate(model, PROMPTS, max_new_tokens=4, stop_ids=stops)
    assert all(answer.ids == [] and answer.finish == "stop_id" for answer in ended)
    answers = generate(model, PROMPTS, max_new_tokens=4, stop_ids=stops, min_new_tokens=2)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.ids) >= 2 and not set(answer.ids) & set(stops)
        with torch.no_grad():
            logits = model(torch.tensor([prompt]))[0, -1]
        logits[stops] = -torch.inf
        assert answer.ids[0] == int(logits.argmax())
