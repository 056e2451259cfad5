"""gates.toml is read, judged and failed; the short gate of the CPU holds."""

import json

import pytest
from benchmark_helpers import BUILT, point, run

from benchmarks import gates, suite


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
    done = run("gate", write(tmp_path, point([10], [20])), "--gates", str(path))
    assert done.returncode == 1 and "1 passed, 1 missed" in done.stdout
    assert "| MISSED | layer_norm tiny eager | speed >= 3x" in done.stdout
    done = run("gate", write(tmp_path, point([10], [40])), "--gates", str(path))
    assert done.returncode == 0 and "2 passed, 0 missed" in done.stdout


def test_what_was_not_measured_is_missed(tmp_path):
    gate = gates.load(gates_of(tmp_path, GATE.format(limits="speed = 1")))["cpu"]
    for other in ({"peer": "compile"}, {"op": "rope"}, {"model": "demo"}):
        (verdict,) = gates.judge(gate, [point([1], [9], **other)])
        assert not verdict.passed and verdict.found == "no such point"
    weights = gates.load(gates_of(tmp_path, GATE.format(limits="memory = 1")))["cpu"]
    (verdict,) = gates.judge(weights, [point([1], [9], memory_ratio=None)])
    assert not verdict.passed and verdict.found == "not measured"


def test_a_wrong_point_misses_and_the_worst_point_decides(tmp_path):
    gate = gates.load(gates_of(tmp_path, GATE.format(limits="speed = 1")))["cpu"]
    bad = point([1], [9]) | {"wrong": "result 0 is off", "ms": None, "ratio": None}
    verdicts = gates.judge(gate, [point([1], [9]), bad])
    assert [v.passed for v in verdicts] == [True, False]
    (verdict,) = gates.judge(gate, [point([1], [9]), point([2], [1])])
    assert not verdict.passed and verdict.found == "0.50x"


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
        ('[cpu]\ngates = [{ op = "rope", pear = "eager", speed = 1 }]', "pear"),
        ('[cpu]\ngates = [{ op = "rope", peer = "eager" }]', "expected one of"),
        ("[cpu\n", "gates.toml"),
        ("[cpu]\n", "gates"),
    ],
)
def test_mistakes_in_the_file_exit_with_2(tmp_path, text, message):
    path = gates_of(tmp_path, text)
    done = run("gate", write(tmp_path, point([1], [1])), "--gates", str(path))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


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
