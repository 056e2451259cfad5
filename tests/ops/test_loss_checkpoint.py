"""The losses under selective activation checkpointing, eager and in one graph, and under autocast.

The independent reference is the same function without checkpointing, whose results and gradients
must come out to the bit, those that are added to memory of the caller once and not twice. How often
an operator ran is counted in its own formulas. Autocast of linear_cross_entropy:
test_linear_cross_entropy.py. Not covered: memory.
"""

import functools

import pytest
import torch
from grid import KERNELS, generator
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from stellarator_kernels import (
    cross_entropy,
    cross_entropy_statistics,
    linear_cross_entropy,
    linear_cross_entropy_statistics,
    reference,
)

KEPT = {
    torch.ops.stellarator.cross_entropy_forward.default,
    torch.ops.stellarator.linear_cross_entropy_forward.default,
}


def save_losses(context, operator, *args, **kwargs):
    """A policy: keep what the losses give, compute all else again."""
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.MUST_RECOMPUTE


def save_nothing(context, operator, *args, **kwargs):
    """A policy: compute everything again."""
    return CheckpointPolicy.MUST_RECOMPUTE


def plain(hidden, weight, targets, dweight):
    """Of logits."""
    return cross_entropy(hidden @ weight.t(), targets, z_loss=0.1, impl="reference").sum()


def linear(reduction, with_dweight):
    """Of states."""

    def loss(hidden, weight, targets, dweight):
        return linear_cross_entropy(
            hidden, weight, targets, z_loss=0.1, reduction=reduction, impl="reference",
            dweight=dweight if with_dweight else None,
        ).sum()  # fmt: skip

    return loss


CASES = {
    "plain": (plain, "cross_entropy_ref"),
    "linear mean": (linear("mean", False), "linear_cross_entropy_ref"),
    "linear into memory": (linear("mean", True), "linear_cross_entropy_ref"),
    "linear none into memory": (linear("none", True), "linear_cross_entropy_ref"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("policy", [save_losses, save_nothing])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_and_no_run_too_many(case, policy, compiled, monkeypatch):
    function, formula = CASES[case]
    runs, real = [], getattr(reference, formula)
    monkeypatch.setattr(reference, formula, lambda *args: runs.append(1) or real(*args))
    g = generator(0)
    hidden, weight = torch.randn(9, 8, generator=g), torch.randn(13, 8, generator=g)
    targets = torch.randint(0, 13, (9,), generator=g)
    targets[4] = -100
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def block(hidden, weight, targets, dweight):
        return function(hidden.sin(), weight, targets, dweight).sin()

    def with_checkpoint(*args):
        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

    if compiled:
        torch.compiler.reset()
        with_checkpoint = torch.compile(with_checkpoint, fullgraph=True, backend="aot_eager")
    # The backward for "none" computes the logits again by itself.
    again = int(case.startswith("linear none"))
    results = []
    for f, most in ((block, 1), (with_checkpoint, 1 if policy is save_losses else 2)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        total = torch.ones(13, 8)
        runs.clear()
        out = f(*leaves, targets, total)
        assert len(runs) == 1
        gradients = torch.autograd.grad(out, leaves, torch.tensor(3.0), allow_unused=True)
        assert len(runs) == most + again
        results.append([out.detach(), gradients[0], total, *gradients[1:]])
    assert (results[0][3] is None) == ("memory" in case)
    assert torch.equal(results[0][2], torch.ones(13, 8)) != ("memory" in case)
    for one, other in zip(*results, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("impl", KERNELS)
def test_cross_entropy_under_autocast(impl):
    """fp32 whatever the dtype of the logits, as autocast asks of a loss."""
    g = generator(1)
    logits = torch.randn(6, 20, generator=g).half().requires_grad_()
    targets = torch.randint(0, 20, (6,), generator=g)
    kind = torch.get_default_device().type
    with torch.autocast(kind, dtype=torch.bfloat16):
        loss = cross_entropy(logits, targets, impl=impl)
    wanted = cross_entropy(logits, targets, impl=impl)
    assert loss.dtype == torch.float32 and torch.equal(loss, wanted)
    gradients = [torch.autograd.grad(x.sum(), logits)[0] for x in (loss, wanted)]
    assert torch.equal(*gradients) and gradients[0].dtype == torch.float16


@pytest.mark.parametrize("impl", KERNELS)
def test_a_shard_under_autocast(impl):
    """Callers pass what they computed; the sums stay fp32 and the products in the dtype given."""
    g = generator(2)
    hidden, weight = torch.randn(6, 8, generator=g), torch.randn(20, 8, generator=g)
    targets = torch.randint(0, 20, (6,), generator=g)
    at = {"vocab_start": 0, "vocab_size": 20, "impl": impl}
    kind = torch.get_default_device().type

    def both():
        first = linear_cross_entropy_statistics(hidden, weight, targets, **at)
        return first, cross_entropy_statistics(hidden.half() @ weight.half().t(), targets, **at)

    wanted = both()
    with torch.autocast(kind, dtype=torch.float16):
        found = both()
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], wanted[1])
    assert torch.equal(found[0], wanted[0])
