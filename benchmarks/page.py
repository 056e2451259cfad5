"""The Markdown page of one run of `python -m benchmarks gpu`.

defines: page

From top to bottom: GPU, driver, clocks, versions, commit, command; the floors that the run
measured; a table for each op, with its errors, our times, every peer's, the share of the floor that
bounds the op at that shape, and memory; what was wrong, and what was not measured and why.
"""

from benchmarks import peers, results
from benchmarks.checks import LIMIT
from benchmarks.machine import Quietness
from benchmarks.suite import Outcome

_CLOCKS = {  # field of clocks.State -> its row
    "sm_mhz": "SM clock, MHz", "sm_max_mhz": "its maximum", "memory_mhz": "memory clock, MHz",
    "power_watts": "power, W", "power_limit_watts": "its limit", "temperature_c": "temperature, C",
    "throttled_by": "held back by",
}  # fmt: skip
_DRY = (
    "**A dry run: interpreted kernels on tensors of the CPU at tiny shapes. The checks hold, the "
    "times mean nothing.**"
)


def page(points: list[dict], outcome: Outcome, seconds: float, *, dry: bool = False) -> str:
    """The page.

    Args:
        points: of the run, valid.
        outcome: of the same run; the `clocks` of its environment are dicts of clocks.State.
        seconds: that the run took.
    """
    e = outcome.environment
    lines = [f"# Kernels on {e['gpu'] or e['cpu']}", ""]
    lines += [_DRY, ""] if dry else []
    lines += [*_header(e, seconds), "", *_clocks(e["clocks"]), ""]
    lines += ["Floors, measured in this run; shares are of these:", ""]
    lines += [
        f"- {device}, {dtype}: copy {limits.copy_gbps:,.1f} GB/s, matrix product "
        f"{limits.matmul_tflops:,.3f} TFLOP/s"
        for (device, dtype, _), limits in outcome.limits.items()
    ] or ["- none"]
    lines += ["", *_summary(points, outcome), ""]
    for op in dict.fromkeys(p["op"] for p in points):
        group = [p for p in points if p["op"] == op]
        lines += [f"## {op}: {', '.join(_models(group))}", "", _table(group), ""]
    return "\n".join([*lines, *_rest(outcome)]) + "\n"


def _header(e: dict, seconds: float) -> list[str]:
    """What ran where."""
    commit = e["commit"] + (" with changes" if e["dirty"] else "")
    names = ("torch", "triton", "cuda", "python")
    versions = ", ".join(f"{name} {e[name] or 'none'}" for name in names)
    return [
        f"- GPU: {e['gpu'] or 'none'}, driver {e['clocks']['before']['driver'] or 'unknown'}",
        f"- processor: {e['cpu']}, {e['threads']} threads, isa {e['isa']}",
        f"- versions: {versions}; commit {commit}",
        f"- `{e['command']}`, {e['date']}, {seconds:.0f} s",
    ]


def _clocks(states: dict[str, dict]) -> list[str]:
    """A row for each thing that the driver tells."""
    if not any(state[name] is not None for state in states.values() for name in _CLOCKS):
        return ["Clocks, power, temperature: unknown, no GPU or nothing that tells them."]
    rows = [[text, *(_known(s[name]) for s in states.values())] for name, text in _CLOCKS.items()]
    header = ["during a matrix product", *(f"{when} the run" for when in states)]
    return results.table(rows, header).splitlines()


def _known(value: object) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, (list, tuple)):
        return ", ".join(value) or "nothing"
    return f"{value:g}"


def _summary(points: list[dict], outcome: Outcome) -> list[str]:
    """How much of it was done, and how to read it."""
    cases = {(results.name(p), p["model"], str(p["sizes"])) for p in points if not p["wrong"]}
    lines = [
        f"Cases measured: {len(cases)}; wrong: {len(outcome.wrong)}; without their turn: "
        f"{len(outcome.skipped)}.",
        "",
        "check: the largest of our errors against float64 over that of plain eager code, at most "
        f"{LIMIT:g}, and the shapes that were checked. ms: median (20th, 80th percentile). Peers: "
        "ms, and their time over ours in brackets: above 1, ours is faster. Memory: what forward "
        "and backward add at their peak, in MiB.",
    ]
    loaded = [p["quiet"] for p in points if p["quiet"] and not p["quiet"]["quiet"]]
    if loaded:
        worst = max(loaded, key=lambda q: (q["others"], q["drift"]))
        lines += ["", Quietness.warning(worst)]
    return lines


def _models(points: list[dict]) -> list[str]:
    return list(dict.fromkeys(p["model"] for p in points))


def _table(points: list[dict]) -> str:
    """One row for each case, phase and implementation; one column for each peer."""
    names = list(dict.fromkeys(p["peer"] for p in points if p["peer"]))
    several, rows = len(_models(points)) > 1, {}
    for p in points:
        words = (p["variant"], p["model"] if several else "", results.sizes_text(p["sizes"]))
        case = ", ".join(filter(None, words))
        rows.setdefault((case, p["impl"], p["phase"]), []).append(p)
    header = ["case", "impl", "phase", "check", "ms", *names, "of the floor", "memory"]
    return results.table([_row(case, rows[case], names) for case in rows], header)


def _row(case: tuple[str, ...], group: list[dict], names: list[str]) -> list[str]:
    """The cells of the points that differ in their peer only."""
    p = group[0]
    cells = [*case, "WRONG" if p["wrong"] else _check(p["errors"])]
    if p["wrong"]:
        return cells + [""] * (len(names) + 3)
    ms, by_peer = p["ms"], {q["peer"]: q for q in group}
    times = [
        f"{q['peer_ms']['p50']:.3f} ({q['ratio']:.2f}x)" if (q := by_peer.get(name)) else ""
        for name in names
    ]
    ours = f"{ms['p50']:.3f} ({ms['p20']:.3f}, {ms['p80']:.3f})"
    return [*cells, ours, *times, _share(p), _memory(group)]


def _check(errors: dict) -> str:
    """The largest ratio of the rules, and where was looked."""
    worst = max(max(e["maximum"], e["rms"], e.get("factor", 0.0)) for e in errors.values())
    return f"{worst:.2f} ({', '.join(errors)})"


def _share(p: dict) -> str:
    """Of the floor that is higher at this many operations per byte, so that it bounds the op."""
    limits = p["limits"]
    if p["flops_per_byte"] * limits["copy_gbps"] < 1e3 * limits["matmul_tflops"]:
        return f"{p['gbps']:,.1f} GB/s ({p['copy_share']:.0%})"
    return f"{p['tflops']:,.3f} TFLOP/s ({p['matmul_share']:.0%})"


def _memory(group: list[dict]) -> str:
    """Ours, then each peer's."""
    if group[0]["peak_bytes"] is None:
        return ""
    weights = {q["peer"]: q["peer_peak_bytes"] for q in group if q["peer_peak_bytes"] is not None}
    others = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in weights.items())
    return f"{group[0]['peak_bytes'] / 2**20:,.1f}" + (f" ({others})" if others else "")


def _rest(outcome: Outcome) -> list[str]:
    """What was wrong, and what was not measured and why."""
    lines = [f"- WRONG, not timed: {_flat(text)}" for text in outcome.wrong]
    lines += [f"- not measured: out of time: {text}" for text in outcome.skipped]
    lines += [f"- peer {name} cannot be imported: {_flat(t)}" for name, t in peers.absent().items()]
    lines += [f"- {_flat(text)}" for text in outcome.notes]
    return ["## Wrong, or not measured", "", *(dict.fromkeys(lines) or ["Nothing."])]


def _flat(text: str) -> str:
    """In one line."""
    return " ".join(text.split())
