"""Shapes of the ops, by the name of a model.

defines: Shape, names, get, reduced, narrow
"""

import dataclasses
import random

from benchmarks.usage import one_of
from stellarator import recipes
from stellarator.config import ModelConfig

# The model that the training step is measured with beside its recipes: 12.6 M parameters.
_SMALL = "starcoder2_12m"
# Rows and tokens of a micro-batch; models that are not listed take one row of 2,048 tokens.
_BATCH = {"demo": (16, 256), "tiny": (4, 64), _SMALL: (8, 1024)}
_DEFAULT_BATCH = (1, 2048)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one layer of a model and of one micro-batch; letters as in CONTRIBUTING.md."""

    model: str
    B: int
    T: int
    C: int
    H: int
    G: int
    F: int
    V: int
    window: int  # always below T, so that it hides something
    rope_theta: float
    parameters: int  # of the part of the model that one optimizer call updates here

    @property
    def D(self) -> int:
        """Width of one head."""
        return self.C // self.H

    @property
    def N(self) -> int:
        """Tokens of the micro-batch."""
        return self.B * self.T

    def documents(self) -> list[int]:
        """Lengths of the documents in the N tokens: none longer than T, uneven, always the same."""
        generator, lengths = random.Random(0), []
        while sum(lengths) < self.N:
            length = round(generator.lognormvariate(0, 1.0) * self.T / 4) + 1
            lengths.append(min(length, self.T, self.N - sum(lengths)))
        return lengths


def names() -> list[str]:
    """Models that have shapes: the recipes, and the one of the training benchmark."""
    return [_SMALL, *recipes.names()]


def get(
    model: str, *, tokens: int | None = None, rows: int | None = None, window: int | None = None
) -> Shape:
    """The shape of a model.

    Args:
        model: one of `names()`.
        tokens: T; None: that of the model's micro-batch here (2,048 for a large model).
        rows: B; None: likewise (1 for a large model, or where `tokens` is given).
        window: visible keys; None: those of the model if they are fewer than T, else T/4.
    """
    one_of("--model", [model], names())
    config = _config(model)
    B, T = _BATCH.get(model, _DEFAULT_BATCH)
    B = rows or (1 if tokens else B)
    T = tokens or T
    if window is None:
        window = config.window if config.window and config.window < T else max(1, T // 4)
    return Shape(
        model=model,
        B=B,
        T=T,
        C=config.width,
        H=config.num_heads,
        G=config.num_kv_heads,
        F=config.ffn_width,
        V=config.vocab_size,
        window=window,
        rope_theta=config.rope_theta,
        parameters=_parameters(config),
    )


def _config(model: str) -> ModelConfig:
    return ModelConfig(vocab_size=8192) if model == _SMALL else recipes.get(model).model


def _parameters(config: ModelConfig) -> int:
    """Of the whole model up to 50 million, of one layer of a larger one."""
    C, F = config.width, config.ffn_width
    kv = config.num_kv_heads * config.head_width
    layer = C * (2 * C + 2 * kv) + 2 * C + 2 * kv + 2 * C * F + F + C + 4 * C
    whole = config.num_layers * layer + config.vocab_size * C + 2 * C
    return whole if whole <= 50e6 else layer


def reduced(shape: Shape) -> Shape:
    """A small shape of the same kind, odd where it may be: the first check of every kernel.

    The number of query heads of a key/value head stays; two heads are enough of the latter.
    """
    G = min(shape.G, 2)
    H, D = G * (shape.H // shape.G), min(shape.D, 32)
    C = H * D
    return dataclasses.replace(
        shape, B=2, T=97, C=C, H=H, G=G, F=2 * C, V=min(shape.V, 515), window=25, parameters=10_007
    )


def narrow(shape: Shape) -> Shape:
    """One row, as long, with few heads: where the float64 reference of all is too large."""
    H = min(4, shape.H // shape.G)
    return dataclasses.replace(shape, B=1, H=H, G=1, C=H * shape.D)
