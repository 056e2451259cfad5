"""Which sample comes when: random streams, permutations and blending as pure functions.

defines:
    generator(seed, purpose, i, j)      an independent random stream for every key
    permutation(size, seed, purpose, i, j)  (size,) int64, a shuffle that depends on the key alone
    Blend(weights)                      sample index -> (corpus, index within that corpus)

Nothing here has state, so nothing depends on what ran before. Every stream is Philox (a cipher of
a counter), keyed by (seed, purpose) and started at a counter whose high words are (i, j): streams
of different keys never overlap, and any of them starts in constant time. Only raw 64-bit words and
their 53-bit doubles are used. Those are fixed by the algorithm, while `Generator.permutation` and
`Generator.integers` may change between NumPy versions, which would reshuffle a resumed run.

Source: Philox4x64-10, Salmon et al. 2011. The blending rule is Megatron's, see `Blend`.
"""

from collections.abc import Sequence

import numpy as np

# The purposes of random streams. The values are part of the data format: changing one reshuffles.
DOCUMENTS = 1
ROWS = 2
FIM = 3
TEXTS = 4

BLEND_PERIOD = 1 << 16


def generator(seed: int, purpose: int, i: int = 0, j: int = 0) -> np.random.Generator:
    """A random stream that depends on (seed, purpose, i, j) alone, each of them below 2**64.

    Draw with `.random()` or `.bit_generator.random_raw()` only (see the module docstring).

    Raises:
        ValueError: the seed is negative or has more than 64 bits.
    Cost: 9 us.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"generator: expected 0 <= seed < 2**64, got {seed}. Choose another seed.")
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, i, j], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def permutation(size: int, seed: int, purpose: int, i: int = 0, j: int = 0) -> np.ndarray:
    """(size,) int64, a uniform permutation of 0 .. size-1 that depends on the key alone.

    It sorts `size` random 64-bit words, stably, so equal words (2**-64 per pair) do no harm.

    Cost: 0.12 s and 24 MB per million entries, once per epoch.
    """
    words = generator(seed, purpose, i, j).bit_generator.random_raw(size)
    return np.argsort(words, kind="stable")


class Blend:
    """Samples drawn from several corpora in the proportion of their weights.

    The rule is Megatron's, but for i counted from one: sample i goes to the corpus with the largest
    weight * i - drawn, the first one among equals. So no corpus is ever a whole sample ahead of its
    share, and the sequence does not depend on its length.

    Here weights are first rounded to multiples of 2**-16 (largest remainders, sum kept), which
    makes the sequence periodic: after 2**16 samples every corpus has had exactly its share, because
    the differences are then integers above -1 that sum to 0. So one period is tabulated, and any
    sample is found in constant time, where Megatron tabulates the whole run.

    Args:
        weights: positive, any scale.
    Raises:
        ValueError: no weights, or one that is not finite, not positive, or that rounds to 0.
    Cost: at construction 65,536 steps of a loop (0.06 s) and 0.8 MB.
    """

    def __init__(self, weights: Sequence[float]):
        values = np.asarray(weights, dtype=np.float64)
        if values.ndim != 1 or not len(values):
            raise ValueError(
                f"blend: expected one weight per corpus, got {weights!r}. Pass a list of numbers."
            )
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(
                f"blend: expected positive finite weights, got {list(weights)}. "
                "Leave a corpus out instead of giving it no weight."
            )
        exact = values / values.sum() * BLEND_PERIOD
        shares = np.floor(exact).astype(np.int64)
        missing = BLEND_PERIOD - int(shares.sum())
        shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
        if (shares == 0).any():
            raise ValueError(
                f"blend: expected every weight to be at least 1/{BLEND_PERIOD} of their sum, got "
                f"{list(weights)}. A corpus with less is as good as left out: leave it out."
            )
        self.shares = shares  # (corpora,) samples of each corpus per period
        self._corpus, self._rank = _greedy_period(shares)

    def __call__(self, index: int) -> tuple[int, int]:
        """The corpus of sample `index` (counted from zero), and which of its samples that is."""
        period, offset = divmod(index, BLEND_PERIOD)
        corpus = int(self._corpus[offset])
        return corpus, period * int(self.shares[corpus]) + int(self._rank[offset])


def _greedy_period(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One period of the greedy rule in integers: (corpus, rank within it), each (BLEND_PERIOD,)."""
    corpus = np.zeros(BLEND_PERIOD, dtype=np.int32)
    rank = np.zeros(BLEND_PERIOD, dtype=np.int64)
    if len(shares) == 1:
        return corpus, np.arange(BLEND_PERIOD)
    owed = np.zeros_like(shares)  # BLEND_PERIOD * (weight * i - drawn)
    drawn = np.zeros_like(shares)
    for offset in range(BLEND_PERIOD):
        owed += shares
        chosen = int(owed.argmax())
        corpus[offset] = chosen
        rank[offset] = drawn[chosen]
        drawn[chosen] += 1
        owed[chosen] -= BLEND_PERIOD
    return corpus, rank
