"""Ranks on axes, and layouts that cannot work: closed forms, StarCoderBase on 512 GPUs."""

import dataclasses
import itertools

import pytest

from stellarator import recipes
from stellarator.config import ModelConfig, ParallelConfig
from stellarator.parallel.layout import Layout, kv_heads_of, layout_of, problems

SIZES = {"seq_length": 64, "global_batch_size": 8, "micro_batch_size": 1}


def test_starcoderbase():
    """TP 4 x PP 4 x DP 32 (facts of the public launch script)."""
    layout = layout_of(ParallelConfig(tp=4, pp=4, sp=True), 512)
    assert layout == Layout(tp=4, cp=1, dp=32, pp=4)
    assert layout.place(0) == {"tp": 0, "cp": 0, "dp": 0, "pp": 0}
    assert layout.place(511) == {"tp": 3, "cp": 0, "dp": 31, "pp": 3}
    assert layout.place(4 * 5 + 2) == {"tp": 2, "cp": 0, "dp": 5, "pp": 0}


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 1, 2), (4, 1, 2, 3), (1, 2, 5, 1)])
def test_places_and_groups_cover_every_rank_once(sizes):
    layout = Layout(*sizes)
    places = [layout.place(rank) for rank in range(layout.size)]
    assert [layout.rank(place) for place in places] == list(range(layout.size))
    for count in range(5):
        for axes in itertools.combinations(("tp", "cp", "dp", "pp"), count):
            groups = layout.groups(*axes)
            assert sorted(itertools.chain(*groups)) == list(range(layout.size))
            length = 1
            for axis in axes:
                length *= getattr(layout, axis)
            assert {len(group) for group in groups} == {length}
            for group in groups:
                others = {tuple(v for a, v in places[r].items() if a not in axes) for r in group}
                assert len(others) == 1 and group == sorted(group)


def test_processes_that_the_axes_do_not_divide():
    with pytest.raises(ValueError, match="= 2 \\* 1 \\* 3 = 6 divides, got 8. Start 12."):
        layout_of(ParallelConfig(tp=2, pp=3), 8)


@pytest.mark.parametrize("G,tp", [(1, 1), (1, 4), (2, 4), (4, 2), (4, 4), (2, 8)])
def test_key_value_heads_are_shared_out_evenly(G, tp):
    held = [list(kv_heads_of(G, tp, rank)) for rank in range(tp)]
    assert len({len(heads) for heads in held}) == 1
    counts = [sum(heads.count(g) for heads in held) for g in range(G)]
    assert counts == [max(1, tp // G)] * G
    # The query heads of a rank belong to the key/value heads that it holds.
    H = 3 * max(G, tp) if max(G, tp) % min(G, tp) == 0 else 0
    for rank, heads in enumerate(held):
        queries = range(rank * H // tp, (rank + 1) * H // tp)
        assert {h * G // H for h in queries} == set(heads)


def test_every_reason_is_given_at_once():
    model = ModelConfig(num_layers=3, num_heads=6, num_kv_heads=2, ffn_width=10, width=24)
    given = ParallelConfig(tp=4, pp=2, stages_per_rank=2, cp=3, sp=True, zero=1)
    sizes = {"seq_length": 64, "global_batch_size": 7, "micro_batch_size": 2}
    found = problems(model, given, 25, **sizes)
    text = "\n".join(found)
    assert len(found) == 7, text
    for words in (
        "parallel: expected processes that tp * cp * pp = 24 divides, got 25. Start 48, or pass "
        "another parallel.tp, pp or cp.",
        "parallel.tp: expected a divisor of num_heads = 6, got 4",
        "parallel.tp: expected a divisor of ffn_width = 10, got 4",
        "expected at most num_layers = 3, got 4",
        "data.seq_length: expected a multiple of 12 for cp = 3 and sp = True, got 64. Pass 72.",
        "train.global_batch_size: expected a multiple of micro_batch_size * dp = 2 * 2, got 7",
        "parallel.stages_per_rank: expected 1 for schedule 1f1b, got 2. Pass 1, or another",
    ):
        assert words in text
    odd = dataclasses.replace(model, num_heads=6, num_kv_heads=3, ffn_width=12)
    text = "\n".join(problems(odd, ParallelConfig(tp=2), 2, **SIZES))
    assert text.startswith("parallel.tp: expected a divisor or a multiple of num_kv_heads = 3")
    assert problems(model, ParallelConfig(tp=0), 2, **SIZES) == [
        "parallel.tp: expected at least 1, got 0. Pass 1 for none."
    ]
    assert problems(model, ParallelConfig(sp=True), 1, **SIZES) == [
        "parallel.sp: expected false without tp, got True. Pass sp=false."
    ]


def test_rows_are_cut_in_two_chunks_a_context_rank_and_their_tokens_by_tensor_ranks():
    """T a multiple of 2 cp, and of cp * tp with sp: what works is not refused, what cannot is."""
    model = ModelConfig(num_heads=12, num_kv_heads=12, width=96, ffn_width=96)
    for cp, tp, T in itertools.product((1, 2, 3, 4), (1, 2, 3, 4), range(12, 60)):
        p = ParallelConfig(cp=cp, tp=tp, sp=tp > 1)
        sizes = SIZES | {"seq_length": T}
        works = (cp == 1 or T % (2 * cp) == 0) and (T / cp / tp).is_integer()
        assert (problems(model, p, cp * tp, **sizes) == []) == works, (cp, tp, T)


def test_layouts_of_the_recipes():
    """StarCoderBase on 512 GPUs: 16 micro-batches of a row."""
    model = recipes.get("starcoderbase").model
    given = ParallelConfig(tp=4, pp=4, sp=True, zero=1)
    sizes = {"seq_length": 8192, "global_batch_size": 512, "micro_batch_size": 1}
    assert problems(model, given, 512, **sizes) == []
    assert 512 // layout_of(given, 512).dp == 16
