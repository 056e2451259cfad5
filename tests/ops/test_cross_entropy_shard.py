"""The split-vocabulary cross entropies: shards in one process against the whole in float64.

The independent reference is F.linear + F.cross_entropy and autograd in float64 on the unsharded
weight (test_linear_cross_entropy.eager); the peer of the tolerance is the same code in the tested
dtype. Where Triton runs: grid.py. Not covered: the exchange between ranks, which is not here, and
memory on a GPU.
"""

import math

import grid
import pytest
import torch
from grid import generator
from test_linear_cross_entropy import eager, make, record, run

from stellarator_kernels import (
    cross_entropy,
    cross_entropy_gradient_,
    cross_entropy_of_statistics,
    cross_entropy_statistics,
    linear_cross_entropy_gradients,
    linear_cross_entropy_statistics,
)
from stellarator_kernels.cross_entropy_shard import (
    ELSEWHERE,
    IGNORED,
    NO_CLASS,
    _cross_entropy_gradient,
    _cross_entropy_statistics,
    local_targets,
)
from stellarator_kernels.linear_cross_entropy_shard import (
    _linear_cross_entropy_gradients,
    _linear_cross_entropy_statistics,
)
from stellarator_kernels.testing import assert_close_to_reference, poison_empty

# Bounds of the shards. 4300 = one block of 4096 lanes and a rest; 13 is odd and cut unevenly.
SHARDS = {
    "one": (0, 13),
    "two": (0, 7, 13),
    "three, uneven": (0, 1, 11, 13),
    "four": (0, 3, 6, 9, 12),
    "two, two blocks in the first": (0, 4300, 4333),
}


def shards(bounds):
    """(slice, keywords) of each shard."""
    for start, stop in zip(bounds, bounds[1:]):
        yield slice(start, stop), {"vocab_start": start, "vocab_size": bounds[-1]}


def split_linear(impl, bounds, hidden, weight, bias, targets, dloss, z_loss, chunk_size, into=None):
    """Losses and gradients of the whole, from shards that only exchange (3, N) statistics."""
    options = {"chunk_size": chunk_size, "impl": impl}
    parts = [
        (weight[rows], None if bias is None else bias[rows], where)
        for rows, where in shards(bounds)
    ]
    statistics = torch.stack(
        [linear_cross_entropy_statistics(hidden, w, targets, b, **at, **options)
         for w, b, at in parts]
    )  # fmt: skip
    loss, lse = cross_entropy_of_statistics(statistics, targets, z_loss=z_loss)
    found = [
        linear_cross_entropy_gradients(
            dloss, hidden, w, targets, lse, b, z_loss=z_loss, **at, **options
        )
        for w, b, at in parts
    ]
    dhidden, dweight, dbias = zip(*found, strict=True)
    total = torch.stack(dhidden).to(loss.dtype).sum(0)
    return loss, total, torch.cat(dweight), None if bias is None else torch.cat(dbias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bounds", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize(("impl", "dtype"), grid.CASES)
def test_shards_of_a_product_give_the_whole(impl, dtype, bounds, bias):
    hidden, weight, b, targets, dloss = make(11, 24, bounds[-1], dtype, bias=bias)
    targets[0], targets[2] = 0, bounds[-1] - 1  # so no shard has the targets of all tokens
    with poison_empty():
        actual = split_linear(impl, bounds, hidden, weight, b, targets, dloss, 1e-2, 4)

    def theirs(*leaves):
        return eager(*leaves, targets, "none", 1e-2)

    peer = run(theirs, hidden, weight, b, dloss)
    wide = [None if t is None else t.double() for t in (hidden, weight, b)]
    exact = run(theirs, *wide, dloss)
    for name, a, e, p in zip(("loss", "dhidden", "dweight", "dbias"), actual, exact, peer):
        # dhidden is rounded once for each shard.
        length = hidden.shape[0] if name in ("dweight", "dbias") else bounds[-1] * len(bounds)
        assert a.dtype == torch.float32, name
        assert_close_to_reference(a.to(p.dtype), e, p, reduction_length=length, name=name)
    ignored = targets == -100
    assert ignored.any() and not actual[0][ignored].any() and not actual[1][ignored].any()


@pytest.mark.parametrize("bounds", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize(("impl", "dtype"), grid.CASES)
def test_shards_of_logits_give_the_whole(impl, dtype, bounds):
    g = generator(bounds[-1])
    logits = (3 * torch.randn(7, bounds[-1], generator=g)).to(dtype)
    targets = torch.randint(0, bounds[-1], (7,), generator=g)
    targets[1::3] = -100
    targets[0], targets[2] = 0, bounds[-1] - 1
    dloss = torch.randn(7, generator=g)

    def whole(x):
        x = x.detach().requires_grad_()
        x32 = x if x.dtype == torch.float64 else x.float()
        losses = torch.nn.functional.cross_entropy(x32, targets, reduction="none")
        losses = losses + torch.where(targets == -100, 0, 0.1 * x32.logsumexp(1).square())
        return losses.detach(), torch.autograd.grad(losses, x, dloss.to(losses.dtype))[0]

    exact, peer = whole(logits.double()), whole(logits)
    parts = [logits[:, rows].clone() for rows, _ in shards(bounds)]
    with poison_empty():
        statistics = torch.stack(
            [
                cross_entropy_statistics(part, targets, **at, impl=impl)
                for part, (_, at) in zip(parts, shards(bounds), strict=True)
            ]
        )
        loss, lse = cross_entropy_of_statistics(statistics, targets, z_loss=0.1)
        for part, (_, at) in zip(parts, shards(bounds), strict=True):
            result = cross_entropy_gradient_(part, targets, lse, dloss, **at, z_loss=0.1, impl=impl)
            assert result is part
    assert_close_to_reference(loss, exact[0], peer[0], reduction_length=bounds[-1], name="loss")
    # The gradient knows the largest logit and the sum by lse alone, a sum over the classes.
    found = torch.cat(parts, 1)
    assert_close_to_reference(found, exact[1], peer[1], reduction_length=bounds[-1], name="dlogits")


@pytest.mark.parametrize("impl", grid.IMPLS)
def test_the_statistics_are_what_they_say(impl):
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 5)
    logits[4] = torch.nan  # what is ignored may hold anything
    targets = torch.tensor([10, 12, 9, 13, -100])
    found = cross_entropy_statistics(logits, targets, vocab_start=10, vocab_size=99, impl=impl)
    total = 1 + math.exp(-1) + math.exp(-2)
    wanted = [[3.0] * 4 + [0], [total] * 4 + [1], [1.0, 2.0, 0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(wanted))


@pytest.mark.parametrize("impl", grid.KERNELS)
def test_a_shard_without_any_possible_class_and_large_logits(impl):
    """Padding of the vocabulary is often switched off with -inf; exp overflows at 100."""
    logits = torch.randn(4, 20, generator=generator(1))
    logits[:, 10:] = -math.inf
    logits[:2, :10] += 3e4
    targets = torch.tensor([3, 9, 0, 5])
    bounds = (0, 5, 10, 20)
    parts = [logits[:, rows].clone() for rows, _ in shards(bounds)]
    statistics = torch.stack(
        [
            cross_entropy_statistics(p, targets, **at, impl=impl)
            for p, (_, at) in zip(parts, shards(bounds), strict=True)
        ]
    )
    assert (statistics[2, 0] == -math.inf).all() and (statistics[2, 1] == 0).all()
    loss, lse = cross_entropy_of_statistics(statistics, targets)
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert_close_to_reference(loss, exact, reduction_length=20)
    at = {"vocab_start": 10, "vocab_size": 20}
    assert not cross_entropy_gradient_(parts[2], targets, lse, torch.ones(4), **at, impl=impl).any()


@pytest.mark.parametrize("impl", grid.IMPLS)
def test_a_class_as_ignore_index_that_looks_like_a_local_one(impl):
    """-100 is also where a shard from 110 on would find class 10 if it only subtracted."""
    logits = torch.randn(3, 30, generator=generator(2))
    at = {"vocab_start": 110, "vocab_size": 140}
    found = cross_entropy_statistics(logits, torch.tensor([10, 5, 120]), **at, impl=impl)
    assert not (found[1] == 1).any() and found[2].tolist() == [0, 0, logits[2, 10]]
    targets = torch.tensor([5, 120, 125])
    found = cross_entropy_statistics(logits, targets, **at, ignore_index=5, impl=impl)
    assert found[:, 0].tolist() == [0, 1, 0] and found[2, 2] == logits[2, 15]


def test_one_shard_reduced_by_hand_is_one_of_the_forms():
    """As a caller does it that reduces instead of gathering: maximum, rescaled sum, sum."""
    logits = torch.randn(6, 12, generator=generator(3))
    targets = torch.tensor([0, 11, -100, 5, 6, 7])
    bounds = (0, 4, 12)
    parts = [
        cross_entropy_statistics(logits[:, rows], targets, **at) for rows, at in shards(bounds)
    ]
    largest = torch.maximum(parts[0][0], parts[1][0])
    total = sum(p[1] * (p[0] - largest).exp() for p in parts)
    reduced = torch.stack([largest, total, parts[0][2] + parts[1][2]])[None]
    loss, lse = cross_entropy_of_statistics(reduced, targets, z_loss=0.3)
    wanted = cross_entropy(logits, targets, z_loss=0.3)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(lse, logits.logsumexp(1).masked_fill(targets == -100, math.log(2)))


@pytest.mark.parametrize("impl", grid.KERNELS)
def test_strided_logits(impl):
    wide = torch.randn(10, 40, generator=generator(4))
    targets, at = torch.arange(5), {"vocab_start": 0, "vocab_size": 20}
    for logits in (wide[::2, 3:23], wide[::2, ::2], torch.randn(20, 5).t()):
        lse, exact = logits.logsumexp(1), logits.double().softmax(1)
        exact[torch.arange(5), targets] -= 1
        found = cross_entropy_statistics(logits, targets, **at, impl=impl)
        torch.testing.assert_close(found[0] + found[1].log(), lse)
        dloss = torch.ones(()).expand(5)
        cross_entropy_gradient_(logits, targets, lse, dloss, **at, impl=impl)
        assert_close_to_reference(logits, exact)


@pytest.mark.parametrize("impl", grid.IMPLS)
def test_gradients_are_added_to_the_buffers_of_the_caller(impl):
    hidden, weight, bias, targets, dloss = make(9, 8, 20, torch.float32)
    at = {"vocab_start": 0, "vocab_size": 20, "impl": impl, "chunk_size": 4}
    statistics = linear_cross_entropy_statistics(hidden, weight, targets, bias, **at)
    _, lse = cross_entropy_of_statistics(statistics[None], targets)
    given = dloss, hidden, weight, targets, lse, bias
    dhidden, dweight, dbias = linear_cross_entropy_gradients(*given, **at)
    before = torch.randn(20, 8, generator=generator(5)), torch.randn(20, generator=generator(6))
    buffers = [b.clone() for b in before]
    again = linear_cross_entropy_gradients(*given, **at, dweight=buffers[0], dbias=buffers[1])
    assert again[1] is buffers[0] and again[2] is buffers[1] and torch.equal(again[0], dhidden)
    torch.testing.assert_close(buffers[0], before[0] + dweight)
    torch.testing.assert_close(buffers[1], before[1] + dbias)


def test_micro_batches_in_bf16_add_up_in_fp32():
    """512 micro-batches whose every gradient is below half a unit of a bf16 sum's last place."""
    hidden, weight = torch.ones(1, 1).bfloat16(), torch.zeros(2, 1).bfloat16()
    targets, at = torch.zeros(1, dtype=torch.int64), {"vocab_start": 0, "vocab_size": 2}
    lse, dweight = torch.full((1,), math.log(2)), torch.zeros(2, 1)
    for _ in range(512):
        linear_cross_entropy_gradients(
            torch.ones(1), hidden, weight, targets, lse, **at, dweight=dweight
        )
    assert dweight.tolist() == [[-256.0], [256.0]]


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=grid.INTERPRETED)])
def test_the_logits_are_never_whole(impl):
    N, C, V, rows = 64, 4, 96, 16
    hidden, weight, _, targets, dloss = make(N, C, V, torch.float32, bias=False, ignored=False)
    at = {"vocab_start": 0, "vocab_size": V, "chunk_size": rows, "impl": impl}
    lse = (hidden @ weight.t()).logsumexp(1)
    for function in (
        lambda: linear_cross_entropy_statistics(hidden, weight, targets, **at),
        lambda: linear_cross_entropy_gradients(dloss, hidden, weight, targets, lse, **at),
    ):
        assert max(record(function)[1]) == rows * V * 4


def rows_of_products(monkeypatch, function):
    """Tokens for which logits are computed in `function`."""
    counted, real = [], torch.mm

    def counting(left, right, **kwargs):
        counted.append((left.shape, right.shape))
        return real(left, right, **kwargs)

    monkeypatch.setattr(torch, "mm", counting)
    function()
    return counted


def test_ignored_tokens_take_part_in_no_product(monkeypatch):
    N, C, V = 1024, 4, 8
    hidden, weight, _, targets, dloss = make(N, C, V, torch.float32, bias=False, ignored=False)
    targets[256:] = -100
    targets[7] = -100
    hidden[targets == -100] = torch.nan
    at = {"vocab_start": 0, "vocab_size": V, "impl": "torch"}
    lse = torch.ones(N)
    for function in (
        lambda: linear_cross_entropy_statistics(hidden, weight, targets, **at),
        lambda: linear_cross_entropy_gradients(dloss, hidden, weight, targets, lse, **at),
    ):
        shapes = rows_of_products(monkeypatch, function)
        assert sum(left[0] for left, right in shapes if right == (C, V)) == 256
    dhidden, dweight, _ = linear_cross_entropy_gradients(dloss, hidden, weight, targets, lse, **at)
    assert torch.isfinite(dhidden).all() and torch.isfinite(dweight).all()


@pytest.mark.parametrize("impl", grid.IMPLS)
def test_no_tokens_and_none_that_count(impl):
    at = {"vocab_start": 5, "vocab_size": 20, "impl": impl}
    for N in (0, 3):
        hidden, weight = torch.ones(N, 8), torch.ones(5, 8)
        targets = torch.full((N,), -100)
        found = linear_cross_entropy_statistics(hidden, weight, targets, **at)
        assert torch.equal(found, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, N))
        nothing = torch.zeros(N)
        found = linear_cross_entropy_gradients(nothing, hidden, weight, targets, nothing, **at)
        assert found[0].shape == (N, 8) and not found[0].any() and not found[1].any()
        logits = torch.ones(N, 5)
        assert cross_entropy_statistics(logits, targets, **at).shape == (3, N)


def test_local_targets():
    targets = torch.tensor([0, 9, 10, 14, 15, -100, 99, 100, -1, -2])
    if torch.get_default_device().type == "cpu":
        with pytest.raises(ValueError, match=r"^op: expected targets in \[0, 100\) or -100, got 1"):
            local_targets("op", targets, 10, 5, 100, -100)
    # Where values are not looked at, as on a GPU.
    found = local_targets("op", targets.to("meta"), 10, 5, 100, -100)
    assert found.shape == (10,)
    found = local_targets("op", targets[:7], 10, 5, 100, -100)
    wanted = [ELSEWHERE, ELSEWHERE, 0, 4, ELSEWHERE, IGNORED, ELSEWHERE]
    assert found.tolist() == wanted


@pytest.mark.parametrize("impl", grid.IMPLS)
def test_a_target_that_is_no_class_makes_the_loss_nan(impl, monkeypatch):
    """As on a GPU, where the check of the values is left out."""
    monkeypatch.setattr("stellarator_kernels.cross_entropy_shard.check_targets", lambda *_: None)
    targets = torch.tensor([0, 8, -1, -100, 7])
    at = {"vocab_start": 0, "vocab_size": 8}
    found = cross_entropy_statistics(torch.zeros(5, 8), targets, **at, impl=impl)
    loss, _ = cross_entropy_of_statistics(found[None], targets)
    assert loss.isnan().tolist() == [False, True, True, False, False]
    assert local_targets("op", targets, 0, 8, 8, -100).tolist() == [0, NO_CLASS, NO_CLASS, -2, 7]


@pytest.mark.parametrize("impl", grid.KERNELS)
def test_the_same_bits_again(impl):
    hidden, weight, bias, targets, dloss = make(40, 16, 300, torch.float32)
    arguments = (impl, (0, 100, 300), hidden, weight, bias, targets, dloss, 0.1, 7)
    first, second = split_linear(*arguments), split_linear(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    hidden, weight, bias, targets, dloss = make(5, 4, 8, torch.bfloat16)
    where = (0, 8, -100)
    check = torch.library.opcheck
    check(_cross_entropy_statistics, (hidden, targets.clamp(max=3), 0, 9, -100, "torch"))
    lse = torch.ones(5)
    logits = torch.randn(5, 8).bfloat16()
    check(_cross_entropy_gradient, (logits, targets, lse, dloss, *where, 0.1, "torch"))
    check(_linear_cross_entropy_statistics, (hidden, weight, bias, targets, *where, 2, "torch"))
    buffers = torch.zeros(8, 4), torch.zeros(8)
    given = (dloss, hidden, weight, bias, targets, lse, *buffers, *where, 0.1, 2, "torch")
    check(_linear_cross_entropy_gradients, given)


@pytest.mark.parametrize("impl", grid.KERNELS)
def test_compiled_in_one_graph(impl):
    hidden, weight, bias, targets, dloss = make(6, 8, 13, torch.float32)

    def function(hidden, weight, bias, dweight):
        at = {"vocab_start": 2, "vocab_size": 15, "impl": impl}
        statistics = linear_cross_entropy_statistics(
            hidden, weight, targets, bias, chunk_size=2, **at
        )
        loss, lse = cross_entropy_of_statistics(statistics[None], targets, z_loss=0.1)
        found = linear_cross_entropy_gradients(
            dloss, hidden, weight, targets, lse, bias, z_loss=0.1, chunk_size=2, dweight=dweight,
            **at,
        )  # fmt: skip
        logits = hidden @ weight.t()
        return loss, found[0], found[2], cross_entropy_gradient_(logits, targets, lse, dloss, **at)

    buffers = torch.ones(13, 8), torch.ones(13, 8)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(hidden, weight, bias, buffers[0])
    actual = compiled(hidden, weight, bias, buffers[1])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(*buffers) and not (buffers[0] == 1).all()


def test_the_statistics_have_no_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    targets = torch.zeros(2, dtype=torch.int64)
    assert not cross_entropy_statistics(logits, targets, vocab_start=0, vocab_size=3).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 0)}, r"logits \(N, V_tp\) with V_tp >= 1, got \(3, 0\)"),
        ({"logits": torch.zeros(3, 8, dtype=torch.int8)}, "expected logits with dtype in"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets \(N,\) = \(3,\), got \(4,\)"),
        ({"targets": torch.zeros(3)}, "expected targets with dtype in"),
        ({"logits": torch.zeros(3, 8, device="meta")}, "expected all tensors on one device"),
        ({"vocab_start": 3}, "a shard of 8 classes within vocab_size = 10, got vocab_start 3"),
        ({"vocab_start": -1}, "a shard of 8 classes within vocab_size = 10, got vocab_start -1"),
        ({"targets": torch.tensor([0, 10, 1])}, r"expected targets in \[0, 10\) or -100, got 10"),
        ({"impl": "cpu"}, "cannot run"),
    ],
    ids=str,
)
def test_messages(change, message):
    arguments = {
        "logits": torch.zeros(3, 8),
        "targets": torch.zeros(3, dtype=torch.int64),
        "vocab_start": 2,
        "vocab_size": 10,
    } | change
    error = RuntimeError if "impl" in change else ValueError
    with pytest.raises(error, match="^cross_entropy_statistics: .*" + message):
        cross_entropy_statistics(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lse": torch.zeros(2)}, r"expected lse \(N,\) = \(3,\), got \(2,\)"),
        ({"lse": torch.zeros(3).half()}, "expected lse with dtype in"),
        ({"dloss": torch.zeros(3).long()}, "expected dloss with dtype in"),
        ({"dweight": torch.zeros(7, 4)}, r"expected dweight like weight = \(8, 4\), got \(7, 4\)"),
        ({"dweight": torch.zeros(8, 4).half()}, "expected dweight with dtype in"),
        ({"chunk_size": 0}, "expected chunk_size >= 1 or None, got 0"),
        ({"weight": torch.zeros(4, 8)}, r"weight \(V, C\) with C = 4 and V >= 1, got \(4, 8\)"),
        ({"dweight": torch.zeros(8, 4, device="meta")}, "expected all tensors on one device"),
    ],
    ids=str,
)
def test_messages_of_the_gradients(change, message):
    arguments = {
        "dloss": torch.zeros(3),
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(8, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
        "lse": torch.zeros(3),
        "vocab_start": 0,
        "vocab_size": 8,
    } | change
    with pytest.raises(ValueError, match="^linear_cross_entropy_gradients: .*" + message):
        linear_cross_entropy_gradients(**arguments)


def test_messages_of_the_merge():
    targets = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"statistics \(P, 3, N\), got \(3, 4\)"):
        cross_entropy_of_statistics(torch.zeros(3, 4), targets)
    with pytest.raises(ValueError, match=r"targets \(N,\) = \(5,\), got \(4,\)"):
        cross_entropy_of_statistics(torch.zeros(2, 3, 5), targets)
