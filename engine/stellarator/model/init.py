"""Initial weights that depend on (seed, parameter name, element) and on nothing else.

defines: normal, initialize, initialize_, build_model

Element i of a parameter is a function of (seed, name, i): a rank of any layout draws just the slice
it holds, in any order, and gets the same bits as a single process would. The numbers come from
Philox4x64, a counter-based generator, through the inverse of the normal distribution function,
which is written with + - * / and sqrt only: those are exactly rounded on every machine, whereas log
and cos differ by a bit from one mathematics library to the next.

Rule: weights of products and embeddings N(0, init_std); the two output projections of a layer
N(0, init_std / sqrt(2 L)); biases 0; norms 1.

Source: Salmon et al. 2011 (Philox); Acklam's rational approximation of the inverse normal
distribution, whose relative error of 1.15e-9 is less than half a unit in the last place of fp32;
the rule is that of the public StarCoder training scripts.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from stellarator.config import ModelConfig
from stellarator.model.transformer import Transformer
from stellarator.parallel.layout import Part
from stellarator.parallel.shard import Shard, shards_of
from stellarator.parallel.tensor import ALONE, TensorParallel

_BLOCK = 1 << 15  # elements drawn at a time: 256 KiB of float64, which stays in the L2 cache
_LOW = 0.02425  # below this probability, and above 1 - it, the tail formula holds
_CENTRE_NUMERATOR = (
    *(-3.969683028665376e01, 2.209460984245205e02, -2.759285104469687e02),
    *(1.383577518672690e02, -3.066479806614716e01, 2.506628277459239e00),
)
_CENTRE_DENOMINATOR = (
    *(-5.447609879822406e01, 1.615858368580409e02, -1.556989798598866e02),
    *(6.680131188771972e01, -1.328068155288572e01, 1.0),
)
_TAIL_NUMERATOR = (
    *(-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e00),
    *(-2.549732539343734e00, 4.374664141464968e00, 2.938163982698783e00),
)
_TAIL_DENOMINATOR = (
    *(7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e00),
    *(3.754408661907416e00, 1.0),
)


def build_model(
    config: ModelConfig,
    *,
    device="cpu",
    dtype: torch.dtype | None = None,
    seed: int = 1234,
    kernels: str = "auto",
    recompute: str = "none",
    tp: TensorParallel = ALONE,
    part: Part | None = None,
) -> Transformer:
    """A model with fresh weights.

    Args:
        config: its shape.
        device: where; on "meta" there are shapes and no values.
        dtype: of the parameters; None: float32. Weights are drawn in float32 and rounded once.
        seed: of the weights.
        kernels, recompute, tp, part: see `Transformer`.
    Raises:
        ValueError: the configuration contradicts itself.
    Cost: 14 ns a weight on one core (measured), so 40 s for three billion.
        Memory of the model and of one parameter in float32.
    """
    to = {"device": device, "dtype": dtype or torch.float32}
    model = Transformer(config, kernels, recompute, tp, part, **to)
    if torch.device(device).type != "meta":
        initialize(model, seed)
    return model


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Set every parameter by the rule of this module."""
    shards = shards_of(model)
    for name, parameter in model.named_parameters():
        initialize_(model.config, seed, name, shards[name], parameter)


def initialize_(
    config: ModelConfig, seed: int, name: str, shard: Shard, values: torch.Tensor
) -> None:
    """Set what of one parameter is here by the rule of this module."""
    std = _std(name, config)
    if std is None:
        values.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    # numpy lets go of the interpreter inside its loops, so threads do help.
    draw, at, flat = partial(normal, name, seed, std), 0, values.view(-1)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for part in pool.map(draw, *zip(*_pieces(shard), strict=True)):
            flat[at : at + len(part)] = torch.from_numpy(part)
            at += len(part)


def _pieces(shard: Shard) -> Iterator[tuple[int, int]]:
    """(start, count) of pieces of the whole parameter that make up this rank's part, in order."""
    for first, total in shard.runs():
        for start in range(first, first + total, 32 * _BLOCK):
            yield start, min(32 * _BLOCK, first + total - start)


def _std(name: str, config: ModelConfig) -> float | None:
    """Standard deviation of a parameter; None for those that are not random."""
    if name.endswith("bias") or "norm." in name:
        return None
    if name.endswith((".attention.out.weight", ".mlp.down.weight")):
        return config.init_std / (2 * config.num_layers) ** 0.5
    return config.init_std


def normal(name: str, seed: int, std: float, start: int, count: int) -> np.ndarray:
    """Elements start .. start + count - 1 of the parameter `name`, drawn from N(0, std^2).

    Args:
        name: of the parameter as a whole, whatever part of it is wanted.
        seed: of the run.
        std: standard deviation.
        start, count: the slice, in elements of the flattened parameter.
    Returns:
        (count,) float32.
    Cost: 14 ns an element on one core (measured); nothing for what lies before `start`.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    generator = np.random.Philox(key=key)
    generator.advance(start // 4)  # a count of blocks of four numbers
    skip = start % 4
    values = np.empty(count, dtype=np.float32)
    generator.random_raw(skip)  # moves on within the block
    for at in range(0, count, _BLOCK):
        part = values[at : at + _BLOCK]
        raw = generator.random_raw(len(part))
        # The middles of 2^52 equal steps: never 0 or 1, and exact in float64.
        uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        part[:] = _inverse_normal(uniform) * std
    return values


def _inverse_normal(p: np.ndarray) -> np.ndarray:
    """x with P(N(0, 1) <= x) = p, for p in (0, 1), float64."""
    q = p - 0.5
    r = q * q
    x = _polynomial(_CENTRE_NUMERATOR, r) * q / _polynomial(_CENTRE_DENOMINATOR, r)
    tail = np.flatnonzero(np.abs(q) > 0.5 - _LOW)
    outer = q[tail]
    t = np.sqrt(-2.0 * _log(0.5 - np.abs(outer)))
    far = _polynomial(_TAIL_NUMERATOR, t) / _polynomial(_TAIL_DENOMINATOR, t)
    x[tail] = np.where(outer < 0, far, -far)
    return x


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """Horner's rule, highest power first."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y *= x
        y += coefficient
    return y


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm by exactly rounded operations: exponent, then the series of atanh."""
    mantissa, exponent = np.frexp(x)  # mantissa in [0.5, 1)
    small = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(small, 2 * mantissa, mantissa), exponent - small
    s = (mantissa - 1.0) / (mantissa + 1.0)  # |s| < 0.172
    series = _polynomial(tuple(1.0 / n for n in range(17, 0, -2)), s * s)
    return exponent * 0.6931471805599453 + 2.0 * s * series
