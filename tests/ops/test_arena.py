"""The arena: large results of a CPU lie in memory that is used again.

Addresses and sums of sizes are the reference. Not covered: machines without MAP_NORESERVE.
"""

import gc
import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from stellarator_kernels import layer_norm
from stellarator_kernels.memory import arena, empty, empty_like, reset_peak, trim
from stellarator_kernels.testing import poison_empty

MB = 1 << 20


@pytest.fixture(autouse=True)
def needs_arena():
    if arena()["reserved"] == 0:
        pytest.skip("there is no arena here")
    gc.collect()


def block(megabytes: float) -> torch.Tensor:
    return empty((int(megabytes * MB // 4),), torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_like_any_other_cpu(dtype):
    before = arena()["used"]
    x = empty((3, 1024, 512), dtype, "cpu")
    assert arena()["used"] - before >= x.numel() * dtype.itemsize
    assert x.shape == (3, 1024, 512) and x.dtype == dtype and x.is_contiguous()
    assert x.data_ptr() % 64 == 0 and not x.requires_grad
    values = torch.arange(x.numel()).view(x.shape).to(dtype)
    x.copy_(values)
    assert torch.equal(x, values) and torch.equal(x.t() if x.dim() == 2 else x.mT, values.mT)
    like = empty_like(x.mT)
    assert like.shape == x.mT.shape and like.is_contiguous() and like.dtype == dtype
    del x, like
    assert arena()["used"] == before


def test_small_tensors_and_other_kinds_come_from_torch_cpu():
    before = arena()["used"]
    kept = [
        empty((MB // 4 - 1,), torch.float32, "cpu"),
        empty((MB,), torch.int64, "cpu"),
        empty((0, MB), torch.float32, "cpu"),
    ]
    assert arena()["used"] == before and kept[2].shape == (0, MB)


def test_sizes_that_are_none_are_torchs_errors_cpu():
    for shape in ((1 << 40, 1 << 40), (-1, MB)):
        with pytest.raises(RuntimeError):
            empty(shape, torch.float32, "cpu")


def test_a_freed_block_is_used_again_and_gaps_join_cpu():
    a, b, c, guard = block(2), block(3), block(4), block(1)
    places = [x.data_ptr() for x in (a, b, c)]
    assert places == sorted(places)
    del b
    again = block(3)
    assert again.data_ptr() == places[1]
    high = arena()["high"]
    del a, again  # in both orders: with the gap before, and with the gap behind
    del c
    whole = block(9)
    assert whole.data_ptr() == places[0] and arena()["high"] == high
    del whole, guard


def test_a_block_lives_as_long_as_its_last_view_cpu():
    before = arena()["used"]
    x = block(2)
    row = x.view(-1, 64)[3]
    row.fill_(7)
    del x
    assert arena()["used"] - before == 2 * MB
    other = block(2)
    other.zero_()
    assert row.eq(7).all()
    del row
    assert arena()["used"] - before == 2 * MB
    del other
    assert arena()["used"] == before


def test_blocks_never_overlap_cpu():
    """Random sizes and lives; each block keeps its own number."""
    rng, alive, before = random.Random(0), {}, arena()["used"]
    for number in range(400):
        if len(alive) > 12 or (alive and rng.random() < 0.4):
            name = rng.choice(list(alive))
            assert alive.pop(name).eq(name).all()
        alive[number] = block(rng.choice((1, 1.5, 2, 3.25, 7))).fill_(number)
    for name, x in alive.items():
        assert x.eq(name).all()
    alive.clear()
    del x
    assert arena()["used"] == before


def test_the_peak_begins_anew_cpu():
    kept = block(2)
    reset_peak()
    used = arena()["used"]
    assert arena()["peak"] == used
    a, b = block(3), block(1)
    del a
    c = block(2)
    assert arena()["peak"] == used + 4 * MB
    reset_peak()
    assert arena()["peak"] == arena()["used"] == used + 3 * MB
    del b, c, kept


def test_trimmed_pages_go_back_to_the_system_cpu():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    kept = block(2).fill_(5)
    large = block(200).fill_(1)
    full = resident()
    del large
    assert resident() > full - 20 * MB  # they stay
    trim()
    assert resident() < full - 180 * MB
    assert arena()["high"] <= arena()["reserved"] and kept.eq(5).all()
    again = block(200)
    assert arena()["high"] >= 200 * MB and again.fill_(2).eq(2).all() and kept.eq(5).all()


def test_threads_may_allocate_and_free_cpu():
    before, wrong = arena()["used"], []

    def work(name: int) -> None:
        for _ in range(150):
            x = block(1).fill_(name)
            wrong.extend([] if x.eq(name).all() else [name])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == [] and arena()["used"] == before


def test_fresh_memory_is_poisoned_when_torch_is_told_so_cpu():
    with poison_empty():
        assert block(1).isnan().all()
        assert empty((MB,), torch.uint8, "cpu").eq(255).all()


def test_results_of_ops_lie_in_the_arena_and_steps_do_not_add_up_cpu():
    x = torch.randn(2048, 512)
    weight = torch.ones(512, requires_grad=True)

    def step() -> None:
        y = layer_norm(x, weight, None, impl="cpu")
        layer_norm(y, weight, None, impl="cpu").sum().backward()

    used = arena()["used"]
    step()
    high = arena()["high"]
    for _ in range(20):
        step()
    assert arena()["high"] == high and arena()["used"] == used


PROGRAM = """
import os, resource, sys
if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
import torch
from stellarator_kernels.memory import arena, empty
x = empty((1 << 22,), torch.float32, "cpu").fill_(3)
if sys.argv[1] == "fork":
    child = os.fork()
    if child == 0:
        del x
        y = empty((1 << 21,), torch.float32, "cpu").fill_(4)
        os._exit(0 if y.eq(4).all() else 1)
    assert os.waitpid(child, 0)[1] == 0 and x.eq(3).all()
print(arena()["used"], int(x.sum()))
"""


@pytest.mark.parametrize(
    ("case", "variable", "used"),
    [("plain", "1", 1 << 24), ("off", "0", 0), ("limited", "1", 0), ("fork", "1", 1 << 24)],
)
def test_in_a_process_of_its_own_cpu(case, variable, used):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, case],
        capture_output=True, text=True,
        env=os.environ | {"STELLARATOR_ARENA": variable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split() == [str(used), str(3 << 22)], done.stderr
