"""Learning-rate schedules. Pure functions of the step; standard library only.

defines: learning_rate

Steps count from 1: the first update of a run is step 1.
"""

import math

from stellarator.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of the update number `step` (1 is the first).

    Warm-up: lr * step / w for step <= w. Then, with d = decay_steps or total_steps:
    cosine: min + (1 + cos(pi r)) / 2 * (lr - min), r = (step - w) / (d - w); min after d.
    wsd: lr until the tail, then from lr to min over the last d steps of the run
    (d = decay_steps, or a fifth of the run), linear, cosine or 1 - sqrt.
    constant: lr.

    Args:
        step: >= 1.
        config: lr, min_lr, schedule, warmup_steps, decay_steps, wsd_shape.
        total_steps: length of the run, in steps.
    Returns:
        the rate; 0 <= rate <= lr.
    Source: Megatron-LM's rule for cosine, as used for StarCoder; WSD: Hu et al. 2024,
        arXiv:2404.06395; 1 - sqrt tail: Haegele et al. 2024, arXiv:2405.18392.
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    span = config.lr - config.min_lr
    if config.schedule == "cosine":
        end = config.decay_steps or total_steps
        if step >= end:
            return config.min_lr
        ratio = (step - warmup) / (end - warmup)
        return config.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * span
    tail = config.decay_steps or max(1, total_steps // 5)
    start = max(warmup, total_steps - tail)
    if step <= start:
        return config.lr
    ratio = min(1.0, (step - start) / (total_steps - start))
    return config.min_lr + span * _tail(config.wsd_shape, ratio)


def _tail(shape: str, ratio: float) -> float:
    """What is left of the height after `ratio` of the tail: 1 at 0, 0 at 1."""
    if shape == "linear":
        return 1 - ratio
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * ratio))
    return 1 - math.sqrt(ratio)
