"""`python -m benchmarks overlap`: how much of the communication lies under computation.

Two ranks run what a training step is made of, each twice: as the engine does it, and with every
message waited for where it begins, which is the peer. Counted are the seconds in which something
travelled, and in how many of them an operator computed at the same time.

On a CPU the messages go over gloo behind a link of a given bandwidth (see link.py), and operators
are timed as torch calls them. On GPUs there is no such link: torch's profiler tells when kernels of
NCCL ran and when others did. `--trace` writes both ranks for chrome://tracing or ui.perfetto.dev.
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import results
from benchmarks.harness import environment, take_turns, timed
from benchmarks.link import Link, LinkedAxis, LinkedGroup, Span
from benchmarks.machine import Quietness
from benchmarks.points import UNTIMED
from benchmarks.ranks import on_ranks
from benchmarks.usage import UsageError, count, one_of, positive
from stellarator.config import ModelConfig, OptimConfig
from stellarator.model import build_model
from stellarator.parallel.buckets import DataParallel
from stellarator.parallel.collectives import Group
from stellarator.parallel.context import context_attention
from stellarator.parallel.mesh import Axis
from stellarator.parallel.products import column_product
from stellarator.parallel.tensor import TensorParallel
from stellarator.parallel.zigzag import Plan
from stellarator.progress import Progress
from stellarator.train.optimizer import FlatOptimizer

RANKS = 2
Prepare = Callable[[], Callable[[], object]]  # does what is not timed; returns what is


def _columns(link: Link, rank: int, device: str, scale: int, *, sp: bool) -> Prepare:
    """The backward of four products by columns, one behind the other."""
    N, C = 512 * scale, 256 * scale
    tp = TensorParallel(_axis("tp", link, rank), sp)
    own = N // RANKS if sp else N
    draw = functools.partial(torch.randn, device=device)
    weights = [(draw(C, C) / C**0.5).requires_grad_() for _ in range(4)]
    bias, x = draw(C).requires_grad_(), draw(1, own, C).requires_grad_()

    def prepare() -> Callable[[], object]:
        y = x
        for weight in weights:  # the slice stands for the product by rows between them
            y = column_product(y[:, :own], weight, bias, torch.Size((1, N)), tp)
        return y.sum().backward

    return prepare


def _replicas(link: Link, rank: int, device: str, scale: int, *, zero: int) -> Prepare:
    """A step of a model without its update: gradients in buckets; with ZeRO 3 gathers, too."""
    C, tokens = 128 * scale, 256 * scale
    shape = {"num_layers": 4, "width": C, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 4 * C}
    model = build_model(ModelConfig(vocab_size=512, **shape), device=device)
    data = DataParallel(_axis("dp", link, rank), zero, bucket_bytes=2**18)
    optimizer = FlatOptimizer(model, OptimConfig(), data=data)
    rows = torch.arange(tokens, device=device).view(1, -1) % 512

    def step() -> None:
        with optimizer.last_micro_batch():
            model(rows, rows, reduction="sum").backward()
        optimizer.complete_grads()

    def prepare() -> Callable[[], object]:
        optimizer.zero_grad()
        return step

    return prepare


def _ring(link: Link, rank: int, device: str, scale: int) -> Prepare:
    """Context-parallel attention, forward and backward."""
    T, group = 512 * scale, LinkedGroup(dist.group.WORLD, "cp")
    group.link = link
    plan = Plan(rank, RANKS, 1, T)
    q, k, v = (
        torch.randn(1, T // RANKS, heads, 64, device=device).requires_grad_() for heads in (4, 2, 2)
    )
    return lambda: lambda: context_attention(q, k, v, plan, group).sum().backward()


def _axis(name: str, link: Link, rank: int) -> Axis:
    return LinkedAxis(name, rank, RANKS, Group(dist.group.WORLD, name), link)


CASES = {
    "tp columns": functools.partial(_columns, sp=False),
    "tp columns sp": functools.partial(_columns, sp=True),
    "dp buckets": functools.partial(_replicas, zero=0),
    "zero 3": functools.partial(_replicas, zero=3),
    "context ring": _ring,
}


class _Operators(TorchDispatchMode):
    """Notes when operators run, other than collectives."""

    def __init__(self, spans: list[Span]):
        super().__init__()
        self._spans = spans

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        start = time.perf_counter()
        found = function(*args, **(kwargs or {}))
        if function.namespace != "c10d":
            name = str(function)
            self._spans.append(Span("computation", name, start, time.perf_counter()))
        return found


@contextlib.contextmanager
def _recorded(link: Link, device: str) -> Iterator[list[Span]]:
    """What computes and what travels within this block; the list is filled at its end."""
    found: list[Span] = []
    link.spans.clear()
    if device == "cpu":
        with _Operators(found):
            yield found
        found += link.spans
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield found
        torch.cuda.synchronize()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = "communication" if "nccl" in event.name.lower() else "computation"
            times = (1e-6 * t for t in (event.time_range.start, event.time_range.end))
            found.append(Span(kind, event.name, *times))


def merged(spans: Iterable[Span], kind: str) -> list[tuple[float, float]]:
    """Stretches of time in which something of this kind went on."""
    found: list[tuple[float, float]] = []
    for start, end in sorted((s.start, s.end) for s in spans if s.kind == kind):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def seconds(spans: Iterable[Span]) -> tuple[float, float]:
    """(in which something travelled, in which something was computed, too)."""
    spans = list(spans)
    travels, computes = (merged(spans, kind) for kind in ("communication", "computation"))
    both = sum(
        max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in itertools.product(travels, computes)
    )
    return sum(end - start for start, end in travels), both


def measure(rank, n, names, device, scale, repeats, gbps, latency_us):
    """On one rank, for each case: ms of {"ours", "at once"}; seconds of each; the last spans."""
    found = []
    for name in names:
        link = Link(gbps, latency_us) if device == "cpu" else Link(float("inf"), 0.0)
        prepare, noted = CASES[name](link, rank, device, scale), {}

        def sampler(at_once: bool, link=link, prepare=prepare, noted=noted) -> Callable:
            def sample() -> dict[str, float]:
                link.at_once = at_once
                run = prepare()
                dist.barrier()
                with _recorded(link, device) as spans:
                    laps = timed(run, device)()
                noted.setdefault(at_once, []).append(spans)
                return laps

            return sample

        samplers = {"ours": sampler(False), "at once": sampler(True)}
        laps = take_turns(samplers, repeats, warmup=1)
        times = {which: each["whole"] for which, each in laps.items()}
        shares = [[seconds(spans) for spans in noted[k][-repeats:]] for k in (False, True)]
        found.append([times, shares, noted[False][-1]])
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `overlap`."""
    parser.add_argument("--case", default=",".join(CASES), help="with commas between: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gbps", type=positive, default=0.5, help="of the link, on a CPU, GB/s")
    parser.add_argument("--latency-us", type=positive, default=100.0, help="of each message")
    parser.add_argument("--scale", type=count, default=2, help="of widths and lengths")
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--trace", metavar="FILE.json", help="for chrome://tracing or Perfetto")
    parser.add_argument("--output", metavar="FILE.json", help="one JSON line a case")


def main(given: argparse.Namespace) -> int:
    """Measure and print."""
    names = given.case.split(",")
    one_of("--case", names, CASES)
    if given.trace:
        _write_trace(given.trace, [])  # now, if it cannot be written
    where, quietness = environment(), Quietness()
    with results.Writer(given.output) as write, Progress("overlap") as show:
        show(0.1, f"{RANKS} ranks")
        of_ranks = on_ranks(
            measure, RANKS, given.device, names, given.device, given.scale, given.repeats,
            given.gbps, given.latency_us,
        )  # fmt: skip
        report, rows, events = quietness.report(), [], []
        for name, *found in zip(names, *of_ranks, strict=True):
            point = _point(name, found, given, where)
            write(point | {"quiet": report})
            rows.append(_row(point, found))
            events += [e for r, (_, _, spans) in enumerate(found) for e in _events(name, r, spans)]
    header = ["", "travels ms", "under computation", "if at once", "ms", "ms if at once", "speed"]
    print(results.where(where), results.table(rows, header), sep="\n\n")
    if given.trace:
        _write_trace(given.trace, events)
    if warning := Quietness.warning(report):
        print(warning)
    return 0


def _point(name: str, found: list, given: argparse.Namespace, where: dict) -> dict:
    """Of the slower rank in each turn."""
    ours, at_once = (
        [max(turn) for turn in zip(*(times[which] for times, _, _ in found), strict=True)]
        for which in ("ours", "at once")
    )
    link = f"{given.gbps:g} GB/s, {given.latency_us:g} us" if given.device == "cpu" else "NCCL"
    base = UNTIMED | {
        "op": f"overlap: {name}", "variant": link, "model": "", "dtype": "float32",
        "device": given.device, "sizes": {"ranks": RANKS, "scale": given.scale}, "phase": "whole",
        "impl": "stellarator", "peer": "wait at once", "errors": {}, "clock": "wall",
        "limits": {}, "environment": where,
    }  # fmt: skip
    return base | results.timed(ours, at_once)


def shares_of(found: list) -> tuple[float, float, float]:
    """(ms that something travels, share of it under computation, the same if at once); medians."""
    ours, at_once = ([pair for _, shares, _ in found for pair in shares[which]] for which in (0, 1))
    middles = [statistics.median(both / travels for travels, both in x) for x in (ours, at_once)]
    return 1e3 * statistics.median(travels for travels, _ in ours), *middles


def _row(point: dict, found: list) -> list[str]:
    travels, share, at_once = shares_of(found)
    return [
        point["op"].removeprefix("overlap: "),
        *(f"{travels:.1f}", f"{share:.0%}", f"{at_once:.0%}"),
        *(f"{point['ms']['p50']:.1f}", f"{point['peer_ms']['p50']:.1f}", f"{point['ratio']:.2f}x"),
    ]


def _events(case: str, rank: int, spans: list) -> list[dict]:
    """Of a trace: a process for each rank, a row for each kind of span."""
    return [
        {"name": s.name, "cat": case, "ph": "X", "pid": f"rank {rank}", "tid": s.kind}
        | {"ts": 1e6 * s.start, "dur": 1e6 * (s.end - s.start)}
        for s in (Span(*span) for span in spans)
    ]


def _write_trace(path: str, events: list[dict]) -> None:
    first = min((event["ts"] for event in events), default=0.0)
    shifted = [event | {"ts": event["ts"] - first} for event in events]
    try:
        Path(path).write_text(json.dumps({"traceEvents": shifted}))
    except OSError as error:
        raise UsageError(f"--trace: expected a file that can be written, got {error}") from None
