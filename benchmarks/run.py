"""`python -m benchmarks run`: the options, the table, the exit code.

defines: arguments, main, add_options, plan_of, print_report
"""

import argparse

from benchmarks import ops, results, shapes, suite
from benchmarks.harness import CLOCKS
from benchmarks.machine import Quietness
from benchmarks.usage import count, positive
from stellarator.progress import Progress

_DTYPES = ("bfloat16", "float16", "float32")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that verbs which time ops share."""
    parser.add_argument("--repeats", type=count, default=15, help="turns of a case at most")
    parser.add_argument("--seconds", type=positive, default=20.0, help="timing of a case at most")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu: processor time, for one thread on a machine with other work",
    )  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run`."""
    parser.add_argument("--op", help=f"with commas between: {', '.join(ops.OPS)} (all)")
    parser.add_argument("--model", default="starcoder2_12m", help=", ".join(shapes.names()))
    parser.add_argument("--tokens", type=count, help="of a row (that of the model)")
    parser.add_argument("--rows", type=count, help="of the micro-batch")
    parser.add_argument("--window", type=count, help="visible keys, of attention")
    parser.add_argument("--small", action="store_true", help="time a small shape, to try it out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--impl", default="auto", help="of ours, with commas between")
    parser.add_argument(
        "--peers", default="default", help="names with commas between; 'compile' on request only"
    )
    add_options(parser)
    parser.add_argument("--output", metavar="FILE.json", help="one JSON line a point")


def plan_of(given: argparse.Namespace) -> suite.Plan:
    """The plan that the options of `run` describe."""
    return suite.Plan(
        ops=tuple(ops.OPS) if given.op is None else tuple(given.op.split(",")),
        model=given.model,
        tokens=given.tokens,
        rows=given.rows,
        window=given.window,
        small=given.small,
        device=given.device,
        dtype=given.dtype,
        impls=tuple(given.impl.split(",")),
        peers=given.peers,
        repeats=given.repeats,
        seconds=given.seconds,
        clock=given.clock,
    )


def main(given: argparse.Namespace) -> int:
    """Run, print; 1 if an op is wrong or nothing was measured."""
    plan = plan_of(given)
    plan.check()
    with results.Writer(given.output) as write, Progress("benchmarks") as show:
        outcome = suite.run([plan], write, show)
    print_report(write.points, outcome)
    return 1 if outcome.wrong or not write.points else 0


def print_report(points: list[dict], outcome: suite.Outcome) -> None:
    """The Markdown that a run ends with: where, the table, what is wrong, what was left out."""
    if points:
        limits = points[0]["limits"]
        print(
            f"{results.where(points[0]['environment'])}, clock {points[0]['clock']}.\n"
            f"Measured here: copy {limits['copy_gbps']:.1f} GB/s, matrix product "
            f"{limits['matmul_tflops']:.3f} TFLOP/s ({points[0]['dtype']}); shares are of these.\n"
        )
        print(markdown([p for p in points if p["wrong"] is None]))
    worst = [p["quiet"] for p in points if p["quiet"] and not p["quiet"]["quiet"]]
    if worst:
        print(Quietness.warning(max(worst, key=lambda q: (q["others"], q["drift"]))))
    for line in outcome.wrong:
        print(f"WRONG, not timed: {line}")
    for line in outcome.notes:
        print(f"note: {line}")
    if not points:
        print("Nothing was measured: expected an implementation and a peer that can run, got none.")


def markdown(points: list[dict]) -> str:
    """One row a point."""
    header = ["op", "phase", "impl", "ms (p20, p80)", "peer", "peer ms", "speed", "MiB, peer",
              "memory", "GB/s", "TFLOP/s", "errors / eager"]  # fmt: skip
    several = len({p["model"] for p in points}) > 1
    return results.table([_cells(p, several) for p in points], header)


def _cells(p: dict, with_model: bool) -> list[str]:
    ms, peer = p["ms"], p["peer_ms"]
    memory, ratio = "", ""
    if p["peak_bytes"] is not None and p["peer_peak_bytes"] is not None:
        memory = f"{p['peak_bytes'] / 2**20:,.1f}, {p['peer_peak_bytes'] / 2**20:,.1f}"
        ratio = "" if p["memory_ratio"] is None else f"{p['memory_ratio']:.2f}x"
    return [
        results.name(p) + (f", {p['model']}" if with_model else ""),
        p["phase"],
        p["impl"],
        f"{ms['p50']:.3f} ({ms['p20']:.3f}, {ms['p80']:.3f})",
        p["peer"],
        f"{peer['p50']:.3f}",
        f"{p['ratio']:.2f}x",
        memory,
        ratio,
        f"{p['gbps']:.1f} ({p['copy_share']:.0%})",
        f"{p['tflops']:.3f} ({p['matmul_share']:.0%})",
        errors(p["errors"]),
    ]


def errors(found: dict) -> str:
    """Largest and root-mean-square ratio at each shape that was checked."""
    cells = [f"{place} {e['maximum']:.2f}, {e['rms']:.2f}" for place, e in found.items()]
    return "; ".join(cells)
