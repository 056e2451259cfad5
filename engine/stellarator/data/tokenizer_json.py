"""What `tokenizer.json` must say so that a tokenizer can be used here, and the bytes of its tokens.

defines: TokenizerError, REPAIR, check_json, bytes_of_ids, hugging_face_files

A foreign file is checked before the library sees it: a size, the shape of the model, how words
are cut (a regular expression of somebody else could take forever), ids in range, the special
tokens.
"""

import json

from tokenizers import pre_tokenizers

MAX_IDS = 1 << 20
SHARED = ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
OWN = {"starcoder": ("<reponame>", "<filename>"), "starcoder2": ("<repo_name>", "<file_sep>")}

# How words are cut, as `tokenizer.json` says it; old files leave out `use_regex`, which means true.
_WORD_KEYS = ("type", "individual_digits", "add_prefix_space", "use_regex")
_WORDS = [
    [
        dict(zip(_WORD_KEYS, ("Digits", True, None, None), strict=True)),
        dict(zip(_WORD_KEYS, ("ByteLevel", None, False, use_regex), strict=True)),
    ]
    for use_regex in (True, None)
]


REPAIR = "It is damaged or cut: copy it again, or run `stellarator data prepare` again."


class TokenizerError(ValueError):
    """A tokenizer that cannot be used here: foreign, damaged or without the sentinels."""


def bytes_of_ids(backend, special: dict[str, int], vocab_size: int) -> list[bytes]:
    """What each id stands for; b"" for ids that no token has."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(hidden)}
    table = [b""] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        if token not in special:
            try:
                table[index] = bytes([byte_of[character] for character in token])
            except KeyError:
                raise TokenizerError(
                    f"tokenizer: expected byte-level tokens, got {token!r}. "
                    "This is not a tokenizer of this family."
                ) from None
    for index, token in backend.get_added_tokens_decoder().items():
        table[index] = token.content.encode()
    return table


def check_json(text: str, name: str) -> str:
    """The generation of a `tokenizer.json`; raises TokenizerError if it cannot be used here."""

    def refuse(expected: str, got: object) -> TokenizerError:
        return TokenizerError(
            f"{name}: expected {expected}, got {str(got)[:200]}. "
            "Use a tokenizer of StarCoder or StarCoder2."
        )

    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        got = f"other text ({error})" if text.strip() else "an empty file"
        raise TokenizerError(f"{name}: expected JSON, got {got}. {REPAIR}") from None
    try:
        model, added, vocab = tree["model"], tree["added_tokens"], tree["model"]["vocab"]
        ids = [*vocab.values(), *(token["id"] for token in added)]
        special = {token["content"] for token in added if token["special"]}
        words = tree["pre_tokenizer"]
        steps = words["pretokenizers"] if words["type"] == "Sequence" else [words]
        steps = [{key: step.get(key) for key in _WORD_KEYS} for step in steps]
    except (KeyError, TypeError, AttributeError) as error:
        raise refuse("a byte-level BPE tokenizer", f"no {error}") from None
    if model.get("type", "BPE") != "BPE" or model.get("dropout"):
        raise refuse("BPE without dropout", f"{model.get('type')}, {model.get('dropout')}")
    if tree.get("normalizer") is not None:
        raise refuse("no normalizer (text must decode exactly)", tree["normalizer"])
    if not all(type(index) is int and 0 <= index < MAX_IDS for index in ids):
        raise refuse(f"ids in [0, {MAX_IDS})", "others")
    if steps not in _WORDS:
        raise refuse("Digits(individual_digits) and ByteLevel(use_regex) to cut words", steps)
    missing = [token for token in SHARED if token not in special]
    generations = [g for g, own in OWN.items() if special.issuperset(own)]
    if missing or not generations:
        wanted = " or ".join(" and ".join(own) for own in OWN.values())
        raise refuse(f"special tokens {', '.join(SHARED)} and {wanted}", sorted(special))
    if len(alphabet := _alphabet() - vocab.keys()):
        raise refuse("all 256 bytes in the vocabulary", f"{len(alphabet)} missing")
    return generations[-1]


def _alphabet() -> set[str]:
    return set(pre_tokenizers.ByteLevel.alphabet())


def hugging_face_files(special: dict[str, int], vocab_size: int) -> dict[str, dict]:
    """The files beside `tokenizer.json` that transformers 4 and 5 read, by name.

    The class is PreTrainedTokenizerFast: GPT2TokenizerFast of transformers 5 cuts words in its
    own way and would not split digits.
    """
    eod = SHARED[0]
    names = {"bos_token": eod, "eos_token": eod, "unk_token": eod}
    others = [token for token in special if token != eod]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": True}
            for token, index in special.items()
        },
        "additional_special_tokens": others,
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # how transformers writes "no limit"
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": vocab_size,
    }
    return {
        "tokenizer_config.json": config,
        "special_tokens_map.json": {**names, "additional_special_tokens": others},
    }
