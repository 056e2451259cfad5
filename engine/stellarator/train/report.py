"""report.html of a run: figures first, then plots, in one file that opens anywhere.

defines: write_report

Everything comes from the files of the run folder (metrics.jsonl, summary.json, config.toml), so it
can be written again at any time. The plots also lie beside it as PNG files in plots/.
"""

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot, which chooses a backend for everybody

_BLUE, _ORANGE, _GREY = "#2060a0", "#d06010", "#909090"
_PHASES = {
    "forward": "#2060a0",
    "backward": "#5090d0",
    "optimizer": "#d06010",
    "data": "#c03030",
    "reduce": "#806090",
}
# Keys of summary.json: losses to compare with, times, and what metrics.jsonl has as well.
_REFERENCES = {"untrained_loss": "untrained model", "unigram_loss": "unigram model"}
_TIMES = {"training_seconds": "time of training", "total_seconds": "time of everything"}
_REPEATED = ("steps", "tokens", "tokens_per_second", "peak_memory_gib", "validation_loss")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #202428; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .25rem .8rem .25rem 0; text-align: left;
       border-bottom: 1px solid #e0e4e8; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
th { font-weight: 600; max-width: 12rem } th + th { text-align: right }
.note { color: #606870; white-space: pre-wrap }
img { max-width: 100%; height: auto } pre { background: #f4f6f8; padding: .8rem; overflow-x: auto;
       font-size: 13px } mark { background: #ffe9a8 }
"""


def write_report(folder: str | Path) -> Path:
    """Write `folder/report.html` and `folder/plots/*.png`.

    Args:
        folder: a run folder with metrics.jsonl; summary.json is shown if it is there.
    Returns:
        the path of the report.
    Raises:
        ValueError: the folder holds no steps.
    """
    folder = Path(folder)
    train, evals = _read(folder / "metrics.jsonl")
    if not train:
        raise ValueError(
            f"{folder}: expected metrics.jsonl with at least one step, got none. Pass a run folder."
        )
    summary_path = folder / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    (folder / "plots").mkdir(exist_ok=True)
    images = []
    for name, title, draw in _plots(train, evals, summary):
        path = folder / "plots" / f"{name}.png"
        figure = Figure(figsize=(8, 3.2), dpi=110)
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path)
        data = base64.b64encode(path.read_bytes()).decode()
        images.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    page = _page(
        folder.resolve().name,
        _figures(train, evals, summary),
        _evaluation(summary),
        images,
        folder / "config.toml",
    )
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def _read(path: Path) -> tuple[list[dict], list[dict]]:
    """Training and evaluation records; lines that are not whole are passed over."""
    train, evals = [], []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            # A value that was not finite is stored as null.
            record = {k: math.nan if v is None else v for k, v in record.items()}
            {"train": train, "eval": evals}.get(record.get("kind"), []).append(record)
    return train, evals


def _plots(train: list[dict], evals: list[dict], summary: dict):
    """(file name, title, function that draws) of each plot."""
    steps = [r["step"] for r in train]

    def loss(axes) -> None:
        axes.plot(steps, [r["loss"] for r in train], color=_BLUE, lw=1, label="training (with FIM)")
        if evals:
            axes.plot(
                [r["step"] for r in evals],
                [r["loss"] for r in evals],
                "o-",
                color=_ORANGE,
                ms=3,
                lw=1,
                label="held out",
            )
        for (key, label), style in zip(_REFERENCES.items(), ("--", ":"), strict=True):
            if key in summary:
                axes.axhline(summary[key], color=_GREY, lw=1, ls=style, label=f"held out, {label}")
        axes.set(xlabel="step", ylabel="nats per token")
        _legend(axes)

    def line(key: str, unit: str):
        def draw(axes) -> None:
            axes.plot(steps, [r[key] for r in train], color=_BLUE, lw=1)
            axes.set(xlabel="step", ylabel=unit)
            axes.set_ylim(bottom=0)

        return draw

    def split(axes) -> None:
        bottoms = [0.0] * len(train)
        for phase, color in _PHASES.items():
            values = [r["time_ms"].get(phase, 0.0) for r in train]
            tops = [b + v for b, v in zip(bottoms, values, strict=True)]
            axes.fill_between(steps, bottoms, tops, color=color, lw=0, label=phase)
            bottoms = tops
        axes.set(xlabel="step", ylabel="ms per step")
        _legend(axes)

    return (
        ("loss", "Loss", loss),
        ("learning_rate", "Learning rate", line("lr", "")),
        ("gradient_norm", "Gradient norm", line("grad_norm", "L2, before clipping")),
        ("throughput", "Throughput", line("tokens_per_second", "target tokens per second")),
        ("time_split", "Where the time of a step goes", split),
    )


def _legend(axes) -> None:
    """Above the axes, at the right of the title, where it covers nothing."""
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    axes.legend(frameon=False, fontsize=8, ncol=5, **place)


def _figures(train: list[dict], evals: list[dict], summary: dict) -> list[tuple[str, str]]:
    """The table: figures from metrics.jsonl, and those of summary.json that are not there."""
    last, nats = train[-1], "nats per token"
    middle = sorted(r["tokens_per_second"] for r in train)[len(train) // 2]
    rows = [
        ("parameters", _value(summary["parameters"]) if "parameters" in summary else None),
        ("steps", f"{last['step']:,}"),
        ("target tokens", f"{last['tokens_total']:,}"),
        ("training loss of the last step", f"{last['loss']:.4f} {nats}"),
        ("held-out loss, last", f"{evals[-1]['loss']:.4f} {nats}" if evals else None),
    ]
    for key, label in _REFERENCES.items():
        loss = summary.get(key)
        rows.append((f"held-out loss, {label}", None if loss is None else f"{loss:.4f} {nats}"))
    rows += [
        ("tokens per second, median", f"{middle:,.0f}"),
        ("peak memory", f"{last['memory_bytes'] / 2**30:.2f} GiB"),
    ]
    for key, label in _TIMES.items():
        rows.append((label, f"{summary[key]:,.0f} s" if key in summary else None))
    known = {"parameters", *_REPEATED, *_REFERENCES, *_TIMES}
    rows += [
        (key.replace("_", " "), _value(value))
        for key, value in summary.items()
        if key not in known and not isinstance(value, (list, dict))
    ]
    return [row for row in rows if row[1] is not None]


def _evaluation(summary: dict) -> str:
    """Infilling and samples that an evaluation left in summary.json."""
    parts = []
    if infilling := summary.get("infilling"):
        titles = ("holes", "number", "filled exactly", "exact if cut where the suffix begins")
        titles += ("filled by the best single text", "edit similarity")
        rows = [
            [
                kind,
                f"{found['count']:,}",
                f"{found['exact']:,} ({100 * found['exact'] / max(1, found['count']):.1f} %)",
                f"{found['exact_trimmed']:,}",
                f"{found['exact_of_one_text']:,}",
                f"{found['edit_similarity']:.3f}",
            ]
            for kind, found in infilling.items()
        ]
        parts += ["<h2>Infilling of held-out files</h2>", _table(rows, titles)]
    for sample in summary.get("samples", []):
        parts.append(
            f"<h2>{html.escape(sample['title'])}</h2><pre>{html.escape(sample['prefix'])}"
            f"<mark>{html.escape(sample['middle'])}</mark>{html.escape(sample['suffix'])}</pre>"
            f"<p class=note>{html.escape(sample['note'])}</p>"
        )
    return "\n".join(parts)


def _value(value) -> str:
    """A figure with the digits that say something."""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: Sequence[Sequence[str]], titles: Sequence[str] = ()) -> str:
    """Rows of a name and figures."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    lines = [f"<tr>{head}</tr>"] * bool(titles)
    for name, *figures in rows:
        cells = "".join(f"<td class=number>{html.escape(figure)}</td>" for figure in figures)
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _page(name: str, figures, evaluation: str, images: list[str], config: Path) -> str:
    text = html.escape(config.read_text(encoding="utf-8")) if config.exists() else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(name)}</title>"
        f"<style>{_STYLE}</style><h1>Run {html.escape(name)}</h1><h2>Training</h2>{_table(figures)}"
        f"{evaluation}<h2>Plots</h2>{''.join(images)}"
        f"<h2>Configuration</h2><details><summary>config.toml</summary><pre>{text}</pre></details></html>"
    )
