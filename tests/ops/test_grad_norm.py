"""The L2 norm against exact rational arithmetic (math.fsum of exact squares) and torch.

Also: the same bits on every instruction set and any number of threads.
Where Triton runs: grid.py; its kernels are also compiled for sm_80 and sm_90.
"""

import math
import os
import subprocess
import sys

import grid
import pytest
import torch

from stellarator_kernels import cost, extension, grad_norm

needs_extension = pytest.mark.skipif(
    extension.failure() is not None, reason=f"no C++ extension: {extension.failure()}"
)
IMPLS = [pytest.param("cpu", marks=needs_extension), *grid.IMPLS, *grid.CUDA]


def exact(tensors):
    """The norm of float32 or narrower tensors; each square is exact in float64, as is fsum."""
    return math.sqrt(math.fsum(x * x for t in tensors for x in t.double().flatten().tolist()))


def random(n, seed=0, dtype=torch.float32):
    """Values over six orders of magnitude, so that the order of additions would show in float32."""
    generator = grid.generator(seed)
    return (torch.randn(n, generator=generator) * torch.logspace(-3, 3, n)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_exact_sum(impl, dtype):
    """One; below a vector; around 32 lanes; above a block of C++ (65536), of Triton (32768)."""
    for sizes in [(1,), (7,), (31,), (32, 33), (65536 + 41,), (40000, 5, 70000)]:
        tensors = [random(n, seed, dtype) for seed, n in enumerate(sizes)]
        assert grad_norm(tensors, impl=impl).item() == torch.tensor(exact(tensors)).float().item()


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes_empty_and_strided_tensors(impl):
    strided = random(60).view(6, 10).t()
    tensors = [random(100), torch.zeros(0), random(64, 1, torch.bfloat16), strided]
    assert grad_norm(tensors, impl=impl).item() == torch.tensor(exact(tensors)).float().item()
    assert grad_norm([torch.zeros(0), torch.zeros(0, 3)], impl=impl).item() == 0.0


@pytest.mark.parametrize("impl", IMPLS)
def test_unaligned_slice(impl):
    buffer = torch.full((300,), 1e6)
    buffer[3:260] = random(257)
    assert grad_norm([buffer[3:260]], impl=impl) == torch.tensor(exact([buffer[3:260]])).float()


@pytest.mark.parametrize("impl", IMPLS)
def test_squares_do_not_overflow_and_nan_shows(impl):
    huge = torch.full((4,), 1e30)
    assert grad_norm([huge], impl=impl).item() == pytest.approx(2e30, rel=1e-6)
    tiny = torch.full((4,), 1e-30)
    assert grad_norm([tiny], impl=impl).item() == pytest.approx(2e-30, rel=1e-6)
    assert grad_norm([torch.tensor([1.0, math.nan])], impl=impl).isnan()
    assert grad_norm([torch.tensor([1.0, -math.inf])], impl=impl).item() == math.inf


def float64_sums(impl, x):
    """The sum of squares before it is rounded to float32, which would hide a change of order."""
    if impl == "torch":
        module = sys.modules["stellarator_kernels.grad_norm"]
        return [module._sum_in_blocks(x.double().square()).item()]
    module, threads = extension.load(), torch.get_num_threads()
    address, n, is_bfloat16 = x.data_ptr(), x.numel(), x.dtype == torch.bfloat16
    isas = [i for i in module.Isa.__members__.values() if int(i) <= int(module.best_isa())]
    return [
        module.sum_of_squares(x=address, is_bfloat16=is_bfloat16, n=n, threads=threads, isa=i)
        for i in isas
    ]


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_extension), "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, trials", [(900_000, 6), (24 * 65536 + 39, 3)])
def test_sums_do_not_depend_on_threads_or_isa(impl, dtype, n, trials):
    """Elements of one scale, so that every block weighs; a change of order shows in some trials."""
    before = torch.get_num_threads()
    for seed in range(trials):
        x = torch.randn(n, generator=grid.generator(seed)).to(dtype)
        sums = set()
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            try:
                sums.update(float64_sums(impl, x))
            finally:
                torch.set_num_threads(before)
        assert len(sums) == 1, sums


def test_float64_and_float16_go_where_they_can():
    values = torch.tensor([3.0, 4.0])
    for dtypes in ([torch.float64], [torch.float16], [torch.float32, torch.float16, torch.float64]):
        norm = grad_norm([values.to(d) for d in dtypes])
        assert norm.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
        assert norm.item() == pytest.approx(5 * len(dtypes) ** 0.5)
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run"):
        grad_norm([values, values.half()], impl="cpu")


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_float64_is_not_rounded_to_float32(impl):
    generator = grid.generator(0)
    tensors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (40_000, 7)]
    wanted = math.sqrt(math.fsum(x * x for t in tensors for x in t.tolist()))
    assert grad_norm(tensors, impl=impl).item() == pytest.approx(wanted, rel=1e-14)
    assert grad_norm([torch.zeros(0).double()], impl=impl).dtype == torch.float64


def test_opcheck():
    tensors = [random(10), random(5, 1, torch.bfloat16)]
    operator = torch.ops.stellarator.grad_norm.default
    torch.library.opcheck(operator, (tensors, [1.0, 0.5], True, "auto"))
    tensors.append(random(5, 2, torch.float64))
    torch.library.opcheck(operator, (tensors, [1.0, 0.5, 0.0], False, "auto"))


@pytest.mark.parametrize("impl", IMPLS)
def test_weights(impl):
    """Against sums of exact squares; 1/3 is no float32."""
    sizes = (70000, 5, 33, 40000)
    tensors = [random(n, seed) for seed, n in enumerate(sizes)]
    weights = [1 / 3, 2, 1, 0.125]
    wanted = math.fsum(w * exact([x]) ** 2 for x, w in zip(tensors, weights, strict=True))
    squares = grad_norm(tensors, weights=weights, squared=True, impl=impl)
    assert squares.dtype == torch.float64 and squares.item() == pytest.approx(wanted, rel=1e-14)
    norm = grad_norm(tensors, weights=weights, impl=impl)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(math.sqrt(wanted), rel=2**-23)
    equal = grad_norm(tensors, weights=[1.0] * 4, impl=impl)
    assert torch.equal(equal, grad_norm(tensors, impl=impl)) and not torch.equal(equal, norm)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_parameter_counts_once(impl):
    """Two ranks with half of one tensor each, and both with all of another, which two ways share.

    A rank has nothing of a tensor of weight 0, so what lies there may be NaN.
    """
    split, shared = random(3000, 1), random(700, 2)
    wanted = exact([split, shared]) ** 2
    halves = split.split(1500)
    by_halves = [grad_norm([h, shared], weights=[1, 0.5], squared=True, impl=impl) for h in halves]
    nan = torch.full((700,), math.nan)
    by_owner = [
        grad_norm([h, x], weights=[1, w], squared=True, impl=impl)
        for h, x, w in zip(halves, (shared, nan), (1, 0), strict=True)
    ]
    for parts in (by_halves, by_owner):
        assert sum(parts).item() == pytest.approx(wanted, rel=1e-14)
    nothing = grad_norm([nan], weights=[0], impl=impl)
    assert nothing.item() == 0 and nothing.dtype == torch.float32
    nothing = grad_norm([nan], weights=[0], squared=True, impl=impl)
    assert nothing.item() == 0 and nothing.dtype == torch.float64


@pytest.mark.parametrize("impl", [IMPLS[1], IMPLS[3]])
def test_compiled_in_one_graph(impl):
    tensors = [random(50), random(7, 1)]

    def function(*tensors):
        return grad_norm(tensors, weights=[1.0, 0.5], impl=impl) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), function(*tensors))


def test_errors():
    with pytest.raises(ValueError, match="grad_norm: expected at least one tensor, got an empty"):
        grad_norm([])
    with pytest.raises(ValueError, match="grad_norm: expected a weight for each tensor, 2, got 1"):
        grad_norm([torch.zeros(2)] * 2, weights=[1])
    for wrong in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"grad_norm: expected weights >= 0, got {wrong}"):
            grad_norm([torch.zeros(2)], weights=[wrong])
    with pytest.raises(ValueError, match=r"grad_norm: expected tensors\[1\] with dtype in"):
        grad_norm([torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="grad_norm: expected all tensors on one device"):
        grad_norm([torch.zeros(2), torch.zeros(2, device="meta")])


def test_cost():
    assert cost.grad_norm(10, 4).forward_bytes == 40


COMPILE = """
import sys
import stellarator_kernels.grad_norm
from stellarator_kernels.testing import compile_kernel

module = sys.modules["stellarator_kernels.grad_norm"]
for capability in [(8, 0), (9, 0)]:
    for dtype in ["*fp32", "*bf16", "*fp16"]:
        built = compile_kernel(
            module._squares_kernel,
            {"x_ptr": dtype, "sums_ptr": "*fp64", "n": "i64"},
            {"BLOCK": module._BLOCK, "BLOCKS": module._BLOCKS_PER_PROGRAM},
            capability,
        )
        assert built.spill_bytes == 0, built.spill_bytes
    built = compile_kernel(
        module._total_kernel,
        {"sums_ptr": "*fp64", "total_ptr": "*fp64", "n": "i32"},
        {"BLOCK": module._BLOCK},
        capability,
    )
    assert built.spill_bytes == 0, built.spill_bytes
"""


def test_compiles_for_gpus():
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True, timeout=120)
