"""Every op beside its peers, checked first.

defines: Plan, Outcome, run

For each case: the float64 check at a small shape, the same at the timed shape where the reference
fits, else at its length with few heads ("narrow"); then forward and backward of ours and all peers
in turns, and the peak memory of each. A wrong implementation is named with its errors and not
timed, a case that raises is named too, and the exit code is 1.
"""

import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from benchmarks import checks, ops, peers, results, shapes
from benchmarks.cases import Calls, Case, Maker
from benchmarks.harness import Stopwatch, environment, take_turns
from benchmarks.machine import Limits, Quietness, measure_limits
from benchmarks.memory import peak_of_call
from benchmarks.points import UNTIMED
from benchmarks.usage import UsageError, one_of
from stellarator_kernels import dispatch

# The timed shape is checked if the float64 reference needs no more than this.
_CHECK_BYTES = {"cpu": 6 * 2**30, "cuda": 48 * 2**30}
_CHECK_FLOPS = {"cpu": 1e12, "cuda": 2e14}


@dataclass(frozen=True)
class Plan:
    """What to run."""

    ops: tuple[str, ...] = tuple(ops.OPS)
    variants: tuple[str, ...] = ()  # first words of the variants; empty: all
    model: str = "starcoder2_12m"
    tokens: int | None = None
    rows: int | None = None
    window: int | None = None
    small: bool = False  # time the small shape: to try the machinery out
    device: str = "cpu"
    dtype: str = "bfloat16"
    impls: tuple[str, ...] = ("auto",)
    peers: str = peers.DEFAULT
    repeats: int = 15
    warmup: int = 1
    seconds: float = 20.0  # of timing a case
    clock: str = "wall"

    def shape(self) -> shapes.Shape:
        """The timed shape."""
        shape = shapes.get(self.model, tokens=self.tokens, rows=self.rows, window=self.window)
        return shapes.reduced(shape) if self.small else shape

    def check(self) -> None:
        """Raises UsageError for what cannot be run."""
        if self.small and (self.tokens or self.rows or self.window):
            raise UsageError(
                "--small: expected no --tokens, --rows or --window, as the small shape has its "
                "own, got one. Leave it out, or --small."
            )
        shape = shapes.reduced(self.shape())
        one_of("--op", self.ops, ops.OPS)
        one_of("--impl", self.impls, ("auto", *dispatch.IMPLEMENTATIONS))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: expected a GPU, got none.")
        there = {peer for op in self.ops for c in ops.cases(op, shape, "cpu") for peer in c.peers}
        named = {*peers.OF_CUDA, *peers.OPTIONAL, peers.DEFAULT, *there}
        one_of("--peers", self.peers.split(","), sorted(named))
        if self.clock == "cpu" and (torch.get_num_threads() > 1 or self.device != "cpu"):
            raise UsageError(
                "--clock cpu: expected one thread on the CPU, got "
                f"{torch.get_num_threads()} on {self.device}. Set OMP_NUM_THREADS=1."
            )


@dataclass
class Outcome:
    """What a run found, beside the points that it wrote."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # cases that no time was left for
    environment: dict = field(default_factory=dict)
    limits: dict[tuple, Limits] = field(default_factory=dict)  # by device, dtype, clock


def run(
    todo: list[Plan],
    write: Callable[[dict], None],
    show: Callable[[float, str], None],
    *,
    seconds: float = math.inf,
    extra: dict | None = None,
) -> Outcome:
    """Check, time and weigh every case of the plans, in their order; what fails stops nothing else.

    Args:
        write: takes each point.
        show: takes the share done and what runs now.
        seconds: of the whole run, shared evenly: a case gets what is left, by the number of cases
            left. A case whose turn comes when none are left is skipped, and named.
        extra: joined to the environment of every point.
    """
    begun = time.monotonic()
    for plan in todo:
        plan.check()
    outcome = Outcome(environment=environment() | (extra or {}))
    pending = [(plan, pair) for plan in todo for pair in _pairs(plan)]
    for number, (plan, (small, timed)) in enumerate(pending):
        left = begun + seconds - time.monotonic()
        if left <= 0:
            outcome.skipped.append(f"{timed.name}, {plan.model}, {results.sizes_text(timed.sizes)}")
            continue
        limits = _limits(plan, outcome.limits, show)
        show(number / len(pending), timed.name)
        until = time.monotonic() + left / (len(pending) - number)
        peers.forget_compiled()
        try:
            points = _points(plan, small, timed, outcome, limits, until)
        except Exception as error:  # of a compiler, of a kernel, or no memory for the case
            traceback.print_exc()
            wrong = f"cannot run: {_first_line(error)}"
            outcome.wrong.append(f"{timed.name}: {wrong}")
            points = [_base(plan, timed) | _untimed(",".join(plan.impls), {}, wrong)]
        for point in points:
            write({"environment": outcome.environment, "limits": asdict(limits), **point})
    show(1.0, "done")
    return outcome


def _limits(plan: Plan, known: dict[tuple, Limits], show: Callable[[float, str], None]) -> Limits:
    """Those of the machine for a plan, measured once for each device, dtype and clock."""
    setting = (plan.device, plan.dtype, plan.clock)
    if setting not in known:
        show(0.0, "measuring the machine")
        dtype = getattr(torch, plan.dtype)
        scale = 8 if plan.small else 1
        known[setting] = measure_limits(plan.device, dtype, plan.clock, scale=scale)
    return known[setting]


def _pairs(plan: Plan) -> list[tuple[Case, Case]]:
    """Each case of a plan, at the small shape and at the timed one."""
    shape, found = plan.shape(), []
    for op in plan.ops:
        small = ops.cases(op, shapes.reduced(shape), plan.device)
        pairs = zip(small, ops.cases(op, shape, plan.device), strict=True)
        found += [(s, t) for s, t in pairs if _wanted(t.variant, plan.variants)]
    return found


def _first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _wanted(variant: str, wanted: tuple[str, ...]) -> bool:
    return not wanted or variant.split(" ")[0] in wanted


def _base(plan: Plan, timed: Case) -> dict:
    """What all points of a case have."""
    return {
        "op": timed.op, "variant": timed.variant, "model": plan.model, "sizes": timed.sizes,
        "dtype": plan.dtype, "device": plan.device, "clock": plan.clock,
    }  # fmt: skip


def _points(
    plan: Plan, small: Case, timed: Case, outcome: Outcome, limits: Limits, until: float
) -> list[dict]:
    """All points of one case; no turn of its timing begins after `until`."""
    dtype = getattr(torch, plan.dtype)
    cases = {"small": small} | _larger_checks(plan, small, timed)
    judges = {place: checks.Judge(case, plan.device, dtype) for place, case in cases.items()}
    calls = Calls(timed.inputs(Maker(plan.device, dtype)))
    right, points, base = {}, [], _base(plan, timed)
    for impl in _impls(plan, timed, next(iter(calls.inputs.values())), outcome):
        found = {place: judge.errors(impl) for place, judge in judges.items()}
        errors = {place: e.to_json() for place, e in found.items()}
        wrong = "; ".join(f"at the {place} shape, {e}" for place, e in found.items() if e.wrong)
        if wrong:
            outcome.wrong.append(f"{timed.name}, {impl}: {wrong}")
            points.append(base | _untimed(impl, errors, wrong))
        else:
            right[impl] = errors
    if not right:
        return points
    others = _peers(plan, timed, judges["small"], outcome)
    if not others:
        outcome.notes.append(f"{timed.name}: none of the peers {plan.peers}, so nothing to compare")
        return points
    judges.clear()  # their float64 results would stand in the way of the memory figures
    # By ours: at a long shape there may be no memory for eager code.
    calls.prepare(calls.forward(lambda *x: timed.ours(next(iter(right)), *x)))
    found = _measure(plan, timed, calls, right, others, outcome, until)
    return points + [base | p for p in _compare(timed, found, right, dtype, limits)]


def _larger_checks(plan: Plan, small: Case, timed: Case) -> dict[str, Case]:
    """The timed case if its float64 reference fits, else one as long with few heads."""
    if timed.sizes == small.sizes:
        return {}
    if _fits(timed, plan.device):
        return {"timed": timed}
    others = ops.cases(timed.op, shapes.narrow(plan.shape()), plan.device)
    narrow = [c for c in others if c.variant == timed.variant and _fits(c, plan.device)]
    return {"narrow": narrow[0]} if narrow else {}


def _impls(plan: Plan, case: Case, tensor: torch.Tensor, outcome: Outcome) -> list[str]:
    """What the asked implementations come to, each once; one that cannot run is noted.

    Few ops have CUDA kernels: beside other implementations it is not noted that one has none.
    """
    ops, found = dispatch.parts(case.op), []
    for asked in plan.impls:
        if asked == "cuda" and len(plan.impls) > 1 and not all(dispatch.has(o, asked) for o in ops):
            continue
        try:
            found.append([dispatch.choose(op, asked, tensor) for op in ops][0])
        except RuntimeError as error:
            outcome.notes.append(str(error))
    return list(dict.fromkeys(found))


def _fits(case: Case, device: str) -> bool:
    """Whether the float64 reference of a case can be waited for and held."""
    cost = case.cost(8)
    flops = cost.forward_flops + cost.backward_flops
    return case.reference_bytes <= _CHECK_BYTES[device] and flops <= _CHECK_FLOPS[device]


def _peers(plan: Plan, case: Case, judge: checks.Judge, outcome: Outcome) -> dict[str, Callable]:
    """Peers of the timed case that compute the same thing; small ones are asked."""
    asked = peers.choose(plan.peers, case.peers)
    for name, peer in peers.choose(plan.peers, judge.case.peers).items():
        try:
            objection = judge.peer_objection(peer)
        except Exception as error:  # another project's error, or no memory for it
            objection = f"cannot run: {_first_line(error)}"
        if objection:
            outcome.notes.append(f"{case.name}: peer {name} left out: {objection}")
            asked.pop(name)
    return asked


@dataclass
class _Measured:
    """Times by phase, peak memory, and how quiet it was."""

    times: dict[str, dict[str, list[float]]]
    memory: dict[str, int | None]
    quiet: dict


def _measure(
    plan: Plan, case: Case, calls: Calls, right: dict, others: dict, outcome: Outcome, until: float
) -> _Measured:
    """Time and weigh the right implementations and the peers, in turns."""
    functions = {impl: lambda *x, impl=impl: case.ours(impl, *x) for impl in right}
    functions |= {f"peer {name}": peer for name, peer in others.items()}
    memory = {}
    for name, function in list(functions.items()):
        if name == "triton" and plan.device == "cpu":
            memory[name] = None  # the interpreter's is not the kernel's
            continue
        try:
            calls.both(function)  # code is loaded and caches are filled
            memory[name] = peak_of_call(lambda f=function: calls.both(f), plan.device)
        except Exception as error:
            if name in right:
                raise
            what = f"cannot run: {_first_line(error)}"
            outcome.notes.append(f"{case.name}: {name} left out: {what}")
            del functions[name]
    watch = Stopwatch(plan.device, plan.clock)
    samplers = {n: _sampler(calls, f, watch) for n, f in functions.items()}
    quietness = Quietness()
    seconds = min(plan.seconds, until - time.monotonic())
    times = take_turns(samplers, plan.repeats, seconds=seconds, warmup=plan.warmup)
    return _Measured(times, memory, quietness.report())


def _sampler(calls: Calls, function: Callable, watch: Stopwatch) -> Callable[[], dict[str, float]]:
    """A function that runs one variant once and returns the ms of each phase."""

    def sample() -> dict[str, float]:
        watch.start()
        outputs = calls.forward(function)
        watch.mark()
        if calls.wanted:
            gradients = calls.backward(outputs)
            watch.mark()
            del gradients
        laps = watch.laps_ms()
        laps = [*laps, sum(laps)] if calls.wanted else laps
        return dict(zip(calls.phases, laps, strict=True))

    return sample


def _compare(case: Case, found: _Measured, right: dict, dtype, limits: Limits) -> list[dict]:
    """One point for each implementation, phase and peer."""
    cost = case.cost(dtype.itemsize)
    work = {
        "forward": (cost.forward_flops, cost.forward_bytes),
        "backward": (cost.backward_flops, cost.backward_bytes),
    }
    work["both"] = tuple(map(sum, zip(*work.values(), strict=True)))
    points = []
    for impl in right:
        phases = found.times[impl]
        for phase, times in phases.items():
            if phase not in case.phases:
                continue
            known = _rates(*work[phase], statistics.median(times), limits)
            known |= {"phase": phase, "impl": impl, "errors": right[impl], "wrong": None}
            for name in (n for n in found.times if n.startswith("peer ")):
                timed = results.timed(times, found.times[name][phase])
                last = phase == list(phases)[-1]
                weights = [found.memory[n] if last else None for n in (impl, name)]
                peer = {"peer": name.removeprefix("peer "), "quiet": found.quiet}
                points.append(known | timed | peer | _weights(*weights))
    return points


def _rates(flops: int, size: int, ms: float, limits: Limits) -> dict:
    """Bandwidth and rate, absolute and as shares of what the run measured."""
    gbps, tflops = size / ms / 1e6, flops / ms / 1e9
    return {
        "gbps": gbps,
        "tflops": tflops,
        "copy_share": gbps / limits.copy_gbps,
        "matmul_share": tflops / limits.matmul_tflops,
        "flops_per_byte": flops / size,
    }


def _weights(ours: int | None, peer: int | None) -> dict:
    """Peak memory of both; the ratio where both have one."""
    ratio = ours / peer if ours is not None and peer else None
    return {"peak_bytes": ours, "peer_peak_bytes": peer, "memory_ratio": ratio}


def _untimed(impl: str, errors: dict, wrong: str) -> dict:
    """A point without times."""
    known = {"phase": "both", "impl": impl, "peer": "", "errors": errors, "wrong": wrong}
    return UNTIMED | known
