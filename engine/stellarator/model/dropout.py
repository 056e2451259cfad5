"""Which elements a forward pass drops: a function of a seed and of global token numbers.

defines: Dropout, Masks

A mask depends neither on how a step is cut into micro-batches and ranks nor on what is computed
again: an element is known by its token, the place in the model, and its channel.

Letters: N tokens, L layers, C width.
"""

from dataclasses import dataclass

from stellarator.config import ModelConfig
from stellarator.parallel.rows import Cut
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator_kernels import random


@dataclass(frozen=True)
class Dropout:
    """Asks `Transformer.forward` to drop with the rates of its configuration.

    seed: of the run, 64 bits.  first_row: global number of the first row of these (B, T) tokens;
    the others follow it. Rows of all steps are counted on, so no step repeats the masks of another.
    """

    seed: int
    first_row: int


class Masks:
    """Keys of one forward pass; see stellarator_kernels.random.

    Args:
        dropout, config: what is dropped, at which rates.
        shape: (B, T) of whole rows.
        device: of the keys.
        tp, cut: the ranks that have other tokens of these rows.
    """

    def __init__(
        self,
        dropout: Dropout,
        config: ModelConfig,
        shape: tuple[int, int],
        device,
        tp: TensorParallel = ALONE,
        cut: Cut | None = None,
    ):
        B, T = shape
        self.config, self.seed, self.first_row = config, dropout.seed, dropout.first_row
        self.first_token = dropout.first_row * T
        # All rows share their keys; each place has columns of its own.
        size = (2 * config.num_layers + 1, config.width)
        rows = random.element_keys(self.seed, 2, (self.first_token,), (B * T,), device).view(B, T)
        self.rows = tp.own_tokens(rows if cut is None else cut.own(rows)).flatten()
        self.columns = random.element_keys(self.seed, 3, (0, 0), size, device)

    def embedding(self) -> dict:
        """Arguments of `dropout` for the sum of the embeddings."""
        return {"p": self.config.embedding_dropout, "keys": (self.rows, self.columns[0])}

    def residual(self, number: int) -> dict:
        """Arguments of norm `number` for the branch that it adds, counted from 1."""
        keys = (self.rows, self.columns[number])
        return {"dropout_p": self.config.residual_dropout, "dropout_keys": keys}

    def attention(self, layer: int, packed: bool, first_head: int = 0) -> dict:
        """Arguments of `flash_attention`; packed rows are one row of global token numbers."""
        token, h = self.first_token, first_head
        origin = (0, h, token, token) if packed else (self.first_row, h, 0, 0)
        seed = random.derived(self.seed, 4, layer)
        rate = self.config.attention_dropout
        return {"dropout_p": rate, "dropout_seed": seed, "dropout_origin": origin}
