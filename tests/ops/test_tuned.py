"""Tables of launch configurations, and the race that fills them, in Triton's interpreter.

The race is judged on a clock of its own, which says how long each configuration takes. Not covered:
real times, which want a GPU.
"""

import json
import re

import pytest
import torch
from grid import INTERPRETED

from stellarator_kernels import flash_attention, matmul, tuned, tuning
from stellarator_kernels.attention import (
    backward,
    designs,
    forward,
    gluon_backward,
    gluon_forward,
    tiles,
)
from stellarator_kernels.attention.tiles import Tiles, tile_sizes

TABLE = {
    "gpu": "GPU One",
    "triton": "3.9.0",
    "command": "stellarator tune",
    "date": "2026-11-21",
    "entries": {
        "flash_attention forward 128": {"own": 64, "step": 32, "num_warps": 4, "num_stages": 3},
        "flash_attention backward 128": {"design": "ordered"},
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables that is in use; what was read before is forgotten."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    tuned._tables.cache_clear()
    yield tmp_path
    tuned._tables.cache_clear()


def test_an_entry_is_for_its_gpu_and_width_only(folder):
    (folder / "one.json").write_text(json.dumps(TABLE))
    args = ("forward", 128, torch.bfloat16, (9, 0))
    assert tile_sizes(*args, gpu="GPU One") == Tiles(64, 32, 4, 3)
    assert tile_sizes(*args, gpu="GPU Two") == tile_sizes(*args)
    packed = ("forward packed", *args[1:])
    assert tile_sizes(*packed, gpu="GPU One") == tile_sizes(*packed) == tile_sizes(*args)
    assert tile_sizes("forward", 64, *args[2:], gpu="GPU One") == tile_sizes(
        "forward", 64, *args[2:]
    )
    # What takes more registers was not raced.
    for more in ({"softcap": True}, {"dropout": True}):
        assert tile_sizes(*args, gpu="GPU One", **more) == tile_sizes(*args, **more)
    wide = ("forward", 120, *args[2:])
    assert tile_sizes(*wide, gpu="GPU One") == tile_sizes(*wide)
    fp32 = ("forward", 128, torch.float32, (9, 0))
    assert tile_sizes(*fp32, gpu="GPU One") == tile_sizes(*fp32)
    assert designs.backward_design(True, 128, "GPU One") == "ordered"
    assert designs.backward_design(True, 128, "GPU Two") == "split"
    assert designs.backward_design(False, 128, "GPU One") == "atomic"
    with tuned.use({}):
        assert tile_sizes(*args, gpu="GPU One") == tile_sizes(*args)


def test_shipped_tables_can_be_read():
    for path in tuned.FOLDER.glob("*.json"):
        for name, entry in tuned.read(path)["entries"].items():
            if name in {f"matmul {phase}" for phase in matmul.PHASES}:
                assert matmul.Tiles(**entry)
                continue
            assert re.fullmatch(r"flash_attention [a-z ]+ (64|128|256)", name)
            design = entry.pop("design", None)
            assert not entry if design in ("triton", "split", "ordered", "atomic") else True
            of = gluon_backward if "backward" in name else gluon_forward
            assert of.Plan(**entry) if design == "gluon" else design or Tiles(**entry)


def test_gluon_runs_where_a_table_says_so_and_it_can():
    """A GPU that it is not written for, and calls that it does not serve, get the portable one."""
    gluon = {"design": "gluon", "step": 128, "stages": 2, "turns": 1}
    bf16, call = torch.bfloat16, (128, torch.bfloat16, (9, 0), False, False, "")
    assert designs.forward_plan(*call) is None
    with tuned.use({"flash_attention forward design 128": {"design": "triton"}}):
        assert designs.forward_plan(*call) is None
    with tuned.use({"flash_attention forward design 128": gluon}):
        assert designs.forward_plan(*call) == gluon_forward.Plan(128, 2, True)
        for other in (
            (128, bf16, (8, 0), False, False, ""),
            (128, bf16, (10, 0), False, False, ""),
            (128, bf16, None, False, False, ""),
            (128, torch.float32, (9, 0), False, False, ""),
            (128, bf16, (9, 0), True, False, ""),
            (128, bf16, (9, 0), False, True, ""),
            (120, bf16, (9, 0), False, False, ""),
            (64, bf16, (9, 0), False, False, ""),
        ):
            assert designs.forward_plan(*other) is None, other


def test_the_backward_in_gluon_runs_where_a_table_says_so_and_it_can():
    numbers = {"step": 64, "stages": 3, "dq_step": 32, "dq_stages": 2}
    entry = {"design": "gluon"} | numbers
    call = (128, torch.bfloat16, (9, 0), False, False, "")
    assert designs.backward_plan(True, *call) is None
    with tuned.use({"flash_attention backward 128": {"design": "ordered"}}):
        assert designs.backward_plan(True, *call) is None
        assert designs.backward_design(True, 128, "") == "ordered"
    with tuned.use({"flash_attention backward 128": entry}):
        assert designs.backward_plan(True, *call) == gluon_backward.Plan(64, 3, 32, 2)
        assert designs.backward_plan(False, *call) is None
        # What runs instead where it cannot: no softcap, no other GPU, no other width.
        assert designs.backward_plan(True, 128, torch.bfloat16, (9, 0), True, False, "") is None
        assert designs.backward_plan(True, 128, torch.bfloat16, (10, 0), False, False, "") is None
        assert designs.backward_plan(True, 120, torch.bfloat16, (9, 0), False, False, "") is None
        assert designs.backward_design(True, 128, "") == "split"
    with tuned.use({"flash_attention backward in any order 128": entry}):
        assert designs.backward_plan(False, *call) == gluon_backward.Plan(**numbers)
    with pytest.raises(ValueError, match="^Plan: expected dq_stages of 2 or more, got 1"):
        gluon_backward.Plan(64, 2, 64, 1)


@INTERPRETED
def test_the_op_runs_the_backward_that_was_chosen(monkeypatch):
    plan, seen = gluon_backward.PLANS[64], []
    monkeypatch.setattr(designs, "backward_plan", lambda *_: plan)

    def fake(*args, plan):
        seen.append(plan)
        return backward.backward(*args)

    monkeypatch.setattr(gluon_backward, "backward", fake)
    q = torch.randn(1, 20, 2, 16, requires_grad=True)
    found, expected = (
        torch.autograd.grad(flash_attention(q, q, q, impl=impl).sum(), q)[0]
        for impl in ("triton", "reference")
    )
    assert seen == [plan]
    torch.testing.assert_close(found, expected)


@INTERPRETED
def test_the_op_runs_the_forward_that_was_chosen(monkeypatch):
    plan, seen = gluon_forward.Plan(64, 2, True), []
    monkeypatch.setattr(designs, "forward_plan", lambda *_: plan)

    def fake(*args, plan):
        seen.append(plan)
        return forward.forward(*args)

    monkeypatch.setattr(gluon_forward, "forward", fake)
    q = torch.randn(1, 20, 2, 16)
    out = flash_attention(q, q, q, impl="triton")
    assert seen == [plan]
    torch.testing.assert_close(out, flash_attention(q, q, q, impl="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": None}, "expected a str as 'gpu', got None"),
        ({"entries": []}, "expected a dict as 'entries'"),
        ({"entries": {"x": {"own": 1.5}}}, "expected whole numbers and words in the entry 'x'"),
        ({"entries": {"x": 3}}, "expected whole numbers and words in the entry 'x'"),
        (None, "expected JSON, got"),
    ],
)
def test_a_damaged_table_is_named(folder, change, message):
    text = "{" if change is None else json.dumps(TABLE | change)
    (folder / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=f"bad.json: .*{re.escape(message)}"):
        tile_sizes("forward", 128, torch.bfloat16, (9, 0), gpu="GPU One")


def test_a_folder_that_is_not_there(monkeypatch, folder):
    monkeypatch.setenv(tuned.VARIABLE, str(folder / "none"))
    tuned._tables.cache_clear()
    with pytest.raises(ValueError, match="^STELLARATOR_TABLES: expected a folder, got"):
        tuned.lookup("GPU One", "x")


def test_rounding_is_right_and_one_wrong_tile_is_not():
    """Late rows of attention are small beside the first ones; a wrong tile of them is seen."""
    size = torch.arange(1, 4097).rsqrt()[None, :, None, None]
    exact = torch.randn(1, 4096, 8, 64, generator=torch.Generator().manual_seed(1)) * size
    rounded = exact.bfloat16()
    assert tuning.rows_right((rounded,), (exact,))
    wrong = rounded.clone()
    wrong[:, 4032:4096, 3] = wrong[:, 3968:4032, 3]
    assert (wrong.float() - exact).norm() < 0.06 * exact.norm()
    assert not tuning.rows_right((rounded, wrong), (exact, exact))
    wrong[:, 4032:4096, 3] = torch.nan
    assert not tuning.rows_right((wrong,), (exact,))


@INTERPRETED
def test_the_race_keeps_the_fastest_that_is_right(monkeypatch, tmp_path):
    """Three candidates; one fails to launch, one is wrong, so the slowest of the rest stays out."""
    made = [(32, 16, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), (16, 32, 4, 1)]
    names = ("own", "step", "num_warps", "num_stages")
    options = [dict(zip(names, x, strict=True)) for x in made]
    monkeypatch.setattr(tuning, "candidates", lambda phase, tma: options)
    used, real = [], tiles.tile_sizes

    def recorded(phase, *args, **kwargs):
        found = real(phase, *args, **kwargs)
        used.append((phase, found))
        if found == Tiles(*made[2]):
            raise RuntimeError("out of shared memory")
        return found

    wrong = forward.forward

    def off(*args, **kwargs):
        out, lse = wrong(*args, **kwargs)
        return (out * 1.1 if used[-1][1] == Tiles(*made[3]) else out), lse

    monkeypatch.setattr(tiles, "tile_sizes", recorded)
    monkeypatch.setattr(forward, "forward", off)
    design = {}
    run = backward.backward

    def seen(*args, design="split", **kwargs):
        found["design"] = design
        return run(*args, design=design, **kwargs)

    found = design
    monkeypatch.setattr(backward, "backward", seen)

    def clock(call):
        used.clear()
        call()
        by_phase = dict(used)
        cost = {"split": 5.0, "ordered": 4.0, "atomic": 4.2}[found.get("design", "split")]
        last = by_phase.get("dkdv") or by_phase.get("dqdkdv") or used[-1][1]
        return cost + {32: 1.0, 16: 2.0}[last.step] + {32: 0.0, 16: 0.5}[last.own]

    shape = tuning.Shape(T=40, H=2, G=1, D=16)
    entries = {f.name: f.entry for f in tuning.tune(shape, "cpu", clock) if f.entry}
    assert entries["flash_attention forward 64"] == options[1]
    assert entries["flash_attention dqdkdv 64"] in options
    assert entries["flash_attention backward 64"] == {"design": "ordered"}
    assert entries["flash_attention backward in any order 64"] == {"design": "ordered"}
    assert entries["flash_attention forward design 64"] == {"design": "triton"}
    path = tuning.write(tmp_path / "new", entries, "NVIDIA H200", "stellarator tune")
    assert path.name == "nvidia_h200.json" and tuned.read(path)["entries"] == entries
    with tuned.use(entries):
        q = torch.randn(1, 40, 2, 16)
        k = torch.randn(1, 40, 1, 16)
        torch.testing.assert_close(
            flash_attention(q, k, k, impl="triton"), flash_attention(q, k, k, impl="reference")
        )


def test_candidates_are_what_the_kernels_take():
    for phase in ("forward", "forward packed", "dq", "dkdv", "dqdkdv"):
        for tma in (False, True):
            found = [Tiles(**c) for c in tuning.candidates(phase, tma)]
            assert len(found) == len(set(found)) >= (24 if tma else 12)
            assert {(t.tma, t.specialize) for t in found} <= {(0, 0), (1, 0), (1, 1)}
            assert tma or not any(t.tma for t in found)
            own = {t.own for t in found if t.specialize}  # what Triton makes right code of
            assert own == (
                {"forward": {64, 128}, "dkdv": set(), "dqdkdv": set()}.get(phase, {64})
                if tma
                else set()
            )
            for tiles_of_one in found:  # Triton leaves 8 warps as they are
                assert not tiles_of_one.specialize or tiles_of_one.num_warps == 4


def test_the_forward_in_gluon_is_raced_where_it_runs():
    assert tuning.forward_designs(False) == [{"design": "triton"}]
    first, *plans = tuning.forward_designs(True)
    assert first == {"design": "triton"} and len(plans) == 12
    for plan in plans:
        assert plan.pop("design") == "gluon" and gluon_forward.Plan(**plan)


def test_the_backward_in_gluon_is_raced_where_it_runs():
    assert tuning.backward_designs(False) == []
    plans = tuning.backward_designs(True)
    assert len(plans) == 6
    for plan in plans:
        assert plan.pop("design") == "gluon" and gluon_backward.Plan(**plan)


@INTERPRETED
def test_a_phase_is_raced_with_what_is_known_of_the_others(monkeypatch):
    """dq belongs to the split backward, whatever the table says runs."""
    known = {"flash_attention backward 64": {"design": "ordered"}}
    options = [{"own": 32, "step": 16, "num_warps": 4, "num_stages": 1}]
    monkeypatch.setattr(tuning, "candidates", lambda phase, tma: options)
    seen, run = [], backward.backward
    monkeypatch.setattr(
        backward, "backward", lambda *a, design, **kw: seen.append(design) or run(*a, **kw)
    )
    shape = tuning.Shape(T=20, H=1, G=1, D=16)

    def clock(call):
        call()
        return 1.0

    results = list(tuning.tune(shape, "cpu", clock, ("dq",), known))
    assert results == [tuning.Found("flash_attention dq 64", options[0], 1.0)]
    assert set(seen) == {"split"}
