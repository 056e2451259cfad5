"""Which layers a pipeline stage has.

defines: split_layers, layer_ranges
"""

from itertools import accumulate, pairwise


def split_layers(
    num_layers: int, num_stages: int, first_extra: float = 0, last_extra: float = 0
) -> list[int]:
    """Layers of each stage, at least one, such that the largest load is as small as it can be.

    The load of a stage is its layers, and what else it does: the first one the embedding, the last
    one the head and the loss. Among equal loads a layer goes to the later stage, which holds fewer
    activations in most schedules.

    Args:
        num_layers, num_stages: L and S, S <= L.
        first_extra, last_extra: cost of embedding and of head, in layers; at least 0.
    Raises:
        ValueError: there are fewer layers than stages, or a cost is negative.
    """
    if not 1 <= num_stages <= num_layers or min(first_extra, last_extra) < 0:
        raise ValueError(
            f"split_layers: expected 1 to {num_layers} stages for {num_layers} layers, and extra "
            f"costs of at least 0, got {num_stages}, {first_extra} and {last_extra}. "
            "Use fewer stages."
        )
    extra = [0] * num_stages
    extra[0] += first_extra
    extra[-1] += last_extra
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        # Layers are alike, so giving each to the least loaded stage minimises the largest load.
        least = min(range(num_stages), key=lambda s: (counts[s] + extra[s], -s))
        counts[least] += 1
    return counts


def layer_ranges(counts: list[int]) -> list[range]:
    """The layers of each stage, numbered through the model."""
    return [range(a, b) for a, b in pairwise(accumulate(counts, initial=0))]
