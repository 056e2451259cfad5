"""gates.toml is read, judged and failed; the short gate of the CPU holds."""

import json
import math
import subprocess
from pathlib import Path

import pytest
from benchmark_helpers import BUILT, called, point, run

from benchmarks import gates, harness, results, suite
from benchmarks.__main__ import main
from benchmarks.usage import UsageError


def write(tmp_path, *points):
    path = tmp_path / "points.json"
    path.write_text("".join(json.dumps(p) + "\n" for p in points))
    return str(path)


def gates_of(tmp_path, text: str):
    path = tmp_path / "gates.toml"
    path.write_text(text)
    return path


GATE = """
[cpu]
defaults = {{ model = "tiny" }}
gates = [{{ op = "layer_norm", peer = "eager", {limits} }}]
"""


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        ("speed = 1.9", None),
        ("speed = 2.1", "speed >= 2.1x"),
        ("memory = 0.26", None),
        ("memory = 0.24", "memory <= 0.24x"),
        ("errors = 1.2", None),
        ("errors = 1.0", "errors <= 1"),
        ("speed = 1.9, memory = 0.24, errors = 1.2", "memory <= 0.24x"),
    ],
)
def test_every_limit_can_be_missed(tmp_path, capsys, limits, missed):
    """The point is twice as fast as the peer, has a quarter of its memory, 1.1 times its error."""
    path = gates_of(tmp_path, GATE.format(limits=limits))
    verdicts = gates.judge(gates.load(path)["cpu"], [point([10, 10, 10], [20, 20, 20])])
    assert [v.limit for v in verdicts if not v.passed] == ([missed] if missed else [])
    assert len(verdicts) == limits.count("=")


def test_the_exit_code_and_the_table(tmp_path):
    path = gates_of(tmp_path, GATE.format(limits="speed = 3, memory = 0.5"))
    done = called("gate", write(tmp_path, point([10], [20])), "--gates", str(path))
    assert done.returncode == 1 and "1 passed, 1 missed" in done.stdout
    assert "| MISSED | layer_norm tiny eager | speed >= 3x" in done.stdout
    done = called("gate", write(tmp_path, point([10], [40])), "--gates", str(path))
    assert done.returncode == 0 and "2 passed, 0 missed" in done.stdout


def test_what_was_not_measured_is_missed(tmp_path):
    gate = gates.load(gates_of(tmp_path, GATE.format(limits="speed = 1")))["cpu"]
    for other in ({"peer": "compile"}, {"op": "rope"}, {"model": "demo"}):
        (verdict,) = gates.judge(gate, [point([1], [9], **other)])
        assert not verdict.passed and verdict.found == "no such point"
    weights = gates.load(gates_of(tmp_path, GATE.format(limits="memory = 1")))["cpu"]
    (verdict,) = gates.judge(weights, [point([1], [9], memory_ratio=None)])
    assert not verdict.passed and verdict.found == "not measured"


def wrong_point(**fields) -> dict:
    """As the suite makes it: with no peer and no times."""
    return point([1], [1]) | suite._untimed("cpu", {}, "result 0 is off") | fields


@pytest.mark.parametrize("more", ["", ', phase = "forward"'])
def test_a_wrong_implementation_misses_every_gate_of_its_op(tmp_path, more):
    gate = gates.load(gates_of(tmp_path, GATE.format(limits="speed = 1" + more)))["cpu"]
    right = point([1], [9], impl="torch", phase="forward" if more else "both")
    verdicts = gates.judge(gate, [wrong_point(), right])
    assert sorted((v.limit, v.passed) for v in verdicts) == [
        ("right", False),
        ("speed >= 1x", True),
    ]
    assert "cpu: result 0 is off" in {v.found for v in verdicts}
    (verdict,) = gates.judge(gate, [wrong_point(op="rope"), wrong_point(model="demo"), right])
    assert verdict.passed
    (verdict,) = gates.judge([gate[0] | {"impl": "torch"}], [wrong_point(), right])
    assert verdict.passed


def test_the_worst_point_decides(tmp_path):
    gate = gates.load(gates_of(tmp_path, GATE.format(limits="speed = 1")))["cpu"]
    (verdict,) = gates.judge(gate, [point([1], [9]), point([2], [1]), point([1], [9])])
    assert not verdict.passed and verdict.found == "0.50x"


@pytest.mark.parametrize("limit", ["speed = 1", "memory = 1", "errors = 2"])
def test_a_figure_that_is_no_number_misses(tmp_path, limit):
    """Files with such points are refused; here they come from within."""
    gate = gates.load(gates_of(tmp_path, GATE.format(limits=limit)))["cpu"]
    error = {"maximum": math.nan, "rms": math.nan}
    odd = {"ratio": math.nan, "memory_ratio": math.nan, "errors": {"small": error}}
    for points in ([point([1], [9]), point([1], [9]) | odd], [point([1], [9]) | odd]):
        (verdict,) = gates.judge(gate, points)
        assert not verdict.passed and "nan" in verdict.found


def test_errors_that_were_not_checked_are_missed(tmp_path):
    gate = gates.load(gates_of(tmp_path, GATE.format(limits="errors = 2")))["cpu"]
    (verdict,) = gates.judge(gate, [point([1], [9], errors={})])
    assert not verdict.passed and verdict.found == "not checked"


def test_the_verdict_on_a_loaded_machine_says_so(tmp_path):
    gate = gates.load(gates_of(tmp_path, GATE.format(limits="speed = 1")))["cpu"]
    loaded = {"quiet": False, "others": 0.4, "drift": 0.0}
    (verdict,) = gates.judge(gate, [point([1], [9], quiet=loaded)])
    assert verdict.passed and verdict.found == "9.00x, LOADED"
    (verdict,) = gates.judge(gate, [point([1], [9])])
    assert verdict.found == "9.00x"


@pytest.mark.parametrize(
    ("sizes", "matches"),
    [
        ({"N": 64, "C": 32}, True),
        ({"N": 65, "C": 64}, False),
        ({"B": 2, "T": 64, "H": 3}, True),
        ({"B": 2, "T": 32, "H": 3}, True),
        ({"B": 2, "T": 65, "H": 3}, False),
        ({"B": 8, "S": 64, "H": 3}, True),
        ({"B": 8, "S": 65, "H": 3}, False),
        ({"n": 10_007}, True),  # an optimizer's parameters are the same for any number of tokens
        ({"layers": 2, "T": 64}, True),
        ({"bytes": 64, "tokens": 64}, False),
        ({}, False),
    ],
)
def test_the_tokens_of_a_gate_are_those_of_the_point(tmp_path, sizes, matches):
    gate = gates.load(gates_of(tmp_path, GATE.format(limits="speed = 1, tokens = 64")))["cpu"]
    (verdict,) = gates.judge(gate, [point([1], [9], sizes=sizes)])
    assert verdict.passed is matches and (matches or verdict.found == "no such point")


def test_gates_of_compiled_kernels(tmp_path):
    path = gates_of(
        tmp_path,
        '[compile]\ngates = [{ kernel = "rope", spill_bytes = 0, shared = 0.5, '
        'instructions = ["ld.global.v4"] }]',
    )
    gate = gates.load(path)["compile"]
    assert all(v.passed for v in gates.judge(gate, [BUILT]))
    for change in (
        {"spill_bytes": 8},
        {"shared_bytes": 501},
        {"instructions": {"ld.global.v4": 0}},
        {"instructions": {}},
    ):
        missed = [v for v in gates.judge(gate, [BUILT, BUILT | change]) if not v.passed]
        assert len(missed) == 1 and "sm_80" in missed[0].found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('gates = [{ op = "rope", pear = "eager", speed = 1 }]', "pear"),
        ('gates = [{ op = "rope", peer = "eager" }]', "expected one of"),
        ('gates = [{ op = "rope", speed = 1 }]', "expected an op and a peer"),
        ('gates = [{ peer = "eager", speed = 1 }]', "expected an op and a peer"),
        ("", "gates"),
        ("gates = []", "gates"),
        ("gates = [3]", "a list of tables"),
        ("gates = 3", "a list of tables"),
        ('defaults = 3\ngates = [{ op = "rope", peer = "eager", speed = 1 }]', "defaults"),
        ('gates = [{ op = [], peer = "eager", speed = 1 }]', "one value at least"),
        ('gates = [{ op = 3, peer = "eager", speed = 1 }]', "op to be a string"),
        ('gates = [{ op = [[]], peer = "eager", speed = 1 }]', "op to be a string"),
        ('gates = [{ op = "rope", peer = "", speed = 1 }]', "peer to be a string"),
        ('gates = [{ op = "rope", peer = "eager", speed = nan }]', "speed to be a number"),
        ('gates = [{ op = "rope", peer = "eager", speed = "1" }]', "speed to be a number"),
        ('gates = [{ op = "rope", peer = "eager", speed = true }]', "speed to be a number"),
        ('gates = [{ op = "rope", peer = "eager", memory = inf }]', "memory to be a number"),
        ('gates = [{ op = "rope", peer = "eager", errors = [2] }]', "errors to be a number"),
        ('gates = [{ op = "rope", peer = "eager", speed = 1, aim = "2" }]', "aim to be"),
        ('gates = [{ op = "rope", peer = "eager", speed = 1, tokens = "many" }]', "tokens to be"),
        ('gates = [{ op = "rope", peer = "eager", speed = 1, tokens = 0 }]', "tokens to be"),
        ('gates = [{ op = "rope", peer = "eager", speed = 1, device = "tpu" }]', "device to be"),
        ('gates = [{ op = "rope", peer = "eager", speed = 1, dtype = "int8" }]', "dtype to be"),
        ('gates = [{ op = "rope", peer = "eager", speed = 1, phase = "x" }]', "phase to be"),
        ('gates = [{ op = "rope", peer = "eager", speed = 1, variant = "a b" }]', "variant to be"),
        ('gates = [{ op = "rope", peer = "eager", speed = 1, variant = "window x" }]', "variant"),
        ('gates = [{ kernel = "rope", spill_bytes = 0.5 }]', "spill_bytes to be"),
        ('gates = [{ kernel = "rope", shared = nan }]', "shared to be"),
        ('gates = [{ kernel = "rope", instructions = [] }]', "instructions to be"),
        ('gates = [{ kernel = "rope", instructions = "ld" }]', "instructions to be"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        gates.load(gates_of(tmp_path, "[cpu]\n" + text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("", "an empty file"), ("[cpu\n", "gates.toml")])
def test_mistakes_in_the_file_exit_with_2(tmp_path, text, message):
    path = gates_of(tmp_path, text)
    done = called("gate", write(tmp_path, point([1], [1])), "--gates", str(path))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("FILE --output other.json", "--output"),
        ("FILE --repeats 3", "--repeats"),
        ("FILE --seconds 3", "--seconds"),
        ("FILE --clock cpu", "--clock"),
        ("--set train --repeats 3", "--repeats"),
        ("--set data --seconds 3", "--seconds"),
        ("--set compile --clock wall", "--clock"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, words, option):
    file = write(tmp_path, point([1], [1]))
    done = called("gate", *(file if word == "FILE" else word for word in words.split()))
    assert done.returncode == 2 and done.stderr.startswith(f"{option}: expected it to be left out")


class Verb:
    """Stands in for the process of a verb: it writes points and exits."""

    def __init__(self, code: int, *points: dict):
        self.code, self.points = code, points

    def __call__(self, command: list[str], **_) -> subprocess.CompletedProcess:
        if self.points:
            write(Path(command[-1]).parent, *self.points)
        return subprocess.CompletedProcess(command, self.code)


def gate_of_data(tmp_path, monkeypatch, verb, *words: str) -> int:
    """`gate --set data` with a gate on a point of the helper and a verb of the test."""
    path = gates_of(tmp_path, GATE.format(limits="speed = 1").replace("[cpu]", "[data]"))
    monkeypatch.setattr(gates.subprocess, "run", verb)
    return main(["gate", "--set", "data", "--gates", str(path), *words])


def test_the_points_of_a_verb_are_judged_and_kept(tmp_path, monkeypatch):
    p, output = point([1], [9]), tmp_path / "kept.json"
    words = ("--output", str(output))
    assert gate_of_data(tmp_path, monkeypatch, Verb(0, p), *words) == 0
    p["environment"] = p["environment"] | {"command": harness.command()}  # not the verb's own
    assert results.read(str(output)) == [p]


def test_a_verb_that_fails_is_missed(tmp_path, monkeypatch, capsys):
    """With its points too: `compile` exits with 1 for a kernel that it does not know."""
    assert gate_of_data(tmp_path, monkeypatch, Verb(1, point([1], [9]))) == 1
    shown = capsys.readouterr().out
    assert "| MISSED | python -m benchmarks data | exit code 0" in shown
    assert "exit code 1" in shown and "1 passed, 1 missed" in shown


def test_the_file_of_an_earlier_run_is_not_judged(tmp_path, monkeypatch, capsys):
    stale = write(tmp_path, point([1], [9]))
    assert gate_of_data(tmp_path, monkeypatch, Verb(0), "--output", stale) == 1
    assert "no such point" in capsys.readouterr().out


def test_every_gate_of_ops_gets_its_point():
    """The runs that `gate` makes cover the op, peer and variant of every gate."""
    for name, found in gates.load().items():
        if name in gates._VERBS:
            continue
        plans = gates.plans(found)
        for gate in found:
            assert any(
                gate["op"] in plan.ops
                and gate["peer"] in plan.peers.split(",")
                and gate["model"] == plan.model
                and suite._wanted(gate.get("variant", ""), plan.variants)
                for plan in plans
            ), gate


def test_the_short_gate_of_the_cpu_holds():
    """Errors and memory are strict, speed is loose: the tests' machine is never quiet."""
    done = run("gate", "--set", "short", "--seconds", "1", "--repeats", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 missed" in done.stdout and "MISSED" not in done.stdout
