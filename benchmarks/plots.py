"""`python -m benchmarks plot`: roofline and ratio plots of result files, and a Markdown page.

    FOLDER/roofline.png   rate against operations per byte, under the peaks that the run measured
    FOLDER/ratios.png     speed beside each peer, with the 20 to 80 % range, and peak memory
    FOLDER/README.md      machine, versions, tables, the plots

One set a device and dtype; the first set has the plain names. Drawn without pyplot, so that no
window system is asked for.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.bench_compile import markdown as compiled_table
from benchmarks.run import markdown
from benchmarks.usage import UsageError

_COLOURS = {"forward": "#4477aa", "backward": "#ee6677", "both": "#228833", "whole": "#228833"}
_STYLES = ("-", "--", ":", "-.")  # of the roofs
_MARKS = "osD^vP*X<>hpd8H"
_TICKS = [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def groups(points: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """(suffix of the file names, points) of each device and dtype."""
    kinds = list(dict.fromkeys((p["device"], p["dtype"]) for p in points))
    for number, kind in enumerate(kinds):
        device, dtype = kind
        suffix = "" if number == 0 else f"_{device}_{dtype}" if dtype else "_data"
        yield suffix, [p for p in points if (p["device"], p["dtype"]) == kind]


def measured_limits(points: list[dict]) -> list[tuple[dict, str]]:
    """Each pair of limits that a run measured, and whose they are: models, dtypes, first date."""
    known = {tuple(sorted(p["limits"].items())): p["limits"] for p in points}
    found = []
    for limits in known.values():
        group = [p for p in points if p["limits"] == limits]
        words = [p[name] for name in ("model", "dtype") for p in group]
        first = min(p["environment"]["date"] for p in group)
        found.append((limits, f"{' '.join(dict.fromkeys(words))}, {first}"))
    return found


def roofline(points: list[dict]) -> Figure:
    """Each op and phase once, ours and the fastest peer's, below copy bandwidth and peak rate."""
    figure = _figure(11, 6)
    axes = figure.add_subplot()
    best: dict[tuple, dict] = {}
    for p in points:
        name = (results.name(p), p["phase"], p["impl"])
        if name not in best or p["peer_ms"]["p50"] < best[name]["peer_ms"]["p50"]:
            best[name] = p
    intensity = [p["flops_per_byte"] for p in best.values()]
    x = np.geomspace(min(intensity) / 2, max(*intensity, 200.0) * 2, 100)
    for style, (limits, of) in zip(itertools.cycle(_STYLES), measured_limits(points)):
        roof = np.minimum(limits["matmul_tflops"], x * limits["copy_gbps"] / 1e3)
        axes.plot(x, roof, style, color="black", label=f"copy and matrix-product peak, {of}")
    ops = list(dict.fromkeys(name for name, _, _ in best))
    for (name, phase, _), p in best.items():
        mark, colour = _MARKS[ops.index(name) % len(_MARKS)], _COLOURS[phase]
        rate, peer = p["tflops"], p["tflops"] / p["ratio"]
        at = p["flops_per_byte"]
        axes.plot([at, at], [rate, peer], color=colour, alpha=0.4, linewidth=1)
        axes.plot(at, rate, mark, color=colour, markersize=8)
        axes.plot(at, peer, mark, color=colour, markersize=6, fillstyle="none")
    for number, name in enumerate(ops):
        axes.plot([], [], _MARKS[number % len(_MARKS)], color="grey", label=name)
    for phase in dict.fromkeys(phase for _, phase, _ in best):
        axes.plot([], [], color=_COLOURS[phase], label=phase)
    axes.plot([], [], "o", color="grey", fillstyle="none", label="hollow: fastest peer")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.set_title(_title(points), fontsize=9)
    figure.legend(fontsize=7, loc="outside right center")
    axes.grid(alpha=0.3, which="both")
    return figure


def ratios(points: list[dict]) -> Figure:
    """Bars of the speed beside each peer; right of them the peak memory, where it was measured."""
    last = _last_phases(points)
    figure = _figure(11, 1.2 + 0.28 * len(last))
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    at = np.arange(len(last))[::-1]
    several = len({p["model"] for p in last}) > 1
    names = [
        f"{results.name(p)}{' of ' + p['model'] if several else ''}, {p['impl']} beside {p['peer']}"
        for p in last
    ]
    values = np.array([p["ratio"] for p in last])
    low = np.clip(values - [p["ratio_p20"] for p in last], 0, None)
    high = np.clip([p["ratio_p80"] for p in last] - values, 0, None)
    colours = ["#228833" if value >= 1 else "#ee6677" for value in values]
    speed.barh(at, values - 1, left=1.0, color=colours, height=0.7)
    speed.errorbar(values, at, xerr=[low, high], fmt="none", ecolor="black", capsize=2)
    speed.set_yticks(at, names, fontsize=7)
    speed.set(xscale="log", xlabel="speed, peer's time over ours")
    inside = [t for t in _TICKS if min(*values, 0.8) <= t <= max(*values, 1.25)]
    speed.set_xticks(inside, [f"{t:g}" for t in inside])
    speed.minorticks_off()
    weights = [(a, p["memory_ratio"]) for a, p in zip(at, last, strict=True) if p["memory_ratio"]]
    if weights:
        places, shares = zip(*weights, strict=True)
        memory.barh(places, shares, color="#4477aa", height=0.7)
    memory.set_xlabel("peak memory, ours over the peer's")
    for axes in (speed, memory):
        axes.axvline(1.0, color="black", linewidth=1)
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(_title(last), fontsize=9)
    return figure


def _last_phases(points: list[dict]) -> list[dict]:
    """Both phases together where there are two, sorted as measured."""
    two = {results.name(p) + p["model"] for p in points if p["phase"] == "both"}
    return [p for p in points if p["phase"] == "both" or results.name(p) + p["model"] not in two]


def _title(points: list[dict]) -> str:
    """Two lines: what, and where."""
    models = ", ".join(dict.fromkeys(p["model"] for p in points if p["model"]))
    what = " ".join(filter(None, (models, points[0]["dtype"], points[0]["device"])))
    return f"{what}\n{results.where(points[0]['environment'])}"


def page(points: list[dict], files: list[str]) -> str:
    """The Markdown page."""
    judged = [p for p in points if "kernel" not in p]
    timed = [p for p in judged if p["wrong"] is None]
    # One line for each machine and commit, with its first date.
    places = {results.where(p["environment"] | {"date": ""}): p for p in points[::-1]}
    places = [results.where(p["environment"]) for p in list(places.values())[::-1]]
    lines = ["# Benchmark results", "", *(f"- {place}" for place in places)]
    commands = dict.fromkeys(p["environment"].get("command") for p in points)
    lines += [f"- `{command}`" for command in commands if command]
    if any(p["quiet"] and not p["quiet"]["quiet"] for p in timed):
        lines.append("- Loaded: other work used the machine, the times are not to be kept.")
    lines += ["", *(f"![{name.removesuffix('.png')}]({name})" for name in files), ""]
    if ops := [p for p in timed if p["gbps"] is not None]:
        lines += ["Shares are of what each run measured as copy bandwidth and matrix product:", ""]
        lines += [
            f"- {of}: {limits['copy_gbps']:.1f} GB/s, {limits['matmul_tflops']:.3f} TFLOP/s"
            for limits, of in measured_limits(ops)
        ]
        lines += ["", markdown(ops), ""]
    if others := [p for p in timed if p["gbps"] is None]:
        header = ["what", "ours", "ms", "peer", "peer ms", "speed", "MiB, peer", "memory"]
        lines += [results.table([_row(p) for p in others], header), ""]
    wrong = [p for p in judged if p["wrong"] is not None]
    lines += [f"Wrong, not timed: {results.name(p)}, {p['impl']}: {p['wrong']}" for p in wrong]
    if compiled := [p for p in points if "kernel" in p]:
        lines += ["", compiled_table(compiled)]
    return "\n".join(lines).rstrip() + "\n"


def _row(p: dict) -> list[str]:
    ours, peer = p["ms"]["p50"], p["peer_ms"]["p50"]
    what = results.name(p)
    cells = [what, p["impl"], f"{ours:.1f}", p["peer"], f"{peer:.1f}", f"{p['ratio']:.2f}x"]
    if p["memory_ratio"] is None:
        return [*cells, "", ""]
    sizes = (p["peak_bytes"] / 2**20, p["peer_peak_bytes"] / 2**20)
    return [*cells, f"{sizes[0]:,.0f}, {sizes[1]:,.0f}", f"{p['memory_ratio']:.2f}x"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `plot`."""
    parser.add_argument("results", nargs="+", metavar="FILE.json")
    parser.add_argument("--folder", default="runs/benchmarks", help="where the plots go")


def main(given: argparse.Namespace) -> int:
    """Write the plots and the page."""
    points = results.read(*given.results)
    if not points:
        raise UsageError(f"plot: expected points in {', '.join(given.results)}, got none.")
    folder, files = Path(given.folder), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").touch()
    except OSError as error:
        raise UsageError(f"--folder: expected one that can be written, got {error}") from None
    timed = [p for p in points if "kernel" not in p and p["wrong"] is None]
    for suffix, group in groups(timed):
        rated = [p for p in group if p["flops_per_byte"]]
        drawn = {"roofline": roofline(rated)} if rated else {}
        for name, figure in (drawn | {"ratios": ratios(group)}).items():
            files.append(f"{name}{suffix}.png")
            figure.savefig(folder / files[-1])
    (folder / "README.md").write_text(page(points, files), encoding="utf-8")
    print(f"{folder}: README.md {' '.join(files)}")
    return 0
