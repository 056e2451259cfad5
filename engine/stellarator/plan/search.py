"""All layouts of so many GPUs, and the fastest of those that fit.

defines: Found, search, layouts
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stellarator.config import ParallelConfig, RunConfig
from stellarator.parallel.pipeline.schedules import default_stages_per_rank
from stellarator.plan.case import Case, make_case
from stellarator.plan.estimate import (
    Machine,
    Plan,
    make_plan,
    optimizer_seconds,
    replicas_seconds,
    stage_costs,
)
from stellarator.settings import ConfigError

_SCHEDULES = ("1f1b", "interleaved", "zb_h1", "zb_v")  # gpipe is 1f1b with more memory
_STAGES_PER_RANK = (2, 4)  # tried for interleaved


@dataclass(frozen=True)
class Found:
    """The fastest plans that fit, and how many layouts there were."""

    plans: list[Plan]
    num_tried: int  # that work at all
    num_refused: int
    num_too_large: int  # of those that were simulated
    why: str = ""  # what most of the refused lack


def search(config: RunConfig, num_gpus: int, machine: Machine, top: int = 5) -> Found:
    """The `top` fastest layouts that fit; rows of a micro-batch and recomputation are the recipe's.

    Of layouts that differ in `sp` and `zero` alone the fastest is kept. No layout is faster than
    its busiest rank's work, so in the order of that the simulation can stop early.

    Raises:
        ValueError: the machine's figures are not above 0.
    """
    cases, refused, too_large = [], Counter(), 0
    for parallel in layouts(config, num_gpus):
        try:
            cases.append(make_case(config, parallel, num_gpus))
        except ConfigError as error:
            refused.update([error.problems[0]])
    bounds = sorted(
        ((_least_seconds(case, machine), index) for index, case in enumerate(cases)),
    )
    best: dict[tuple, Plan] = {}
    for least, index in bounds:
        fastest = sorted(plan.step_seconds for plan in best.values())
        if len(fastest) >= top and least >= fastest[top - 1]:
            break
        plan, key = make_plan(cases[index], machine), _key(cases[index])
        if not plan.fits:
            too_large += 1
        elif key not in best or _order(plan) < _order(best[key]):
            best[key] = plan
    why = refused.most_common(1)[0][0] if refused else ""
    plans = sorted(best.values(), key=_order)[:top]
    return Found(plans, len(cases), refused.total(), too_large, why)


def layouts(config: RunConfig, num_gpus: int) -> Iterator[ParallelConfig]:
    """Every way to share out the GPUs, also such that do not work."""
    small = [n for n in range(1, math.isqrt(num_gpus) + 1) if num_gpus % n == 0]
    divisors = sorted({*small, *(num_gpus // n for n in small)})
    for tp in (n for n in divisors if config.model.num_heads % n == 0):
        for pp in (n for n in divisors if (num_gpus // tp) % n == 0):
            if pp > config.model.num_layers:
                continue
            for cp in (n for n in divisors if (num_gpus // tp // pp) % n == 0):
                dp = num_gpus // tp // pp // cp
                for schedule, v in _ways(pp):
                    for sp in (False, True)[: 1 if tp == 1 else 2]:
                        for zero in range(4 if dp * cp > 1 else 1):
                            named = {"tp": tp, "sp": sp, "pp": pp, "stages_per_rank": v}
                            named |= {"schedule": schedule, "cp": cp, "zero": zero}
                            yield replace(config.parallel, **named)


def _ways(pp: int) -> Iterator[tuple[str, int]]:
    """(schedule, stages per rank)."""
    for schedule in _SCHEDULES if pp > 1 else ("1f1b",):
        if schedule == "interleaved":
            yield from ((schedule, v) for v in _STAGES_PER_RANK)
        else:
            yield schedule, default_stages_per_rank(schedule)


def _key(case: Case) -> tuple:
    """What tells layouts apart in the result."""
    parallel = case.parallel
    return case.layout, parallel.schedule, parallel.stages_per_rank


def _order(plan: Plan) -> tuple:
    return plan.step_seconds, max(memory.total for memory in plan.memory)


def _least_seconds(case: Case, machine: Machine) -> float:
    """A step is never shorter: the work of the busiest rank and what is behind the pipeline."""
    costs = stage_costs(case, machine)
    work = [0.0] * case.layout.pp
    for stage in case.stages:
        index = stage.index
        each = costs.forward[index] + costs.input_gradient[index] + costs.weight_gradient[index]
        work[stage.rank] += each * case.num_micro_batches
    return max(work) + replicas_seconds(case, machine) + optimizer_seconds(case, machine)
