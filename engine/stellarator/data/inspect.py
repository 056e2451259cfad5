"""Look at a token shard: its documents, or its rows as training sees them.

defines: documents, rows
"""

import os
from collections.abc import Iterator

from stellarator.config import FimConfig
from stellarator.data.packing import PackedDataset
from stellarator.data.shards import Shard, check_tokenizer
from stellarator.data.tokenizer import Tokenizer


def documents(prefix: str, tokenizer_folder: str, count: int) -> Iterator[str]:
    """The first documents as text, special tokens as strings, each after a line of figures."""
    prefix = _prefix(prefix)
    shard, tokenizer = Shard(prefix), _tokenizer(prefix, tokenizer_folder)
    yield f"# {prefix}: {len(shard):,} documents, {shard.num_tokens:,} tokens, {shard.dtype}"
    for index in range(min(count, len(shard))):
        yield f"# document {index}: {int(shard.lengths[index]):,} tokens"
        yield tokenizer.decode(shard[index])


def rows(prefix: str, tokenizer_folder: str, seq_length: int, count: int) -> Iterator[str]:
    """The first training rows of T tokens, shuffled, with fill-in-the-middle at default rates."""
    prefix = _prefix(prefix)
    tokenizer = _tokenizer(prefix, tokenizer_folder)
    dataset = PackedDataset([Shard(prefix)], (), tokenizer, seq_length, FimConfig())
    yield f"# {prefix}: {dataset.rows_per_epoch:,} rows of {seq_length} tokens an epoch"
    for index in range(count):
        row = dataset.row(index)
        yield f"# row {index}: {len(row.starts)} documents, {len(row.tokens) - row.length} padding"
        yield tokenizer.decode(row.tokens[: row.length])


def _tokenizer(prefix: str, folder: str) -> Tokenizer:
    """The tokenizer, if it is the one that made the shard: another one decodes it to nonsense."""
    tokenizer = Tokenizer.load(folder)
    check_tokenizer([prefix], tokenizer.sha256)
    return tokenizer


def _prefix(path: str) -> str:
    """The prefix of a shard, also where one of its two files is given."""
    root, extension = os.path.splitext(path)
    is_file = extension in (".bin", ".idx") and not os.path.exists(path + ".idx")
    return root if is_file else path
