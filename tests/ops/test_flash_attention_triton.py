"""Flash attention in Triton: the designs of the backward, 16 bits, random cases, planted bugs.

The references are those of test_flash_attention.py. Not covered: speed.
"""

import dataclasses
import importlib

import pytest
from attention_cases import BF16, CASES, EXTRAS, FP16, FP32, check, random_case
from grid import INTERPRETED, NATIVE, TRITON

from stellarator_kernels import tuned
from stellarator_kernels._triton import tl, triton
from stellarator_kernels.attention import designs, tiles


@TRITON
@pytest.mark.parametrize("case", (CASES | EXTRAS).values(), ids=CASES | EXTRAS)
def test_triton(case):
    check(case, FP32, "triton")


@TRITON
@pytest.mark.parametrize("design", ["ordered", "atomic"])
@pytest.mark.parametrize("case", (CASES | EXTRAS).values(), ids=CASES | EXTRAS)
def test_triton_in_five_products(case, design, monkeypatch):
    monkeypatch.setattr(designs, "backward_design", lambda *_: design)
    check(case, FP32, "triton")


SPECIALIZED = {
    f"flash_attention {phase} {width}": {
        **dict(zip(("own", "step", "num_warps", "num_stages"), (32, 16, 4, 2), strict=True)),
        **{"tma": 1, "specialize": 1},
    }
    for phase in ("forward", "forward packed", "dq", "dkdv", "dqdkdv")
    for width in (64, 128, 256)
}


@INTERPRETED
@pytest.mark.parametrize("design", ["split", "ordered"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_loads_through_descriptors(case, design, monkeypatch):
    """Where the width is a power of two: the others keep the tiles that they have."""
    monkeypatch.setattr(designs, "backward_design", lambda *_: design)
    with tuned.use(SPECIALIZED):
        check(case, FP32, "triton")


@TRITON
@pytest.mark.parametrize("seed", range(200, 210))
def test_triton_takes_turns_whatever_the_masks_are(seed, monkeypatch):
    """In the interpreter a turn that is out of order makes dq NaN."""
    monkeypatch.setattr(designs, "backward_design", lambda *_: "ordered")
    case = random_case(seed, 80)
    print(case)
    check(case, FP32, "triton", seed)


def test_the_designs_of_the_backward():
    assert designs.backward_design(True, 128, "") == "split"
    assert designs.backward_design(False, 128, "") == "atomic"
    with tuned.use({"flash_attention backward 128": {"design": "ordered"}}):
        assert (
            designs.backward_design(True, 128, "")
            == designs.backward_design(True, 72, "")
            == "ordered"
        )
        assert designs.backward_design(True, 64, "") == "split"


@INTERPRETED
@pytest.mark.parametrize("design", ["ordered", "atomic"])
def test_triton_makes_dq_as_its_transpose(design, monkeypatch):
    monkeypatch.setattr(designs, "backward_design", lambda *_: design)
    monkeypatch.setattr(tiles, "turns_dq", lambda *_: True)
    check(CASES["odd length, padded width, group 3"], FP32, "triton")


def test_dq_is_turned_where_the_matrix_instruction_wants_64_rows():
    assert tiles.turns_dq(32, (9, 0)) and not tiles.turns_dq(64, (9, 0))
    assert not any(tiles.turns_dq(32, x) for x in (None, (8, 0), (10, 0), (12, 0)))


def test_heads_whose_keys_stay_in_the_cache_go_together():
    h200 = 50 * 2**20
    assert tiles.heads_together(2, 12, 16384, 128, 2, h200) == 24  # StarCoder2-3B: 8 MiB a head
    assert tiles.heads_together(4, 12, 16384, 128, 2, h200) == 24  # 15B: two of four
    assert tiles.heads_together(4, 12, 8192, 128, 2, h200) == 48
    assert tiles.heads_together(1, 48, 10**6, 128, 2, h200) == 48  # never less than a group
    assert tiles.heads_together(3, 1, 16384, 128, 2, 2 * 2 * 8 * 2**20) == 1  # 2 does not divide 3


def test_groups_are_split_where_programs_are_few():
    assert tiles.group_splits(256 * 2, 12, 132) == 1  # 16K tokens of StarCoder2-3B, tiles of 64
    assert tiles.group_splits(64 * 2, 12, 132) == 3  # 4K tokens
    assert tiles.group_splits(1, 9, 132) == 9  # no more than there are heads
    assert tiles.group_splits(100, 9, 250) == 5  # parts of 2, 2, 2, 2 and 1
    assert tiles.group_splits(1, 1, 132) == 1


@INTERPRETED
@pytest.mark.parametrize("num_sms,cache_bytes", [(1, 2**40), (1000, 1)])
@pytest.mark.parametrize("design", ["split", "ordered"])
@pytest.mark.parametrize("seed", [301, 305, 312, 337])  # groups of 12 and of 3, several of them
def test_triton_on_chips_of_other_sizes(seed, design, num_sms, cache_bytes, monkeypatch):
    """All heads together and no group split; one group at a time and every group split."""
    monkeypatch.setattr(designs, "backward_design", lambda *_: design)
    monkeypatch.setattr(tiles, "chip", lambda device: tiles.Chip(num_sms, cache_bytes))
    case = random_case(seed, 80)
    if case.H == 12:  # groups of 3 have two rows of the batch
        case = dataclasses.replace(case, B=1)
    print(case)
    check(case, FP32, "triton", seed)


@TRITON
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "name", CASES if NATIVE else ["odd length, padded width, group 3", "documents, window"]
)
def test_triton_16_bit(name, dtype):
    check(CASES[name], dtype, "triton")


@TRITON
@pytest.mark.parametrize("seed", range(100, 110))
def test_triton_random(seed):
    case = random_case(seed, 80)
    print(case)
    check(case, FP32, "triton", seed)


@triton.jit
def _sees_one_more(scores, first, last, others):
    visible = (others[None, :] >= first[:, None]) & (others[None, :] <= last[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _window_one_short(scores, first, last, others):
    visible = (others[None, :] > first[:, None]) & (others[None, :] < last[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _natural_units(products, scale, softcap, SOFTCAP: tl.constexpr):
    return products * (scale * 1.4426)


@triton.jit
def _without_the_last_block(first, last, STEP: tl.constexpr):
    begin = tl.min(first) // STEP * STEP
    end = tl.max(last)
    return begin, begin + (end - begin) // STEP * STEP, tl.max(first), tl.min(last)


@triton.jit
def _mask_too_rarely(first, last, STEP: tl.constexpr):
    begin = tl.min(first) // STEP * STEP
    return begin, tl.max(last), tl.min(first), tl.max(last)


BUGS = {
    "mask, last": ("mask_scores", _sees_one_more),
    "mask, first": ("mask_scores", _window_one_short),
    "scale": ("scores_of", _natural_units),
    "last block": ("walk", _without_the_last_block),
    "inside": ("walk", _mask_too_rarely),
}


@INTERPRETED
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("name", BUGS)
def test_the_random_cases_find_planted_bugs(name, phase, monkeypatch):
    """Each in one pass only, so that the two do not agree on the wrong thing; small cases first."""
    function, wrong = BUGS[name]
    module = importlib.import_module(f"stellarator_kernels.attention.{phase}")
    monkeypatch.setattr(module, function, wrong)
    found, cases = 0, [(random_case(seed, 80), seed) for seed in range(100, 110)]
    for case, seed in sorted(cases, key=lambda x: x[0].B * x[0].H * x[0].T * x[0].keys):
        try:
            check(case, FP32, "triton", seed)
        except AssertionError:
            found += 1
        if found == 3:
            return
    pytest.fail(f"{found} of 10 random cases see it")


@triton.jit
def _counts_two(counter_ptr, INTERPRETED: tl.constexpr):
    tl.atomic_add(counter_ptr, 2)


@INTERPRETED
def test_a_turn_out_of_order_is_seen(monkeypatch):
    monkeypatch.setattr(designs, "backward_design", lambda *_: "ordered")
    module = importlib.import_module("stellarator_kernels.attention.backward")
    monkeypatch.setattr(module, "count_one", _counts_two)
    with pytest.raises(AssertionError, match="dq"):
        check(CASES["window 13"], FP32, "triton")
