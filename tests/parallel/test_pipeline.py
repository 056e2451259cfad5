"""Pipelines train the same model: gloo processes, float64, through the loop, every schedule.

The reference is the run of one process: its losses, weights and moments. Not covered: NCCL; time.
"""

import dataclasses

import pytest
import torch
from runs import assert_same_state, changed, losses, stopping, torchrun
from torch.utils.checkpoint import checkpoint

from stellarator.config import ParallelConfig
from stellarator.parallel.pipeline import schedules
from stellarator.parallel.pipeline.deferred import Deferred
from stellarator.parallel.pipeline.execute import messages
from stellarator.parallel.products import column_product
from stellarator.parallel.tensor import ALONE
from stellarator.train.loop import Trainer


def test_three_ranks_follow_one_process(small, tmp_path):
    """Uneven stages, untied, tp 1, under torchrun; other layouts are in test_parity_matrix.py."""
    train = {"micro_batch_size": 1, "global_batch_size": 4}  # four micro-batches
    one = changed(small, model={"tie_embeddings": False, "num_layers": 5}, train=train)
    Trainer(one).run()
    layout = ParallelConfig(pp=3, schedule="zb_h1")
    many = dataclasses.replace(one, parallel=layout, folder=str(tmp_path / "many"))
    done = torchrun(many, tmp_path, 3)
    assert done.returncode == 0, done.stderr[-6000:]
    expected, got = losses(one.folder), losses(many.folder)
    assert len(expected) == len(got) == 6
    assert got == pytest.approx(expected, rel=1e-12, abs=0)
    assert_same_state(one.folder, many.folder, 4)


def test_a_checkpoint_of_a_pipeline_goes_on_in_one_process(small, tmp_path):
    Trainer(small).run()
    config = dataclasses.replace(
        small, parallel=ParallelConfig(pp=2), folder=str(tmp_path / "both")
    )
    done = torchrun(config, tmp_path, 2, (str(stopping(tmp_path, 2)),))
    assert done.returncode == 0, done.stderr[-6000:]
    Trainer(dataclasses.replace(config, parallel=ParallelConfig())).run()
    assert losses(config.folder) == pytest.approx(losses(small.folder), rel=1e-12, abs=0)
    assert_same_state(small.folder, config.folder, 4)


def test_what_is_sent_is_what_is_waited_for():
    """Every message has a receiver that has an action for it, and the other way round."""
    for name in schedules.NAMES:
        v = schedules.default_stages_per_rank(name)
        for p, m in ((1, 3), (2, 5), (4, 6)):
            ranks, plan = schedules.placement(name, p, v), schedules.make(name, p, m, v)
            sent = [key for a in range(p) for b in range(p) for key in messages(plan[a], ranks, b)]
            assert len(sent) == len(set(sent))
            backwards = (schedules.BACKWARD, schedules.INPUT_GRADIENT)
            needed = set()
            for kind, stage, micro_batch in (action for line in plan for action in line):
                if kind == schedules.FORWARD and stage > 0:
                    needed.add((schedules.FORWARD, stage, micro_batch))
                if kind in backwards and stage < len(ranks) - 1:
                    needed.add((schedules.BACKWARD, stage, micro_batch))
            assert set(sent) == needed


def product(x, weight, bias, deferred: Deferred) -> torch.Tensor:
    """As a layer that no ranks share has it."""
    return column_product(x, weight, bias, x.shape[:2], ALONE, deferred)


def test_weight_gradients_are_made_when_asked_for():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, 4, dtype=torch.float64)
    inputs = x, weight, bias
    expected = torch.autograd.grad(
        torch.nn.functional.linear(x, weight, bias), (x, weight, bias), dy
    )
    deferred = Deferred()
    found = torch.autograd.grad(product(*inputs, deferred), inputs, dy)
    torch.testing.assert_close(found, expected)
    assert deferred.empty
    total = torch.zeros_like(weight)
    weight.main_grad = lambda: total
    deferred.key = "here"
    product(*inputs, deferred).backward(dy)
    assert weight.grad is None and not deferred.empty
    torch.testing.assert_close((x.grad, bias.grad), (expected[0], expected[2]))
    deferred.run("elsewhere")
    assert not total.any()
    deferred.run("here")
    torch.testing.assert_close(total, expected[1])
    assert deferred.empty


def test_a_frozen_weight_has_no_gradient_to_be_made():
    deferred, weight = Deferred(), torch.randn(4, 5)
    x, bias = torch.randn(1, 3, 5, requires_grad=True), torch.zeros(4)
    deferred.key = "here"
    product(x, weight, bias, deferred).sum().backward()
    assert deferred.empty and bias.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(1, 3, 5))


def test_weight_gradients_of_layers_that_are_computed_again():
    """Checkpointing gives a backward pass other tensors than those that it was saved."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 3, 5), (4, 5), (4,))
    )
    total, deferred = torch.zeros_like(weight), Deferred()
    weight.main_grad = lambda: total
    y = checkpoint(product, x, weight, bias, deferred, use_reentrant=False)
    deferred.key, dy = 0, torch.randn_like(y)
    y.backward(dy)
    deferred.run(0)
    torch.testing.assert_close(total, dy[0].T @ x[0].detach())
