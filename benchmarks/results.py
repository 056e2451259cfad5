"""Result files: one JSON object a line, one line a point.

defines: timed, Writer, read, key, name, sizes_text, where, table, compare, arguments, main

What a point is: benchmarks/points.py.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from benchmarks.harness import Quantiles
from benchmarks.points import validate
from benchmarks.usage import UsageError

_IDENTITY = ("op", "variant", "model", "sizes", "dtype", "device", "phase", "impl", "peer")


def timed(ours_ms: list[float], peer_ms: list[float]) -> dict:
    """The fields of a point that the times of both, one a turn, give."""
    ours, peer = Quantiles.of(ours_ms), Quantiles.of(peer_ms)
    ratios = Quantiles.of([p / o for p, o in zip(peer_ms, ours_ms, strict=True)])
    return {
        "ms": {"p20": ours.p20_ms, "p50": ours.p50_ms, "p80": ours.p80_ms},
        "peer_ms": {"p20": peer.p20_ms, "p50": peer.p50_ms, "p80": peer.p80_ms},
        "ratio": peer.p50_ms / ours.p50_ms,
        "ratio_p20": ratios.p20_ms,
        "ratio_p80": ratios.p80_ms,
    }


class Writer:
    """Keeps points, and writes each to a file at once if there is one.

    Args:
        path: of a new file; one that is there is replaced.
    """

    def __init__(self, path: str | None = None):
        self.points: list[dict] = []
        try:
            self._file = open(path, "w", encoding="utf-8") if path else None
        except OSError as error:
            raise UsageError(
                f"--output: expected a file that can be written, got {error}"
            ) from None

    def __call__(self, point: dict) -> None:
        """Add a point."""
        validate(point)
        self.points.append(point)
        if self._file:
            self._put(point)

    def _put(self, point: dict) -> None:
        self._file.write(json.dumps(point, allow_nan=False) + "\n")
        self._file.flush()

    def again(self) -> None:
        """Write the file anew, with what is known of its points by now."""
        if self._file:
            self._file.seek(0)
            self._file.truncate()
            for point in self.points:
                validate(point)
                self._put(point)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self._file is None:
            return
        self._file.close()
        if kind is KeyboardInterrupt and self.points:
            count = len(self.points)
            print(f"\n{self._file.name}: the {count} points so far", file=sys.stderr)


def read(*paths: str) -> list[dict]:
    """The points of files, in order.

    Raises:
        UsageError: a file cannot be read, or a line is no point; the message has its number.
    """
    points = []
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {error}") from None
        for number, line in enumerate(lines, 1):
            try:
                point = json.loads(line)
                validate(point)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: {error}") from None
            points.append(point)
    return points


def key(point: dict) -> tuple:
    """What makes two points of two files the same measurement."""
    return tuple(json.dumps(point[name], sort_keys=True) for name in _IDENTITY)


def name(point: dict) -> str:
    """Op and variant."""
    return f"{point['op']} {point['variant']}".rstrip()


def sizes_text(sizes: dict[str, int]) -> str:
    """The sizes of a case in one line; what they come to in pairs goes without saying."""
    return " ".join(f"{name} {size}" for name, size in sizes.items() if name != "pairs")


def where(environment: dict) -> str:
    """One line about machine, versions, commit and date."""
    e = environment
    return (
        f"{e['gpu'] or e['cpu']}, {e['threads']} threads, isa {e['isa']}, torch {e['torch']}, "
        f"commit {e['commit']}{' with changes' if e['dirty'] else ''}, {e['date']}"
    )


def table(rows: list[list[str]], header: list[str]) -> str:
    """Markdown, columns as wide as their widest cell."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def compare(before: list[dict], after: list[dict]) -> list[dict]:
    """Points in both lists, the largest change first.

    Returns:
        dicts of name, phase, impl, peer, before and after (ratios to the peer), change (after over
        before: above 1 is faster), low and high (the change, less and more twice the 20 to 80 %
        half-ranges of both ratios), clear (that range lies beyond 5 % on one side of 1).
    """
    known = {key(p): p for p in before if p.get("ratio")}
    found = []
    for b in (p for p in after if p.get("ratio")):
        a = known.get(key(b))
        if a is None:
            continue
        change = b["ratio"] / a["ratio"]
        noise = math.prod(p["ratio_p80"] / p["ratio_p20"] for p in (a, b))
        low, high = change / noise, change * noise
        found.append(
            {"name": name(b), "model": b["model"]}
            | {field: b[field] for field in ("dtype", "phase", "impl", "peer")}
            | {"before": a["ratio"], "after": b["ratio"], "change": change}
            | {"low": low, "high": high, "clear": low > 1.05 or high < 0.95}
        )
    return sorted(found, key=lambda row: max(row["change"], 1 / row["change"]), reverse=True)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `compare`."""
    parser.add_argument("before", metavar="A.json", help="file of an earlier run")
    parser.add_argument("after", metavar="B.json", help="file of a later run")


def main(arguments) -> int:
    """`compare`: prints the table; 1 if the files have nothing in common."""
    before, after = read(arguments.before), read(arguments.after)
    if any("kernel" in p for p in before + after):
        raise UsageError(
            "compare: expected points with times beside a peer, got compiled kernels. "
            "Judge those with `gate --set compile`."
        )
    rows = compare(before, after)
    if not rows:
        print("compare: expected points of the same ops, shapes and peers in both files, got none.")
        return 1
    for field in ("cpu", "gpu", "threads", "torch"):
        old, new = ({str(p["environment"][field]) for p in points} for points in (before, after))
        if old != new:
            print(f"Not the same {field}: {', '.join(sorted(old))}; {', '.join(sorted(new))}")
    header = ["op", "model", "phase", "impl", "peer", "before", "after", "change", "noise", ""]
    cells = [
        [
            r["name"], r["model"], r["phase"], r["impl"], r["peer"], f"{r['before']:.2f}x",
            f"{r['after']:.2f}x", f"{r['change']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}",
            "" if not r["clear"] else "faster" if r["change"] > 1 else "SLOWER",
        ]
        for r in rows
    ]  # fmt: skip
    print(table(cells, header))
    return 0
