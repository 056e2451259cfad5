"""How the parameters of a rank lie in buckets, as `parallel.buckets.plan` puts them there.

defines: Bucket, buckets_of, made_together
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from stellarator import sizes
from stellarator.config import ModelConfig
from stellarator.plan.case import Case


@dataclass(frozen=True)
class Bucket:
    """Numbers of elements.

    whole: of the parameters over all tensor ranks; by it a bucket is full.
    here: on one tensor rank.
    shared: of the sum over the tensor ranks of what several of them hold shares of: a place for
        each different piece.
    """

    whole: int = 0
    here: int = 0
    shared: int = 0

    def __add__(self, other: "Bucket") -> "Bucket":
        return Bucket(self.whole + other.whole, self.here + other.here, self.shared + other.shared)


# Of a layer from its end, how many parameters one op makes the gradients of: the MLP with its norm,
# attention's last product, its first one with its norm. Of tensor ranks: each product, without its
# bias where that is behind a sum, and the norms.
_OPS = (6, 2, 4)
_OPS_APART = (1, 1, 2, 2, 1, 1, 2, 2)


def buckets_of(case: Case, rank: int) -> list[Bucket]:
    """Of a pipeline rank; the embedding is in the last one.

    One process has one bucket. With ZeRO 3 a layer is a bucket and so is the rest; else a bucket
    ends behind the parameter that makes its gradients `parallel.bucket_mib` or more.
    """
    before, layers, behind = _parameters(case, rank)
    if case.replicas == 1:
        return [sum([*before, *(p for layer in layers for p in layer), *behind], Bucket())]
    if case.parallel.zero == 3:
        return [sum(layer, Bucket()) for layer in layers] + [sum([*before, *behind], Bucket())]
    filled = groupby(_filled(case, rank), lambda place: place[0])
    return [sum((parameter for _, _, parameter in places), Bucket()) for _, places in filled]


def made_together(case: Case, rank: int) -> list[tuple[int, int]]:
    """Of each op that makes gradients, in their order, the first and the last bucket of these.

    Not of ZeRO 3, where a layer is a bucket.
    """
    ops = groupby(_filled(case, rank), lambda place: place[1])
    spans = [[index for index, _, _ in places] for _, places in ops]
    return [(span[0], span[-1]) for span in spans]


def _parameters(case: Case, rank: int) -> tuple[list, list, list]:
    """Before the layers, of each layer, and behind them."""
    model, sp, tp = case.model, case.parallel.sp, case.layout.tp
    own = [stage for stage in case.stages if stage.rank == rank]
    first, last = any(s.first for s in own), any(s.last for s in own)
    before, behind = _ends(model, tp, sp, first, last)
    return before, [_layer(model, tp, sp)] * sum(stage.num_layers for stage in own), behind


def _filled(case: Case, rank: int) -> Iterator[tuple[int, int, Bucket]]:
    """(bucket, number of the op that makes its gradient, parameter), the last parameter first."""
    before, layers, behind = _parameters(case, rank)
    apart = case.layout.tp > 1
    ops = [1] * max(0, len(behind) - 2) + [2] * bool(behind)  # the head, the last norm
    ops += (_OPS_APART if apart else _OPS) * len(layers)
    ops += [1] * len(before) if apart else [len(before)]
    numbers = [number for number, count in enumerate(ops) for _ in range(count)]
    limit, size = int(case.parallel.bucket_mib * 2**20), case.state_bytes["gradients"]
    index = filled = 0
    every = reversed([*before, *(p for layer in layers for p in layer), *behind])
    for number, parameter in zip(numbers, every, strict=True):
        if filled * size >= limit:
            index, filled = index + 1, 0
        filled += parameter.whole
        yield index, number, parameter


@lru_cache
def _layer(model: ModelConfig, tp: int, sp: bool) -> tuple[Bucket, ...]:
    """Parameters of a layer, in their order."""
    C, F, D, G = model.width, model.ffn_width, model.head_width, model.num_kv_heads
    of_all = (model.num_heads + 2 * G) * D  # outputs of the projection
    here = (model.num_heads // tp + 2 * max(1, G // tp)) * D
    copied = 2 * G * D if tp > G else 0
    vector = Bucket(C, C, C if sp else 0)
    norm = (vector, vector)
    return (
        *norm,
        Bucket(of_all * C, here * C, copied * C),
        Bucket(of_all, here, copied),
        Bucket(C * C, C * C // tp),
        vector,
        *norm,
        Bucket(F * C, F // tp * C),
        Bucket(F, F // tp),
        Bucket(C * F, C * F // tp),
        vector,
    )


def _ends(model: ModelConfig, tp: int, sp: bool, first: bool, last: bool) -> tuple[list, list]:
    """Parameters before and behind the layers."""
    matrix = Bucket(model.vocab_size * model.width, sizes.embedding_parameters(model, tp))
    positions, C = sizes.position_parameters(model), model.width
    before = [matrix] * (first or (last and model.tie_embeddings))
    if first and positions:
        before.append(Bucket(positions, positions, positions if sp else 0))
    behind = [Bucket(C, C, C if sp else 0)] * 2 * last
    return before, behind + [matrix] * (last and not model.tie_embeddings)
