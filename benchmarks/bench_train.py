"""One training step (forward, backward, clip, AdamW) beside transformers, same shapes, same run.

Peers: transformers' Starcoder2ForCausalLM with fp32 parameters, bf16 autocast, SDPA and torch's
fused AdamW; eager, and with torch.compile on request. Ours: bf16 parameters with fp32 masters. Both
train the same initial weights on the same rows; the losses of the first steps must agree before
anything is timed.
"""

import dataclasses
import json
import tempfile

import torch

from benchmarks.harness import environment, interleave, peak_memory_of
from stellarator import build_model, save_pretrained
from stellarator.config import ModelConfig, OptimConfig
from stellarator.train.flops import batch_flops
from stellarator.train.optimizer import FlatOptimizer

_OPTIM = OptimConfig(lr=3e-4)


def _config(arguments) -> ModelConfig:
    return ModelConfig(
        vocab_size=arguments.vocab,
        num_layers=arguments.layers,
        width=arguments.width,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        ffn_width=4 * arguments.width,
    )


def _rows(config: ModelConfig, rows: int, length: int, device: str):
    """(tokens, targets), each (B, T)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, length + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def ours(config: ModelConfig, rows: int, length: int, device: str):
    """A function that makes one step and returns the loss before it."""
    model = build_model(config, device=device, dtype=torch.bfloat16, seed=1)
    optimizer = FlatOptimizer(model, _OPTIM)
    tokens, targets = _rows(config, rows, length, device)
    count = 0

    def step() -> float:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = model(tokens, targets, reduction="sum")
        loss.backward()
        norm = optimizer.norm(targets.numel())
        optimizer.step(count, _OPTIM.lr, targets.numel(), norm)
        return float(loss.detach()) / targets.numel()

    return step


def transformers_eager(config: ModelConfig, rows: int, length: int, device: str):
    """The peer: bf16 autocast, SDPA, fused AdamW."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(build_model(config, dtype=torch.float32, seed=1), f"{folder}/model")
        model = AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", dtype=torch.float32, attn_implementation="sdpa"
        )
    model = model.to(device).train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": _OPTIM.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=_OPTIM.lr,
        betas=(_OPTIM.beta1, _OPTIM.beta2),
        eps=_OPTIM.eps,
        fused=True,
    )
    tokens, targets = _rows(config, rows, length, device)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _OPTIM.clip_norm)
        optimizer.step()
        return float(loss.detach())

    return step


PROVIDERS = {"stellarator": ours, "transformers eager": transformers_eager}


def main(arguments) -> int:
    """Check, time, print a table; returns 1 if the losses disagree."""
    config = _config(arguments)
    shape = (config, arguments.rows, arguments.length, arguments.device)
    steps = {name: make(*shape) for name, make in PROVIDERS.items()}
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    reference = losses["transformers eager"]
    for name, values in losses.items():
        print(f"{name}: losses of the first steps {', '.join(f'{v:.4f}' for v in values)}")
        if max(abs(a - b) for a, b in zip(values, reference, strict=True)) > 0.02:
            print(f"{name}: expected losses within 0.02 of the peer's; not timed")
            return 1
    times = interleave(steps, arguments.repeats)
    tokens = arguments.rows * arguments.length
    flops = batch_flops(config, [arguments.length] * arguments.rows)
    peer = times["transformers eager"].p50_ms
    del steps
    print(f"\n{json.dumps(environment())}\n")
    print("| provider | ms (p20, p80) | tokens/s | TFLOP/s | peak MiB | speed, memory vs peer |")
    print("|---|---|---|---|---|---|")
    memories = {name: peak_memory_of(make, *shape) for name, make in PROVIDERS.items()}
    peer_memory = memories["transformers eager"]
    for name, q in times.items():
        memory = memories[name]
        print(
            f"| {name} | {q.p50_ms:.0f} ({q.p20_ms:.0f}, {q.p80_ms:.0f}) "
            f"| {1e3 * tokens / q.p50_ms:,.0f} | {flops / q.p50_ms / 1e9:.3f} "
            f"| {memory / 2**20:,.0f} | {peer / q.p50_ms:.2f}x, {memory / peer_memory:.2f}x |"
        )
        if arguments.json:
            with open(arguments.json, "a", encoding="utf-8") as file:
                row = {"provider": name, "tokens": tokens, "memory_bytes": memory}
                row |= dataclasses.asdict(q) | {"model": dataclasses.asdict(config)} | environment()
                file.write(json.dumps(row) + "\n")
    return 0
