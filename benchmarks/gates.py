"""`python -m benchmarks gate`: what must hold, from gates.toml, judged on results.

defines: load, judge, Verdict, arguments, main

Nothing in gates.toml is absolute: a gate is a ratio to a named peer in the same run, an error ratio
to eager code, or a limit of compiled code (spilled registers, share of the GPU's shared memory). A
gate whose point is not among the results is missed too: what was not measured has not passed.
"""

import argparse
import itertools
import math
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import results, suite
from benchmarks.harness import CLOCKS
from benchmarks.run import print_report
from benchmarks.usage import UsageError, count, one_of, positive
from stellarator.progress import Progress

FILE = Path(__file__).with_name("gates.toml")
COMPILED = "compile"
_SELECT = ("op", "variant", "model", "tokens", "dtype", "device", "phase", "impl", "peer")
_LIMITS = ("speed", "memory", "errors")
# Sets that another verb measures, in a process of its own: it says how Triton is imported.
_VERBS = {"train": ["train", "--peers", "eager,compiled"], "data": ["data"], COMPILED: [COMPILED]}
_SELECT_COMPILED = ("kernel", "arch")
_LIMITS_COMPILED = ("spill_bytes", "shared", "instructions")


def load(path: str | Path = FILE) -> dict[str, list[dict]]:
    """{name of a set: its gates}, defaults filled in and lists taken apart.

    Raises:
        UsageError: the file cannot be read, or an entry has a key that is no field and no limit, or
            no limit at all.
    """
    try:
        sets = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    return {name: _gates(f"{path}: {name}", given) for name, given in sets.items()}


def _gates(where: str, given: dict) -> list[dict]:
    """One dict a gate."""
    found = []
    if not isinstance(given, dict) or not isinstance(given.get("gates"), list):
        raise UsageError(f"{where}: expected `gates`, a list of tables, got {given!r}.")
    for gate in (given.get("defaults", {}) | gate for gate in given["gates"]):
        compiled = "kernel" in gate
        select = _SELECT_COMPILED if compiled else _SELECT
        limits = _LIMITS_COMPILED if compiled else _LIMITS
        if unknown := set(gate) - {*select, *limits, "aim"}:
            raise UsageError(f"{where}: expected keys of {select + limits}, got {unknown}.")
        if not set(gate) & set(limits):
            raise UsageError(f"{where}: expected one of {limits}, got {gate}.")
        lists = {name: gate[name] for name in select if isinstance(gate.get(name), list)}
        for values in itertools.product(*lists.values()):
            found.append(gate | dict(zip(lists, values, strict=True)))
    return found


@dataclass(frozen=True)
class Verdict:
    """One limit of one gate, on the worst of its points."""

    what: str
    limit: str
    found: str
    passed: bool


def judge(gates: list[dict], points: list[dict]) -> list[Verdict]:
    """Every limit of every gate; points that are wrong pass nothing."""
    verdicts = []
    for gate in gates:
        compiled = "kernel" in gate
        names = _SELECT_COMPILED if compiled else _SELECT
        wanted = {name: gate[name] for name in names if name in gate}
        found = [p for p in points if ("kernel" in p) == compiled and _matches(p, wanted)]
        if "phase" not in gate and any(p.get("phase") == "both" for p in found):
            found = [p for p in found if p["phase"] == "both"]
        what = " ".join(str(v) for v in wanted.values())
        if not found:
            verdicts.append(Verdict(what, "measured", "no such point", False))
        rule = _judge_compiled if compiled else _judge_point
        worst: dict[str, tuple[float, str]] = {}
        for point in found:
            for limit, excess, text in rule(gate, point):
                worst[limit] = max(worst.get(limit, (-math.inf, "")), (excess, text))
        verdicts += [Verdict(what, n, text, excess <= 0) for n, (excess, text) in worst.items()]
    return verdicts


def _matches(point: dict, wanted: dict) -> bool:
    """Whether a point is the one that is meant; `variant` may be its first word."""
    for name, value in wanted.items():
        if name == "tokens":
            sizes = point["sizes"]
            if sizes.get("T") is not None and value not in (sizes["T"], sizes["B"] * sizes["T"]):
                return False
        elif name == "variant":
            if value not in (point["variant"], point["variant"].split(" ")[0]):
                return False
        elif point[name] != value:
            return False
    return True


def _judge_point(gate: dict, point: dict) -> Iterator[tuple[str, float, str]]:
    """(limit, by how much it is missed, what was found) of each limit."""
    if point["wrong"] is not None:
        yield "right", math.inf, point["wrong"]
        return
    if "errors" in gate:
        found = {place: max(e["maximum"], e["rms"]) for place, e in point["errors"].items()}
        place = max(found, key=found.get)
        limit = f"errors <= {gate['errors']:g}"
        yield limit, found[place] - gate["errors"], f"{found[place]:.2f} ({place} shape)"
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
    """Run what the gates of a set need."""
    if given.set in _VERBS:
        return _run_verb(_VERBS[given.set], given.output)
    clock = given.clock or ("cpu" if torch.get_num_threads() == 1 else "wall")
    if any(gate.get("device") == "cuda" for gate in gates):
        clock = "wall"
    options = {"repeats": given.repeats, "seconds": given.seconds, "clock": clock}
    todo, merged, limits = plans(gates, **options), suite.Outcome(), {}
    with results.Writer(given.output) as write, Progress("gate") as show:
        for number, plan in enumerate(todo):
            plan.check()

            def part(done: float, text: str, number: int = number) -> None:
                show((number + done) / len(todo), text)

            outcome = suite.run(plan, write, part, limits)
            merged.wrong += outcome.wrong
            merged.notes += outcome.notes
    print_report(write.points, merged)
    print()
    return write.points


def _run_verb(words: list[str], output: str | None) -> list[dict]:
    """The points of another verb; its own report goes to the error stream."""
    with tempfile.TemporaryDirectory() as folder:
        path = output or os.path.join(folder, "points.json")
        command = [sys.executable, "-m", "benchmarks", *words, "--output", path]
        subprocess.run(command, stdout=sys.stderr, check=False)
        return results.read(path) if os.path.exists(path) else []


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `gate`."""
    parser.add_argument("results", nargs="*", metavar="FILE.json", help="judge these; else run")
    parser.add_argument("--set", default="cpu", help="of gates.toml: short, cpu, train, ... (cpu)")
    parser.add_argument("--gates", default=FILE, metavar="FILE.toml", help="other gates")
    parser.add_argument("--repeats", type=count, default=15)
    parser.add_argument("--seconds", type=positive, default=20.0, help="timing of a case at most")
    parser.add_argument("--clock", choices=CLOCKS, help="cpu with one thread, wall with more")
    parser.add_argument("--output", metavar="FILE.json", help="one JSON line a point")


def main(given: argparse.Namespace) -> int:
    """Print the table of passed and missed; 1 if one is missed."""
    sets = load(given.gates)
    one_of("--set", [given.set], sets)
    gates = sets[given.set]
    points = results.read(*given.results) if given.results else measure(given, gates)
    verdicts = judge(gates, points)
    header = ["", "gate", "limit", "found"]
    rows = [["passed" if v.passed else "MISSED", v.what, v.limit, v.found] for v in verdicts]
    print(results.table(rows, header))
    missed = sum(not v.passed for v in verdicts)
    print(f"\n{len(verdicts) - missed} passed, {missed} missed")
    return 1 if missed else 0
