"""The tokenizer, against a byte-pair encoding in plain Python and against transformers.

The plain encoder cuts words with `re` and merges by rank, from the tables in tokenizer.json; it
knows ASCII text only. Text of other scripts is checked by decoding and by transformers. Not
covered: the quality of the merges, and the released tokenizer files, which tests cannot download.
"""

import json
import os
import pickle
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from stellarator.data import tokenizer as module
from stellarator.data.formats import Special
from stellarator.data.tokenizer import (
    SPECIAL_TOKENS_STARCODER,
    SPECIAL_TOKENS_STARCODER2,
    Tokenizer,
    TokenizerError,
)

SENTINELS = sorted({*SPECIAL_TOKENS_STARCODER, *SPECIAL_TOKENS_STARCODER2})
GENERATIONS = {"starcoder": SPECIAL_TOKENS_STARCODER, "starcoder2": SPECIAL_TOKENS_STARCODER2}


def corpus(seed: int = 0, lines: int = 400) -> list[str]:
    """Lines like code, from a seeded generator."""
    rng = np.random.default_rng(seed)
    words = [
        "self",
        "return",
        "value",
        "index",
        "def ",
        "class ",
        "import os",
        "for x in",
        "(",
        "):",
    ]
    words += [
        "\n    ",
        "\n",
        " ",
        "  ",
        "\t",
        "12",
        "3.14",
        "0x",
        "==",
        " = ",
        "\u00e9t\u00e9",
        "don't",
    ]
    words += ["\u4e2d\u6587", "\U0001f600", "\u00a0", "\u2028", "\u0663", "\u00b2"]
    return ["".join(rng.choice(words, 40)) for _ in range(lines)]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: Tokenizer.train(corpus(), 420, name) for name in GENERATIONS}


@pytest.fixture(scope="module", params=list(GENERATIONS))
def tokenizer(request, tokenizers) -> Tokenizer:
    return tokenizers[request.param]


class PlainEncoder:
    """Byte-level BPE for ASCII text, from the tables of tokenizer.json."""

    WORDS = re.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
    )

    def __init__(self, tokenizer: Tokenizer):
        model = json.loads(tokenizer.to_json())["model"]
        self.ids = model["vocab"]
        pairs = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
        self.rank = {tuple(pair): rank for rank, pair in enumerate(pairs)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in re.split(r"([0-9])", text):
            for word in [part] if part.isdigit() else self.WORDS.findall(part):
                ids += self._merge([c if "!" <= c <= "~" else self._hidden(c) for c in word])
        return ids

    @staticmethod
    def _hidden(character: str) -> str:
        return chr(256 + ord(character)) if character <= " " else chr(256 + 33)

    def _merge(self, parts: list[str]) -> list[int]:
        while len(parts) > 1:
            ranks = [self.rank.get(pair, 1 << 30) for pair in zip(parts, parts[1:], strict=False)]
            best = min(ranks)
            if best == 1 << 30:
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]


def ascii_text(rng: np.random.Generator, length: int) -> str:
    letters = list("aaabcdefgst ' ' \n\n  \t0123456789(){}=._<>|\"\r\x0b\x01") + ["return", "self"]
    return "".join(rng.choice(letters, length))


def test_encode_is_byte_pair_encoding_of_split_words(tokenizer):
    plain = PlainEncoder(tokenizer)
    rng = np.random.default_rng(1)
    for _ in range(300):
        text = ascii_text(rng, int(rng.integers(0, 60)))
        assert tokenizer.encode(text) == plain.encode(text), text


@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_special_tokens_have_the_first_ids_in_order(tokenizers, generation):
    tokenizer, order = tokenizers[generation], GENERATIONS[generation]
    assert len(order) == {"starcoder": 19, "starcoder2": 38}[generation]
    assert tokenizer.special == {token: index for index, token in enumerate(order)}
    assert tokenizer.special_ids.tolist() == list(range(len(order)))
    assert (tokenizer.eod, tokenizer.fim_prefix, tokenizer.fim_middle) == (0, 1, 2)
    assert (tokenizer.fim_suffix, tokenizer.fim_pad) == (3, 4)


def test_digits_are_always_single(tokenizer):
    ids = tokenizer.encode("x1234567890 12.5 y99")
    digits = [tokenizer.decode([i]) for i in ids if re.search("[0-9]", tokenizer.decode([i]))]
    assert digits == list("123456789012599")


def copies(tokenizer: Tokenizer, folder) -> dict[str, Tokenizer]:
    """The tokenizer as it comes back by every way there is."""
    tokenizer.save(folder)
    return {
        "trained": tokenizer,
        "folder": Tokenizer.load(folder),
        "file": Tokenizer.load(folder / "tokenizer.json"),
        "pickle": pickle.loads(pickle.dumps(tokenizer)),
    }


def test_sentinel_text_never_becomes_a_special_token(tokenizer, tmp_path):
    texts = [f"a{s}b" for s in SENTINELS] + SENTINELS + ["".join(SENTINELS), " ".join(SENTINELS)]
    for way, copy in copies(tokenizer, tmp_path).items():
        found = {"encode": [copy.encode(text) for text in texts], "batch": copy.encode_batch(texts)}
        found["pieces"] = [copy.encode_pieces([text]) for text in texts]
        for how, encoded in found.items():
            assert encoded == found["encode"], (way, how)
            for text, ids in zip(texts, encoded, strict=True):
                assert not np.isin(ids, copy.special_ids).any(), (way, how, text)
                assert copy.decode(ids) == text, (way, how, text)


def test_training_on_sentinel_text_learns_nothing_of_it():
    clean = corpus()
    dirty = [f"{text[:50]}<fim_prefix>{text[50:]}<|endoftext|>" for text in clean]
    cut = [part for text in clean for part in (text[:50], text[50:])]
    assert Tokenizer.train(dirty, 420).to_json() == Tokenizer.train(cut, 420).to_json()


def test_pieces_mix_text_and_special_tokens(tokenizer):
    t = tokenizer
    pieces = [Special("<fim_prefix>"), "def ", "f(", Special("<fim_suffix>"), "<fim_suffix>", ")"]
    expected = [t.fim_prefix, *t.encode("def f("), t.fim_suffix, *t.encode("<fim_suffix>)")]
    assert t.encode_pieces(pieces) == expected
    batch = t.encode_pieces_batch([pieces, [], ["x"], [Special("<|endoftext|>")]])
    assert [row.tolist() for row in batch] == [expected, [], t.encode("x"), [t.eod]]
    assert all(row.dtype == np.int32 for row in batch)
    with pytest.raises(ValueError, match="expected a special token of .*, got '<nonsense>'"):
        t.encode_pieces([Special("<nonsense>")])


def test_any_bytes_decode_exactly(tokenizer):
    single = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size)}
    rng = np.random.default_rng(2)
    for _ in range(50):
        data = rng.integers(0, 256, 100, dtype=np.uint8).tobytes()
        ids = [single[bytes([byte])] for byte in data]
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode_bytes(np.array(ids, dtype=np.uint16)) == data
    for text in corpus(3, 50):
        ids, data = tokenizer.encode(text), text.encode()
        assert tokenizer.decode_bytes(ids) == data and tokenizer.decode(ids) == text
        cut = len(ids) // 2
        assert tokenizer.decode_bytes(ids[:cut]) + tokenizer.decode_bytes(ids[cut:]) == data


def test_decode_of_special_tokens_and_of_broken_ids(tokenizer):
    ids = [tokenizer.fim_prefix, *tokenizer.encode("x"), tokenizer.eod]
    assert tokenizer.decode(ids) == "<fim_prefix>x<|endoftext|>"
    assert tokenizer.decode(ids, skip_special=True) == "x"
    assert tokenizer.decode(iter(ids)) == "<fim_prefix>x<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("\u00e9")[:1]) in ("\u00e9", "\ufffd")
    for bad in ([-1], [tokenizer.vocab_size], [0, 1 << 40]):
        with pytest.raises(IndexError, match=r"expected ids in \[0, "):
            tokenizer.decode(bad)


@pytest.mark.parametrize("size", [40, 64, 1000])
def test_cutting_long_texts_does_not_change_the_ids(tokenizer, monkeypatch, size):
    """Chunks this small put a cut into every text; without white space, digits or letters next to
    signs a cut may change ids, so the texts here have one in every 40 characters."""
    rng = np.random.default_rng(size)
    texts = ["".join(corpus(int(s), 3)) for s in rng.integers(0, 1000, 10)]
    texts += [ascii_text(rng, 500) for _ in range(60)]
    texts = [re.sub(r"(.{30})", r"\1 x", text, flags=re.DOTALL) for text in texts]
    expected = [tokenizer._backend.encode(text, add_special_tokens=False).ids for text in texts]
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", size)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 700)
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [ids.tolist() for ids in tokenizer.encode_pieces_batch([[t] for t in texts])] == expected


@pytest.mark.parametrize(
    "unit",
    ["\u4e2d", "a", " ", "(", "\n", "9", "\U0001f600", "f7", "\u0301"],
    ids=["chinese", "letter", "blank", "sign", "newline", "digit", "emoji", "hex", "combining"],
)
def test_one_endless_line_costs_little_and_decodes_exactly(tokenizer, monkeypatch, unit):
    largest, encode_many = 0, tokenizer._encode_many

    def watched(texts, **arguments):
        nonlocal largest
        largest = max(largest, *map(len, texts))
        assert sum(map(len, texts)) <= module.BATCH_CHARACTERS + module.CHUNK_CHARACTERS
        return encode_many(texts, **arguments)

    monkeypatch.setattr(tokenizer, "_encode_many", watched)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1 << 16)
    text = unit * (200_000 // len(unit))
    began = time.monotonic()
    ids = tokenizer.encode(text)
    assert time.monotonic() - began < 5
    assert 0 < largest <= module.CHUNK_CHARACTERS
    assert tokenizer.decode(ids) == text


def test_same_texts_give_the_same_merges_in_every_process(tmp_path):
    program = (
        "import sys, json; from stellarator.data.tokenizer import Tokenizer\n"
        "print(Tokenizer.train(json.load(sys.stdin), 500).sha256)"
    )
    found = set()
    for seed, threads in (("0", "false"), ("1", "true"), ("2", "true")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": threads}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(corpus()), env=environment,
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        found.add(done.stdout.strip())
    assert found == {Tokenizer.train(corpus(), 500).sha256}


@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_vocabulary_sizes(generation):
    smallest = 256 + len(GENERATIONS[generation])
    bytes_only = Tokenizer.train(corpus(), smallest, generation)
    assert bytes_only.vocab_size == smallest
    assert len(bytes_only.encode("return")) == 6
    assert Tokenizer.train(corpus(), smallest + 57, generation).vocab_size == smallest + 57
    assert smallest < Tokenizer.train(["aaaa bbbb"], 49_152, generation).vocab_size < smallest + 20
    assert Tokenizer.train([], 300, generation).vocab_size == smallest
    for wrong in (smallest - 1, 49_153, 0):
        with pytest.raises(ValueError, match=rf"expected vocab_size in \[{smallest}, 49152\]"):
            Tokenizer.train(corpus(), wrong, generation)


def test_unknown_generation():
    with pytest.raises(ValueError, match="expected generation in .*starcoder2.*, got 'gpt2'"):
        Tokenizer.train([], 400, "gpt2")


def test_transformers_loads_the_folder_and_gives_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for other in (fast, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        for text in [*corpus(5, 30), "x = 12345", "  \n\n\tindent", ""]:
            assert other(text)["input_ids"] == tokenizer.encode(text)
            assert other.decode(tokenizer.encode(text)) == text
        assert other.convert_tokens_to_ids(list(tokenizer.special)) == [*tokenizer.special.values()]
        assert other("<fim_prefix>")["input_ids"] == [tokenizer.fim_prefix]
        assert other.eos_token_id == other.bos_token_id == other.unk_token_id == tokenizer.eod
        assert set(other.all_special_ids) == set(tokenizer.special_ids.tolist())
        assert len(other) == tokenizer.vocab_size


def test_files_beside_the_tokenizer_speak_the_dialect_of_transformers_4(tokenizer, tmp_path):
    """Version 4 cannot be installed beside 5, so this pins the keys that its source reads."""
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] > 1 << 60
    for key in ("bos_token", "eos_token", "unk_token"):
        assert config[key] == "<|endoftext|>"
    assert config["additional_special_tokens"] == list(tokenizer.special)[1:]
    assert "extra_special_tokens" not in config  # version 4 wants a dict there and fails on a list
    decoder = config["added_tokens_decoder"]
    assert {entry["content"]: int(i) for i, entry in decoder.items()} == tokenizer.special
    special_map = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert special_map["eos_token"] == "<|endoftext|>"


def test_lone_surrogates_are_an_error_that_says_so(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match="lone surrogate"):
            encode("a\ud800b")


def test_encoding_in_a_forked_child_does_not_hang(tmp_path):
    """The library's threads are used first, so a child that waited for them would wait forever."""
    program = """
import os, sys, json
from stellarator.data.tokenizer import Tokenizer
texts = json.load(sys.stdin)
t = Tokenizer.train(texts, 500)
expected = t.encode_batch(texts)
child = os.fork()
if child == 0:
    os._exit(0 if t.encode_batch(texts) == expected else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(corpus()), env=environment,
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0"


def changed(tokenizer: Tokenizer, change) -> str:
    tree = json.loads(tokenizer.to_json())
    change(tree)
    return json.dumps(tree)


def drop_special(tree: dict, *tokens: str) -> None:
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] not in tokens]


def make_ordinary(tree: dict, token: str) -> None:
    for entry in tree["added_tokens"]:
        entry["special"] &= entry["content"] != token


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
REFUSED = {
    "empty": (lambda t: "", "got an empty file. It is damaged or cut: copy it again, or run `s"),
    "truncated": (lambda t: t.to_json()[:3000], "It is damaged or cut: copy it again, or run `"),
    "deep": (lambda t: "[" * 100_000, "expected JSON, got other text"),
    "a list": (lambda t: "[]", "a byte-level BPE tokenizer"),
    "other model": (lambda t: changed(t, lambda x: x["model"].update(type="WordPiece")), "BPE"),
    "dropout": (lambda t: changed(t, lambda x: x["model"].update(dropout=0.1)), "BPE without"),
    "normalizer": (lambda t: changed(t, lambda x: x.update(normalizer={"type": "NFC"})), "no norm"),
    "slow regex": (lambda t: changed(t, lambda x: x.update(pre_tokenizer=SPLIT)), "to cut words"),
    "digits joined": (
        lambda t: changed(t, lambda x: x["pre_tokenizer"]["pretokenizers"].pop(0)), "Digits"),
    "no sentinel": (
        lambda t: changed(t, lambda x: drop_special(x, "<fim_middle>")), "<fim_middle>"),
    "no generation": (
        lambda t: changed(t, lambda x: drop_special(x, "<file_sep>", "<reponame>")), "<file_sep>"),
    "ordinary": (lambda t: changed(t, lambda x: make_ordinary(x, "<fim_pad>")), "<fim_pad>"),
    "huge id": (lambda t: changed(t, lambda x: x["model"]["vocab"].update(zz=1 << 40)), "ids in"),
    "negative id": (lambda t: changed(t, lambda x: x["model"]["vocab"].update(zz=-1)), "ids in"),
    "byte missing": (lambda t: changed(t, lambda x: x["model"]["vocab"].pop("a")), "all 256 bytes"),
    "merges of nothing": (
        lambda t: changed(t, lambda x: x["model"].update(merges=[["qq", "zz"]])), "a tokenizer"),
    "not byte-level": (
        lambda t: changed(t, lambda x: x["model"]["vocab"].update({"\u4e2d": 419})), "byte-level"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_foreign_tokenizer_files_are_refused_in_one_line(tokenizer, tmp_path, case):
    make, message = REFUSED[case]
    path = tmp_path / "tokenizer.json"
    path.write_text(make(tokenizer), encoding="utf-8")
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_missing_large_and_binary_tokenizer_files(tmp_path):
    with pytest.raises(TokenizerError, match="none.*cannot be read: No such file"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(TokenizerError, match="tokenizer.json: cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "set" / "tokenizer").mkdir(parents=True)
    (tmp_path / "set" / "tokenizer" / "tokenizer.json").touch()
    with pytest.raises(TokenizerError, match=r"tokenizer.json, such as .*/set/tokenizer\.$"):
        Tokenizer.load(tmp_path / "set")
    large = tmp_path / "large.json"
    with open(large, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TokenizerError, match=f"expected at most {64 << 20} bytes, got {1 << 40}"):
        Tokenizer.load(large)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match="expected JSON in UTF-8.*copy it again"):
        Tokenizer.load(tmp_path / "binary.json")


def test_settings_of_a_released_file_that_would_change_ids_are_switched_off(tokenizer, tmp_path):
    """Old files have a post-processor and no use_regex; some carry truncation or padding."""

    def old(tree):
        del tree["pre_tokenizer"]["pretokenizers"][1]["use_regex"]
        tree["post_processor"] = {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False
        }  # fmt: skip
        tree["truncation"] = {
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
        }  # fmt: skip
        tree["padding"] = {
            "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }  # fmt: skip

    path = tmp_path / "tokenizer.json"
    path.write_text(changed(tokenizer, old), encoding="utf-8")
    loaded = Tokenizer.load(path)
    assert loaded.generation == tokenizer.generation
    for text in [*corpus(9, 20), "x", ""]:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode_batch([text]) == [tokenizer.encode(text)]
