"""One training step (forward, backward, clip, AdamW) beside transformers, same shapes, same run.

Peers: transformers' Starcoder2ForCausalLM with fp32 parameters, bf16 autocast, SDPA and torch's
fused AdamW; eager, or with its forward pass and loss under torch.compile (`--peers compiled`; both:
`--peers eager,compiled`). Ours: bf16 parameters with fp32 masters. All train the same initial
weights on the same rows; the losses of the first steps must agree before anything is timed. The
first peer is the one that the table compares with; a result file has all of them.
"""

import argparse
import functools
import gc
import tempfile

import torch

from benchmarks import results
from benchmarks.harness import CLOCKS, Quantiles, environment, take_turns, timed
from benchmarks.machine import Quietness
from benchmarks.memory import peak_memory_of
from benchmarks.points import UNTIMED
from benchmarks.usage import count, one_of, refusals
from stellarator import build_model, save_pretrained
from stellarator.config import ModelConfig, OptimConfig
from stellarator.model.transformer import RECOMPUTE
from stellarator.train.flops import batch_flops
from stellarator.train.optimizer import FlatOptimizer

_OPTIM = OptimConfig(lr=3e-4)
_LOSS_LIMIT = 0.02  # between ours and the peers', in nats


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


def ours(config: ModelConfig, rows: int, length: int, device: str, recompute: str = "none"):
    """A function that makes one step and returns the loss before it."""
    model = build_model(config, recompute=recompute, device=device, dtype=torch.bfloat16, seed=1)
    optimizer = FlatOptimizer(model, _OPTIM)
    tokens, targets = _rows(config, rows, length, device)
    number = 0

    def step() -> float:
        nonlocal number
        number += 1
        optimizer.zero_grad()
        loss = model(tokens, targets, reduction="sum")
        loss.backward()
        norm = optimizer.norm(targets.numel())
        optimizer.step(number, _OPTIM.lr, targets.numel(), norm)
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


def providers(peers: str, recompute: str = "none") -> dict:
    """{name: function that makes its step}, ours first; `peers` as in "eager,compiled"."""
    names = peers.split(",")
    one_of("--peers", names, PEERS)
    step = ours if recompute == "none" else functools.partial(ours, recompute=recompute)
    return {"stellarator": step} | {f"transformers {name}": PEERS[name] for name in names}


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


def disagreeing(losses: dict[str, list[float]], first: str) -> list[str]:
    """Who has other losses than the peer `first`, in any step; NaN is no loss, the peer's too."""
    return [
        name
        for name, values in losses.items()
        if not all(abs(a - b) <= _LOSS_LIMIT for a, b in zip(values, losses[first], strict=True))
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `train`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=count, default=6)
    parser.add_argument("--width", type=count, default=384)
    parser.add_argument("--heads", type=count, default=6)
    parser.add_argument("--kv-heads", type=count, default=2)
    parser.add_argument("--vocab", type=count, default=8192)
    parser.add_argument("--rows", type=count, default=8)
    parser.add_argument("--length", type=count, default=1024)
    parser.add_argument(
        "--recompute", choices=RECOMPUTE, default="none", help="of our model (none)"
    )
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: one thread only")
    parser.add_argument("--peers", default="eager", help="eager, compiled, or eager,compiled")
    parser.add_argument(
        "--output", "--json", metavar="FILE.json", help="one JSON line a peer", dest="output"
    )


def main(given: argparse.Namespace) -> int:
    """Check, time, print a table; returns 1 if the losses disagree."""
    config = _config(given)
    shape = (config, given.rows, given.length, given.device)
    makers = providers(given.peers, given.recompute)
    where = environment()
    with results.Writer(given.output) as write:
        return _run(given, shape, makers, where, write)


def _run(
    given: argparse.Namespace, shape: tuple, makers: dict, where: dict, write: results.Writer
) -> int:
    """`main` with everything that the options may have wrong behind it."""
    config, first = shape[0], list(makers)[1]
    with refusals():  # of sizes that make no model
        steps = {name: make(*shape) for name, make in makers.items()}
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    for name, values in losses.items():
        print(f"{name}: losses of the first steps {', '.join(f'{v:.4f}' for v in values)}")
    if off := disagreeing(losses, first):
        print(f"{', '.join(off)}: expected losses within {_LOSS_LIMIT} of {first}'s; not timed")
        return 1
    quietness = Quietness()
    samplers = {n: timed(step, given.device, given.clock) for n, step in steps.items()}
    times = take_turns(samplers, given.repeats)
    quiet = quietness.report()
    times = {name: found["whole"] for name, found in times.items()}
    steps.clear()
    memories = {name: peak_bytes(make, shape) for name, make in makers.items()}
    flops = batch_flops(config, [given.length] * given.rows)
    for point in _points(given, config, times, memories, flops):
        write(point | {"quiet": quiet, "environment": where})
    print("", results.where(where), "", sep="\n")
    print(_table(given, times, memories, first, flops))
    print(Quietness.warning(quiet))
    return 0


def _points(given, config: ModelConfig, times: dict, memories: dict, flops: int) -> list[dict]:
    """One point for each peer."""
    names = ("layers", "width", "heads", "kv_heads", "vocab", "rows", "length")
    ours, *others = times
    variant = "" if given.recompute == "none" else f"recompute {given.recompute}"
    median = Quantiles.of(times[ours]).p50_ms
    return [
        UNTIMED
        | {
            "op": "training_step", "variant": variant, "model": config.family, "dtype": "bfloat16",
            "sizes": {name: getattr(given, name) for name in names} | {"T": given.length},
            "device": given.device, "phase": "whole", "impl": ours, "peer": peer, "errors": {},
            "clock": given.clock, "limits": {}, "tflops": flops / median / 1e9,
            "peak_bytes": memories[ours], "peer_peak_bytes": memories[peer],
            "memory_ratio": memories[ours] / memories[peer],
        }
        | results.timed(times[ours], times[peer])
        for peer in others
    ]  # fmt: skip


def _table(given, times: dict, memories: dict, first: str, flops: int) -> str:
    """One row a provider."""
    tokens, base = given.rows * given.length, Quantiles.of(times[first]).p50_ms
    header = ["provider", "ms (p20, p80)", "tokens/s", "TFLOP/s", "peak MiB",
              f"speed, memory vs {first}"]  # fmt: skip
    rows = []
    for name, found in times.items():
        q, memory = Quantiles.of(found), memories[name]
        rows.append(
            [
                name,
                f"{q.p50_ms:.0f} ({q.p20_ms:.0f}, {q.p80_ms:.0f})",
                f"{1e3 * tokens / q.p50_ms:,.0f}",
                f"{flops / q.p50_ms / 1e9:.3f}",
                f"{memory / 2**20:,.0f}",
                f"{base / q.p50_ms:.2f}x, {memory / memories[first]:.2f}x",
            ]
        )
    return results.table(rows, header)
