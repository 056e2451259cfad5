"""What the verb gpu runs, in which order and in what time; what fails or takes too long is named.

Cases are planted or their clock is. Not covered: a GPU.
"""

import argparse
import dataclasses

import pytest
import torch
from benchmark_helpers import point
from plan_helpers import PLAN, plant, run

from benchmarks import checks, gpu, ops, peers, results, shapes, suite
from benchmarks.usage import UsageError

SIZES = {"N": 3, "pairs": 4}


def given(*words: str) -> argparse.Namespace:
    """The options of a command."""
    parser = argparse.ArgumentParser()
    gpu.arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def with_a_gpu(monkeypatch):
    """One that is never used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


TABLE = [
    ("flash_attention", "starcoder2_3b", 2, 8192),
    ("flash_attention", "starcoder2_3b", 1, 16384),
    ("decode_attention", "starcoder", 64, 8192),
    ("decode_attention", "starcoder2_3b", 16, 16384),
]


def described(plans: list[suite.Plan]) -> list[tuple]:
    """First op, model, rows and tokens of each."""
    shapes_of = [(p.ops[0], p.shape()) for p in plans]
    return [(op, shape.model, shape.B, shape.T) for op, shape in shapes_of]


def test_attention_comes_first_and_then_every_op(with_a_gpu):
    *table, others = gpu.plans_of(given())
    assert described(table) == TABLE
    assert table[1].shape().window == 4096 and table[0].variants == ("causal",)
    assert described([others]) == [("flash_attention", "starcoder2_3b", 2, 4096)]
    assert {op for plan in (*table, others) for op in plan.ops} == set(ops.OPS)
    assert {p.dtype for p in (*table, others)} == {"bfloat16"} and others.impls[:2] == (
        "triton",
        "cuda",
    )
    asked = {"sdpa", "flash", "cudnn", "flex", "varlen", "flash_attn"}  # the peers of the issue
    assert all(asked <= set(p.peers.split(",")) for p in table) and others.peers == "default"
    for plan in (*table, others):
        plan.check()


def test_a_table_alone(with_a_gpu):
    plans = gpu.plans_of(given("--table", "attention", "--peers", "sdpa"))
    assert described(plans) == TABLE and {p.peers for p in plans} == {"sdpa"}
    (plan,) = gpu.plans_of(given("--table", "mlp"))
    assert described([plan]) == [("linear", "starcoder2_3b", 1, 16384)]
    assert plan.peers == "default" and {"mlp", "layer_norm_mlp"} < set(plan.ops)
    plan.check()
    with pytest.raises(UsageError, match="--table: expected no --op"):
        gpu.plans_of(given("--table", "attention", "--tokens", "5"))


def test_ops_that_are_asked_for_are_all_that_runs(with_a_gpu):
    plans = gpu.plans_of(given("--op", "rope,adamw_", "--dtype", "float16", "--repeats", "7"))
    assert [(p.ops, p.dtype, p.repeats) for p in plans] == [(("rope", "adamw_"), "float16", 7)]


@pytest.mark.parametrize(
    "words", [["--device", "cpu"], ["--dtype", "bfloat16"], ["--model", "demo"]], ids=str
)
def test_a_dry_run_refuses_what_it_would_not_heed(words):
    with pytest.raises(UsageError, match="--dry: expected no --device, --dtype or --model"):
        gpu.plans_of(given("--dry", *words))


def test_a_dry_run_is_on_the_cpu_and_heeds_the_rest():
    (plan,) = gpu.plans_of(given("--dry", "--repeats", "3", "--op", "rope"))
    assert (plan.device, plan.dtype, plan.model, plan.small) == ("cpu", "float32", "tiny", True)
    assert (plan.repeats, plan.ops) == (3, ("rope",))
    assert gpu.plans_of(given("--dry"))[0].repeats == 1


@pytest.mark.parametrize("name", ["a/points", "a/points.json", "a/points.md"])
def test_one_name_gives_two_files(tmp_path, name):
    files = gpu.files_of(str(tmp_path / name))
    assert [f.relative_to(tmp_path).as_posix() for f in files] == ["a/points.json", "a/points.md"]
    assert gpu.files_of(str(tmp_path / "v1.5"))[0].name == "v1.5.json"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--output: expected files that can be written"):
        gpu.files_of(str(tmp_path / "file" / "points"))


def test_the_time_is_shared_evenly_and_what_gets_none_is_named(monkeypatch):
    """Ten cases, 100 s. A case that takes longer than its share takes it from those behind it."""
    now, shares, took = [0.0], [], {1: 46.0, 5: 60.0}

    def points_of(plan, small, timed, outcome, limits, until):
        shares.append(round(until - now[0], 6))
        now[0] += took.get(len(shares), 6.0)
        return []

    clock = argparse.Namespace(monotonic=lambda: now[0])
    monkeypatch.setattr(suite, "time", clock)
    monkeypatch.setattr(suite, "_points", points_of)
    monkeypatch.setattr(suite, "measure_limits", lambda *_, **__: suite.Limits(1.0, 1.0))
    cases = [
        dataclasses.replace(c, variant=f"{n}", sizes=SIZES)
        for n, c in enumerate(ops.cases("rope", shapes.get("tiny"), "cpu") * 5)
    ]
    monkeypatch.setattr(ops, "cases", lambda *_: cases)
    plans = [dataclasses.replace(PLAN, ops=("rope",))] * 2
    outcome = suite.run(plans, pytest.fail, lambda *_: None, seconds=100.0)
    # 100/10, (100 - 46)/9, then 6 s less for one case less, and 36 left for 6 at the fifth.
    assert shares == [10.0, 6.0, 6.0, 6.0, 6.0]
    assert outcome.skipped == [f"rope {n}, tiny, N 3" for n in range(5)]
    assert outcome.wrong == [] and list(outcome.limits) == [("cpu", "float32", "wall")]


def test_timing_ends_with_the_share_of_a_case(monkeypatch):
    seen = []

    def turns(samplers, repeats, *, seconds, warmup):
        seen.append(seconds)
        return {name: sampler() and {"both": [1.0]} for name, sampler in samplers.items()}

    monkeypatch.setattr(suite, "take_turns", turns)
    plan = dataclasses.replace(PLAN, ops=("grad_norm",), seconds=1000.0)
    suite.run([plan], lambda _: None, lambda *_: None, seconds=30.0)
    assert len(seen) == 1 and 0 < seen[0] < 30


def test_sdpa_by_one_of_its_backends_is_the_same_attention():
    """By flash kernels, which a CPU has too; by cuDNN, which it has not."""
    case = ops.cases("flash_attention", shapes.reduced(shapes.get("tiny")), "cpu")[0]
    made = peers.attention(case.sizes["T"], None, None)
    assert checks.Judge(case, "cpu", torch.float32).peer_objection(made["flash"]) == ""
    with pytest.raises(RuntimeError):
        checks.Judge(case, "cpu", torch.float32).peer_objection(made["cudnn"])


def test_what_raises_is_named_and_stops_nothing_else(monkeypatch, capfd):
    def broken(case):
        def ours(impl, *inputs):
            if case.op == "rope" and impl != "reference":
                raise RuntimeError("out of registers\nand more")
            return case.ours(impl, *inputs)

        return ours

    plant(monkeypatch, ours=broken)
    points, outcome = run(dataclasses.replace(PLAN, ops=("rope", "grad_norm")))
    assert outcome.wrong == ["rope: cannot run: RuntimeError: out of registers"]
    assert [(p["op"], p["wrong"]) for p in points if p["wrong"]] == [
        ("rope", "cannot run: RuntimeError: out of registers")
    ]
    assert any(p["op"] == "grad_norm" and p["ratio"] for p in points)
    assert "Traceback" in capfd.readouterr().err


def test_a_shape_that_is_too_large_is_checked_with_few_heads(monkeypatch):
    """A kernel that is wrong from the 200th key on passes the small shape, which has 97."""

    def late(case):
        def ours(impl, q, *others):
            out = case.ours(impl, q, *others)
            wrong = impl != "reference" and q.shape[1] > 200
            return torch.cat([out[:, :200], out[:, 200:] * 1.01], 1) if wrong else out

        return ours

    plan = dataclasses.replace(
        PLAN, ops=("flash_attention",), variants=("causal",), model="starcoder2_12m", small=False,
        tokens=256,
    )  # fmt: skip
    # The float64 reference of its 6 heads takes 15 MiB, that of 3 takes 7.5.
    monkeypatch.setitem(suite._CHECK_BYTES, "cpu", 10 * 2**20)
    monkeypatch.setattr(suite, "_measure", lambda *_: pytest.fail("a wrong kernel was timed"))
    plant(monkeypatch, ours=late)
    points, outcome = run(plan)
    assert len(outcome.wrong) == 1 and "at the narrow shape" in outcome.wrong[0]
    assert points[0]["errors"]["small"]["rms"] < checks.LIMIT < points[0]["errors"]["narrow"]["rms"]
    narrow = shapes.narrow(plan.shape())
    assert (narrow.B, narrow.T, narrow.H, narrow.G, narrow.D) == (1, 256, 3, 1, 64)


def test_a_compiled_peer_stays_compiled_from_case_to_case(monkeypatch):
    """torch compiles a function for a few shapes only, and then runs it as it is."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    def once(function):
        return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)

    monkeypatch.setattr(peers, "compiled", once)
    plan = dataclasses.replace(PLAN, ops=("embedding",), peers="eager,compile")
    todo = [dataclasses.replace(plan, model=m) for m in ("tiny", "demo", "starcoder2_12m")]
    points = []
    with torch._dynamo.config.patch(recompile_limit=2):  # monkeypatch would delete it afterwards
        outcome = suite.run(todo, points.append, lambda *_: None)
    assert outcome.notes == [] and len(compiled) >= 3
    beside = [p["peer"] for p in points if p["phase"] == "both"]
    assert beside.count("compile") == beside.count("eager") == 6  # with and without positions


def test_a_file_written_again_has_what_came_later(tmp_path):
    path = str(tmp_path / "points.json")
    with results.Writer(path) as write:
        for op in ("rope", "grad_norm"):
            write(
                point([1.0], [2.0], op=op) | {"environment": dict(point([1], [1])["environment"])}
            )
        for p in write.points:
            p["environment"] |= {"clocks": {"after": 5}, "command": "short"}
        write.again()
    assert [p["op"] for p in results.read(path)] == ["rope", "grad_norm"]
    assert all(p["environment"]["clocks"] == {"after": 5} for p in results.read(path))
