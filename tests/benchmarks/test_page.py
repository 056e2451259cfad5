"""The page of the verb gpu says what was found, what was wrong, and what was not measured."""

import dataclasses

import pytest
from benchmark_helpers import ENVIRONMENT, point

from benchmarks import clocks, page, peers
from benchmarks.machine import Limits
from benchmarks.points import UNTIMED
from benchmarks.suite import Outcome

BEFORE = dataclasses.asdict(clocks.State("550.54", 1980.0, 1980.0, 2619.0, 300.0, 700.0, 40.0, ()))
AFTER = BEFORE | {"sm_mhz": 1500.0, "throttled_by": ("power cap", "idle"), "memory_mhz": None}
GPU = ENVIRONMENT | {"gpu": "NVIDIA H200", "clocks": {"before": BEFORE, "after": AFTER}}


def outcome(**changes) -> Outcome:
    """Of a run on a GPU that measured its floors."""
    limits = {("cuda", "bfloat16", "wall"): Limits(4000.0, 700.0)}
    return Outcome(environment=GPU, limits=limits, **changes)


def cells(text: str, start: str) -> list[list[str]]:
    """Cells of the rows of a table that begin so."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_top_says_where_and_when(monkeypatch):
    text = page.page([], outcome(), 431.4)
    assert text.startswith("# Kernels on NVIDIA H200\n")
    for line in (
        "- GPU: NVIDIA H200, driver 550.54",
        "- versions: torch 2.13.0, triton none, cuda none, python 3.11; commit abc1234",
        "- `python -m benchmarks run --op layer_norm`, 2026-11-21T00:00:00+00:00, 431 s",
        "- cuda, bfloat16: copy 4,000.0 GB/s, matrix product 700.000 TFLOP/s",
    ):
        assert line in text.splitlines(), text
    assert cells(text, "SM clock") == [["SM clock, MHz", "1980", "1500"]]
    assert cells(text, "memory clock") == [["memory clock, MHz", "2619", "unknown"]]
    assert cells(text, "held back") == [["held back by", "nothing", "power cap, idle"]]
    assert "dry run" not in text and "dry run" in page.page([], outcome(), 1.0, dry=True)


def test_clocks_that_nobody_knows_are_one_line():
    unknown = dataclasses.asdict(clocks.UNKNOWN)
    found = outcome()
    found.environment = GPU | {"clocks": {"before": unknown, "after": unknown}}
    text = page.page([], found, 1.0)
    assert "Clocks, power, temperature: unknown" in text and "SM clock" not in text


def test_a_row_has_every_peer_and_the_floor_that_bounds_it():
    fields = {
        "op": "flash_attention", "variant": "causal", "sizes": {"T": 64, "pairs": 2080},
        "device": "cuda", "limits": {"copy_gbps": 4000.0, "matmul_tflops": 700.0},
        "errors": {
            "small": {"maximum": 0.5, "rms": 0.9, "factor": 1.25},
            "timed": {"maximum": 0.7, "rms": 0.6, "factor": 0.0},
        },
    }  # fmt: skip
    # 700 TFLOP/s over 4,000 GB/s are 175 operations for each byte.
    many, few = {"flops_per_byte": 176.0}, {"flops_per_byte": 174.0}
    rates = {"tflops": 350.0, "matmul_share": 0.5, "gbps": 3000.0, "copy_share": 0.75}
    points = [
        point([2.0] * 3, [3.0] * 3, peer="sdpa", **fields, **rates, **many),
        point([2.0] * 3, [1.0] * 3, peer="flex", **fields, **rates, **many),
        point([4.0] * 3, [6.0] * 3, peer="flex", **fields, **rates, **few) | {"variant": "packed"},
    ]
    text = page.page(points, outcome(), 1.0)
    assert "## flash_attention: tiny" in text and "Cases measured: 2; wrong: 0;" in text
    header = ["case", "impl", "phase", "check", "ms", "sdpa", "flex", "of the floor", "memory"]
    assert cells(text, "case") == [header]
    check, memory = "1.25 (small, timed)", "1.0 (sdpa 4.0, flex 4.0)"
    assert cells(text, "causal") == [
        ["causal, T 64", "cpu", "both", check, "2.000 (2.000, 2.000)", "3.000 (1.50x)",
         "1.000 (0.50x)", "350.000 TFLOP/s (50%)", memory],
    ]  # fmt: skip
    assert cells(text, "packed")[0][4:] == [
        "4.000 (4.000, 4.000)", "", "6.000 (1.50x)", "3,000.0 GB/s (75%)", "1.0 (flex 4.0)",
    ]  # fmt: skip


def test_the_end_says_what_is_missing_and_why(monkeypatch):
    monkeypatch.setattr(peers, "absent", lambda: {"flash_attn": "ImportError: no\nsymbol"})
    wrong = point([1], [1]) | UNTIMED | {"peer": "", "wrong": "result 0 is off", "errors": {}}
    notes = ["rope: peer flex left out: cannot run", "rope: peer flex left out: cannot run"]
    found = outcome(wrong=["layer_norm, triton: off"], skipped=["adamw_, tiny, n 7"], notes=notes)
    text = page.page([point([1.0], [2.0], op="rope"), wrong], found, 1.0)
    assert cells(text, "residual")[-1][:4] == ["residual, N 64 C 32", "cpu", "both", "WRONG"]
    assert "Cases measured: 1; wrong: 1; without their turn: 1." in text
    assert text.split("## Wrong, or not measured\n\n")[1].splitlines() == [
        "- WRONG, not timed: layer_norm, triton: off",
        "- not measured: out of time: adamw_, tiny, n 7",
        "- peer flash_attn cannot be imported: ImportError: no symbol",
        "- rope: peer flex left out: cannot run",
    ]


def test_a_loaded_machine_is_named():
    loaded = point([1.0], [2.0], quiet={"quiet": False, "others": 0.3, "drift": 0.0})
    assert "LOADED: other work took 30%" in page.page([loaded], outcome(), 1.0)


@pytest.mark.parametrize("there", [True, False])
def test_a_peer_that_cannot_be_imported_has_a_reason(there, tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("" if there else "raise OSError('wrong libc')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(peers.sys.modules, "flash_attn", raising=False)
    found = peers.absent()
    assert found.get("flash_attn") == (None if there else "OSError: wrong libc")
    peers.sys.modules.pop("flash_attn", None)
