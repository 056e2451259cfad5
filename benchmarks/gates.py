"""`python -m benchmarks gate`: what must hold, from gates.toml, judged on results.

defines: Verdict, judge, plans, measure, run_verb, arguments, main

Nothing in gates.toml is absolute: a gate is a ratio to a named peer in the same run, an error ratio
to eager code, or a limit of compiled code (spilled registers, share of the GPU's shared memory). A
gate whose point is not among the results is missed too: what was not measured has not passed.
"""

import argparse
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import results, suite
from benchmarks.gatefile import FILE, SELECT, SELECT_COMPILED, load
from benchmarks.harness import CLOCKS, command
from benchmarks.run import print_report
from benchmarks.usage import UsageError, count, one_of, positive
from stellarator.progress import Progress

# Sets that another verb measures, in a process of its own: it says how Triton is imported.
_VERBS = {"train": ["train", "--peers", "eager,compiled"], "data": ["data"], "compile": ["compile"]}
_REPEATS, _SECONDS = 15, 20.0


@dataclass(frozen=True)
class Verdict:
    """One limit of one gate, on the worst of its points."""

    what: str
    limit: str
    found: str
    passed: bool


def judge(gates: list[dict], points: list[dict]) -> list[Verdict]:
    """Every limit of every gate, at least one verdict for each; what is wrong passes nothing."""
    return [verdict for gate in gates for verdict in _verdicts(gate, points)]


def _verdicts(gate: dict, points: list[dict]) -> list[Verdict]:
    """Each limit of a gate on the worst of its points."""
    compiled = "kernel" in gate
    wanted = {name: gate[name] for name in _select(compiled) if name in gate}
    found = _points_of(wanted, [p for p in points if ("kernel" in p) == compiled])
    what = " ".join(str(v) for v in wanted.values())
    worst: dict[str, tuple[float, str]] = {}
    for point in found:
        for limit, excess, text in (_judge_compiled if compiled else _judge_point)(gate, point):
            # NaN is neither above nor below anything: it is the worst.
            excess = math.inf if math.isnan(excess) else excess
            worst[limit] = max(worst.get(limit, (-math.inf, "")), (excess, text))
    if not worst:
        return [Verdict(what, "measured", "no such point", False)]
    loaded = any(p.get("quiet") and not p["quiet"]["quiet"] for p in found)
    mark = ", LOADED" if loaded else ""
    return [Verdict(what, n, text + mark, excess <= 0) for n, (excess, text) in worst.items()]


def _select(compiled: bool) -> tuple[str, ...]:
    return SELECT_COMPILED if compiled else SELECT


def _points_of(wanted: dict, points: list[dict]) -> list[dict]:
    """The points of a gate, and those of wrong implementations, which have no peer and phase.

    Without a phase in the gate: forward and backward together, where there are such points.
    """
    right = [p for p in points if p.get("wrong") is None and _matches(p, wanted)]
    if "phase" not in wanted and any(p.get("phase") == "both" for p in right):
        right = [p for p in right if p["phase"] == "both"]
    anywhere = {n: v for n, v in wanted.items() if n not in ("peer", "phase")}
    return right + [p for p in points if p.get("wrong") is not None and _matches(p, anywhere)]


def _matches(point: dict, wanted: dict) -> bool:
    """Whether a point is the one that is meant; `variant` may be its first word."""
    for name, value in wanted.items():
        if name == "tokens":
            if not _has_tokens(point["sizes"], value):
                return False
        elif name == "variant":
            if value not in (point["variant"], point["variant"].split(" ")[0]):
                return False
        elif point[name] != value:
            return False
    return True


def _has_tokens(sizes: dict, tokens: int) -> bool:
    """Whether a row, a cache or the micro-batch has so many; an optimizer's n does not depend."""
    if set(sizes) == {"n"}:
        return True
    batch = sizes.get("B", 0) * sizes.get("T", 0)
    return tokens in (sizes.get("N"), sizes.get("T"), sizes.get("S"), batch)


def _judge_point(gate: dict, point: dict) -> Iterator[tuple[str, float, str]]:
    """(limit, by how much it is missed, what was found) of each limit."""
    if point["wrong"] is not None:
        yield "right", math.inf, f"{point['impl']}: {point['wrong']}"
        return
    if "errors" in gate:
        limit = f"errors <= {gate['errors']:g}"
        found = {place: max(e["maximum"], e["rms"]) for place, e in point["errors"].items()}
        if found:
            place = max(found, key=found.get)
            yield limit, found[place] - gate["errors"], f"{found[place]:.2f} ({place} shape)"
        else:
            yield limit, math.inf, "not checked"
    if "speed" in gate:
        aim = f", aim {gate['aim']:g}x" if "aim" in gate else ""
        limit, ratio = f"speed >= {gate['speed']:g}x{aim}", point["ratio"]
        yield limit, gate["speed"] - ratio, f"{ratio:.2f}x"
    if "memory" in gate:
        limit, ratio = f"memory <= {gate['memory']:g}x", point["memory_ratio"]
        if ratio is None:
            yield limit, math.inf, "not measured"
        else:
            yield limit, ratio - gate["memory"], f"{ratio:.2f}x"


def _judge_compiled(gate: dict, point: dict) -> Iterator[tuple[str, float, str]]:
    """As _judge_point; the case and architecture of what was found with it."""
    case = f"{point['case']} {point['arch']}".lstrip()
    if "spill_bytes" in gate:
        found = point["spill_bytes"]
        yield (
            f"spills <= {gate['spill_bytes']} B",
            found - gate["spill_bytes"],
            f"{found} B, {case}",
        )
    if "shared" in gate:
        share = point["shared_bytes"] / point["shared_limit"]
        limit = f"shared memory <= {gate['shared']:.0%}"
        yield limit, share - gate["shared"], f"{share:.0%}, {case}"
    for name in gate.get("instructions", ()):
        found = point["instructions"].get(name, 0)
        yield f"has {name}", 1 - found, f"{found}, {case}"


def plans(gates: list[dict], **options) -> list[suite.Plan]:
    """The fewest runs that give every gate of ops its point."""
    fields = ("model", "tokens", "dtype", "device")
    defaults = {f: getattr(suite.Plan, f) for f in fields}
    found = []
    gates = [defaults | gate for gate in gates]

    def settings(gate: dict) -> tuple:
        return (str(gate.get("impl", "auto")), *(str(gate[f]) for f in fields), gate["op"])

    for _, group in itertools.groupby(sorted(gates, key=settings), settings):
        group = list(group)
        variants = {v for gate in group if (v := gate.get("variant", ""))}
        windows = {int(v.split()[1]) for v in variants if v.startswith("window ")}
        found.append(
            suite.Plan(
                ops=(group[0]["op"],),
                variants=tuple(sorted({v.split(" ")[0] for v in variants})),
                window=windows.pop() if len(windows) == 1 else None,
                impls=(group[0].get("impl", "auto"),),
                peers=",".join(sorted({gate["peer"] for gate in group})),
                **{f: group[0][f] for f in fields},
                **options,
            )
        )
    return found


def measure(given: argparse.Namespace, gates: list[dict]) -> list[dict]:
    """Run the ops that the gates of a set need."""
    clock = given.clock or ("cpu" if torch.get_num_threads() == 1 else "wall")
    if given.clock is None and any(gate.get("device") == "cuda" for gate in gates):
        clock = "wall"
    options = {
        "repeats": given.repeats or _REPEATS,
        "seconds": given.seconds or _SECONDS,
        "clock": clock,
    }
    todo = plans(gates, **options)
    for plan in todo:
        plan.check()
    with results.Writer(given.output) as write, Progress("gate") as show:
        outcome = suite.run(todo, write, show)
    print_report(write.points, outcome)
    print()
    return write.points


def run_verb(words: list[str], output: str | None) -> tuple[list[dict], list[Verdict]]:
    """The points of another verb, and a missed verdict if it failed.

    Its own report goes to the error stream. It writes to a new file, so that nothing of an earlier
    run is judged.
    """
    with results.Writer(output) as write, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "points.json")
        start = [sys.executable, "-m", "benchmarks", *words, "--output", str(path)]
        try:
            code = subprocess.run(start, stdout=sys.stderr, check=False).returncode
        except KeyboardInterrupt:  # the verb got it too and has said so
            raise SystemExit(130) from None
        for point in results.read(str(path)) if path.exists() else []:
            write(point | {"environment": point["environment"] | {"command": command()}})
    what = f"python -m benchmarks {' '.join(words)}"
    failed = [Verdict(what, "exit code 0", f"exit code {code}", False)] if code else []
    return write.points, failed


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `gate`."""
    parser.add_argument("results", nargs="*", metavar="FILE.json", help="judge these; else run")
    parser.add_argument("--set", default="cpu", help="of gates.toml: short, cpu, train, ... (cpu)")
    parser.add_argument("--gates", default=FILE, metavar="FILE.toml", help="other gates")
    parser.add_argument("--repeats", type=count, help=f"turns of a case at most ({_REPEATS})")
    parser.add_argument("--seconds", type=positive, help=f"timing of a case at most ({_SECONDS:g})")
    parser.add_argument("--clock", choices=CLOCKS, help="cpu with one thread, wall with more")
    parser.add_argument("--output", metavar="FILE.json", help="one JSON line a point")


def main(given: argparse.Namespace) -> int:
    """Print the table of passed and missed; 1 if one is missed."""
    sets = load(given.gates)
    one_of("--set", [given.set], sets)
    gates, failed = sets[given.set], []
    if given.results:
        _refuse(given, ("output", "repeats", "seconds", "clock"), "files are only judged")
        points = results.read(*given.results)
    elif given.set in _VERBS:
        _refuse(given, ("repeats", "seconds", "clock"), f"`{given.set}` measures in its own way")
        points, failed = run_verb(_VERBS[given.set], given.output)
    else:
        points = measure(given, gates)
    verdicts = failed + judge(gates, points)
    header = ["", "gate", "limit", "found"]
    rows = [["passed" if v.passed else "MISSED", v.what, v.limit, v.found] for v in verdicts]
    print(results.table(rows, header))
    missed = sum(not v.passed for v in verdicts)
    print(f"\n{len(verdicts) - missed} passed, {missed} missed")
    return 1 if missed else 0


def _refuse(given: argparse.Namespace, options: tuple[str, ...], why: str) -> None:
    """Raises UsageError for options that would do nothing."""
    for option in options:
        if getattr(given, option) is not None:
            raise UsageError(f"--{option}: expected it to be left out, as {why}. Leave it out.")
