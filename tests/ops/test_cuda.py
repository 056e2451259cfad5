"""The CUDA kernels without a GPU: their source compiled for the CPU (cuda_emulated.py).

Independent references: what the other implementations are tested against (float64, torch.optim,
exact sums), the bits of the C++ for CPUs, math.fsum. Each kernel's neighbours in memory are NaN,
and pages that cannot be touched lie before and behind it. Planted bugs are seen: wrong results,
elements before and behind the tensor, vectors that are not aligned, barriers left out.
Not covered: a GPU (there the tests of the ops themselves run with impl="cuda"), other orders of
threads than forwards and backwards, races between warps that no barrier divides.
"""

import ctypes
import faulthandler
import math
import mmap
import os
import sys

import cuda_emulated
import grid
import pytest
import test_adamw
import test_embedding
import test_grad_norm
import test_layer_norm
import torch

from stellarator_kernels import (
    adamw,
    adamw_,
    adamw_kernels,
    dispatch,
    extension,
    grad_norm,
    layer_norm,
)

pytestmark = [
    pytest.mark.skipif(
        cuda_emulated.COMPILER is None or sys.platform != "linux", reason="no C++ compiler on Linux"
    ),
    pytest.mark.timeout(900),  # beside other work the compiler takes minutes
]
BF16, FP32 = torch.bfloat16, torch.float32
SUMS = sys.modules["stellarator_kernels.grad_norm"]
NORM = sys.modules["stellarator_kernels.layer_norm"]
ROWS = sys.modules["stellarator_kernels.embedding"]
TILE, SQUARES = 2048, 32768  # elements of a block
# One; around a vector; around a tile; several with a rest. Where the arrays begin behind an
# aligned place: all alike, or apart (the last).
LENGTHS = (1, 3, 5, TILE - 1, TILE, TILE + 1, 3 * TILE + 37)
OFFSETS = ((0, 0), (1, 1), (3, 3), (2, 3))
# file, expression, what a bug makes of it; all stand in one library, see cuda_emulated.py
PLANTED = {
    "behind the end": ("adamw.cu", "end <= u.n", "begin < u.n"),
    "before the start": ("adamw.cu", "begin >= 0", "true"),
    "vectors not aligned": (
        "adamw.cu", "shift_of(static_cast<const Grad*>(u.grad)) == shift", "true",
    ),
    "last elements left": ("adamw.cu", "(shift > 0 ? shift : 0) + kTile - 1", "kTile - 1"),
    "not clipped": ("adamw.cu", "grad * f.clip", "grad"),
    "wrong factor": ("adamw.cu", "u.factors[2]", "u.factors[1]"),
    "ties away from zero": ("bfloat16.h", "0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
    "no barrier": ("grad_norm.cu", "__syncthreads()", "(void)0"),
    "half a warp": ("grad_norm.cu", "kWarp / 2", "kWarp / 4"),
    "reads behind the end": ("grad_norm.cu", "first + i + k < n", "first + i < n"),
    "squares not aligned": (
        "grad_norm.cu", "aligned && begin + kSquaresPerSum <= n", "begin + kSquaresPerSum <= n",
    ),
    "not weighted": ("grad_norm.cu", "weight * sum", "sum"),
    "some of the warps": ("grad_norm.cu", "warp < kThreads / kWarp", "warp < 8"),
    "a barrier for some": (
        "grad_norm.cu", "__syncthreads()", "(threadIdx.x > 0 ? __syncthreads() : (void)0)",
    ),
    "no residual": ("layer_norm.cu", "x[k] + residual[k]", "x[k]"),
    "variance of what is no element": (
        "layer_norm.cu", "column<Element>(k) < C ? x[k] - mean : 0.0f", "x[k] - mean",
    ),
    "half a warp of a row": ("layer_norm.cu", "kWarp / 2", "kWarp / 4"),
    "the first warp of a row": (
        "layer_norm.cu", "lane < static_cast<int>(blockDim.x) / kWarp", "lane < 1",
    ),
    "rows behind the last": ("layer_norm.cu", "row + gridDim.x < u.N", "true"),
    "rows not aligned": ("vector.h", "stride * bytes % 16 == 0", "true"),
    "weights not aligned": (
        "layer_norm.cu", "rows_aligned(u.weight, u.C, sizeof(Element))", "true",
    ),
    "sums of one row over those of another": ("layer_norm.cu", "turn ^= 1", "turn = 0"),
    "second sums over the first": (
        "layer_norm.cu", "block_sums(sums, warps[1])", "block_sums(sums, warps[0])",
    ),
    "mean left": ("layer_norm.cu", "g - mean_g", "g"),
    "dbias of the last row": (
        "layer_norm.cu", "dbias[k] += own.dy[k]", "dbias[k] = own.dy[k]",
    ),
    "every other partial sum": ("layer_norm.cu", "i += kGroups", "i += 2 * kGroups"),
    "partial sums of other blocks": ("layer_norm.cu", "2 * u.C * i + c", "u.C * i + c"),
    "not added to what is there": ("embedding.cu", "sum + (u.add ? widen(*target) : 0.0f)", "sum"),
    "a run that came from before": ("embedding.cu", "ids[0] == ids[1]", "false"),
    "a chunk that is no beginning": (
        "embedding.cu", "began_before ? parts : parts + C", "parts + C",
    ),
    "the parts of the next id, too": (
        "embedding.cu", "u.ids[end + middle * kRowsOfChunk] == id", "true",
    ),
    "sums not aligned": ("embedding.cu", "rows_aligned(u.sums, u.C, sizeof(Sum))", "true"),
    "ids behind the last": ("embedding.cu", "place >= 0 && place < u.N", "place >= 0"),
    "a last row left": ("embedding.cu", "i + a >= count", "i + a >= count - 1"),
    "gradients not aligned": (
        "embedding.cu", "rows_aligned(u.dy, u.stride, sizeof(Element))", "true",
    ),
    "tiles left": ("embedding.cu", "(u.C + columns - 1) / columns", "1"),
    "columns left": ("layer_norm.cu", "2 * u.C + kColumns - 1", "2 * u.C"),
}  # fmt: skip


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The library of the kernels as they are, and the one with all planted bugs."""
    folders = [tmp_path_factory.mktemp("cuda") for _ in range(2)]
    right = cuda_emulated.build(folders[0])
    return right, cuda_emulated.build(folders[1], list(PLANTED.values()), folders[0])


class Emulated:
    """Within this block impl="cuda" runs a library on tensors of the CPU."""

    def __init__(self, library):
        self.module = None if library is None else cuda_emulated.load(library)

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        load, module = extension.load, self.module
        self.patch.setattr(
            extension, "load", lambda name="_cpu": module if name == "_cuda" else load(name)
        )
        self.patch.setattr(extension, "stream", lambda x: 0)
        for place in (adamw, SUMS, NORM, ROWS):
            choose = place.choose
            self.patch.setattr(
                place,
                "choose",
                lambda op, impl, *x, choose=choose, **options: (
                    "cuda" if impl == "cuda" else choose(op, impl, *x, **options)
                ),
            )
        return self.module

    def __exit__(self, *error):
        self.patch.undo()


@pytest.fixture
def emulated(libraries):
    with Emulated(libraries[0]) as module:
        yield module


# Of layer_norm. Odd; vectors and a rest of a warp; several warps; those of the models; the widest.
WIDTHS = ((1, 1), (7, 13), (37, 40), (150, 37), (9, 384), (5, 3072), (3, 4608), (2, 6144))
CASES = [
    (test_adamw.test_fifty_steps_follow_torch,),
    (test_adamw.test_bfloat16_is_the_rounded_float32_run, FP32),
    (test_adamw.test_bfloat16_is_the_rounded_float32_run, BF16),
    (test_adamw.test_rounding_of_special_values,),
    (test_adamw.test_clip_coefficient_scales_the_gradient,),
    (test_adamw.test_each_group_has_its_own_decay,),
    (test_adamw.test_sizes_and_unaligned_slices, FP32),
    (test_adamw.test_sizes_and_unaligned_slices, BF16),
    (test_adamw.test_nan_stays_where_it_is,),
    (test_adamw.test_lr_and_step_as_tensors,),
    (test_grad_norm.test_equals_exact_sum, FP32),
    (test_grad_norm.test_equals_exact_sum, BF16),
    (test_grad_norm.test_unaligned_slice,),
    (test_grad_norm.test_squares_do_not_overflow_and_nan_shows,),
    (test_grad_norm.test_weights,),
    (test_grad_norm.test_each_parameter_counts_once,),
    *((test_layer_norm.compare, t, *x) for t in (FP32, BF16) for x in WIDTHS),
    (test_layer_norm.test_without_residual_bias_or_one_of_the_gradients, {"residual": False}),
    (test_layer_norm.test_without_residual_bias_or_one_of_the_gradients, {"bias": False}),
    (test_layer_norm.test_without_residual_bias_or_one_of_the_gradients, {"with_dy": False}),
    (test_layer_norm.test_without_residual_bias_or_one_of_the_gradients, {"with_dsummed": False}),
    (test_layer_norm.test_frozen_parameters_get_no_gradient,),
    (test_layer_norm.test_statistics_are_those_of_the_rounded_sum,),
    (test_layer_norm.test_statistics_are_kept_in_fp32,),
    (test_layer_norm.test_a_large_mean_does_not_cancel_the_variance,),
    *(
        (test_layer_norm.test_strided_transposed_and_other_ranks, layout, True)
        for layout in test_layer_norm.LAYOUTS
    ),
    (test_layer_norm.test_no_rows,),
    (test_layer_norm.test_the_same_to_the_bit_on_every_run,),
    (test_layer_norm.test_sums_over_many_rows_keep_their_digits,),
    *(
        (test_embedding.check_sums, tuple(counts), C, dtype)
        for counts in (*test_embedding.COUNTS.values(), [31, 2, 31, 200], [64, 32, 32])
        for C, dtype in ((5, FP32), (1032, FP32), (12, BF16), (1032, BF16))
    ),
    (test_embedding.check_sums, (40, 3), 16, BF16, 1),
    (test_embedding.check_sums, (40, 3), 16, BF16, 8, 1),
    (test_embedding.test_learned_positions_and_both_gradients, FP32),
    (test_embedding.test_no_ids_a_frozen_weight_and_the_added_gradient,),
    (test_embedding.test_many_gradients_of_one_id_are_not_lost,),
]


@pytest.mark.parametrize("test", CASES, ids=lambda x: "-".join([x[0].__name__, *map(str, x[1:])]))
def test_what_the_other_implementations_pass(emulated, test):
    function, *arguments = test
    function("cuda", *arguments)


def inside(values, offset, around=math.nan):
    """(whole, part): `part` holds the values, `offset` elements behind an aligned place."""
    whole = torch.full((values.numel() + 24,), around, dtype=values.dtype)
    part = whole[8 + offset : 8 + offset + values.numel()]
    part.copy_(values)
    return whole, part


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_adamw(param_dtype, grad_dtype, lengths=LENGTHS):
    """Two steps with a clip have the bits of the C++ for CPUs, and what lies around stays.

    NaN would not show that they were updated too, so only gradients lie in NaN.
    """
    for n in lengths:
        grads = test_adamw.gradients(n, 2, dtype=grad_dtype)
        for offset, offset_of_grad in OFFSETS:
            plain, ours = (test_adamw.State(n, param_dtype=param_dtype) for _ in range(2))
            wholes = []
            for name in ("weight", "exp_avg", "exp_avg_sq", "param"):
                whole, part = inside(getattr(ours, name), offset, 123.0)
                wholes.append(whole)
                setattr(ours, name, part)
            if ours.master is None:
                ours.param = ours.weight
                wholes.pop()
            else:
                ours.master = ours.weight
            clip = torch.tensor(0.3)
            for t, grad in enumerate(grads, start=1):
                plain.step(grad, t, impl="cpu", clip_coefficient=clip)
                ours.step(inside(grad, offset_of_grad)[1], t, impl="cuda", clip_coefficient=clip)
            for a, b in zip(ours.tensors(), plain.tensors(), strict=True):
                assert same_bits(a.contiguous(), b), (n, offset, offset_of_grad)
            for whole in wholes:
                outside = torch.cat([whole[: 8 + offset], whole[8 + offset + n :]])
                assert (outside == 123.0).all(), (n, offset, offset_of_grad)


@grid.EXTENSION
@pytest.mark.parametrize("grad_dtype", [FP32, BF16])
@pytest.mark.parametrize("param_dtype", [FP32, BF16])
def test_adamw_has_the_bits_of_the_cpu(emulated, param_dtype, grad_dtype):
    check_adamw(param_dtype, grad_dtype)


def check_factors():
    """What a GPU does when lr and step are tensors there: the same bits as from numbers."""
    grad = test_adamw.gradients(1500, 1)[0]
    numbers, tensors = test_adamw.State(1500), test_adamw.State(1500)
    for state, convert in ((numbers, float), (tensors, test_adamw.on_gpu)):
        factors = adamw_kernels.factors_of_step(convert(1e-2), convert(3.0), 0.9, 0.95, 0.1)
        states = (state.weight, grad, state.exp_avg, state.exp_avg_sq)
        adamw_kernels.launch_cuda(state.param, *states, None, factors, 0.9, 0.95, 1e-8)
    assert same_bits(numbers.param, tensors.param)
    assert not same_bits(numbers.param, test_adamw.State(1500).param)


def test_factors_from_memory(emulated):
    check_factors()


def check_grad_norm(module, dtype, lengths=(1, 7, SQUARES - 1, 2 * SQUARES + 13)):
    """Against exact sums; the additions do not depend on where the tensor lies."""
    for n in lengths:
        values = torch.randn(n, generator=grid.generator(n)).to(dtype)
        exact = math.fsum(x * x for x in values.double().tolist())
        found = set()
        for offset in (0, 1, 4):
            part = inside(values, offset)[1]
            found.add(grad_norm([part], weights=[0.25], squared=True, impl="cuda").item())
        assert len(found) == 1 and found.pop() == pytest.approx(0.25 * exact, rel=1e-14), n
    for n in (1, 33, 4097):
        sums, total = torch.arange(n + 5.0, dtype=torch.float64), torch.zeros(1).double()
        sums[n:] = math.nan
        module.total_of_sums(sums=sums.data_ptr(), n=n, total=total.data_ptr(), stream=0)
        assert total.item() == n * (n - 1) / 2


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_grad_norm_whatever_the_alignment(emulated, dtype):
    check_grad_norm(emulated, dtype)


def between_pages(n, dtype, at_end):
    """n zeros, just before a page or just behind one that ends the process if it is touched."""
    page, count = mmap.PAGESIZE, -(-n * dtype.itemsize // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (count + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for start in (address, address + (count + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), page, 0) == 0
    offset = (count + 1) * page - n * dtype.itemsize if at_end else page
    return torch.frombuffer(memory, dtype=dtype, count=n, offset=offset)


def check_pages():
    """Neither kernel reads or writes outside its tensors."""
    factors = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    for at_end in (False, True):
        n = SQUARES + 3
        x, grad, *states, master = (between_pages(n, FP32, at_end) for _ in range(5))
        narrow = between_pages(n, BF16, at_end)
        states = [[state] for state in states]
        adamw_([x], [grad], *states, **factors, impl="cuda")
        adamw_([narrow], [grad], *states, master=[master], **factors, impl="cuda")
        assert grad_norm([x, narrow], impl="cuda") == 0


def check_pages_of_layer_norm(module):
    """Forward and backward stay inside their tensors, aligned or not."""
    for C, dtype in ((37, FP32), (264, BF16), (264, FP32)):
        for at_end in (False, True):
            N, blocks = 5, 2
            x, residual, y, summed = (between_pages(N * C, dtype, at_end) for _ in range(4))
            weight, bias, dweight, dbias = (between_pages(C, dtype, at_end) for _ in range(4))
            mean, rstd = (between_pages(N, FP32, at_end) for _ in range(2))
            partials = between_pages(blocks * 2 * C, FP32, at_end)
            common = {"is_bfloat16": dtype == BF16, "N": N, "C": C, "stream": 0}
            common |= {"weight": weight.data_ptr()}
            common |= {"mean": mean.data_ptr(), "rstd": rstd.data_ptr()}
            rows = [(t.data_ptr(), C) for t in (x, residual, summed)]
            module.layer_norm_forward(
                **common, eps=1e-5, x=rows[0], residual=rows[1], bias=bias.data_ptr(),
                y=y.data_ptr(), summed=summed.data_ptr(),
            )  # fmt: skip
            module.layer_norm_backward(
                **common, blocks=blocks, dy=rows[0], dsummed=rows[1], summed=rows[2],
                dx=y.data_ptr(), dweight=dweight.data_ptr(), dbias=dbias.data_ptr(),
                partials=partials.data_ptr(),
            )  # fmt: skip


def survives(library, check, bug=0):
    """Whether a check passes, made in a process of its own, which a bug may end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.environ["PLANTED_BUG"] = str(bug)
            torch.set_num_threads(1)
            with Emulated(library) as module:
                check(module)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def check_all_of_adamw(module):
    check_pages()
    check_factors()
    test_adamw.test_rounding_of_special_values("cuda")
    check_adamw(BF16, FP32, (TILE, 2 * TILE + 37))


def check_all_of_grad_norm(module):
    check_pages()
    check_grad_norm(module, FP32, (7, SQUARES + 13))


def check_alignment_of_layer_norm():
    """Whether parameters and rows are aligned changes no bit."""
    for N, C, dtype in ((60, 40, BF16), (5, 1024, FP32)):
        x, residual, dy = (torch.randn(N, C).to(dtype) for _ in range(3))
        weight, bias = (torch.randn(C).to(dtype) for _ in range(2))
        found = []
        for offsets in ((0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 1)):
            flat = zip((weight, bias, x.flatten()), offsets, strict=True)
            given = [inside(t, o)[1] for t, o in flat]
            given[2] = given[2].view(N, C)
            leaves = [t.detach().requires_grad_() for t in given]
            y, summed = layer_norm(leaves[2], *leaves[:2], residual=residual, impl="cuda")
            found.append([y, *torch.autograd.grad((y, summed), leaves, (dy, dy))])
        assert all(same_bits(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_alignment_changes_no_bit_of_layer_norm(emulated):
    check_alignment_of_layer_norm()


def test_the_widest_row_is_that_of_the_choice(emulated):
    widest = emulated.widest_row
    assert dispatch._MAX_WIDTHS["cuda"] == widest
    given = dispatch.facts("layer_norm", torch.ones(2, widest + 1))
    assert dict(given.limits)["cuda"].endswith(f"at most {widest} elements, not {widest + 1}")
    assert dispatch.facts("layer_norm", torch.ones(2, widest)).limits == ()


def check_all_of_layer_norm(module):
    check_pages_of_layer_norm(module)
    check_alignment_of_layer_norm()
    for dtype in (FP32, BF16):
        for N, C in ((7, 13), (60, 40), (20, 1024)):  # two have more rows than blocks
            test_layer_norm.compare("cuda", dtype, N, C)
    test_layer_norm.test_strided_transposed_and_other_ranks(
        "cuda", "columns_of_a_wider_tensor", True
    )


def check_pages_of_embedding(module):
    """Each id takes part of two chunks; aligned or not."""
    for C, dtype in ((5, FP32), (24, BF16)):
        for at_end in (False, True):
            N, V = 2 * module.rows_of_chunk + 3, 2
            dy, sums = (between_pages(n * C, dtype, at_end) for n in (N, V))
            ids, order = (between_pages(N, torch.int64, at_end) for _ in range(2))
            ids[N // 2 :] = 1
            order.copy_(torch.arange(N).flip(0))
            parts = between_pages(3 * 2 * C, FP32, at_end)
            module.embedding_backward(
                is_bfloat16=dtype == BF16, sums_are_bfloat16=dtype == BF16, add=True, N=N, C=C,
                dy=(dy.data_ptr(), C), ids=ids.data_ptr(), order=order.data_ptr(),
                sums=sums.data_ptr(), parts=parts.data_ptr(), stream=0,
            )  # fmt: skip


def check_all_of_embedding(module):
    check_pages_of_embedding(module)
    for counts in ([31, 2, 31, 200], [64, 32, 32]):
        for C, dtype in ((5, FP32), (12, BF16), (1032, BF16)):
            test_embedding.check_sums("cuda", counts, C, dtype)
        test_embedding.check_sums("cuda", counts, 16, BF16, gap=1)
        test_embedding.check_sums("cuda", counts, 16, FP32, offset=1)


CHECKS = {
    "adamw.cu": check_all_of_adamw,
    "bfloat16.h": check_all_of_adamw,
    "embedding.cu": check_all_of_embedding,
    "grad_norm.cu": check_all_of_grad_norm,
    "layer_norm.cu": check_all_of_layer_norm,
    "vector.h": check_all_of_layer_norm,
}


@pytest.mark.parametrize(
    "check",
    [lambda module: check_pages(), check_pages_of_layer_norm, check_pages_of_embedding],
    ids=["adamw_ and grad_norm", "layer_norm", "embedding"],
)
def test_nothing_outside_the_tensors_is_touched(libraries, check):
    assert survives(libraries[0], check)


def test_pages_that_cannot_be_touched():
    """Else the test above shows nothing."""
    for at_end, element in ((True, 3), (False, -1)):

        def touch(module, at_end=at_end, element=element):
            x = between_pages(3, FP32, at_end)
            ctypes.string_at(x.data_ptr() + 4 * element, 1)

        assert not survives(None, touch)


@grid.EXTENSION
@pytest.mark.parametrize("bug", range(len(PLANTED) + 1), ids=["none", *PLANTED])
def test_planted_bugs_are_seen(libraries, bug):
    checks = {CHECKS[list(PLANTED.values())[bug - 1][0]]} if bug else set(CHECKS.values())
    for check in checks:
        assert survives(libraries[1], check, bug) == (bug == 0)
