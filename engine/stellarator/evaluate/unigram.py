"""The loss of a model that knows only how often each token occurs: the bar to clear.

defines: unigram_loss
"""

from collections.abc import Iterable, Sequence

import numpy as np

from stellarator.data.shards import Shard


def unigram_loss(train: Sequence[Shard], held_out: Sequence[np.ndarray], vocab_size: int) -> float:
    """Mean -log p(token) over the held-out tokens, in nats, with p from the training tokens.

    Args:
        train: shards whose tokens are counted.
        held_out: (n,) arrays of tokens to predict.
        vocab_size: V.

    p(t) = (count(t) + 1) / (N + V): one is added to every count, so no token is impossible.
    """
    counts = _counts((document for shard in train for document in shard), vocab_size) + 1.0
    seen = _counts(held_out, vocab_size)
    return float(-(seen * np.log(counts / counts.sum())).sum() / seen.sum())


def _counts(arrays: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """(V,) float64: how often each id occurs."""
    total = np.zeros(vocab_size)
    for ids in arrays:
        total += np.bincount(ids, minlength=vocab_size)
    return total
