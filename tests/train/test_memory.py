"""A model that cannot fit is refused before it is made, with the figures.

References: bytes worked out by hand; the buffers that FlatOptimizer really has. Not covered: a GPU.
"""

import dataclasses
import itertools
import os

import pytest
import torch

from stellarator import recipes
from stellarator.cli import main
from stellarator.config import OptimConfig
from stellarator.model import build_model
from stellarator.sizes import bytes_per_parameter
from stellarator.train import memory
from stellarator.train.loop import DTYPES
from stellarator.train.optimizer import FlatOptimizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "weights", "moments"),
    [(p, "masters", "fp32") for p in DTYPES]
    + [("bf16", "remainders", "fp32"), ("bf16", "stochastic", "8bit"), ("fp32", "masters", "8bit")],
)
def test_bytes_are_those_of_the_buffers(precision, weights, moments):
    model = build_model(recipes.tiny().model)
    count = sum(p.numel() for p in model.parameters())
    optim = OptimConfig(weights=weights, moments=moments)
    optimizer = FlatOptimizer(model.to(DTYPES[precision]), optim)
    buffers = [x for b in optimizer.buckets for kind in b.states.tensors().values() for x in kind]
    buffers += [x for b in optimizer.buckets for x in (b.params, b.grads)]
    held = sum(b.numel() * b.element_size() for b in buffers)
    expected = bytes_per_parameter(precision, weights=weights, moments=moments) * count
    if moments == "fp32":
        assert held == expected
        return
    # Biases and norms have fp32 moments, and matrices begin with a group of 256.
    sizes = [(p.numel(), p.dim()) for p in model.parameters()]
    expected += sum(n for n, dim in sizes if dim == 1) * (8 - 2 * (1 + 4 / 256))
    assert 0 <= held - expected < 256 * 16 * (len(sizes) - sum(dim == 1 for _, dim in sizes) + 1)


def test_bytes_of_narrow_kinds():
    """By hand: bf16 weights with fp32 gradients, then what is beside them."""
    kinds = itertools.product(("masters", "remainders", "stochastic"), ("fp32", "8bit"))
    each = [bytes_per_parameter("bf16", weights=w, moments=m) for w, m in kinds]
    moments = 2 * (1 + 4 / 256)
    assert each == [18, 10 + moments, 16, 8 + moments, 14, 6 + moments]
    assert bytes_per_parameter("bf16", 1, 4, "remainders") == 2 + 4 + (2 + 8) / 4


def test_bytes_of_the_stages_of_zero():
    """By hand, on four ranks: weights, gradients, then masters with moments."""
    stages = [bytes_per_parameter("bf16", stage, 4) for stage in range(4)]
    assert stages == [2 + 4 + 12, 2 + 4 + 3, 2 + 1 + 3, 0.5 + 1 + 3]
    stages = [bytes_per_parameter("fp32", stage, 4) for stage in range(4)]
    assert stages == [4 + 4 + 8, 4 + 4 + 2, 4 + 1 + 2, 1 + 1 + 2]


def test_too_large_is_one_line_after_the_header(tiny_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 22 << 30)
    words = ["train", "--recipe", "starcoder2_15b", "train.device=cpu", f"folder={tmp_path / 'r'}"]
    words += [f"data.train={tiny_corpus / 'train'}", f"data.tokenizer={tiny_corpus / 'tokenizer'}"]
    words += ["data.seq_length=64", "parallel.tp=1", "parallel.sp=false", "parallel.pp=1"]
    assert main(words) == 1
    output = capsys.readouterr()
    assert output.out.startswith("starcoder2_15b: starcoder2, 15,957,889,024 parameters")
    assert output.err == (
        "error: train: expected 267.5 GiB of free memory for the weights, masters, gradients and "
        "moments of 15,957,889,024 parameters (18 bytes each in bf16), got 22.0 GiB available on "
        "this machine. Choose a smaller model or a machine with more memory, or end what else runs "
        "there.\n"
    )
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_every_process_of_a_machine_holds_a_model(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100)
    memory.check(6, "fp32", CPU)
    with pytest.raises(RuntimeError, match="18 bytes each in bf16"):
        memory.check(24, "bf16", CPU)
    memory.check(88, "bf16", CPU, 3, 16)
    with pytest.raises(RuntimeError, match="1.125 bytes each in bf16"):
        memory.check(89, "bf16", CPU, 3, 16)
    memory.check(7, "bf16", CPU, 0, 1, "stochastic")
    with pytest.raises(RuntimeError, match="weights, gradients.*14 bytes each in bf16"):
        memory.check(8, "bf16", CPU, 0, 1, "stochastic")
    with pytest.raises(RuntimeError, match="weights, remainders, .*10.0312 bytes each in bf16"):
        memory.check(10, "bf16", CPU, 0, 1, "remainders", "8bit")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="16 bytes each in fp32 in each of 2 processes"):
        memory.check(6, "fp32", CPU)


def tree(root, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 5000 * 1024),
        ({"proc/self/cgroup": "0::/\n"}, 5000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, 5000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "4096000\n"}, 4096000),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/memory.max": "4096000\n"}, 4096000),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "9999999999"}, 5000 * 1024),
        (
            {
                "proc/self/cgroup": "5:cpuset:/x\n4:memory:/a\n0::/\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4096000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            4096000,
        ),
    ],
)
def test_available_is_the_least_of_the_machine_and_its_cgroups(tmp_path, files, expected):
    meminfo = "MemTotal:       9000 kB\nMemFree:          10 kB\nMemAvailable:   5000 kB\n"
    root = tree(tmp_path, {"proc/meminfo": meminfo, **files})
    assert memory.available_bytes(CPU, root) == expected


def test_this_machine_has_memory():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 << 20 < memory.available_bytes(CPU) <= total


def test_a_run_that_fits_is_not_refused(tiny_config):
    from stellarator.train.loop import Trainer

    train = dataclasses.replace(tiny_config.train, steps=3, eval_interval=None)
    assert Trainer(dataclasses.replace(tiny_config, train=train)).run()["status"] == "done"
