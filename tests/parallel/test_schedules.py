"""Pipeline schedules and their simulation: closed forms, peak memory, planted faults, layer splits.

References: the closed forms of the papers, in exact fractions; brute force for the split of layers.
Not covered: real processes.
"""

import itertools
import random
from fractions import Fraction

import pytest

from stellarator.parallel.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NAMES,
    SPLIT,
    WEIGHT_GRADIENT,
    Action,
    default_stages_per_rank,
    make,
    placement,
    problems,
)
from stellarator.parallel.pipeline.simulate import Costs, DeadlockError, simulate, validate
from stellarator.parallel.pipeline.split import layer_ranges, split_layers

PAIRS = [(1, 1), (1, 5), (2, 2), (2, 4), (2, 6), (2, 14), (3, 6), (3, 9), (3, 12), (4, 8)]
PAIRS += [(4, 12), (4, 16), (5, 10), (5, 20), (6, 12), (6, 18), (8, 16), (8, 24), (8, 32), (12, 24)]
# F, B, W in any ratio; for ZB-H1 with W <= B, else the weight gradients are what is waited for.
FORMS = [("gpipe", 1), ("1f1b", 1), ("zb_h1", 1)]
FORMS += [("interleaved", v) for v in (2, 3, 4)]
TIMES = [(1, 1, 1), (4, 5, 3), (3, 7, 2)]


def run(name, p, m, v=None, F=1, B=1, W=1, **others):
    """A schedule whose stages together cost a rank F, B and W for a micro-batch."""
    v = default_stages_per_rank(name) if v is None else v
    durations = (Fraction(x, v) for x in (F, B, W))
    return simulate(make(name, p, m, v), Costs.uniform(p * v, *durations, **others))


def idle(name, p, v, F, B, W):
    """The closed form: idle time of the busiest rank."""
    if name == "zb_h1":
        return (p - 1) * (F + B - W)
    return Fraction((p - 1) * (F + B + W), v)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("name", "v"), FORMS)
def test_bubble_is_the_closed_form(name, v, times):
    F, B, W = times
    for p, m in PAIRS:
        expected = idle(name, p, v, F, B, W) / Fraction(m * (F + B + W))
        assert run(name, p, m, v, F, B, W).bubble == expected, (p, m)


def test_bubbles_of_the_published_table():
    """F = B = W, as fractions of the work, to three digits."""
    sizes = [(4, 8), (4, 16), (8, 16), (8, 32)]
    table = {
        ("gpipe", 1): (0.375, 0.188, 0.438, 0.219),
        ("1f1b", 1): (0.375, 0.188, 0.438, 0.219),
        ("interleaved", 2): (0.188, 0.094, 0.219, 0.109),
        ("interleaved", 4): (0.094, 0.047, 0.109, 0.055),
        ("zb_h1", 1): (0.125, 0.063, 0.146, 0.073),
    }
    for (name, v), row in table.items():
        for (p, m), expected in zip(sizes, row, strict=True):
            assert abs(float(run(name, p, m, v).bubble) - expected) <= 0.0005 + 1e-12


def test_zb_v_as_measured():
    """The paper: no idle time where F = B = W, at the memory of 1F1B.

    Simulated: no rank is idle between its first and its last action from 2p - 1 micro-batches on.
    The ranks start one after the other, each half a forward later: that much is left in the bubble.
    """
    for p, m in PAIRS:
        found = run("zb_v", p, max(m, 2 * p - 1))
        assert found.idle_inside == [0] * p
        assert set(found.idle) == {Fraction(p - 1, 2)}
        assert found.peak_activations == [2 * p] * p  # halves of what a rank of 1F1B holds
    few = run("zb_v", 4, 4)
    assert max(few.idle_inside) > 0 and few.peak_activations == [5, 6, 7, 8]


def test_zb_v_with_times_that_differ():
    """Not zero, and less than 1F1B: what the paper says of F, B, W measured on real models."""
    for F, B, W in [(4, 5, 4), (3, 4, 2), (10, 9, 8)]:
        v_shaped, plain = (run(n, 8, 32, None, F, B, W).bubble for n in ("zb_v", "1f1b"))
        assert 0 < v_shaped < plain / 2


@pytest.mark.parametrize(("p", "m"), PAIRS)
def test_peak_activations(p, m):
    """In stages: of rank 0 p in 1F1B, p * v + p - 1 interleaved, m in GPipe, p in ZB-H1."""
    assert run("gpipe", p, m).peak_activations == [m] * p
    assert run("1f1b", p, m).peak_activations == [min(m, p - r) for r in range(p)]
    for v in (2, 3):
        peaks = run("interleaved", p, m, v).peak_activations
        expected = [p * v + p - 1 - 2 * r for r in range(p)]
        assert peaks == [min(m * v, x) for x in expected], v
        assert Fraction(expected[0], v) == p * (1 + Fraction(p - 1, p * v))
    assert run("zb_h1", p, m).peak_activations == [min(m, p)] * p
    # Were nothing kept for the weight gradients, ZB-H1 would hold what 1F1B does.
    freed = run("zb_h1", p, m, deferred=[0] * p).peak_activations
    assert freed == run("1f1b", p, m).peak_activations


def test_any_sizes_are_free_of_deadlock():
    """Random sizes and durations: complete, each action once, never faster than a rank's work."""
    rng = random.Random(6)
    for _ in range(200):
        name, p, m = rng.choice(NAMES), rng.randint(1, 9), rng.randint(1, 30)
        v = rng.randint(2, 4) if name == "interleaved" else default_stages_per_rank(name)
        schedule, S = make(name, p, m, v), p * v
        assert validate(schedule, S, m) == []
        assert problems(name, p, m, v) == []
        durations = [[Fraction(rng.randint(1, 9)) for _ in range(S)] for _ in range(3)]
        found = simulate(schedule, Costs(*durations, latency=rng.randint(0, 3)))
        assert found.makespan >= max(found.work) and found.bubble >= 0
        ranks = placement(name, p, v)
        assert [{a.stage for a in line} for line in schedule] == [
            {s for s in range(S) if ranks[s] == r} for r in range(p)
        ]
        hops = sum(a != b for a, b in itertools.pairwise(ranks))
        assert found.num_messages == 2 * m * hops
        split = any(a.kind == INPUT_GRADIENT for line in schedule for a in line)
        assert split == (name in SPLIT)


def test_interleaved_with_micro_batches_that_do_not_fill_a_group():
    """The order of the next multiple of p without what does not exist: never slower than that."""
    for p, m, v in [(4, 9, 2), (4, 3, 2), (3, 7, 3), (5, 6, 2), (2, 1, 4)]:
        full = -(-m // p) * p
        kept = [[a for a in line if a.micro_batch < m] for line in make("interleaved", p, full, v)]
        assert make("interleaved", p, m, v) == kept
        assert run("interleaved", p, m, v).makespan < run("interleaved", p, full, v).makespan


def test_placement():
    assert placement("1f1b", 3) == [0, 1, 2]
    assert placement("interleaved", 3, 2) == [0, 1, 2, 0, 1, 2]
    assert placement("zb_v", 3, 2) == [0, 1, 2, 2, 1, 0]


def test_durations_of_stages_and_latency():
    """Two ranks, one micro-batch: F0, message, F1, B1, message, B0, by hand."""
    costs = Costs([3, 5], [7, 11], [2, 1], latency=4, activation=[10, 20])
    found = simulate(make("1f1b", 2, 1), costs)
    assert [[(s.start, s.end) for s in line] for line in found.timeline] == [
        [(0, 3), (28, 37)],
        [(7, 12), (12, 24)],
    ]
    assert found.makespan == 37 and found.work == [12, 17] and found.idle == [25, 20]
    assert found.idle_inside == [25, 0] and found.bubble == 20 / 17
    assert found.peak_activations == [10, 20] and found.num_messages == 2
    assert found.peak_messages == {(0, 1): 1, (1, 0): 1}
    split = simulate(make("zb_h1", 2, 1), costs)
    assert split.makespan == 12 + 11 + 4 + 7 + 2


def test_what_weight_gradients_wait_for_is_held():
    """By hand: rank 0 does F0 F1 B0 W0 F2 ..., rank 1 F0 B0 F1 B1 W0 F2 ..., so two wait there."""
    costs = Costs.uniform(2, activation=[10, 20], deferred=[30, 50])
    assert simulate(make("zb_h1", 2, 4), costs).peak_activations == [10 + 30, 50 + 50]
    assert simulate(make("1f1b", 2, 4), costs).peak_activations == [10 + 10, 20]


def test_messages_that_wait():
    """A first stage that is ten times as fast as the second sends all that its warm-up allows."""
    costs = Costs([1, 10], [1, 10], [1, 10])
    assert simulate(make("gpipe", 2, 6), costs).peak_messages[0, 1] == 5
    assert simulate(make("1f1b", 2, 6), costs).peak_messages[0, 1] == 1


# Faults that are planted.


def without(schedule, action):
    return [[a for a in line if a != action] for line in schedule]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_and_a_double_action_are_found(name):
    v = default_stages_per_rank(name)
    schedule = make(name, 3, 4, v)
    for line in schedule:
        for action in line[:: max(1, len(line) // 5)]:
            missing = without(schedule, action)
            found = validate(missing, 3 * v, 4)
            assert any(str(action) in text and "got 0" in text for text in found), action
            with pytest.raises(ValueError, match="schedule: "):
                simulate(missing, Costs.uniform(3 * v))
            double = [own + [action] * (own is line) for own in schedule]
            assert any(str(action) in text and "got 2" in text for text in validate(double, 3 * v))


def test_other_faults_are_found():
    schedule = make("zb_h1", 2, 2)
    moved = [schedule[0][1:], [*schedule[1], schedule[0][0]]]
    (text,) = validate(moved, 2)
    assert text == "forward of stage 0, micro-batch 0 is on rank 1, its stage on rank 0"
    both = [[*schedule[0], Action(BACKWARD, 0, 0)], schedule[1]]
    assert validate(both, 2) == ["backward of stage 0, micro-batch 0: expected 0 times, got 1"]
    odd = [[*schedule[0], Action("sideways", 0, 0)], schedule[1]]
    assert validate(odd, 2) == ["sideways of stage 0, micro-batch 0: there is no such action"]
    assert "there is no such action" in " ".join(validate(schedule, 1))
    assert validate(schedule, 2, 3)[0] == (
        "forward of stage 0, micro-batch 2: expected 1 times, got 0"
    )
    assert "rank 2 has nothing to do" in validate([*schedule, []], 2)


def test_a_deadlock_names_who_waits_for_what():
    """Rank 1 wants micro-batch 1 first, for which rank 0 waits until it has a gradient."""
    schedule = make("1f1b", 2, 3)
    assert [str(a) for a in schedule[0][:3]] == [
        "forward of stage 0, micro-batch 0",
        "forward of stage 0, micro-batch 1",
        "backward of stage 0, micro-batch 0",
    ]
    line = schedule[1]
    line[0], line[4] = line[4], line[0]  # forwards of micro-batches 0 and 2
    with pytest.raises(DeadlockError) as caught:
        simulate(schedule, Costs.uniform(2))
    assert caught.value.waiting == [
        (0, Action(BACKWARD, 0, 0), "gradient of stage 1, micro-batch 0 (rank 1)"),
        (1, Action(FORWARD, 1, 2), "forward of stage 0, micro-batch 2 (rank 0)"),
    ]
    assert str(caught.value).startswith(
        "deadlock: rank 0 stands at backward of stage 0, micro-batch 0, which needs the gradient"
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_action_before_what_it_needs_is_a_deadlock(name):
    """Each kind is moved to the front, of each stage: of the last one the rank itself gives it."""
    v = default_stages_per_rank(name)
    for stage, rank in enumerate(placement(name, 3, v)):
        for kind in {a.kind for line in make(name, 3, 4, v) for a in line} - {FORWARD}:
            schedule = make(name, 3, 4, v)
            first = Action(kind, stage, 0)
            schedule[rank].remove(first)
            schedule[rank].insert(0, first)
            with pytest.raises(DeadlockError) as caught:
                simulate(schedule, Costs.uniform(3 * v))
            assert (rank, first) in [entry[:2] for entry in caught.value.waiting]


def first_meetings(schedule, ranks, rank) -> list[tuple[int, int]]:
    """The links (from, to) of a rank, in the order in which it uses each for the first time."""
    found, last = [], len(ranks) - 1
    for kind, stage, _ in schedule[rank]:
        if kind == WEIGHT_GRADIENT:
            continue
        before, behind = (stage - 1, stage + 1) if kind == FORWARD else (stage + 1, stage - 1)
        if 0 <= before <= last:
            found.append((ranks[before], rank))
        if 0 <= behind <= last:
            found.append((rank, ranks[behind]))
    return [link for link in dict.fromkeys(found) if link[0] != link[1]]


@pytest.mark.parametrize("name", NAMES)
def test_first_meetings_make_no_circle(name):
    """NCCL connects two ranks in their first message, at which both hosts have to arrive."""
    for p, m in itertools.product(range(2, 7), range(1, 15)):
        for v in (2, 3) if name == "interleaved" else (default_stages_per_rank(name),):
            schedule, ranks = make(name, p, m, v), placement(name, p, v)
            todo = [first_meetings(schedule, ranks, rank) for rank in range(p)]
            while any(todo):
                met = [
                    link
                    for a, links in enumerate(todo)
                    for link in links[:1]
                    if link[0] == a and todo[link[1]][:1] == [link]
                ]
                assert met, (p, m, v, [links[:1] for links in todo])
                todo = [[link for link in links if link not in met] for links in todo]


def test_dependencies_hold_in_every_timeline():
    """Checked from the spans alone, for durations and a latency that nothing divides."""
    costs = {"F": 3, "B": 4, "W": 2, "latency": Fraction(1, 7)}
    for name in NAMES:
        v, p, m = default_stages_per_rank(name), 4, 6
        found = run(name, p, m, v, **costs)
        ranks, S = placement(name, p, v), p * v
        ends, starts = {}, {}
        for line in found.timeline:
            assert all(a.end <= b.start for a, b in itertools.pairwise(line))
            ends |= {s.action: s.end for s in line}
            starts |= {s.action: s.start for s in line}
        back = INPUT_GRADIENT if name in SPLIT else BACKWARD
        for s, i in itertools.product(range(S), range(m)):
            if s:
                gap = Fraction(1, 7) * (ranks[s] != ranks[s - 1])
                assert starts[FORWARD, s, i] >= ends[FORWARD, s - 1, i] + gap
                assert starts[back, s - 1, i] >= ends[back, s, i] + gap
            assert starts[back, s, i] >= ends[FORWARD, s, i]
            if name in SPLIT:
                assert starts[WEIGHT_GRADIENT, s, i] >= ends[back, s, i]


# What cannot be made, and layers.


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (("1f1", 2, 4, 1), ["expected one of gpipe, 1f1b, interleaved, zb_h1, zb_v, got '1f1'"]),
        (("1f1b", 2, 4, 2), ["parallel.stages_per_rank: expected 1 for schedule 1f1b, got 2"]),
        (("zb_v", 2, 4, 1), ["expected 2 for schedule zb_v, got 1. Pass 2"]),
        (("interleaved", 2, 4, 1), ["expected at least 2 for schedule interleaved, got 1"]),
        (("gpipe", 0, 0, 3), ["pp of at least 1", "num_micro_batches of at least 1", "gpipe"]),
    ],
)
def test_what_cannot_be_made_says_why(given, parts):
    found = problems(*given)
    assert len(found) == len(parts)
    for text, part in zip(found, parts, strict=True):
        assert part in text
    with pytest.raises(ValueError):
        make(*given)
    assert problems("interleaved", 2, 4, 3) == []


def every_split(layers, stages):
    """All ways to give each stage at least one of the layers."""
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield [b - a for a, b in itertools.pairwise((0, *cuts, layers))]


def largest(counts, first, last):
    loads = list(counts)
    loads[0] += first
    loads[-1] += last
    return max(loads)


@pytest.mark.parametrize(
    "extras", [(0, 0), (0, 2), (1, 0), (Fraction(1, 3), Fraction(5, 2)), (9, 1)]
)
def test_split_is_as_even_as_brute_force_finds(extras):
    for layers in range(1, 12):
        for stages in range(1, layers + 1):
            counts = split_layers(layers, stages, *extras)
            best = min(largest(x, *extras) for x in every_split(layers, stages))
            assert largest(counts, *extras) == best and sum(counts) == layers and min(counts) >= 1
            assert counts == split_layers(layers, stages, *extras)


def test_splits_by_hand():
    assert split_layers(40, 4) == [10, 10, 10, 10]
    assert split_layers(30, 4) == [7, 7, 8, 8]
    assert split_layers(30, 4, 0, 2) == [8, 8, 8, 6]
    assert layer_ranges([2, 1, 3]) == [range(0, 2), range(2, 3), range(3, 6)]
    for given in [(3, 4), (3, 0), (3, 1, -1)]:
        with pytest.raises(ValueError, match="split_layers: expected 1 to 3 stages"):
            split_layers(*given)
