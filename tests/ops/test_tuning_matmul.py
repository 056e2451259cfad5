"""The race of the products' launches, in Triton's interpreter.

It is judged on a clock of its own, which says how long each configuration takes. What is refused is
compiled for GPUs that are not here. Not covered: real times, which want a GPU.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from grid import INTERPRETED, generator

from stellarator_kernels import (
    _triton,
    add_weight_gradient_,
    matmul,
    mlp,
    reference,
    tuned,
    tuning,
    tuning_matmul,
)
from stellarator_kernels.matmul import PHASES, Tiles
from stellarator_kernels.tuning_matmul import Shape, right

SHAPE = Shape(N=20, C=16, F=24)
SLOW, WRONG, FAILS, FAST = (
    {"rows": rows, "cols": 16, "depth": 16, "num_warps": 4, "num_stages": 1, "parts": parts}
    for rows, parts in ((16, 1), (16, 2), (32, 1), (32, 2))
)
LAUNCHERS = {
    "up": ("mlp", "_up_triton"),
    "down gradient": ("mlp", "_down_gradient_triton"),
    "weight gradient": ("weight_gradient", "_add_triton"),
}


@pytest.fixture
def used(monkeypatch):
    """Tiles that were asked for, the last one last; those of FAILS cannot be launched."""
    found, real = [], matmul.tile_sizes

    def recorded(phase, *args):
        tiles = real(phase, *args)
        found.append((phase, tiles))
        if tiles == Tiles(**FAILS):
            raise RuntimeError("out of shared memory")
        return tiles

    monkeypatch.setattr(matmul, "tile_sizes", recorded)
    return found


def clock(used):
    """WRONG would be the fastest, then FAST with 4 rows of tiles together; the plain product 3."""

    def time_ms(call):
        used.clear()
        call()
        if not used:
            return 3.0
        tiles = used[-1][1]
        if tiles == Tiles(**WRONG):
            return 0.5
        return {16: 2.0, 32: 1.0}[tiles.rows] - 0.1 * (tiles.group == 4)

    return time_ms


def spoil(monkeypatch, phase, used, change):
    """What the kernel of a phase writes is changed in place where WRONG is in use."""
    module, launcher = LAUNCHERS[phase]
    module = sys.modules[f"stellarator_kernels.{module}"]
    real = getattr(module, launcher)

    def off(*args):
        results = real(*args)
        if used[-1][1] == Tiles(**WRONG):
            change(args[0] if results is None else results[0])
        return results

    monkeypatch.setattr(module, launcher, off)


def one_element(result):
    result[-1, -1] += 0.01


def a_hole(result):
    """The last row is not written; without poison, memory holds what was right there before."""
    memory = torch.empty_like(result[-1])
    result[-1] = torch.where(memory.isnan(), memory, result[-1])


@INTERPRETED
@pytest.mark.parametrize(
    ("phase", "change"),  # the weight gradient leaves no memory unwritten, as it adds
    [*((phase, one_element) for phase in PHASES), ("up", a_hole)],
)
def test_the_race_keeps_the_fastest_that_is_right(monkeypatch, used, phase, change):
    options = [SLOW, WRONG, FAILS, FAST]
    monkeypatch.setattr(tuning_matmul, "candidates", lambda capability: options)
    spoil(monkeypatch, phase, used, change)
    (found,) = tuning_matmul.tune(SHAPE, "cpu", clock(used), (phase,))
    assert found == tuning.Found(f"matmul {phase}", FAST | {"group": 4}, 0.9, 3.0)
    assert {name for name, _ in used} <= {phase}


@INTERPRETED
def test_nothing_runs(monkeypatch, used):
    monkeypatch.setattr(tuning_matmul, "candidates", lambda capability: [FAILS])
    (found,) = tuning_matmul.tune(SHAPE, "cpu", clock(used), ("up",))
    assert found == tuning.Found("matmul up", None, float("inf"), 3.0)


@INTERPRETED
def test_the_kernels_use_the_table_that_is_written(monkeypatch, used, tmp_path):
    monkeypatch.setattr(tuning_matmul, "candidates", lambda capability: [SLOW, FAST])
    entries = {f.name: f.entry for f in tuning_matmul.tune(SHAPE, "cpu", clock(used))}
    assert set(entries) == {f"matmul {phase}" for phase in PHASES}
    tuning.write(tmp_path, entries, "GPU One", "stellarator tune")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "gpu_name", lambda device: "GPU One")
    g = generator(1)
    shapes = ((20, 16), (24, 16), (24,), (16, 24), (16,))
    tensors = [torch.randn(*s, generator=g).requires_grad_() for s in shapes]
    tuned._tables.cache_clear()
    try:
        used.clear()
        out = mlp(*tensors, impl="triton")
        gradients = torch.autograd.grad(out.square().sum(), tensors)
        total = torch.zeros(16, 16)
        add_weight_gradient_(total, out.detach(), tensors[0].detach(), impl="triton")
    finally:
        tuned._tables.cache_clear()
    assert used == [(phase, Tiles(**FAST, group=4)) for phase in PHASES]
    plain = mlp(*tensors, impl="reference")
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, (plain.t() @ tensors[0]).detach(), rtol=1e-4, atol=1e-3)
    expected = torch.autograd.grad(plain.square().sum(), tensors)
    for a, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-2)


def test_rounding_is_right_and_one_wrong_tile_is_not():
    """Plain code in bf16, at the inner width of StarCoder2-3B."""
    g = generator(2)
    x, weight = (torch.randn(512, 3072, generator=g).bfloat16() for _ in range(2))
    weight, bias = weight * 3072**-0.5, torch.randn(512, generator=g).bfloat16()
    expected = reference.mlp_up_ref(x.float(), weight.float(), bias.float())
    pre = F.linear(x, weight, bias)
    y = F.gelu(pre, approximate="tanh")
    assert right((y, pre), expected, 3072)
    wrong = y.clone()
    wrong[16:32, 496:] = wrong[:16, 496:]
    assert (wrong.float() - expected[0]).norm() < 0.05 * expected[0].norm()
    assert not right((wrong, pre), expected, 3072)
    wrong[16:32, 496:] = torch.nan
    assert not right((y, wrong), expected, 3072)
    down = (weight, weight.t().contiguous(), pre)
    expected = reference.mlp_down_gradient_ref(*(t.float() for t in down))
    results = reference.mlp_down_gradient_ref(*down)
    assert right(results, expected, 3072)
    assert not right((results[0], results[1] * 1.02, results[2]), expected, 3072)


def test_sums_are_right_within_their_length_and_without_a_term_are_not():
    g = generator(3)
    dy, x = (torch.randn(8192, 128, generator=g).bfloat16().float() for _ in range(2))
    expected = (dy.double().t() @ x.double()).float()
    blocks = torch.einsum("nbm,nbk->nmk", dy.view(512, 16, 128), x.view(512, 16, 128))
    total = torch.zeros(128, 128)
    for block in blocks:  # one after the other, as the kernel adds
        total += block
    assert right((total,), (expected,), 8192)
    assert not right((total - torch.outer(dy[0], x[0]),), (expected,), 8192)


def test_candidates_are_what_the_kernels_take():
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        found = [Tiles(**option) for option in tuning_matmul.candidates(capability)]
        assert len(found) == len(set(found)) >= 40
        tma = capability >= (9, 0)
        loads = {(0, 0, 0), (0, 1, 0)}
        if tma:
            loads = {(1, 1, 0), (1, 1, 1), (1, 0, 0), (0, 0, 0)}
        assert {(t.tma, t.persistent, t.flatten) for t in found} == loads
        for t in found:
            assert all(n & (n - 1) == 0 for n in (t.rows, t.cols, t.depth, t.num_warps, t.parts))
        # What runs without a table is raced, too.
        for phase in PHASES:
            assert matmul.tile_sizes(phase, torch.bfloat16, capability) in found


def test_what_the_compiler_refuses_is_not_raced(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    asked = []

    def refusal(phase, tiles, shape, capability):
        asked.append((phase, tiles, shape, capability))
        return "spills 8 bytes" if tiles == Tiles(**WRONG) else None

    monkeypatch.setattr(tuning_matmul, "refusal", refusal)
    kept = tuning_matmul._fitting([SLOW, WRONG, FAST], "up", SHAPE, (9, 0))
    assert list(kept) == [SLOW, FAST]
    assert asked == [("up", Tiles(**o), SHAPE, (9, 0)) for o in (SLOW, WRONG, FAST)]


REFUSED = """
from stellarator_kernels import matmul, tuning_matmul as t
for phase, tiles, capability in (
    ("down gradient", (128, 128, 64, 4, 8, 4), (9, 0)),
    ("weight gradient", (128, 128, 32, 4, 16, 4), (8, 0)),
    ("weight gradient", (96, 128, 32, 4, 3, 4), (8, 0)),
    ("weight gradient", (128, 128, 32, 8, 4, 2), (8, 0)),
):
    print(t.refusal(phase, matmul.Tiles(*tiles), t.Shape(8192, 3072, 12288), capability))
"""


def test_what_the_compiler_refuses():
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", REFUSED]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared, spills, *others = done.stdout.splitlines()
    assert shared == "takes 262144 bytes of shared memory, of 232448"
    assert re.fullmatch(r"spills \d+ bytes", spills)
    assert others == ["does not compile: CompilationError", "None"]
