"""Keys and values of texts that are being generated.

defines: KVCache

Rows grow on their own: row b holds `lengths[b]` tokens at the start of its S places, so a batch of
prompts of different lengths is filled right-padded in one pass and then cut back with `truncate`.
What lies behind a row's length is never read and is written over.

Letters: L layers, B rows, S places (`max_length`), G key/value heads, D head width.
"""

import torch

from stellarator.config import ModelConfig


class KVCache:
    """Memory: 2 * L * B * S * G * D elements; for StarCoder (G = 1) 48 times less than for H heads.

    Args:
        config: shape of the model.
        batch: B.
        max_length: S, tokens that a row can hold.
        dtype, device: of the model.
    """

    def __init__(self, config: ModelConfig, batch: int, max_length: int, dtype, device):
        shape = (config.num_layers, batch, max_length, config.num_kv_heads, config.head_width)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0  # upper bound of `lengths`, known without asking the device

    @property
    def empty(self) -> bool:
        """Whether no row holds a token."""
        return self.longest == 0

    def check_room(self, tokens: int) -> None:
        """Raise ValueError unless every row can take this many tokens more."""
        S = self.k.shape[2]
        if self.longest + tokens > S:
            raise ValueError(
                f"KVCache: expected at most {S} tokens in a row, got {self.longest} + {tokens}. "
                "Make the cache with a larger max_length."
            )

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k, v (B, T, G, D) of one layer behind each row's length, which stays as it is."""
        T = k.shape[1]
        if self.empty:
            self.k[layer, :, :T], self.v[layer, :, :T] = k, v
            return
        places = self.lengths[:, None] + torch.arange(T, device=k.device)  # (B, T)
        rows = torch.arange(len(places), device=k.device)[:, None]
        self.k[layer].index_put_((rows, places), k)
        self.v[layer].index_put_((rows, places), v)

    def advance(self, tokens: int) -> None:
        """All layers have taken `tokens` more in every row."""
        self.lengths = self.lengths + tokens
        self.longest += tokens

    def truncate(self, lengths: torch.Tensor) -> None:
        """Cut rows back to `lengths` (B,): what follows, such as padding, is forgotten."""
        self.lengths = torch.minimum(self.lengths, lengths.to(self.lengths))
        self.longest = int(self.lengths.max())

    def keep(self, rows: list[int]) -> None:
        """Leave out all rows but these."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.k, self.v = self.k[:, index], self.v[:, index]
        self.lengths = self.lengths[index]
        self.longest = int(self.lengths.max()) if rows else 0
