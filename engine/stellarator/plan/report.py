"""A plan in words.

defines: plan_lines, search_lines
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import fields

from stellarator import sizes
from stellarator.plan.case import Case
from stellarator.plan.estimate import Machine, Plan
from stellarator.plan.memory import Memory
from stellarator.plan.search import Found

_KINDS = [field.name for field in fields(Memory)]
_AXES = {"tp": "tensor", "cp": "context", "pp": "pipeline", "dp": "data"}


def plan_lines(plan: Plan, given: Collection[str] = ()) -> list[str]:
    """What `stellarator plan` prints.

    Args:
        plan: from `make_plan`.
        given: names of the machine's figures that the user gave; the others are assumed.
    """
    return [
        *_head(plan.case),
        "",
        *_memory(plan),
        "",
        *_pipeline(plan),
        "",
        *_traffic(plan),
        "",
        *_time(plan),
        "",
        *machine_lines(plan.machine, given),
    ]


def _head(case: Case) -> Iterator[str]:
    config, layout = case.config, case.layout
    train, total = config.train, sizes.num_parameters(case.model)
    yield f"{config.name}: {total:,} parameters, {train.precision}, recompute {train.recompute}"
    yield f"layout of {layout.size} GPUs: {_layout(case)}"
    yield (
        f"step: {train.global_batch_size} rows of {config.data.seq_length:,} tokens = "
        f"{case.step_tokens:,} tokens; {case.num_micro_batches} micro-batches of {case.rows} "
        f"on each of {layout.dp} replicas"
    )
    counts = " ".join(str(stage.num_layers) for stage in case.stages)
    yield f"layers of the stages: {counts}"


def _layout(case: Case) -> str:
    """Sizes of the axes, shortly."""
    layout, parallel = case.layout, case.parallel
    schedule = parallel.schedule
    if parallel.stages_per_rank > 1:
        schedule += f" x {parallel.stages_per_rank} stages"
    words = [f"tp {layout.tp}" + (" with sp" if parallel.sp else ""), f"cp {layout.cp}"]
    words[-1] += f" ({parallel.cp_form})" if layout.cp > 1 else ""
    words += [f"pp {layout.pp}" + (f" ({schedule})" if layout.pp > 1 else ""), f"dp {layout.dp}"]
    return ", ".join([*words, f"zero {parallel.zero}"])


def _memory(plan: Plan) -> Iterator[str]:
    """One line for each pipeline rank, one column for each kind."""
    yield "memory of a GPU, GiB, by pipeline rank"
    yield "rank " + "".join(f"{kind:>13}" for kind in (*_KINDS, "total")) + "  parameters held"
    for rank, memory in enumerate(plan.memory):
        values = [*(getattr(memory, kind) for kind in _KINDS), memory.total]
        row = "".join(f"{value / 2**30:>13.2f}" for value in values)
        yield f"{rank:>4} {row}  {plan.case.parameters(rank):,}"
    machine = plan.machine
    room = machine.memory_gib - machine.reserve_gib
    yield (
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {machine.memory_gib:g} GiB less "
        f"{machine.reserve_gib:g} for what is not counted leave {room:g}"
    )


def _pipeline(plan: Plan) -> Iterator[str]:
    case, found = plan.case, plan.simulation
    yield (
        f"bubble: {_percent(found.bubble)} of the busiest rank's work with these stages; "
        f"{_percent(plan.schedule_bubble)} if all were alike and messages took no time"
    )
    idle = " ".join(_percent(idle / found.makespan) for idle in found.idle)
    yield f"idle by pipeline rank, of the pipeline's time: {idle}"
    if case.layout.pp > 1:
        most = max(found.peak_messages.values(), default=0)
        yield (
            f"messages between stages: {found.num_messages:,} in all, at most {most} of a link "
            "sent and not yet used"
        )


def _traffic(plan: Plan) -> Iterator[str]:
    """For each axis and purpose the pipeline rank that sends most."""
    yield "sent by a GPU in a step, by the pipeline rank that sends most"
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for traffic in (t for own in plan.traffic for t in own):
        key = traffic.axis, traffic.purpose
        rows[key] = max(rows.get(key, (0, 0)), (traffic.num_bytes, traffic.num_messages))
    for axis, purpose in sorted(rows, key=lambda key: list(_AXES).index(key[0])):
        num_bytes, num_messages = rows[axis, purpose]
        gbps = plan.machine.bandwidth(plan.case, axis) / 1e9
        yield (
            f"{_AXES[axis]:>9} {purpose:<33} {num_bytes / 2**30:>10.3f} GiB "
            f"{num_messages:>8,} messages at {gbps:g} GB/s"
        )
    if not rows:
        yield "     none"


def _time(plan: Plan) -> Iterator[str]:
    case, seconds = plan.case, plan.step_seconds
    rate, tokens = case.step_tokens / seconds, case.step_tokens
    yield f"model FLOPs of a step: {plan.model_flops:.4g} = {sizes.FORMULA}"
    yield (
        f"step: {seconds:.4g} s = pipeline {plan.simulation.makespan:.4g} + replicas "
        f"{plan.replicas_seconds:.4g} + optimizer {plan.optimizer_seconds:.4g}"
    )
    yield (
        f"      {rate:,.0f} tokens/s, {rate / case.layout.size:,.0f} a GPU, MFU "
        f"{_percent(plan.mfu)}; {case.config.train.steps:,} steps, "
        f"{case.config.train.steps * tokens:,} tokens in "
        f"{case.config.train.steps * seconds / 86400:.1f} days"
    )
    yield "      a stage's action: FLOPs / (tflops * efficiency) + tensor and context bytes / link;"
    yield "      its message, replicas, optimizer: bytes / bandwidth; nothing sent is hidden"


def machine_lines(machine: Machine, given: Collection[str]) -> Iterator[str]:
    """Its figures: those that were given, then those that are assumed."""
    names = [field.name for field in fields(machine)]
    for word, chosen in (
        ("given", [name for name in names if name in given]),
        ("assumed, not measured", [name for name in names if name not in given]),
    ):
        if chosen:
            figures = ", ".join(f"{name} {getattr(machine, name):g}" for name in chosen)
            yield f"{word}: {figures}"


def search_lines(found: Found, machine: Machine, given: Collection[str] = ()) -> list[str]:
    """What `stellarator plan --search` prints; arguments as in `plan_lines`."""
    lines = [
        f"{found.num_tried:,} layouts work, {found.num_refused:,} do not; of those that were "
        f"simulated {found.num_too_large:,} do not fit",
    ]
    if not found.plans and not found.num_tried:
        lines.append(f"none works; most of them lack the same: {found.why}")
    elif not found.plans:
        lines.append("none fits: try train.micro_batch_size=1, train.recompute=full, or more GPUs")
    for plan in found.plans:
        case = plan.case
        most = max(memory.total for memory in plan.memory) / 2**30
        bubble, sp = _percent(plan.simulation.bubble), " --sp" if case.parallel.sp else ""
        lines.append(
            f"{plan.step_seconds:>9.4g} s  MFU {_percent(plan.mfu)}  {math.ceil(most):>3} GiB  "
            f"bubble {bubble:>6}  --tp {case.layout.tp}{sp} --cp {case.layout.cp} "
            f"--pp {case.layout.pp} --schedule {case.parallel.schedule} "
            f"--stages-per-rank {case.parallel.stages_per_rank} --zero {case.parallel.zero}"
        )
    return [*lines, *machine_lines(machine, given)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
