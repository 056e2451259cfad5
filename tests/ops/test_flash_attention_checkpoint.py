"""Flash attention under selective activation checkpointing, eager and in one graph.

The independent reference is the same function without checkpointing, whose results and gradients
must come out to the bit: with dropout only if what is computed again drops the same weights. How
often the operator ran is counted in its own formulas. Not covered: memory, which the allocator of
a CPU does not tell.
"""

import functools

import pytest
import torch
from attention_cases import FP32, Case
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from stellarator_kernels import flash_attention, reference

FORWARD = torch.ops.stellarator.flash_attention_forward.default
CASES = {
    "window": Case(40, B=2, H=4, G=2, window=9),
    "documents": Case(40, H=4, G=2, documents=(13, 27)),
    "dropout": Case(40, B=2, H=4, G=2, dropout_p=0.3),
    "documents, window, softcap, dropout": Case(
        40, H=4, G=2, documents=(13, 27), window=9, softcap=1.5, dropout_p=0.3
    ),
}


def save_attention(context, operator, *args, **kwargs):
    """A policy: keep what attention gives, compute all else again."""
    saved = operator is FORWARD
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.MUST_RECOMPUTE


def save_nothing(context, operator, *args, **kwargs):
    """A policy: compute everything again."""
    return CheckpointPolicy.MUST_RECOMPUTE


@pytest.fixture
def runs(monkeypatch):
    """Grows by one whenever the forward operator runs."""
    counted, real = [], reference.flash_attention_ref

    def counting(*args):
        counted.append(1)
        return real(*args)

    monkeypatch.setattr(reference, "flash_attention_ref", counting)
    return counted


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("policy", [save_attention, save_nothing])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_bits_and_no_run_too_many(case, policy, compiled, runs):
    q, k, v, dout, _ = case.inputs(FP32)
    options = case.options()
    seed = torch.tensor(options.pop("dropout_seed"))  # as in a compiled step
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def block(q, k, v, seed):
        out = flash_attention(
            q.sin(), k.sin(), v.sin(), **options, dropout_seed=seed, impl="reference"
        )
        return out.sin()

    def with_checkpoint(q, k, v, seed):
        return checkpoint(block, q, k, v, seed, use_reentrant=False, context_fn=contexts)

    if compiled:
        torch.compiler.reset()
        with_checkpoint = torch.compile(with_checkpoint, fullgraph=True, backend="aot_eager")
    expected, found = [], []
    for function, into, most in (
        (block, expected, 1),
        (with_checkpoint, found, 1 if policy is save_attention else 2),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        runs.clear()
        out = function(*inputs, seed)
        assert len(runs) == 1
        into += [out.detach(), *torch.autograd.grad(out, inputs, dout)]
        assert len(runs) == most
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
