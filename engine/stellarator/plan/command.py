"""The verb `stellarator plan`.

defines: run
"""

from dataclasses import fields

from stellarator.config import ParallelConfig, RunConfig
from stellarator.parallel.pipeline.schedules import default_stages_per_rank
from stellarator.plan.case import make_case
from stellarator.plan.estimate import Machine, make_plan
from stellarator.plan.report import plan_lines, search_lines
from stellarator.plan.search import search


def run(
    config: RunConfig,
    num_gpus: int,
    parallel: dict[str, object],
    figures: dict[str, float],
    top: int | None = None,
) -> tuple[list[str], bool]:
    """The lines of a plan, or of a search, and whether it fits the GPUs, or anything does.

    Args:
        config: of the run.
        num_gpus: all of them.
        parallel: the layout, values of ParallelConfig; None or false: the default one. Where all
            are, the layout is that of `config`; what is not named here always is.
        figures: of the machine, by the names of `Machine`; the others are assumed.
        top: how many layouts of a search to print; None: no search, plan the one of `parallel`.
    Raises:
        ValueError: the layout cannot work, with every reason; or a search was given a layout.
    """
    chosen = {n: value for n, value in parallel.items() if value is not None and value is not False}
    machine = Machine(**figures)
    if top is not None:
        if chosen:
            raise ValueError(
                f"plan: expected --search or a layout, got both: {', '.join(sorted(chosen))}. "
                "Leave out one of them."
            )
        found = search(config, num_gpus, machine, top)
        return search_lines(found, machine, figures), bool(found.plans)
    layout = config.parallel
    if chosen:
        fewest = default_stages_per_rank(str(chosen.get("schedule", "1f1b")))
        others = {f.name: getattr(layout, f.name) for f in fields(layout) if f.name not in parallel}
        layout = ParallelConfig(**{"stages_per_rank": fewest, **others, **chosen})
    plan = make_plan(make_case(config, layout, num_gpus), machine)
    return plan_lines(plan, figures), plan.fits
