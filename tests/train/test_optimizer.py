"""Flat buffers: masters keep the digits of fp32 weights. AdamW itself is in tests/ops."""

import torch

from stellarator.config import OptimConfig
from stellarator.model import build_model
from stellarator.train.optimizer import FlatOptimizer


def test_masters_of_a_bf16_run_keep_fp32_weights(tiny_config):
    model = build_model(tiny_config.model, dtype=torch.float32, seed=3)
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = FlatOptimizer(model, OptimConfig(), dtype=torch.bfloat16)
    state = optimizer.state()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(state[f"master.{name}"], exact[name])
        assert torch.equal(parameter, exact[name].to(torch.bfloat16))
    assert any((state[f"master.{n}"] != p.float()).any() for n, p in model.named_parameters())


def test_gradients_of_several_passes_add_up_in_fp32(tiny_config):
    model = build_model(tiny_config.model, dtype=torch.bfloat16, seed=3)
    optimizer = FlatOptimizer(model, OptimConfig())
    tokens = torch.arange(40).view(2, 20)
    once = None
    for _ in range(3):
        model(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
        if once is None:
            once = [grads.clone() for grads in optimizer.flat_grads]
    assert all(p.grad is None for p in model.parameters())
    for total, first in zip(optimizer.flat_grads, once, strict=True):
        assert total.dtype == torch.float32  # each pass may add several products, one by one
        torch.testing.assert_close(
            total, 3 * first, rtol=1e-6, atol=1e-6 * float(first.abs().max())
        )
    optimizer.zero_grad()
    assert not any(grads.any() for grads in optimizer.flat_grads)
