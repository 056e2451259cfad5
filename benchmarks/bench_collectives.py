"""`python -m benchmarks collectives`: what ranks of this machine say to each other, and how fast.

Every collective of `stellarator.parallel.collectives` with its tags and its journal, beside the
bare call of torch.distributed that it makes. Of S bytes in t seconds on n ranks:

    algorithm bandwidth   S / t
    bus bandwidth         S / t * 2 (n - 1) / n    all-reduce
                          S / t * (n - 1) / n      all-gather, reduce-scatter
                          S / t                    broadcast, send, exchange

S is the tensor that every rank has before or after: of a gather the whole result, of a
reduce-scatter the whole input, of an exchange (each rank sends to the one above it) one message.
Bus bandwidth is what a rank of a ring sends, so it is what `stellarator plan --link-gbps` means.
A time is that of the slowest rank, of several calls one behind the other; the time of the smallest
S is latency. Beside bandwidths stands that of a copy in memory, measured in the same run.

Formulas after nccl-tests, doc/PERFORMANCE.md.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks import results
from benchmarks.harness import environment, take_turns, timed
from benchmarks.machine import Quietness, measure_limits
from benchmarks.points import UNTIMED
from benchmarks.ranks import on_ranks
from benchmarks.usage import UsageError, count
from stellarator.parallel.collectives import Group, Message
from stellarator.parallel.journal import Journal
from stellarator.progress import Progress

KIB, MIB = 2**10, 2**20
SIZES = [4 * KIB, 32 * KIB, 256 * KIB, 2 * MIB, 16 * MIB, 64 * MIB]
SMALL = [4 * KIB, 256 * KIB]
# Share of S / t that a rank of a ring sends.
BUS = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "send": lambda n: 1.0,
    "exchange": lambda n: 1.0,
}
_RINGS = ("all_reduce", "all_gather", "reduce_scatter")
_NAMES = ("ours", "torch")


def _calls(kind: str, x: torch.Tensor, group: Group) -> tuple[Callable, Callable]:
    """Ours and torch's; each returns the tensor in which its result is."""
    n, rank = group.size, group.rank
    part = x.view(n, -1)[rank].clone()
    above, below = (rank + 1) % n, (rank - 1) % n

    def gather():
        whole = torch.empty_like(x)
        _torch("all_gather_single", "all_gather_into_tensor")(whole, part)
        return whole

    def scatter():
        found = torch.empty_like(part)
        _torch("reduce_scatter_single", "reduce_scatter_tensor")(found, x)
        return found

    def exchange():
        found = torch.empty_like(x)
        messages = [dist.P2POp(dist.isend, x, above), dist.P2POp(dist.irecv, found, below)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        return found

    def ours_exchange():
        found = torch.empty_like(x)
        group.exchange([Message(x, above)], [Message(found, below)], kind).wait()
        return found

    def pairs(send: Callable, receive: Callable):
        """Ranks 0, 2, ... send to the one above them."""
        if rank % 2:
            receive(x, below)
        elif above:
            send(x, above)
        return x

    both = {
        "all_reduce": (lambda: group.all_reduce(x, kind), lambda: dist.all_reduce(x) or x),
        "all_gather": (lambda: group.all_gather(part, kind), gather),
        "reduce_scatter": (lambda: group.reduce_scatter(x, kind), scatter),
        "broadcast": (lambda: group.broadcast(x, 0, kind), lambda: dist.broadcast(x, 0) or x),
        "send": (
            lambda: pairs(
                lambda x, to: group.send(x, to, kind), lambda x, a: group.recv(x, a, kind)
            ),
            lambda: pairs(dist.send, dist.recv),
        ),
        "exchange": (ours_exchange, exchange),
    }
    return both[kind]


def _torch(*names: str) -> Callable:
    """The first of these functions that this torch has."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


def _expected(kind: str, rank: int, tensors: list[torch.Tensor]) -> torch.Tensor:
    """What a call gives if these are the tensors of the ranks."""
    n = len(tensors)
    if kind == "all_gather":
        return torch.cat([x.view(n, -1)[r] for r, x in enumerate(tensors)])
    if kind in _RINGS:
        total = sum(tensors)
        return total if kind == "all_reduce" else total.view(n, -1)[rank]
    alone = n % 2 and rank == n - 1  # without one above it
    of_pair = rank if alone else rank - rank % 2
    return tensors[{"broadcast": 0, "send": of_pair, "exchange": (rank - 1) % n}[kind]]


def measure(rank: int, n: int, kinds: list[str], sizes: list[int], device: str, repeats: int):
    """On one rank: for each kind and size whether it is right and {"ours", "torch"} -> times."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        group = Group(dist.group.WORLD, "world", Journal(folder, rank))
        for kind, size in itertools.product(kinds, sizes):
            tensors = [
                (torch.arange(size // 4 // n * n, device=device) % 7 + 10 * r).float()
                for r in range(n)
            ]
            expected = _expected(kind, rank, tensors)
            got = [_calls(kind, tensors[rank].clone(), group)[which]() for which in (0, 1)]
            right = all(torch.equal(x.view(-1), expected) for x in got)
            calls = _calls(kind, torch.zeros_like(tensors[rank]), group)
            found.append(
                [right, _times(dict(zip(_NAMES, calls, strict=True)), size, device, repeats)]
            )
    return found


def _times(calls: dict[str, Callable], size: int, device: str, repeats: int):
    """ms of one call of each, one a turn; a turn is several calls one behind the other."""
    times = max(1, min(20, MIB // size))

    def sampler(call: Callable) -> Callable:
        def several() -> None:
            for _ in range(times):
                call()

        sample = timed(several, device)

        def together() -> dict[str, float]:
            dist.barrier()
            return {"whole": sample()["whole"] / times}

        return together

    samplers = {name: sampler(call) for name, call in calls.items()}
    return {name: laps["whole"] for name, laps in take_turns(samplers, repeats).items()}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `collectives`."""
    parser.add_argument("--ranks", type=count, help="processes; default 2, on GPUs all of them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help="two sizes, to try it out")
    parser.add_argument("--repeats", type=count, default=15)
    parser.add_argument("--output", metavar="FILE.json", help="one JSON line a point")


def main(given: argparse.Namespace) -> int:
    """Check, time, print; 1 if a collective gives something else than it should."""
    device, sizes = given.device, SMALL if given.small else SIZES
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: expected a GPU, got none.")
    n = given.ranks or (torch.cuda.device_count() if device == "cuda" else 2)
    if n < 2:
        raise UsageError(f"--ranks: expected at least 2, with a GPU each on cuda, got {n}.")
    where, quietness = environment(), Quietness()
    with results.Writer(given.output) as write, Progress("collectives") as show:
        show(0.0, "what memory can do")
        limits = measure_limits(device, torch.float32, scale=16 if given.small else 1)
        show(0.1, f"{n} ranks")
        found = on_ranks(measure, n, device, list(BUS), sizes, device, given.repeats)
        for (kind, size), *of_ranks in zip(itertools.product(BUS, sizes), *found, strict=True):
            write(_point(kind, size, n, of_ranks, device, limits, where))
        report = quietness.report()
        for point in write.points:
            point["quiet"] = report
        write.again()
    print(results.where(where), f"copy in memory {limits.copy_gbps:.1f} GB/s", sep=", ")
    print(f"\n{markdown(write.points)}\n")
    wrong = [p for p in write.points if p["wrong"]]
    for point in wrong:
        print(f"WRONG, not timed: {results.name(point)}: {point['wrong']}")
    if not wrong:
        print(f"The slowest ring of the largest size: --link-gbps {link_gbps(write.points):.3g}")
    if warning := Quietness.warning(report):
        print(warning)
    return 1 if wrong else 0


def _point(kind: str, size: int, n: int, of_ranks: list, device: str, limits, where: dict) -> dict:
    """Of the slowest rank in each turn."""
    base = UNTIMED | {
        "op": kind, "variant": f"{n} ranks", "model": "", "dtype": "float32", "device": device,
        "sizes": {"bytes": size, "ranks": n}, "phase": "whole", "impl": "stellarator",
        "peer": "torch", "errors": {}, "clock": "wall", "environment": where,
        "limits": {"copy_gbps": limits.copy_gbps, "matmul_tflops": limits.matmul_tflops},
    }  # fmt: skip
    bad = [rank for rank, (right, _) in enumerate(of_ranks) if not right]
    if bad:
        return base | {"wrong": f"not what the tensors of the ranks give, on ranks {bad}"}
    ours, bare = (
        [max(turn) for turn in zip(*(times[name] for _, times in of_ranks), strict=True)]
        for name in _NAMES
    )
    return base | results.timed(ours, bare)


def bandwidths(point: dict) -> tuple[float, float]:
    """Algorithm and bus bandwidth of a point, GB/s."""
    gbps = point["sizes"]["bytes"] / point["ms"]["p50"] / 1e6
    return gbps, gbps * BUS[point["op"]](point["sizes"]["ranks"])


def link_gbps(points: list[dict]) -> float:
    """What `stellarator plan` wants to know: of the rings of the largest size the slowest one's."""
    rings = [p for p in points if p["op"] in _RINGS]
    largest = max(p["sizes"]["bytes"] for p in rings)
    return min(bandwidths(p)[1] for p in rings if p["sizes"]["bytes"] == largest)


def markdown(points: list[dict]) -> str:
    """One row a point."""
    header = ["collective", "KiB", "us (p20, p80)", "algorithm GB/s", "bus GB/s", "of a copy"]
    rows = []
    for p in (p for p in points if p["wrong"] is None):
        us = {name: 1e3 * value for name, value in p["ms"].items()}
        algorithm, bus = bandwidths(p)
        rows.append([
            f"{p['op']}, {p['variant']}", str(p["sizes"]["bytes"] // KIB),
            f"{us['p50']:.0f} ({us['p20']:.0f}, {us['p80']:.0f})",
            f"{algorithm:.3f}", f"{bus:.3f}", f"{bus / p['limits']['copy_gbps']:.1%}",
            f"{1e3 * p['peer_ms']['p50']:.0f}", f"{p['ratio']:.2f}x",
        ])  # fmt: skip
    return results.table(rows, [*header, "torch us", "speed"])
