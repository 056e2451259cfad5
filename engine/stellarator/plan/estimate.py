"""How long a step takes on a machine whose figures are given or assumed.

defines: Machine, Plan, make_plan, stage_costs, replicas_seconds, optimizer_seconds

    step      = pipeline + replicas + optimizer
    pipeline  = makespan of the simulated schedule
    duration  of a stage's forward, input gradient, weight gradient:
                FLOPs / (peak * efficiency) + bytes on the tensor and context axes / bandwidth
    latency   of a message = its bytes / bandwidth
    replicas  = bytes on the data axis / bandwidth, and the tied embedding's
    optimizer = bytes of masters, moments, gradients and parameters / memory bandwidth

No communication is hidden behind computation, so an engine that overlaps both is faster.
"""

from dataclasses import dataclass, fields
from functools import cached_property

from stellarator import sizes
from stellarator.parallel.layout import AXES
from stellarator.parallel.pipeline.schedules import make
from stellarator.parallel.pipeline.simulate import Costs, Simulation, simulate
from stellarator.plan.case import Case, Stage
from stellarator.plan.memory import Memory, memory_of, stage_activation_bytes, stage_deferred_bytes
from stellarator.plan.traffic import Traffic, layer_traffic, message_bytes, traffic_of


@dataclass(frozen=True)
class Machine:
    """Figures of one GPU and its links; the defaults are assumptions, an A100-80GB's data sheet."""

    tflops: float = 312.0  # dense peak in the run's precision
    efficiency: float = 0.5  # share of the peak that layers reach, norms and gelu included
    hbm_gbps: float = 2039.0  # memory bandwidth, GB/s
    memory_gib: float = 80.0
    reserve_gib: float = 6.0  # context, libraries, gaps
    link_gbps: float = 300.0  # GB/s that a GPU sends to others of its node
    network_gbps: float = 25.0  # GB/s that a GPU sends to other nodes
    gpus_per_node: int = 8

    def bandwidth(self, case: Case, axis: str) -> float:
        """Bytes per second of a ring on an axis: of the network where it leaves the node."""
        reach = 1  # ranks from the first to the last of a group, all faster axes included
        for name in AXES[: AXES.index(axis) + 1]:
            reach *= getattr(case.layout, name)
        gbps = self.link_gbps if reach <= self.gpus_per_node else self.network_gbps
        return gbps * 1e9


@dataclass(frozen=True)
class Plan:
    """What a run needs and how long a step takes."""

    case: Case
    machine: Machine
    simulation: Simulation  # in seconds and bytes
    memory: list[Memory]  # of a GPU of each pipeline rank
    traffic: list[list[Traffic]]  # the same
    replicas_seconds: float
    optimizer_seconds: float

    @property
    def step_seconds(self) -> float:
        """Of one optimizer step."""
        return self.simulation.makespan + self.replicas_seconds + self.optimizer_seconds

    @cached_property
    def model_flops(self) -> int:
        """Of one step: what the model needs, each row one document."""
        config, rows = self.case.config, self.case.config.train.global_batch_size
        pairs = sizes.row_pairs(config.model, config.data.seq_length)
        return sizes.model_flops(config.model, self.case.step_tokens, rows * pairs)

    @property
    def mfu(self) -> float:
        """Share of the peak of all GPUs that goes into `model_flops`."""
        peak = self.case.layout.size * self.machine.tflops * 1e12
        return self.model_flops / (self.step_seconds * peak)

    @property
    def fits(self) -> bool:
        """Whether every rank's memory is enough."""
        room = (self.machine.memory_gib - self.machine.reserve_gib) * 2**30
        return max(memory.total for memory in self.memory) <= room

    @cached_property
    def schedule_bubble(self) -> float:
        """That of the schedule itself: all stages alike, F = B = W, messages take no time."""
        uniform = Costs.uniform(len(self.case.stages))
        return simulate(_schedule(self.case), uniform).bubble


def make_plan(case: Case, machine: Machine) -> Plan:
    """Simulates a step.

    Args:
        case: from `make_case`.
        machine: its figures.
    Raises:
        ValueError: a figure of the machine is not above 0.
    """
    for field in fields(machine):
        value = getattr(machine, field.name)
        if not value > 0 and field.name != "reserve_gib":
            raise ValueError(f"plan: expected {field.name} above 0, got {value}. Give a figure.")
    simulation = simulate(_schedule(case), stage_costs(case, machine))
    ranks = range(case.layout.pp)
    traffic = [traffic_of(case, rank) for rank in ranks]
    return Plan(
        case,
        machine,
        simulation,
        [memory_of(case, rank, simulation) for rank in ranks],
        traffic,
        replicas_seconds(case, machine),
        optimizer_seconds(case, machine),
    )


def _schedule(case: Case):
    parallel = case.parallel
    m, v = case.num_micro_batches, parallel.stages_per_rank
    return make(parallel.schedule, parallel.pp, m, v)


def replicas_seconds(case: Case, machine: Machine) -> float:
    """What is sent behind the pipeline, by the rank that sends longest."""
    slowest = 0.0
    for rank in range(case.layout.pp):
        own = traffic_of(case, rank)
        seconds = sum(t.num_bytes for t in own if t.axis == "dp") / machine.bandwidth(case, "dp")
        tied = sum(t.num_bytes for t in own if t.purpose.endswith("tied embedding"))
        slowest = max(slowest, seconds + tied / machine.bandwidth(case, "pp"))
    return slowest


def optimizer_seconds(case: Case, machine: Machine) -> float:
    """AdamW and the norm: the gradients are read twice, all else is read and written once."""
    state, layout = case.state_bytes, case.layout
    count = max(case.parameters(rank) for rank in range(layout.pp))
    if case.parallel.zero:
        count = -(-count // case.replicas)
    if case.config.optim.weights == "masters" and state["masters"]:
        weights = 2 * state["masters"] + state["parameters"]  # parameters are written only
    else:
        weights = 2 * (state["masters"] + state["parameters"])
    each = weights + 2 * state["moments"] + 2 * state["gradients"]
    return count * each / (machine.hbm_gbps * 1e9)


def stage_costs(case: Case, machine: Machine) -> Costs:
    """Seconds of each stage's actions, of one message, and bytes of what it holds."""
    pairs = case.rows * sizes.row_pairs(case.model, case.config.data.seq_length) / case.layout.cp
    durations = [_stage_seconds(case, machine, stage, pairs) for stage in case.stages]
    latency = message_bytes(case) / machine.bandwidth(case, "pp") if case.layout.pp > 1 else 0.0
    activation = [stage_activation_bytes(case, stage) for stage in case.stages]
    deferred = [stage_deferred_bytes(case, stage) for stage in case.stages]
    held = {"activation": activation, "deferred": deferred}
    return Costs(*zip(*durations, strict=True), latency=latency, **held)


def _stage_seconds(case: Case, machine: Machine, stage: Stage, pairs: float):
    """(forward, input gradient, weight gradient) of one micro-batch.

    The loss computes the head's gradients in its forward, so all of its products are there.
    Attention has two products per pair forward and five back.
    """
    model, tp, N = case.model, case.layout.tp, case.tokens
    products = 2 * N * sizes.layer_matmul_parameters(model, tp)
    attention = 4 * model.head_width * (model.num_heads // tp) * pairs
    up = 2 * N * model.width * (model.ffn_width // tp)
    again = {"none": 0, "full": products + attention, "selective": up}
    flops = [
        products + attention,
        products + 2.5 * attention + again[case.config.train.recompute],
        products,
    ]
    flops = [stage.num_layers * each for each in flops]
    if stage.last:
        flops[0] += 6 * N * sizes.embedding_parameters(model, tp)
    rate = machine.tflops * 1e12 * machine.efficiency
    seconds = [each / rate for each in flops]
    for index, direction in enumerate(("forward", "backward")):
        sent = layer_traffic(case, direction)
        each = sent.tp_bytes / machine.bandwidth(case, "tp")
        each += sent.cp_bytes / machine.bandwidth(case, "cp")
        seconds[index] += stage.num_layers * each
    return seconds
