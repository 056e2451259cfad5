"""Result files are valid or refused; two of them are compared; plots show what is in them."""

import json
import math

import pytest
from benchmark_helpers import BUILT, called, point

from benchmarks import plots, results
from benchmarks.checks import Errors
from benchmarks.points import validate
from benchmarks.usage import UsageError


def write(path, *points):
    with results.Writer(str(path)) as file:
        for p in points:
            file(p)
    return str(path)


def test_a_point_goes_through_a_file_unchanged(tmp_path):
    points = [point([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]), point([1.0], [2.0], op="rope")]
    assert results.read(write(tmp_path / "a.json", *points)) == points
    assert points[0]["ms"] == {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    assert (points[0]["ratio"], points[0]["ratio_p20"], points[0]["ratio_p80"]) == (
        2.0, pytest.approx(4 / 3), 4.0,
    )  # fmt: skip


ERROR = {"maximum": 1.0, "rms": 1.0, "where": "result 0", "limit": 2.0}
HOLLOW = [
    {"ratio": "fast"}, {"ratio": math.nan}, {"ratio": math.inf}, {"ratio": None}, {"ratio": 0},
    {"ratio_p20": None}, {"ratio_p20": 0}, {"ms": None}, {"peer_ms": {"p20": 1.0, "p50": 1.0}},
    {"ms": {"p20": 1.0, "p50": math.nan, "p80": 1.0}}, {"phase": "zzz"}, {"phase": {}},
    {"sizes": None}, {"sizes": {"N": "many"}}, {"extra": 1}, {"op": None}, {"op": ""},
    {"gbps": True}, {"gbps": None}, {"gbps": 10**400}, {"tflops": math.nan}, {"limits": {}},
    {"limits": {"copy_gbps": math.nan, "matmul_tflops": 1.0}}, {"memory_ratio": math.nan},
    {"errors": []}, {"errors": {"small": {}}}, {"errors": {"small": ERROR | {"rms": math.nan}}},
    {"errors": {"small": ERROR | {"rms": None}}}, {"environment": {}}, {"wrong": ""},
    {"wrong": "off"}, {"quiet": {}}, {"quiet": {"quiet": 1, "others": 0.0, "drift": 0.0}},
]  # fmt: skip


@pytest.mark.parametrize("change", HOLLOW, ids=str)
def test_a_point_that_is_none_is_refused(tmp_path, change):
    field = next(iter(change))
    with pytest.raises(ValueError, match=field):
        validate(point([1], [1]) | change)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(point([1], [1])) + "\n" + json.dumps(point([1], [1]) | change))
    with pytest.raises(UsageError, match=rf"a\.json, line 2: .*{field}"):
        results.read(str(path))


@pytest.mark.parametrize("line", ["5", "null", "[1, 2]", "no JSON", '"kernel"', '{"kernel": 1}'])
def test_a_line_that_is_no_point_is_refused(tmp_path, line):
    path = tmp_path / "a.json"
    path.write_text(line)
    with pytest.raises(UsageError, match=r"a\.json, line 1: "):
        results.read(str(path))


def test_a_field_that_is_missing_is_named():
    with pytest.raises(ValueError, match="wrong"):
        validate({k: v for k, v in point([1], [1]).items() if k != "wrong"})


@pytest.mark.parametrize("verb", ["compare", "gate", "plot"])
def test_every_verb_refuses_a_file_with_a_hollow_point(tmp_path, verb):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(point([1], [1], environment={})) + "\n")
    done = called(verb, *[str(path)] * (2 if verb == "compare" else 1))
    assert done.returncode == 2 and done.stderr.startswith(f"{path}, line 1: expected environment")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_errors_that_are_not_finite_are_null_in_a_file(tmp_path):
    errors = {"small": Errors(math.nan, math.inf, 0.0, "result 0").to_json()}
    assert errors["small"]["maximum"] is None and errors["small"]["rms"] is None
    untimed = dict.fromkeys(("ms", "peer_ms", "ratio", "ratio_p20", "ratio_p80"))
    bad = point([1], [1], errors=errors, wrong="not finite") | untimed
    assert results.read(write(tmp_path / "a.json", bad)) == [bad]


def test_compare_tells_a_change_from_noise(tmp_path):
    def steady(ours, **fields):
        return point([ours] * 5, [10.0] * 5, **fields)

    noisy = point([4.0, 5.0, 6.0, 7.0, 8.0], [10.0] * 5, op="rope")
    before = [steady(5.0), steady(5.0, op="bias_gelu"), noisy, steady(5.0, op="grad_norm")]
    after = [
        steady(4.0), steady(8.0, op="bias_gelu"), point([5.0] * 5, [10.0] * 5, op="rope"),
        steady(5.1, op="grad_norm"), steady(1.0, op="adamw_"),
    ]  # fmt: skip
    found = {row["name"].split()[0]: row for row in results.compare(before, after)}
    assert set(found) == {"layer_norm", "bias_gelu", "rope", "grad_norm"}  # adamw_ is new
    assert found["layer_norm"]["change"] == pytest.approx(1.25) and found["layer_norm"]["clear"]
    assert found["bias_gelu"]["change"] == pytest.approx(0.625) and found["bias_gelu"]["clear"]
    assert not found["rope"]["clear"]  # 1.2, but either file may be off by more
    assert not found["grad_norm"]["clear"]
    a, b = write(tmp_path / "a.json", *before), write(tmp_path / "b.json", *after)
    done = called("compare", a, b)
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert done.returncode == 0
    assert "faster" in lines["layer_norm"] and "SLOWER" in lines["bias_gelu"]
    assert "SLOWER" not in lines["grad_norm"] and "faster" not in lines["rope"]


def test_compare_says_what_it_cannot_compare(tmp_path):
    a = write(tmp_path / "a.json", point([1], [1]))
    b = write(tmp_path / "b.json", point([1], [1], op="rope"))
    done = called("compare", a, b)
    assert done.returncode == 1 and "got none" in done.stdout
    (tmp_path / "c.json").write_text("no point\n")
    done = called("compare", a, str(tmp_path / "c.json"))
    assert done.returncode == 2 and done.stderr.startswith(str(tmp_path / "c.json") + ", line 1")
    built = write(tmp_path / "d.json", BUILT)
    done = called("compare", built, built)
    assert done.returncode == 2 and "expected points with times beside a peer" in done.stderr
    done = called("compare", a, str(tmp_path / "none.json"))
    assert done.returncode == 2 and "none.json" in done.stderr


def test_plots_show_the_points(tmp_path):
    from matplotlib.image import imread

    points = [
        point([1.0] * 3, [2.0] * 3, phase=phase, op=op)
        for op in ("layer_norm", "rope")
        for phase in ("forward", "backward", "both")
    ]
    wrong = point([1], [1], op="bias_gelu") | dict.fromkeys(("ms", "peer_ms", "ratio", "ratio_p20"))
    wrong |= {"wrong": "result 0 is off", "ratio_p80": None}
    path = write(tmp_path / "a.json", *points, wrong)
    done = called("plot", path, "--folder", str(tmp_path / "page"))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("roofline.png", "ratios.png"):
        image = imread(tmp_path / "page" / name)
        assert min(image.shape[:2]) > 150 and image.std() > 0.05  # not blank
    text = (tmp_path / "page" / "README.md").read_text()
    assert "![roofline](roofline.png)" in text and text.count("| layer_norm residual") == 3
    assert "- `python -m benchmarks run --op layer_norm`" in text
    assert "2.00x" in text and "Wrong, not timed: bias_gelu residual, cpu: result 0 is off" in text


def test_the_roofline_has_the_measured_roof_and_every_point():
    p = point([1.0] * 3, [4.0] * 3, tflops=0.03, flops_per_byte=6.0)
    (axes,) = plots.roofline([p]).axes
    roof, *marks = (line.get_xydata() for line in axes.lines)
    assert roof[:, 1].max() == pytest.approx(0.5)  # the measured product peak
    low = roof[roof[:, 1] < 0.4]
    assert (low[:, 1] / low[:, 0]).max() == pytest.approx(10 / 1e3)  # the measured copy, 10 GB/s
    drawn = {tuple(xy) for mark in marks for xy in mark.tolist()}
    assert (6.0, 0.03) in drawn and any(
        xy == (6.0, pytest.approx(0.0075)) for xy in drawn
    )  # the peer takes four times as long


def test_each_run_has_its_own_limits(tmp_path):
    """The second file's run found a faster copy; each is named by what it measured."""
    limits = {"copy_gbps": 20.0, "matmul_tflops": 0.25}
    points = [point([1.0], [2.0]), point([1.0], [2.0], model="demo", limits=limits)]
    roofs = [line for line in plots.roofline(points).axes[0].lines if line.get_color() == "black"]
    assert [roof.get_ydata().max() for roof in roofs] == [0.5, 0.25]
    assert ["tiny" in roofs[0].get_label(), "demo" in roofs[1].get_label()] == [True, True]
    text = plots.page([*points, points[0]], [])
    assert text.count("10.0 GB/s, 0.500 TFLOP/s") == 1 and "- tiny bfloat16, 2026-11-21" in text
    assert text.count("20.0 GB/s, 0.250 TFLOP/s") == 1 and "- demo bfloat16, 2026-11-21" in text


def test_the_bars_are_the_ratios():
    figure = plots.ratios([point([1.0] * 3, [4.0] * 3), point([2.0] * 3, [1.0] * 3, op="rope")])
    speed, memory = figure.axes
    ends = [bar.get_x() + bar.get_width() for bar in speed.patches]
    assert ends == [pytest.approx(4.0), pytest.approx(0.5)]
    assert [bar.get_width() for bar in memory.patches] == [0.25, 0.25]


def test_files_that_cannot_be_plotted(tmp_path):
    (tmp_path / "empty.json").write_text("")
    for name, message in (("empty.json", "got none"), ("none.json", "none.json")):
        done = called("plot", str(tmp_path / name), "--folder", str(tmp_path / "page"))
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
