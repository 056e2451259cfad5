"""Hugging Face folders of `starcoder2` and `gpt_bigcode`, read and written without transformers.

defines: load_pretrained, Pretrained, save_pretrained, Tensor, tensor_map

The same numbers under other names. Three layouts of the attention projection exist: `starcoder2`
has q, k and v apart; `gpt_bigcode` has them in one matrix, as [Q | K | V] with one key/value head,
and head by head as [q, k, v], [q, k, v], ... with as many key/value heads as query heads.

Tied models: a file may hold a copy of the embedding as `lm_head.weight` or leave it out; none is
written. A copy that differs contradicts `tie_word_embeddings` and is refused, because readers
disagree on which of the two counts.
"""

import contextlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stellarator.config import ModelConfig
from stellarator.files import sync
from stellarator.model.hf_config import read_config, write_config
from stellarator.model.hf_files import FolderError, WeightFiles, read_json, replaced_folder
from stellarator.model.transformer import Transformer

_HEAD = "lm_head.weight"
_NAMES = {
    "starcoder2": {
        "embedding": "model.embed_tokens",
        "layers": "model.layers",
        "attention_norm": "input_layernorm",
        "attention.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
    "gpt_bigcode": {
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "layers": "transformer.h",
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Buffers that old versions of transformers stored; they hold no weights.
_BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|.*rotary_emb\.inv_freq")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "added_tokens.json"),
)
_EXPORTED = re.compile(
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    + "|".join(map(re.escape, _TOKENIZER_FILES))
)


@dataclass(frozen=True)
class Tensor:
    """One of our parameters as it stands in a Hugging Face file."""

    ours: str
    theirs: tuple[str, ...]  # one name, or those of q, k and v
    shapes: tuple[tuple[int, ...], ...]  # of each
    interleaved_heads: int | None = None  # H where rows go [q, k, v] head by head

    def gather(self, read) -> torch.Tensor:
        """Our tensor, from `read(name)`."""
        parts = [read(name) for name in self.theirs]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._regroup(tensor, to_ours=True)

    def scatter(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their tensors, from ours."""
        tensor = self._regroup(tensor, to_ours=False)
        parts = tensor.split([shape[0] for shape in self.shapes])
        return dict(zip(self.theirs, parts, strict=True))

    def _regroup(self, tensor: torch.Tensor, to_ours: bool) -> torch.Tensor:
        """Rows (H, 3, D) <-> (3, H, D)."""
        H = self.interleaved_heads
        if H is None:
            return tensor
        split = (H, 3) if to_ours else (3, H)
        grouped = tensor.unflatten(0, (*split, -1)).transpose(0, 1)
        return grouped.flatten(0, 2)


def tensor_map(config: ModelConfig) -> list[Tensor]:
    """Every parameter of a model of this configuration, in order, with its names in the files."""
    with torch.device("meta"):
        parameters = Transformer(config).named_parameters()
        return [_tensor(name, tuple(p.shape), config) for name, p in parameters]


def _tensor(name: str, shape: tuple[int, ...], config: ModelConfig) -> Tensor:
    """The entry of one parameter."""
    names = _NAMES[config.family]
    module, _, leaf = name.rpartition(".")
    prefix = ""
    if module.startswith("layers."):
        _, index, module = module.split(".", 2)
        prefix = f"{names['layers']}.{index}."
    if module == "attention.qkv" and config.family == "starcoder2":
        D = config.head_width
        rows = [config.num_heads * D, config.num_kv_heads * D, config.num_kv_heads * D]
        theirs = tuple(f"{prefix}{part}.{leaf}" for part in _QKV)
        return Tensor(name, theirs, tuple((r, *shape[1:]) for r in rows))
    interleaved = module == "attention.qkv" and config.num_kv_heads > 1
    heads = config.num_heads if interleaved else None
    return Tensor(name, (f"{prefix}{names[module]}.{leaf}",), (shape,), heads)


class Pretrained:
    """A Hugging Face folder whose parameters are read one by one; a context manager.

    config: of its model.  dtype: the widest in the files.

    Raises:
        FolderError: (a ValueError) the folder is damaged, unsafe, or of another model; all tensors
            that are missing, unknown or of the wrong shape are listed at once.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.config = read_config(read_json(folder, "config.json"), str(folder / "config.json"))
        tensors = tensor_map(self.config)
        self._tensors = {tensor.ours: tensor for tensor in tensors}
        with contextlib.ExitStack() as stack:
            self._files = stack.enter_context(WeightFiles(folder))
            _check_tensors(self._files, tensors, self.config)
            self.dtype = _widest([self._files.dtypes[name] for t in tensors for name in t.theirs])
            self._stack = stack.pop_all()

    def __enter__(self) -> "Pretrained":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter under our name, in the dtype of the file, on the CPU."""
        return self._tensors[name].gather(self._files.__getitem__)


def load_pretrained(
    folder: str | Path,
    *,
    device="cpu",
    dtype: torch.dtype | None = None,
    kernels: str = "auto",
    recompute: str = "none",
) -> Transformer:
    """A model from a Hugging Face folder of type `starcoder2` or `gpt_bigcode`.

    Args:
        folder: with config.json and model.safetensors, or shards and model.safetensors.index.json.
        device: of the parameters.
        dtype: of the parameters; None: that of the file (the widest, if there are several).
        kernels, recompute: see `Transformer`.
    Raises:
        FolderError: (a ValueError) the folder is damaged, unsafe, or of another model; all tensors
            that are missing, unknown or of the wrong shape are listed at once.
    Cost: reads the file once; memory of the model and of one tensor.
    """
    with Pretrained(folder) as weights, torch.no_grad():
        to = {"device": device, "dtype": dtype or weights.dtype}
        model = Transformer(weights.config, kernels, recompute, **to)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
    return model


def _widest(dtypes) -> torch.dtype:
    """The dtype that holds all of them."""
    result = dtypes[0]
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


def _check_tensors(files: WeightFiles, tensors: list[Tensor], config: ModelConfig) -> None:
    """Raise FolderError with everything that differs between the files and the configuration."""
    expected = {name: s for t in tensors for name, s in zip(t.theirs, t.shapes, strict=True)}
    embedding = f"{_NAMES[config.family]['embedding']}.weight"
    if config.tie_embeddings and _HEAD in files.shapes:
        expected[_HEAD] = expected[embedding]
    missing = [name for name in expected if name not in files.shapes]
    extra = [n for n in files.shapes if n not in expected and not _BUFFERS.fullmatch(n)]
    there = [name for name in expected if name in files.shapes]
    shapes = [
        f"{name} {files.shapes[name]} instead of {expected[name]}"
        for name in there
        if files.shapes[name] != expected[name]
    ]
    kinds = [f"{n} {files.dtypes[n]}" for n in there if isinstance(files.dtypes[n], str)]
    problems = [
        f"{len(found)} {what}: {', '.join(sorted(found)[:20])}{' ...' if len(found) > 20 else ''}"
        for what, found in (
            ("missing", missing),
            ("unknown", extra),
            ("of another shape", shapes),
            ("of a dtype that is not supported", kinds),
        )
        if found
    ]
    if problems:
        raise FolderError(
            f"{files.folder}: expected the tensors of its config.json, got "
            + "; ".join(problems)
            + ". The weights and the configuration belong to different models."
        )
    if config.tie_embeddings and _HEAD in files.shapes:
        if not torch.equal(files[_HEAD], files[embedding]):
            raise FolderError(
                f"{files.folder}: expected {_HEAD} equal to {embedding} because "
                "tie_word_embeddings is true, got different values. Set it to false in config.json "
                f"to use both, or remove {_HEAD}."
            )


def save_pretrained(
    model: Transformer,
    folder: str | Path,
    *,
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a folder that transformers 4.4x and 5.x, and `load_pretrained`, read.

    The folder appears whole or not at all. An earlier export in its place is replaced.

    Args:
        model: its parameters are written in their dtype.
        folder: to write.
        tokenizer_folder: its tokenizer files are copied; its `<|endoftext|>` becomes bos and eos.
        max_shard_bytes: a larger model is written in several files with an index.
    Returns:
        the folder.
    Raises:
        ValueError: the configuration has no words in that model type, or the folder is not ours.
        OSError: the disk is full, no permission, ...
    Cost: writes the model once; memory of one shard.
    """
    folder = Path(folder)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    end_of_text = _end_of_text(tokenizer_folder, model.config)
    settings = write_config(model.config, dtype, end_of_text)
    with replaced_folder(folder, lambda name: _EXPORTED.fullmatch(name) is not None) as aside:
        _write_json(aside / "config.json", settings)
        generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
        _write_json(aside / "generation_config.json", {"_from_model_config": True, **generation})
        if tokenizer_folder is not None:
            for name in _TOKENIZER_FILES:
                if (Path(tokenizer_folder) / name).is_file():
                    shutil.copyfile(Path(tokenizer_folder) / name, aside / name)
        _write_weights(model, aside, max_shard_bytes)
        for path in aside.iterdir():
            sync(path)
    return folder


def _write_weights(model: Transformer, folder: Path, max_shard_bytes: int) -> None:
    """One file, or shards and their index."""
    parameters = dict(model.named_parameters())
    shards: list[list[Tensor]] = [[]]
    sizes = [0]
    for tensor in tensor_map(model.config):
        size = parameters[tensor.ours].nbytes
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(tensor)
        sizes[-1] += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        content = {}
        for tensor in shard:
            values = parameters[tensor.ours].detach()
            content |= {k: v.cpu().contiguous() for k, v in tensor.scatter(values).items()}
        weight_map |= dict.fromkeys(content, file)
        try:
            save_file(content, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file}: cannot be written: {error}") from None
    if len(shards) > 1:
        count = sum(p.numel() for p in parameters.values())
        metadata = {"total_size": sum(sizes), "total_parameters": count}
        index = {"metadata": metadata, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _end_of_text(tokenizer_folder: str | Path | None, config: ModelConfig) -> int:
    """Id of `<|endoftext|>`: what the tokenizer says, else 0 as in both StarCoders."""
    if tokenizer_folder is None:
        return 0
    tree = read_json(Path(tokenizer_folder), "tokenizer.json")
    try:
        ids = [*tree["model"]["vocab"].values(), *(t["id"] for t in tree["added_tokens"])]
        marks = [t["id"] for t in tree["added_tokens"] if t["content"] == "<|endoftext|>"]
        largest = max(ids)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise FolderError(f"{tokenizer_folder}: expected a BPE tokenizer.json.") from None
    if largest >= config.vocab_size:
        raise FolderError(
            f"{tokenizer_folder}: expected ids below vocab_size = {config.vocab_size}, "
            f"got {largest}. Pass the tokenizer that the model was trained with."
        )
    return marks[0] if marks else 0


def _write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
