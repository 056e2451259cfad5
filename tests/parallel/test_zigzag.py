"""Chunks, masks and routes of context parallelism: pure, against masks written out in full.

The reference is the (T, T) mask of `reference.visible_keys`. Not covered: processes, see
test_context.py.
"""

import random

import pytest
import torch

from stellarator.parallel.zigzag import (
    Plan,
    calls_between,
    calls_to_row,
    chunks_of,
    owner,
    positions,
    shard,
    unshard,
)
from stellarator_kernels.reference import visible_keys


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_token_is_on_one_rank(size):
    T = 2 * size * 3
    x = torch.arange(2 * T).view(2, T)
    parts = [shard(x, r, size) for r in range(size)]
    assert torch.equal(unshard(parts), x)
    for r in range(size):
        assert torch.equal(x[:, positions(r, size, T)], parts[r])
        assert [owner(c, size) for c in chunks_of(r, size)] == [r, r]
    assert positions(0, 2, 8).tolist() == [0, 1, 6, 7]
    assert positions(1, 2, 8).tolist() == [2, 3, 4, 5]
    y = torch.arange(2 * T).view(T, 2)
    assert torch.equal(unshard([shard(y, r, size, dim=0) for r in range(size)], dim=0), y)


def test_rows_that_cannot_be_cut():
    with pytest.raises(ValueError, match="a multiple of 2 \\* 3 tokens, got 10. Pad them to 12."):
        shard(torch.zeros(1, 10), 0, 3)
    with pytest.raises(ValueError, match="a multiple of 2 \\* 2 tokens, got 6"):
        Plan(0, 2, 1, 6)
    with pytest.raises(ValueError, match="got window=3, causal=False"):
        Plan(0, 2, 1, 8, causal=False, window=3)
    with pytest.raises(ValueError, match="every multiple of T = 4, got \\(0, 6, 8\\)"):
        Plan(0, 2, 2, 4, cu_seqlens=(0, 6, 8))


def seen(call) -> torch.Tensor:
    """(T, S) of one call, from what flash_attention is told."""
    T, S = call.q[1] - call.q[0], call.k[1] - call.k[0]
    bounds = None if call.bounds is None else torch.tensor(call.bounds)
    mask = visible_keys(T, S, causal=call.mask != "full", window=call.window, cu_seqlens=bounds)
    return mask.flip(0, 1) if call.mask == "mirrored" else mask


def counts(calls, T) -> torch.Tensor:
    """(T, T): how many calls compute each pair."""
    found = torch.zeros(T, T, dtype=torch.long)
    for call in calls:
        assert call.q[0] < call.q[1] and call.k[0] < call.k[1]
        found[slice(*call.q), slice(*call.k)] += seen(call)
    return found


def random_case(rng):
    size, n = rng.randint(1, 4), rng.randint(1, 5)
    T = 2 * size * n
    ends = {0, T, *(rng.randint(0, T) for _ in range(rng.choice([0, 0, 1, 3, 8])))}
    causal = rng.random() < 0.8
    window = rng.randint(1, T + 2) if causal and rng.random() < 0.6 else None
    return size, n, T, tuple(sorted(ends)), causal, window


def test_calls_compute_each_visible_pair_once():
    rng, masks = random.Random(5), set()
    for _ in range(600):
        size, n, T, ends, causal, window = random_case(rng)
        expected = visible_keys(
            T, T, causal=causal, window=window, cu_seqlens=torch.tensor(ends)
        ).long()
        chunks = [(c * n, c * n + n) for c in range(2 * size)]
        between = [
            call
            for q in chunks
            for k in chunks
            for call in calls_between(q, k, ends, causal, window)
        ]
        to_row = [call for q in chunks for call in calls_to_row(q, ends, causal, window)]
        assert torch.equal(counts(between, T), expected), (size, n, ends, causal, window)
        assert torch.equal(counts(to_row, T), expected), (size, n, ends, causal, window)
        queries = [i for call in to_row for i in range(*call.q)]
        assert sorted(queries) == list(range(T))  # each in one call: nothing to merge
        masks |= {call.mask for call in between}
    assert masks == {"full", "causal", "mirrored"}


def test_routes_bring_each_block_to_those_who_see_it_and_to_nobody_else():
    """All ranks' plans are run here, without tensors: forward and the way back of the gradients."""
    rng = random.Random(6)
    for _ in range(300):
        size, n, T, ends, causal, window = random_case(rng)
        B = rng.randint(1, 2)
        cu_seqlens = None
        if len(ends) > 2:
            cu_seqlens = [row * T + end for row in range(B) for end in ends]
        plans = [Plan(r, size, B, T, cu_seqlens, causal, window) for r in range(size)]
        assert len({len(plan.steps) for plan in plans}) == 1
        held = [set(plan._owned(plan.rank)) for plan in plans]
        calls = [[] for _ in plans[0].slots]
        home, received = {}, set()
        for s in range(len(plans[0].steps)):
            steps = [plan.steps[s] for plan in plans]
            sent = {(r, to): blocks for r, x in enumerate(steps) for to, blocks in x.sends}
            got = {(peer, r): blocks for r, x in enumerate(steps) for peer, blocks in x.receives}
            assert sent == got and all(abs(a - b) == 1 for a, b in sent)
            for (r, _), blocks in sent.items():
                assert set(blocks) <= held[r]
            if s:
                held = [{b for _, m in x.receives for b in m} for x in steps]
                received |= {(r, b) for r, blocks in enumerate(held) for b in blocks}
            for r, x in enumerate(steps):
                assert {b for b, _ in x.calls} == held[r]  # nothing comes that is not seen
                for block, call in x.calls:
                    calls[block.slot].append(call)
            out = {(r, to): blocks for r, x in enumerate(steps) for to, blocks in x.home_sends}
            back = {(p, r): blocks for r, x in enumerate(steps) for p, blocks in x.home_receives}
            assert out == back
            for (r, to), blocks in out.items():
                for block in blocks:
                    assert block in held[r] and owner(block.chunk, size) == to
                    home[block, r > to] = r
        expected = visible_keys(T, T, causal=causal, window=window, cu_seqlens=torch.tensor(ends))
        chunk = expected.view(2 * size, n, 2 * size, n).any(3).any(1).nonzero().tolist()
        needed = {
            (owner(q, size), (slot, k))
            for slot in range(len(plans[0].slots))
            for q, k in chunk
            if owner(q, size) != owner(k, size)
        }
        assert received == needed
        # A sum that goes up, and one that goes down, comes home from the last one who sees it.
        ends_of = {}
        for r, (slot, k) in needed:
            up, here = r > owner(k, size), owner(k, size)
            far = ends_of.get(((slot, k), up), here)
            ends_of[(slot, k), up] = max(far, r) if up else min(far, r)
        assert home == ends_of
        for slot in range(len(plans[0].slots)):
            assert torch.equal(counts(calls[slot], T), expected.long())


def blocks_received(T, size, window, ends=None, causal=True):
    """Per rank: how many chunks come in, and of how many steps."""
    plans = [Plan(r, size, 1, T, ends, causal, window) for r in range(size)]
    return [sum(len(b) for s in plan.steps for _, b in s.receives) for plan in plans], len(
        plans[0].steps
    )


def test_message_counts():
    """Rows of 65,536 on 8 ranks: chunks of 4096."""
    T, size, P = 65536, 8, 8
    # Each of the 2P - 1 borders between chunks is crossed once, but the one in the middle of the
    # row, whose two chunks are on one rank.
    for window in (2, 4096, 4097):
        received, steps = blocks_received(T, size, window)
        assert sum(received) == 2 * (P - 1) and max(received) == 2 and steps == 2
    received, steps = blocks_received(T, size, 1)
    assert sum(received) == 0 and steps == 1
    received, _ = blocks_received(T, size, 4098)  # the first query now sees two chunks back
    assert sum(received) > 2 * (P - 1)
    # Causal: early chunks to all, late ones to the ranks below. Handing everything on: 2 P (P - 1).
    received, steps = blocks_received(T, size, None)
    assert sum(received) == P * (P - 1) * 3 // 2 and steps == P
    received, _ = blocks_received(T, size, None, causal=False)
    assert sum(received) == 2 * P * (P - 1)
    # Documents that end where chunks end: nothing moves.
    assert blocks_received(T, size, None, range(0, T + 1, 4096)) == ([0] * size, 1)
    # One document over the third border, and one within the middle of the row.
    received, steps = blocks_received(T, size, None, [0, 4096 * 2 + 5, 4096 * 3 + 9, 4096 * 7, T])
    assert sum(received[:2]) > 0 and steps > 1


def test_ranks_work_alike_under_a_causal_mask():
    T, size = 960, 5
    pairs = []
    for r in range(size):
        plan = Plan(r, size, 1, T)
        pairs.append(sum(int(seen(call).sum()) for step in plan.steps for _, call in step.calls))
    assert sum(pairs) == T * (T + 1) // 2
    assert max(pairs) == min(pairs)
