"""One training step (forward, backward, clip, AdamW) beside transformers, same shapes, same run.

Peers: transformers' Starcoder2ForCausalLM with fp32 parameters, bf16 autocast, SDPA and torch's
fused AdamW; eager, or with its forward pass and loss under torch.compile (`--peers compiled`; both:
`--peers eager,compiled`). Ours: bf16 parameters with fp32 masters. All train the same initial
weights on the same rows; the losses of the first steps must agree before anything is timed. The
first peer is the one that speed and memory are compared with.
"""

import dataclasses
import gc
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
    return _transformers(config, rows, length, device, lambda loss_of: loss_of)


def transformers_compiled(config: ModelConfig, rows: int, length: int, device: str):
    """The peer with forward and loss, and so their backward, compiled by Inductor."""
    return _transformers(config, rows, length, device, torch.compile)


def _transformers(config: ModelConfig, rows: int, length: int, device: str, wrap):
    """The peer, its function from (tokens, targets) to the loss passed through `wrap`."""
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

    @wrap
    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(input_ids=tokens, labels=targets, shift_labels=targets).loss

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _OPTIM.clip_norm)
        optimizer.step()
        return float(loss.detach())

    return step


PEERS = {"eager": transformers_eager, "compiled": transformers_compiled}


def providers(peers: str) -> dict:
    """{name: function that makes its step}, ours first; `peers` as in "eager,compiled"."""
    names = peers.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise SystemExit(f"--peers: expected some of {','.join(PEERS)}, got {','.join(unknown)}.")
    return {"stellarator": ours} | {f"transformers {name}": PEERS[name] for name in names}


def peak_bytes(make, shape: tuple) -> int:
    """Peak memory of making a step and taking it twice.

    On a GPU that of torch's allocator; on a CPU that of a process of its own, torch's compiler
    included where it runs.
    """
    if shape[-1] != "cuda":
        return peak_memory_of(make, *shape)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = make(*shape)
    step()
    step()
    return torch.cuda.max_memory_allocated() - before


def main(arguments) -> int:
    """Check, time, print a table; returns 1 if the losses disagree."""
    config = _config(arguments)
    shape = (config, arguments.rows, arguments.length, arguments.device)
    makers = providers(arguments.peers)
    first = list(makers)[1]
    steps = {name: make(*shape) for name, make in makers.items()}
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    for name, values in losses.items():
        print(f"{name}: losses of the first steps {', '.join(f'{v:.4f}' for v in values)}")
        if max(abs(a - b) for a, b in zip(values, losses[first], strict=True)) > 0.02:
            print(f"{name}: expected losses within 0.02 of the peer's; not timed")
            return 1
    times = interleave(steps, arguments.repeats)
    steps.clear()
    memories = {name: peak_bytes(make, shape) for name, make in makers.items()}
    _print_table(arguments, config, times, memories, first)
    return 0


def _print_table(arguments, config: ModelConfig, times: dict, memories: dict, first: str) -> None:
    """One row a provider; one JSON line each if asked for."""
    tokens = arguments.rows * arguments.length
    flops = batch_flops(config, [arguments.length] * arguments.rows)
    print(f"\n{json.dumps(environment())}\n")
    print(
        f"| provider | ms (p20, p80) | tokens/s | TFLOP/s | peak MiB | speed, memory vs {first} |"
    )
    print("|---|---|---|---|---|---|")
    for name, q in times.items():
        memory = memories[name]
        print(
            f"| {name} | {q.p50_ms:.0f} ({q.p20_ms:.0f}, {q.p80_ms:.0f}) "
            f"| {1e3 * tokens / q.p50_ms:,.0f} | {flops / q.p50_ms / 1e9:.3f} "
            f"| {memory / 2**20:,.0f} "
            f"| {times[first].p50_ms / q.p50_ms:.2f}x, {memory / memories[first]:.2f}x |"
        )
        if arguments.json:
            with open(arguments.json, "a", encoding="utf-8") as file:
                row = {"provider": name, "tokens": tokens, "memory_bytes": memory}
                row |= dataclasses.asdict(q) | {"model": dataclasses.asdict(config)} | environment()
                file.write(json.dumps(row) + "\n")
