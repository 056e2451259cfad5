"""The peers of the training benchmark: which are chosen, that they agree, where memory is counted.

The reference of the compiled peer is the eager one. Not covered: Inductor (the graphs run in eager
mode here, to save its time) and a GPU, whose allocator is stood in for.
"""

import math

import pytest
import torch

from benchmarks import bench_train
from benchmarks.__main__ import main
from benchmarks.usage import UsageError
from stellarator.config import ModelConfig

pytest.importorskip("transformers")
CONFIG = ModelConfig(
    vocab_size=300, num_layers=1, width=64, num_heads=2, num_kv_heads=1, ffn_width=256
)
SHAPE = (CONFIG, 2, 16, "cpu")


def test_peers_are_chosen_by_name_and_ours_comes_first():
    assert list(bench_train.providers("eager")) == ["stellarator", "transformers eager"]
    found = bench_train.providers("compiled,eager")
    assert list(found) == ["stellarator", "transformers compiled", "transformers eager"]
    with pytest.raises(UsageError, match="--peers: expected some of eager, compiled, got"):
        bench_train.providers("eager,fast")


@pytest.mark.parametrize("wrong", [6.05, math.nan, math.inf])
def test_losses_that_disagree_are_not_timed(monkeypatch, capsys, wrong):
    right, off = lambda *_: lambda: 6.0, lambda *_: lambda: wrong
    monkeypatch.setattr(bench_train, "take_turns", lambda *_: pytest.fail("it was timed"))
    for ours, peer in ((off, right), (right, off), (off, off)):
        if ours is peer and math.isfinite(wrong):
            continue  # the same number is the same loss
        monkeypatch.setattr(bench_train, "ours", ours)
        monkeypatch.setitem(bench_train.PEERS, "eager", peer)
        assert main(["train"]) == 1
        assert "expected losses within 0.02 of transformers eager's" in capsys.readouterr().out


def test_losses_that_agree():
    losses = {"a": [6.0, 5.0], "b": [6.019, 5.0], "c": [6.0, 5.021]}
    assert bench_train.disagreeing(losses, "a") == ["c"]


def test_the_compiled_peer_takes_the_same_steps_in_one_graph(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compiler = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=counter))
    eager, compiled = (
        [step() for _ in range(3)]
        for step in (
            bench_train.transformers_eager(*SHAPE),
            bench_train.transformers_compiled(*SHAPE),
        )
    )
    assert compiled == pytest.approx(eager, abs=1e-3) and eager[2] < eager[0] - 0.01
    assert counter.frame_count == 1 and counter.op_count > 10


def test_memory_on_a_gpu_is_that_of_the_allocator(monkeypatch):
    seen = []

    def make(*shape):
        assert shape == (CONFIG, 2, 16, "cuda")
        seen.append("make")
        return lambda: seen.append("step")

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: seen.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7000)
    assert bench_train.peak_bytes(make, (*SHAPE[:3], "cuda")) == 6000
    assert seen == ["reset", "make", "step", "step"]


def test_memory_on_a_cpu_is_that_of_a_process_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_train, "peak_memory_of", lambda *a: asked.append(a) or 5)
    assert bench_train.peak_bytes(bench_train.ours, SHAPE) == 5
    assert asked == [(bench_train.ours, *SHAPE)]


def test_ours_with_recomputation_takes_the_same_steps():
    losses = []
    for recompute in ("none", "selective", "full"):
        step = bench_train.providers("eager", recompute)["stellarator"](*SHAPE)
        losses.append([step() for _ in range(3)])
    assert losses[0] == losses[1] == losses[2]
