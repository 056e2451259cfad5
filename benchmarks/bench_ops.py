"""Every op on one device: checked against float64 first, then timed beside ATen's kernels.

`python -m benchmarks gpu` runs it on a GPU at the shapes of StarCoder2-3B; `--small` shrinks the
shapes, and `--device cpu --small` with TRITON_INTERPRET=1 is how the tests try it out.
An op that is wrong is not timed.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.harness import environment, interleave
from stellarator_kernels import (
    adamw_,
    bias_gelu,
    cross_entropy,
    flash_attention,
    grad_norm,
    layer_norm,
    linear_cross_entropy,
    rope,
)
from stellarator_kernels.testing import assert_close_to_reference, poison_empty


@dataclass(frozen=True)
class Case:
    """One op at one shape: `call(impl, *inputs)`; gradients of the inputs are checked too."""

    name: str
    shapes: tuple[tuple[int, ...], ...]  # of the float inputs
    call: Callable
    reduction: int  # terms in the longest sum


def cases(device: str, small: bool) -> list[Case]:
    """StarCoder2-3B: C 3072, H 24, G 2, D 128, F 12288, V 49152, and N tokens."""
    T, C, H, G, D, V = (96, 128, 6, 2, 32, 640) if small else (4096, 3072, 24, 2, 128, 49152)
    N = 2 * T
    positions = torch.arange(T, device=device).repeat(2)
    ends = torch.tensor([0, T // 3, T, N], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (N,), generator=generator).to(device)
    qkv = ((2, T, H, D), (2, T, G, D), (2, T, G, D))
    packed = ((N, H, D), (N, G, D), (N, G, D))
    return [
        Case("flash_attention causal", qkv, lambda i, *x: flash_attention(*x, impl=i), T),
        Case(
            "flash_attention window T/4", qkv,
            lambda i, *x: flash_attention(*x, window=T // 4, impl=i), T,
        ),
        Case(
            "flash_attention packed", packed,
            lambda i, *x: flash_attention(*x, cu_seqlens=ends, impl=i), T,
        ),
        Case("rope", packed[:2], lambda i, q, k: rope(q, k, positions, 1e5, impl=i), 2),
        Case(
            "layer_norm + residual", ((N, C), (C,), (C,), (N, C)),
            lambda i, x, w, b, r: layer_norm(x, w, b, 1e-5, r, impl=i), N,
        ),
        Case("bias_gelu", ((N, 4 * C), (4 * C,)), lambda i, x, b: bias_gelu(x, b, impl=i), N),
        Case("cross_entropy", ((N, V),), lambda i, x: cross_entropy(x, targets, impl=i), V),
        Case(
            "linear_cross_entropy", ((N, C), (V, C)),
            lambda i, h, w: linear_cross_entropy(h, w, targets, impl=i), N,
        ),
    ]  # fmt: skip


def _inputs(case: Case, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Normal values; weights of products scaled so that the results are of order one."""
    generator = torch.Generator().manual_seed(1)
    scales = [s[-1] ** -0.5 if case.name == "linear_cross_entropy" and n else 1.0
              for n, s in enumerate(case.shapes)]  # fmt: skip
    return [
        (torch.randn(s, generator=generator) * scale).to(device, dtype).requires_grad_()
        for s, scale in zip(case.shapes, scales, strict=True)
    ]


def _run(case: Case, impl: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs and gradients, for a fixed gradient of the outputs."""
    for x in inputs:
        x.grad = None
    outputs = case.call(impl, *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.full_like(o, 0.5) for o in outputs])
    return [*outputs, *(x.grad for x in inputs)]


def check(case: Case, impl: str, device: str, dtype: torch.dtype) -> None:
    """Compare with float64; raises AssertionError with the error found."""
    inputs = _inputs(case, device, dtype)
    exact = _run(case, "reference", [x.detach().double().requires_grad_() for x in inputs])
    eager = _run(case, "reference", inputs)
    with poison_empty():
        got = _run(case, impl, inputs)
    for number, (a, e, p) in enumerate(zip(got, exact, eager, strict=True)):
        name = f"{case.name} result {number}"
        assert_close_to_reference(a, e, p, reduction_length=case.reduction, name=name)


def _check_optimizer(impl: str, device: str) -> None:
    """adamw_ and grad_norm against their reference in float64."""
    generator = torch.Generator().manual_seed(2)
    base = [torch.randn(100_003, generator=generator).to(device) for _ in range(3)]
    states = {}
    for name, dtype in ((impl, torch.float32), ("reference", torch.float64)):
        p, g, m = (t.to(dtype, copy=True) for t in base)
        v = m.square()
        adamw_([p], [g], [m], [v], lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
               step=3, impl=name)  # fmt: skip
        states[name] = (p, m, v)
    for a, e in zip(states[impl], states["reference"], strict=True):
        assert_close_to_reference(a, e, reduction_length=16, name="adamw_")
    exact = base[0].double().norm()
    assert_close_to_reference(
        grad_norm([base[0]], impl=impl), exact, reduction_length=2, name="norm"
    )


def main(arguments) -> int:
    """Check and time everything; returns 1 if an op is wrong."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    failures, rows = [], []
    try:
        _check_optimizer("triton", device)
    except AssertionError as error:
        failures.append(f"optimizer: {error}")
    small = {case.name: case for case in cases(device, True)}
    print(
        "| op | phase | triton ms (p20, p80) | torch ms | speed vs torch | peak memory MiB, torch |"
    )
    print("|---|---|---|---|---|---|")
    for case in cases(device, arguments.small):
        try:
            check(small[case.name], "triton", device, dtype)
        except AssertionError as error:
            failures.append(str(error))
            continue
        rows += [time_case(case, device, dtype, arguments.repeats)]
        print(_line(rows[-1]), flush=True)
    for failure in failures:
        print(f"WRONG, not timed: {failure}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"environment": environment(), "rows": rows, "failures": failures}, file)
    return 1 if failures else 0


def time_case(case: Case, device: str, dtype: torch.dtype, repeats: int) -> dict:
    """Forward and backward together, both implementations in turns, and the peak memory of each."""
    inputs = _inputs(case, device, dtype)
    calls = {impl: lambda impl=impl: _run(case, impl, inputs) for impl in ("triton", "torch")}
    times = interleave(calls, repeats)
    memory = {}
    for impl, call in calls.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            call()
            memory[impl] = torch.cuda.max_memory_allocated()
    return {
        "op": case.name,
        "shapes": case.shapes,
        "times": {impl: asdict(q) for impl, q in times.items()},
        "memory_bytes": memory,
    }


def _line(row: dict) -> str:
    ours, peer = row["times"]["triton"], row["times"]["torch"]
    memory = [f"{m / 2**20:,.0f}" for m in row["memory_bytes"].values()] or ["not measured"]
    return (
        f"| {row['op']} | forward + backward | {ours['p50_ms']:.3f} ({ours['p20_ms']:.3f}, "
        f"{ours['p80_ms']:.3f}) | {peer['p50_ms']:.3f} | {peer['p50_ms'] / ours['p50_ms']:.2f}x | "
        f"{', '.join(memory)} |"
    )
