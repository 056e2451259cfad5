"""report.html: what each plot holds, figure by figure, against metrics.jsonl and summary.json.

The data are read from the axes that are drawn on, just before they become an image. Not covered:
how it looks.
"""

import json
import math
import os
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from stellarator.train.report import write_report

PHASES = ("forward", "backward", "optimizer", "data", "reduce")
SUMMARY = {
    "parameters": 1234567,
    "steps": 6,
    "tokens": 384,
    "training_seconds": 283.6,
    "tokens_per_second": 400.0,
    "peak_memory_gib": 1.5,
    "validation_loss": -1.0,
    "untrained_loss": 7.0,
    "unigram_loss": 5.5,
    "own_figure": 0.25,
    "total_seconds": 370.2,
    "infilling": {
        "short": {"count": 400, "exact": 18, "exact_trimmed": 21, "exact_of_one_text": 11,
                  "edit_similarity": 0.25}
    },
    "samples": [
        {"title": "A hole", "prefix": "a", "middle": "<b>", "suffix": "c", "note": "x  y"}
    ],
}  # fmt: skip


def record(step: int) -> dict:
    """A step whose every figure is another one."""
    return {
        "kind": "train",
        "step": step,
        "loss": None if step == 3 else 6.0 / step,
        "lr": 1e-3 * step,
        "grad_norm": 2.0 + step,
        "tokens": 64,
        "tokens_total": 64 * step,
        "tokens_per_second": 100.0 * step,
        "memory_bytes": step << 28,
        "time_ms": {phase: step + 10.0 * k for k, phase in enumerate(PHASES)},
    }


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """(records, {name of a plot: its axes}, the page)."""
    train = [record(step) for step in range(1, 7)]
    evals = [{"kind": "eval", "step": s, "loss": 5.0 - s, "tokens": 9} for s in (0, 3, 6)]
    lines = [json.dumps(r) for r in (evals[0], *train[:3], evals[1], *train[3:], evals[2])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    axes, save = {}, Figure.savefig

    def savefig(figure, path, **options):
        (axes[path.stem],) = figure.axes
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    page = write_report(tmp_path).read_text()
    return train, axes, page


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    """The points of every line by its label, those without one under their colour."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_losses_stand_beside_their_references(drawn):
    train, axes, _ = drawn
    found = lines_of(axes["loss"])
    training = found["training (with FIM)"]
    assert [x for x, _ in training] == [1, 2, 3, 4, 5, 6]
    assert math.isnan(training[2][1])  # a loss that was not finite is a gap
    assert [y for _, y in training if y == y] == [6.0, 3.0, 1.5, 1.2, 1.0]
    assert found["held out"] == [(0, 5.0), (3, 2.0), (6, -1.0)]
    for label, level in (("held out, untrained model", 7.0), ("held out, unigram model", 5.5)):
        assert {y for _, y in found[label]} == {level}


@pytest.mark.parametrize("name", ["loss", "time_split"])
def test_legends_cover_nothing(drawn, name):
    axes = drawn[1][name]
    legend = axes.get_legend()
    assert {t.get_text() for t in legend.get_texts()} == set(axes.get_legend_handles_labels()[1])
    frame, box = axes.get_window_extent(), legend.get_window_extent()
    title = axes._left_title.get_window_extent()
    assert box.y0 >= frame.y1 and title.x1 < box.x0 and box.y1 <= axes.figure.bbox.y1


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("learning_rate", "lr"),
        ("gradient_norm", "grad_norm"),
        ("throughput", "tokens_per_second"),
    ],
)
def test_each_plot_shows_its_own_figure(drawn, name, key):
    train, axes, _ = drawn
    (points,) = lines_of(axes[name]).values()
    assert points == [(r["step"], r[key]) for r in train]
    assert axes[name].get_ylim()[0] == 0.0


def test_phases_lie_one_above_the_other(drawn):
    train, axes, _ = drawn
    areas = axes["time_split"].collections
    assert [area.get_label() for area in areas] == list(PHASES)
    bottom = [0.0] * len(train)
    for phase, area in zip(PHASES, areas, strict=True):
        top = [b + r["time_ms"][phase] for b, r in zip(bottom, train, strict=True)]
        corners = {tuple(point) for path in area.get_paths() for point in path.vertices.tolist()}
        expected = {(r["step"], y) for side in (bottom, top) for r, y in zip(train, side)}
        assert corners == expected, phase
        bottom = top


def test_the_page_has_the_figures_and_the_plots(drawn):
    _, axes, page = drawn
    assert page.count("<img") == len(axes) == 5
    for cells in (
        "<td>steps</td><td class=number>6</td>",
        "<td>target tokens</td><td class=number>384</td>",
        "<td>held-out loss, last</td><td class=number>-1.0000 nats per token</td>",
        "<td>training loss of the last step</td><td class=number>1.0000 nats per token</td>",
        "<td>tokens per second, median</td><td class=number>400</td>",
        "<td>peak memory</td><td class=number>1.50 GiB</td>",
        "<td>parameters</td><td class=number>1,234,567</td>",
        "<td>held-out loss, untrained model</td><td class=number>7.0000 nats per token</td>",
        "<td>held-out loss, unigram model</td><td class=number>5.5000 nats per token</td>",
        "<td>time of training</td><td class=number>284 s</td>",
        "<td>time of everything</td><td class=number>370 s</td>",
        "<td>own figure</td><td class=number>0.25</td>",
        "<td>short</td><td class=number>400</td><td class=number>18 (4.5 %)</td>"
        "<td class=number>21</td><td class=number>11</td><td class=number>0.250</td>",
        "<mark>&lt;b&gt;</mark>",
    ):
        assert page.count(cells) == 1, cells
    figures = page.partition("</table>")[0]
    assert figures.count("<tr>") == 12 and "gib" not in figures  # nothing twice
    assert "white-space: pre-wrap" in page  # two spaces of a text stay two


def test_a_folder_without_steps_is_the_users_mistake(tmp_path):
    with pytest.raises(ValueError, match="got none. Pass a run folder"):
        write_report(tmp_path)


PROGRAM = """
import sys
import matplotlib
matplotlib.use("svg")
from stellarator.train.report import write_report
write_report(sys.argv[1])
assert matplotlib.get_backend() == "svg" and "matplotlib.pyplot" not in sys.modules
"""


def test_the_backend_of_the_caller_stays(drawn, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
