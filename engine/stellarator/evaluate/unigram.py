"""The loss of a model that knows only how often each token occurs: the bar to clear.

defines: unigram_loss
"""

from collections.abc import Sequence

import numpy as np

from stellarator.data.shards import Shard


def unigram_loss(train: Sequence[Shard], held_out: Sequence[Shard], vocab_size: int) -> float:
    """Mean -log p(token) over the held-out tokens, in nats, with p from the training tokens.

    p(t) = (count(t) + 1) / (N + V): one is added to every count, so no token is impossible.
    """
    counts = _counts(train, vocab_size) + 1.0
    seen = _counts(held_out, vocab_size)
    return float(-(seen * np.log(counts / counts.sum())).sum() / seen.sum())


def _counts(shards: Sequence[Shard], vocab_size: int) -> np.ndarray:
    """(V,) float64: how often each id occurs."""
    total = np.zeros(vocab_size)
    for shard in shards:
        for index in range(len(shard)):
            total += np.bincount(shard[index], minlength=vocab_size)
    return total
