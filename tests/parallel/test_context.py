"""Context-parallel attention on gloo processes against flash_attention of one process.

float64: out, lse and every gradient within 1e-12 of the largest value. The reference runs in each
rank, on whole rows. Not covered: NCCL.
"""

import dataclasses
import random
import re

import pytest
import torch
import torch.distributed as dist
from ranks import Failed, on_ranks

from stellarator.parallel import context
from stellarator.parallel.collectives import Group
from stellarator.parallel.context import context_attention
from stellarator.parallel.journal import Journal, read
from stellarator.parallel.zigzag import Plan, shard
from stellarator_kernels import flash_attention

pytestmark = pytest.mark.dist
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; cu_seqlens of all rows."""

    T: int = 24
    B: int = 1
    H: int = 4
    G: int = 2
    D: int = 8
    causal: bool = True
    window: int | None = None
    cu_seqlens: tuple[int, ...] | None = None
    options: tuple = ()
    dtype: torch.dtype = torch.float64


DROPOUT = (("dropout_p", 0.3), ("dropout_seed", 7), ("dropout_origin", (3, 2, 5, 1)))
CASES = {
    "causal": Case(B=2),
    "bidirectional": Case(causal=False, B=2),
    "one key/value head": Case(G=1, H=3),
    "as many key/value heads": Case(G=4),
    "window in a chunk": Case(window=2),
    "window of a chunk": Case(T=32, window=4),
    "window over chunks": Case(T=40, window=13, B=2),
    "window over the row": Case(window=99),
    "documents": Case(T=40, cu_seqlens=(0, 3, 4, 17, 17, 31, 40)),
    "documents and window": Case(T=40, cu_seqlens=(0, 3, 31, 40), window=7),
    "documents, bidirectional": Case(T=40, cu_seqlens=(0, 2, 33, 40), causal=False),
    "rows of documents": Case(T=16, B=3, cu_seqlens=(0, 5, 16, 32, 33, 47, 48)),
    "documents of a chunk: no messages": Case(T=32, cu_seqlens=tuple(range(0, 33, 4))),
    "softcap and scale": Case(options=(("softcap", 2.0), ("scale", 0.7))),
    "dropout": Case(B=2, options=DROPOUT),
    "dropout and window": Case(T=40, window=9, options=DROPOUT),
    "dropout and documents": Case(T=16, B=2, cu_seqlens=(0, 13, 16, 32), options=DROPOUT),
    "dropout, bidirectional": Case(causal=False, options=DROPOUT),
    "reference": Case(window=5, options=(("impl", "reference"),)),
    "fp32": Case(dtype=torch.float32, window=9),
    "fp32 by the CPU's kernels": Case(dtype=torch.float32, D=16, T=64, window=23),
    "Triton's kernels": Case(
        *(16, 1, 2, 1, 16, True, 5), None, (("impl", "triton"), *DROPOUT), torch.float32
    ),
    "bf16": Case(dtype=torch.bfloat16, T=48, D=16),
}


def inputs(case: Case, seed: int = 0):
    """q, k, v, dout, dlse of whole rows."""
    generator = torch.Generator().manual_seed(seed)
    B, T, D = case.B, case.T, case.D
    shapes = [(B, T, n, D) for n in (case.H, case.G, case.G, case.H)] + [(B, case.H, T)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(case.dtype) for s in shapes]
    return *made[:4], made[4].to(torch.float64 if case.dtype == torch.float64 else torch.float32)


def of_one_process(case: Case, dtype=None):
    """out, lse, dq, dk, dv of whole rows; in another dtype than the case's, from its values."""
    q, k, v, dout, dlse = (x.to(dtype or x.dtype) for x in inputs(case))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    options = {"causal": case.causal, "window": case.window, "return_lse": True}
    options |= {name: value for name, value in case.options if name != "impl"}
    if case.cu_seqlens is None:
        out, lse = flash_attention(q, k, v, **options)
    else:
        bounds = torch.tensor(case.cu_seqlens, dtype=torch.int32)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        out, lse = flash_attention(*packed, cu_seqlens=bounds, **options)
        out, lse = out.view_as(q), lse.unflatten(1, (case.B, case.T)).transpose(0, 1)
    torch.autograd.backward((out, lse), (dout, dlse))
    return out.detach(), lse.detach(), q.grad, k.grad, v.grad


def of_rank(case: Case, rank: int, size: int, group: Group, form: str):
    """The same of one rank."""
    parts = [shard(x, rank, size, 2 if i == 4 else 1) for i, x in enumerate(inputs(case))]
    q, k, v = (x.requires_grad_() for x in parts[:3])
    plan = Plan(rank, size, case.B, case.T, case.cu_seqlens, case.causal, case.window)
    out, lse = context_attention(
        q, k, v, plan, group, form=form, return_lse=True, **dict(case.options)
    )
    torch.autograd.backward((out, lse), parts[3:])
    return out.detach(), lse.detach(), q.grad, k.grad, v.grad


def errors(case: Case, rank: int, size: int, group: Group, form: str) -> dict[str, float]:
    """Of each result, relative to its largest value."""
    dtype = case.dtype if case.dtype == torch.float64 else torch.float64
    expected = of_one_process(case, dtype)
    got = of_rank(case, rank, size, group, form)
    found = {}
    for name, x, whole in zip(NAMES, got, expected, strict=True):
        part = shard(whole, rank, size, 2 if name == "lse" else 1)
        assert x.shape == part.shape and not x.isnan().any()
        found[name] = float((x.double() - part).abs().max() / whole.abs().max())
    return found


def all_cases(rank, size):
    group = Group(dist.group.WORLD, "cp")
    return {
        (name, form): errors(case, rank, size, group, form)
        for name, case in CASES.items()
        for form in ("ring", "gather")
    }


TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_what_one_process_does(size):
    results = on_ranks(all_cases, size, size)
    assert all(len(found) == 2 * len(CASES) for found in results)
    for found in results:
        for (name, form), errs in found.items():
            for what, error in errs.items():
                assert error <= TOLERANCES[CASES[name].dtype], (name, form, what, error)


def fuzz(rank, size, seed):
    rng, worst = random.Random(seed), 0.0
    group = Group(dist.group.WORLD, "cp")
    for _ in range(25):
        T, B = 2 * size * rng.randint(1, 7), rng.randint(1, 2)
        G = rng.choice([1, 2])
        causal = rng.random() < 0.8
        window = rng.randint(1, T) if causal and rng.random() < 0.6 else None
        ends = None
        if rng.random() < 0.6:
            ends = {rng.randint(0, B * T) for _ in range(rng.randint(0, 6))}
            ends = tuple(sorted(ends | set(range(0, B * T + 1, T))))
        options = DROPOUT if rng.random() < 0.3 else ()
        case = Case(T, B, G * rng.randint(1, 3), G, 4, causal, window, ends, options)
        for form in ("ring", "gather"):
            found = errors(case, rank, size, group, form)
            assert max(found.values()) <= 1e-12, (seed, case, form, found)
            worst = max(worst, *found.values())
    return worst


@pytest.mark.parametrize("size", [2, 4])
def test_random_shapes_and_masks(size):
    on_ranks(fuzz, size, size, 11)


def counted(rank, size, folder):
    """(messages, elements) received, forward and backward, by what the journal noted."""
    journal = Journal(folder, rank)
    group = Group(dist.group.WORLD, "cp", journal)
    found = {}
    for name, window in (("chunk", 4), ("row", None)):
        heard = []
        enter = journal.enter

        def listening(channel, kind, tag, elements, waits, heard=heard, enter=enter):
            heard.append((kind, channel, elements))
            return enter(channel, kind, tag, elements, waits)

        journal.enter = listening
        of_rank(Case(T=8 * size, window=window), rank, size, group, "ring")
        journal.enter = enter
        found[name] = [(c, n) for kind, c, n in heard if kind == "recv"]
    record = read(folder, rank)
    assert record.waits is None and record.groups == {"cp": tuple(range(size))}
    return found


def test_a_window_of_a_chunk_needs_neighbours_only(tmp_path):
    """4 ranks: 6 of the 7 borders between chunks are between ranks; their keys go over them once
    forward and once backward, and their gradients home."""
    size, block = 4, 2 * 4 * 2 * 8  # keys and values, 4 tokens, G = 2, D = 8
    results = on_ranks(counted, size, size, str(tmp_path))
    received = [item for found in results for item in found["chunk"]]
    assert len(received) == 3 * 6 and {n for _, n in received} == {block}
    for r, found in enumerate(results):
        for channel, _ in found["chunk"]:
            source, target = map(int, channel.split(":")[1].split(">"))
            assert target == r and abs(source - target) == 1
    # Without a window: early chunks to all, late ones down, 3/2 P (P - 1) blocks, three times.
    elements = sum(n for found in results for _, n in found["row"])
    assert elements == 3 * block * (size * (size - 1) * 3 // 2)


def order(rank, size):
    """The forward of a ring in turn: s, messages start; a, a part is attended; w, it waits."""
    events = []
    exchange, attend, wait = Group.exchange, context._attend, context.Pending.wait

    def noting(name, function):
        def noted(*args):
            events.append(name)
            return function(*args)

        return noted

    Group.exchange = noting("s", exchange)
    context._attend = noting("a", attend)
    context.Pending.wait = noting("w", wait)
    group = Group(dist.group.WORLD, "cp")
    q, k, v = inputs(Case(T=8 * size))[:3]
    parts = (shard(x, rank, size) for x in (q, k, v))
    context_attention(*parts, Plan(rank, size, 1, 8 * size), group)
    return "".join(events)


def test_the_next_keys_travel_while_the_present_ones_are_attended():
    for events in on_ranks(order, 4, 4):
        assert re.fullmatch("(sa*w){3}a*", events), events
        assert events.startswith("saaa") and events.count("a") == 3 + 2 * 3, events


def test_bits_repeat():
    first, second = (on_ranks(fuzz_bits, 2) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fuzz_bits(rank):
    group = Group(dist.group.WORLD, "cp")
    case = dataclasses.replace(CASES["documents and window"], dtype=torch.float32)
    return [x for form in ("ring", "gather") for x in of_rank(case, rank, 2, group, form)]


def faulty(rank, size, fault):
    """All cases with a planted fault: which of them still look right."""
    if fault == "no merge":

        def replace(out, lse, part_out, part_lse):
            out.copy_(part_out)
            lse.copy_(part_lse)

        context._merge_ = replace
    elif fault == "lse not used":

        def average(out, lse, part_out, part_lse):
            out.add_(part_out)
            lse.copy_(torch.logaddexp(lse, part_lse))

        context._merge_ = average
    elif fault == "wrong chunk":
        own = context._own

        def swapped(plan, k, v):
            blocks = own(plan, k, v)
            return dict(zip(blocks, reversed(blocks.values()), strict=True))

        context._own = swapped
    elif fault == "gradients not sent home":
        add = context._add
        context._add = lambda sums, others: None if len(others) else add(sums, others)
    elif fault == "local dropout":
        element_keys = context.random.element_keys
        context.random = type("R", (), {})
        context.random.element_keys = lambda seed, stream, starts, sizes, device: element_keys(
            seed, stream, (0,) * len(starts), sizes, device
        )
    elif fault == "window edge off by one":
        mask = context._mask_and_dropout

        def wider(options, slot, call, H, device):
            return mask(options, slot, call._replace(mask="full"), H, device)

        context._mask_and_dropout = wider
    group = Group(dist.group.WORLD, "cp")
    name = {"local dropout": "dropout", "window edge off by one": "window over chunks"}.get(
        fault, "causal"
    )
    return errors(CASES[name], rank, size, group, "ring")


@pytest.mark.parametrize(
    "fault",
    [
        "no merge",
        "lse not used",
        "wrong chunk",
        "gradients not sent home",
        "local dropout",
        "window edge off by one",
    ],
)
def test_planted_faults_are_seen(fault):
    found = on_ranks(faulty, 2, 2, fault)
    assert max(error for errs in found for error in errs.values()) > 1e-3


def test_one_rank_calls_flash_attention():
    for name in ("rows of documents", "window over chunks", "dropout"):
        case = CASES[name]
        for got, expected in zip(
            of_rank(case, 0, 1, Group(None, "cp"), "ring"), of_one_process(case), strict=True
        ):
            assert torch.equal(got, expected)


def test_what_does_not_fit_is_refused():
    q = torch.zeros(1, 8, 2, 4)
    group = Group(None, "cp")
    with pytest.raises(ValueError, match="expected a plan for rank 0 of 1, got one for 1 of 2"):
        context_attention(q, q, q, Plan(1, 2, 1, 16), group)
    with pytest.raises(ValueError, match="expected form 'ring' or 'gather', got 'star'"):
        context_attention(q, q, q, Plan(0, 1, 1, 8), group, form="star")
    with pytest.raises(ValueError, match="with \\(B, T/P\\) = \\(2, 8\\), got \\(1, 8, 2, 4\\)"):
        context_attention(q, q, q, Plan(0, 1, 2, 8), group)


def raises(rank):
    if rank == 1:
        raise ValueError("this is rank 1")


def test_a_failing_rank_fails_its_test():
    with pytest.raises(Failed, match="this is rank 1"):
        on_ranks(raises, 2)
