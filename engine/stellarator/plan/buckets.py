"""How the parameters of a rank lie in buckets, as `parallel.buckets.plan` puts them there.

defines: Bucket, buckets_of
"""

from dataclasses import dataclass
from functools import lru_cache

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


def buckets_of(case: Case, rank: int) -> list[Bucket]:
    """Of a pipeline rank; the embedding is in the last one.

    One process has one bucket. With ZeRO 3 a layer is a bucket and so is the rest; else a bucket
    ends behind the parameter that makes its gradients `parallel.bucket_mib` or more.
    """
    model, parallel = case.model, case.parallel
    own = [stage for stage in case.stages if stage.rank == rank]
    layers = sum(stage.num_layers for stage in own)
    layer = _layer(model, case.layout.tp, parallel.sp)
    first, last = any(s.first for s in own), any(s.last for s in own)
    before, behind = _ends(model, case.layout.tp, parallel.sp, first, last)
    if case.replicas == 1:
        return [sum([*before, *layer * layers, *behind], Bucket())]
    if parallel.zero == 3:
        return [sum(layer, Bucket())] * layers + [sum([*before, *behind], Bucket())]
    limit, size = int(parallel.bucket_mib * 2**20), case.state_bytes["gradients"]
    found = [Bucket()]
    for parameter in reversed([*before, *layer * layers, *behind]):
        if found[-1].whole * size >= limit:
            found.append(Bucket())
        found[-1] += parameter
    return found


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
