"""AdamW against torch.optim.AdamW, which is the independent reference, in float64 and float32.

Also: the C++ kernel gives the same bits on every instruction set and any number of threads, the
bfloat16 copy is rounded as ATen rounds, and what lies beside a slice is not touched.
Where Triton runs: grid.py; its kernel is also compiled for sm_80 and sm_90.
Not covered: speed (benchmarks), processors without AVX-512 beyond forcing the lower levels here.
"""

import os
import subprocess
import sys

import grid
import pytest
import torch

from stellarator_kernels import adamw_, adamw_kernels, cost, extension
from stellarator_kernels.testing import assert_close_to_reference

BETAS, EPS, LR = (0.9, 0.95), 1e-8, 1e-2
IMPLS = [grid.CPU, *grid.IMPLS, *grid.CUDA]
# Empty; one; less than a vector; around one chunk of 64; above one Triton block of 1024.
SIZES = (0, 1, 7, 63, 64, 65, 1025)


class State:
    """Flat tensors of one group, with a run of steps."""

    def __init__(self, n, *, param_dtype=torch.float32, seed=0, state_dtype=torch.float32):
        generator = grid.generator(seed)
        self.weight = torch.randn(n, generator=generator, dtype=torch.float64).to(state_dtype)
        self.exp_avg = torch.zeros(n, dtype=state_dtype)
        self.exp_avg_sq = torch.zeros(n, dtype=state_dtype)
        self.master = None if param_dtype == state_dtype else self.weight
        self.param = self.weight if self.master is None else self.weight.to(param_dtype)

    def step(self, grad, step, *, impl, **changes):
        """One update."""
        options = {
            "lr": LR,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": EPS,
            "weight_decay": 0.1,
            "step": step,
            "master": None if self.master is None else [self.master],
            "impl": impl,
        }
        lists = [self.param], [grad], [self.exp_avg], [self.exp_avg_sq]
        adamw_(*lists, **(options | changes))

    def tensors(self):
        """Everything that a step changes, in one list."""
        return [self.param, self.weight, self.exp_avg, self.exp_avg_sq]


def gradients(n, steps, seed=1, dtype=torch.float32):
    """Gradients whose scale differs by element and by step."""
    generator = grid.generator(seed)
    scale = torch.logspace(-3, 1, max(n, 1))[:n]
    return [
        (torch.randn(n, generator=generator) * scale * (1 + t % 3)).to(dtype) for t in range(steps)
    ]


def same_bits(a, b):
    """Equal to the bit, NaN included."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def torch_run(weight, grads, dtype, weight_decay=0.1):
    """The same steps by torch.optim.AdamW in `dtype`; returns the weight and its state."""
    parameter = torch.nn.Parameter(weight.to(dtype).clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=weight_decay, foreach=False
    )
    for grad in grads:
        parameter.grad = grad.to(dtype)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


@pytest.mark.parametrize("impl", IMPLS)
def test_fifty_steps_follow_torch(impl):
    grads = gradients(1025, 50)
    state = State(1025)
    exact, exact_state = torch_run(state.weight, grads, torch.float64)
    eager, eager_state = torch_run(state.weight, grads, torch.float32)
    for t, grad in enumerate(grads, start=1):
        state.step(grad, t, impl=impl)
    assert_close_to_reference(state.param, exact, eager, name="param")
    for name, moment in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
        assert_close_to_reference(moment, exact_state[name], eager_state[name], name=name)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_float64_equals_torch(impl):
    grads = gradients(257, 50, dtype=torch.float64)
    state = State(257, param_dtype=torch.float64, state_dtype=torch.float64)
    exact, exact_state = torch_run(state.weight, grads, torch.float64)
    for t, grad in enumerate(grads, start=1):
        state.step(grad, t, impl=impl)
    torch.testing.assert_close(state.param, exact, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(state.exp_avg_sq, exact_state["exp_avg_sq"], rtol=1e-13, atol=0)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_float64_clip_coefficient_keeps_its_digits(impl):
    clip, grads = torch.tensor(1 / 3, dtype=torch.float64), gradients(64, 3, dtype=torch.float64)
    state = State(64, param_dtype=torch.float64, state_dtype=torch.float64)
    exact, exact_state = torch_run(state.weight, [g * clip for g in grads], torch.float64)
    for t, grad in enumerate(grads, start=1):
        state.step(grad, t, impl=impl, clip_coefficient=clip)
    torch.testing.assert_close(state.param, exact, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(state.exp_avg_sq, exact_state["exp_avg_sq"], rtol=1e-13, atol=0)


def test_one_float64_tensor_decides_for_all():
    """The C++ kernel would read its memory as float32."""
    states = [State(70, seed=1), State(70, param_dtype=torch.float64, state_dtype=torch.float64)]
    grads = [gradients(70, 1)[0], gradients(70, 1, dtype=torch.float64)[0]]
    exact = [torch_run(s.weight, [g], torch.float64)[0] for s, g in zip(states, grads)]
    lists = [[s.param for s in states], grads]
    lists += [[s.exp_avg for s in states], [s.exp_avg_sq for s in states]]
    adamw_(*lists, lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=0.1, step=1)
    for state, wanted in zip(states, exact):
        torch.testing.assert_close(state.param.double(), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_is_the_rounded_float32_run(impl, grad_dtype):
    grads = gradients(1025, 5, dtype=grad_dtype)
    plain, mixed = State(1025), State(1025, param_dtype=torch.bfloat16)
    for t, grad in enumerate(grads, start=1):
        plain.step(grad, t, impl=impl)
        mixed.step(grad, t, impl=impl)
    for ours, theirs in zip(mixed.tensors()[1:], plain.tensors()[1:], strict=True):
        assert same_bits(ours, theirs)
    assert same_bits(mixed.param, mixed.master.bfloat16())
    assert not same_bits(mixed.param.float(), mixed.master)


@pytest.mark.parametrize("impl", IMPLS)
def test_rounding_of_special_values(impl):
    """Ties, their neighbours, infinities, overflow, zero, NaN whose rounding would carry over."""
    patterns = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F800000, 0xFF800000, 0x7F7FFFFF]
    patterns += [0x80000000, 0x7FC00000, 0xBF808000, 0x00808000, 0x7FFFFFFF, 0xFFFFFFFF]
    bits = torch.tensor([p - (1 << 32) if p >= 1 << 31 else p for p in patterns * 16])
    weight = bits.to(torch.int32).view(torch.float32)
    n = weight.numel()
    zeros = torch.zeros(n)
    state = State(n, param_dtype=torch.bfloat16)
    state.master.copy_(weight)
    state.step(zeros, 1, impl=impl, weight_decay=0.0)
    assert torch.equal(state.master.isnan(), weight.isnan())
    number = ~weight.isnan()
    assert same_bits(state.master[number], weight[number])
    assert same_bits(state.param[number], weight.bfloat16()[number])
    assert state.param[~number].isnan().all()


# Compiled for a GPU, the product with the coefficient is fused into the difference after it.
@pytest.mark.parametrize("impl", [IMPLS[0], *grid.IMPLS_ON_CPU])
def test_clip_coefficient_scales_the_gradient(impl):
    grads = gradients(300, 4)
    clipped, scaled, plain = (State(300, param_dtype=torch.bfloat16) for _ in range(3))
    for t, grad in enumerate(grads, start=1):
        before = grad.clone()
        clipped.step(grad, t, impl=impl, clip_coefficient=torch.tensor(0.3))
        assert same_bits(grad, before)
        scaled.step(grad * torch.tensor(0.3), t, impl=impl)
        plain.step(grad, t, impl=impl)
    for a, b in zip(clipped.tensors(), scaled.tensors(), strict=True):
        assert same_bits(a, b)
    assert not torch.allclose(clipped.exp_avg, plain.exp_avg)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_group_has_its_own_decay(impl):
    grads = [gradients(130, 6, seed=s) for s in (1, 2)]
    groups, decays = [State(130, seed=0), State(130, seed=5)], [0.5, 0.0]
    exact = [
        torch_run(group.weight, g, torch.float64, decay)[0]
        for group, g, decay in zip(groups, grads, decays, strict=True)
    ]
    for t in range(6):
        adamw_(
            [group.param for group in groups],
            [g[t] for g in grads],
            [group.exp_avg for group in groups],
            [group.exp_avg_sq for group in groups],
            lr=LR,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=decays,
            step=t + 1,
            impl=impl,
        )
    for group, reference in zip(groups, exact, strict=True):
        torch.testing.assert_close(group.param.double(), reference, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", [grid.CPU, *grid.KERNELS, *grid.CUDA])
def test_sizes_and_unaligned_slices(impl, param_dtype):
    """Slices that start at an odd element of a flat buffer; their neighbours stay as they are."""
    if impl == "cpu" and extension.failure() is not None:
        pytest.skip("no C++ extension")
    for n in SIZES:
        grads = gradients(n, 2)
        whole, part = (State(n, param_dtype=param_dtype) for _ in range(2))
        names = ["weight", "exp_avg", "exp_avg_sq"] + ["param"] * (part.master is not None)
        buffers = {}
        for name in names:
            tensor = getattr(part, name)
            buffers[name] = torch.full((n + 6,), 123.0, dtype=tensor.dtype)
            inner = buffers[name][3 : 3 + n]
            inner.copy_(tensor)
            setattr(part, name, inner)
        if part.master is None:
            part.param = part.weight
        else:
            part.master = part.weight
        for t, grad in enumerate(grads, start=1):
            whole.step(grad, t, impl="reference")
            part.step(grad, t, impl=impl)
        for name, buffer in buffers.items():
            assert (buffer[:3] == 123).all() and (buffer[3 + n :] == 123).all(), (n, name)
        pairs = zip(part.tensors()[1:], whole.tensors()[1:], strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        assert same_bits(part.param, part.weight.to(param_dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_where_it_is(impl):
    grad = gradients(200, 1)[0]
    grad[77] = torch.nan
    state = State(200, param_dtype=torch.bfloat16)
    state.step(grad, 1, impl=impl)
    for tensor in state.tensors():
        assert tensor.isnan().nonzero().flatten().tolist() == [77]
    state = State(200, param_dtype=torch.bfloat16)
    state.step(gradients(200, 1)[0], 1, impl=impl, clip_coefficient=torch.tensor(torch.nan))
    assert all(tensor.isnan().all() for tensor in state.tensors())


def levels():
    """Names of the instruction sets that this machine can run."""
    module = extension.load()
    best = int(module.best_isa())
    return [name for name, isa in module.Isa.__members__.items() if int(isa) <= best]


@grid.EXTENSION
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_isa_or_threads(monkeypatch, param_dtype, grad_dtype):
    """Five tasks of the thread loop and an odd end."""
    n, results, before = 4 * 16384 + 39, [], torch.get_num_threads()
    grads = gradients(n, 2, dtype=grad_dtype)
    for isa in levels():
        for threads in (1, 2, 3):
            monkeypatch.setenv(extension.ISA_VARIABLE, isa)
            torch.set_num_threads(threads)
            state = State(n, param_dtype=param_dtype)
            try:
                for t, grad in enumerate(grads, start=1):
                    state.step(grad, t, impl="cpu", clip_coefficient=torch.tensor(0.7))
            finally:
                torch.set_num_threads(before)
            results.append(state.tensors())
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


@grid.EXTENSION
@pytest.mark.parametrize("offset", [0, 3])
def test_large_tensors_are_streamed_to_the_same_bits(monkeypatch, offset):
    """From 2^20 elements the bfloat16 copy is written past the caches, if it is aligned."""
    n = (1 << 20) + 77
    grad = gradients(n, 1)[0]
    for isa in levels():
        monkeypatch.setenv(extension.ISA_VARIABLE, isa)
        state = State(n, param_dtype=torch.bfloat16)
        buffer = torch.full((n + 8,), 9.0, dtype=torch.bfloat16)
        state.param = buffer[offset : offset + n]
        state.step(grad, 1, impl="cpu")
        assert same_bits(state.param, state.master.bfloat16())
        assert (buffer[:offset] == 9).all() and (buffer[offset + n :] == 9).all()


@grid.EXTENSION
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="x86 only")
def test_subnormal_moments_become_zero_and_the_mode_is_restored():
    state = State(100)
    before = state.weight.clone()
    state.exp_avg.fill_(1e-40)
    state.exp_avg_sq.fill_(1e-40)
    state.step(torch.zeros(100), 5, impl="cpu", weight_decay=0.0)
    assert (state.exp_avg == 0).all() and (state.exp_avg_sq == 0).all()
    assert same_bits(state.weight, before)
    assert (torch.full((100,), 1e-40) * 1.0 != 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_lr_and_step_as_tensors(impl):
    grads = gradients(90, 3)
    numbers, tensors = State(90), State(90)
    for t, grad in enumerate(grads, start=1):
        numbers.step(grad, t, impl=impl)
        lr = torch.tensor(LR, dtype=torch.float64)
        tensors.step(grad, torch.tensor(t), impl=impl, lr=lr)
    assert same_bits(numbers.param, tensors.param)


def on_gpu(x):
    """As `lr` or `step` arrives from a GPU: its memory is not read by the host."""
    return torch.tensor(x, dtype=torch.float64)


@grid.TRITON
@pytest.mark.parametrize(("lr", "step"), [(on_gpu, on_gpu), (on_gpu, float), (float, on_gpu)])
def test_triton_reads_the_factors_from_memory(lr, step):
    """What a GPU does when lr, step or both are tensors there."""
    grad = gradients(1500, 1)[0]
    numbers, tensors = State(1500), State(1500)
    for state, arguments in ((numbers, (LR, 3.0)), (tensors, (lr(LR), step(3.0)))):
        factors = adamw_kernels.factors_of_step(*arguments, *BETAS, 0.1)
        assert len({type(x) for x in factors}) == 1
        adamw_kernels.launch_triton(
            state.param,
            state.weight,
            grad,
            state.exp_avg,
            state.exp_avg_sq,
            None,
            factors,
            *BETAS,
            EPS,
        )
    assert same_bits(numbers.param, tensors.param)
    assert not same_bits(numbers.param, State(1500).param)


def test_a_parameter_that_requires_grad_is_updated():
    parameter = torch.nn.Parameter(torch.ones(5))
    state = State(5)
    state.param = state.weight = parameter
    version = parameter._version
    state.step(torch.ones(5), 1, impl="auto")
    assert parameter._version > version, "autograd must see that the tensor changed"
    torch.testing.assert_close(parameter.detach(), torch.full((5,), 1 - LR * 0.1 - LR))


def operator_arguments(param_dtype, clip):
    """Arguments of the registered operator for two tensors."""
    states = [State(33, param_dtype=param_dtype, seed=s) for s in (0, 1)]
    masters = [] if states[0].master is None else [s.master for s in states]
    return (
        [s.param for s in states],
        gradients(33, 2),
        [s.exp_avg for s in states],
        [s.exp_avg_sq for s in states],
        masters,
        [],
        [],
        torch.tensor(LR, dtype=torch.float64),
        torch.tensor(1.0, dtype=torch.float64),
        torch.tensor(0.5) if clip else None,
        None,
        *BETAS,
        EPS,
        [0.1, 0.0],
        [0, 33],
        [],
        "auto",
    )


@pytest.mark.parametrize("param_dtype, clip", [(torch.float32, False), (torch.bfloat16, True)])
def test_opcheck(param_dtype, clip):
    arguments = operator_arguments(param_dtype, clip)
    torch.library.opcheck(torch.ops.stellarator.adamw.default, arguments)


def test_compiles_in_one_graph():
    grads = gradients(64, 2)
    eager, compiled = State(64, param_dtype=torch.bfloat16), State(64, param_dtype=torch.bfloat16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(param, grad, exp_avg, exp_avg_sq, master):
        adamw_(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            lr=LR,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=0.1,
            step=1,
            master=[master],
        )

    for grad in grads:
        step(compiled.param, grad, compiled.exp_avg, compiled.exp_avg_sq, compiled.master)
        eager.step(grad, 1, impl="auto")
    for a, b in zip(compiled.tensors(), eager.tensors(), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"params": [torch.zeros(2, 2)]}, r"adamw_: expected params\[0\] flat, \(n,\) with"),
        ({"params": [torch.zeros(8)[::2]]}, "with stride 1, got shape .4,. and strides .2,."),
        ({"params": [torch.zeros(4).half()]}, r"params\[0\] with dtype in"),
        ({"params": [torch.zeros(4).bfloat16()]}, "a float32 master for bfloat16 params"),
        ({"master": [torch.zeros(4)]}, "none for others, got .* with 1 masters"),
        ({"master": []}, "as many master as params, 1, got 0"),
        ({"grads": [torch.zeros(5)]}, r"grads\[0\] \(n,\) = \(4,\), got \(5,\)"),
        ({"grads": [torch.zeros(4).half()]}, r"grads\[0\] with dtype in"),
        ({"grads": []}, "as many grads as params, 1, got 0"),
        ({"exp_avgs": [torch.zeros(4).bfloat16()]}, r"exp_avgs\[0\] with dtype in"),
        ({"exp_avg_sqs": [torch.zeros(4, device="meta")]}, "all tensors on one device"),
        ({"weight_decay": [0.1, 0.2]}, "one weight_decay, or one per tensor, 1, got 2"),
        ({"step": 0}, "step >= 1, got 0. Count the first update as step 1."),
        ({"lr": torch.zeros(2)}, r"lr \(\) = \(\), got \(2,\)"),
        ({"clip_coefficient": torch.ones(1)}, r"clip_coefficient \(\) = \(\), got \(1,\)"),
        ({"clip_coefficient": torch.tensor(1)}, "clip_coefficient with dtype in"),
        ({"clip_coefficient": torch.ones(()).double()}, "clip_coefficient with dtype in"),
        ({"impl": "fast"}, "adamw_: expected impl in"),
    ],
)
def test_errors(change, message):
    arguments = {
        "params": [torch.zeros(4)],
        "grads": [torch.zeros(4)],
        "exp_avgs": [torch.zeros(4)],
        "exp_avg_sqs": [torch.zeros(4)],
        "lr": LR,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": EPS,
        "weight_decay": 0.1,
        "step": 1,
    }
    with pytest.raises(ValueError, match=message):
        adamw_(**(arguments | change))


def test_explicit_impl_that_cannot_run_raises():
    state = State(4, param_dtype=torch.float64, state_dtype=torch.float64)
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run: "):
        state.step(torch.zeros(4).double(), 1, impl="cpu")


def test_no_tensors_is_no_work():
    adamw_([], [], [], [], lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0, step=1)


@grid.EXTENSION
def test_forced_instruction_set_is_checked(monkeypatch):
    monkeypatch.setenv(extension.ISA_VARIABLE, "avx1024")
    with pytest.raises(ValueError, match="STELLARATOR_ISA in .*'portable'.*, got 'avx1024'"):
        State(4).step(torch.zeros(4), 1, impl="cpu")


def test_cost():
    """bfloat16 parameters with float32 gradients move 30 bytes per element."""
    assert cost.adamw(10, 2, 4, master=True).forward_bytes == 300
    assert cost.adamw(10, 4, 4, master=False).forward_bytes == 280
    assert cost.adamw(10, 2, 4, master=False, remainder=True).forward_bytes == 280
    assert cost.adamw(10, 2, 4, master=False).forward_bytes == 240
    assert cost.adamw(512, 2, 4, master=False, eight_bits=True).forward_bytes == 512 * 12 + 32


COMPILE = """
import itertools
from stellarator_kernels.adamw_kernels import _adamw_kernel, warps
from stellarator_kernels.testing import compile_kernel

names = "weight exp_avg exp_avg_sq exp_avg_scale exp_avg_sq_scale clip factors".split()
pointers = {f"{n}_ptr": "*fp32" for n in names} | {"key_ptr": "*i64", "remainder_ptr": "*i16"}
scalars = "decay step_size root_correction beta1_rest beta2 beta2_rest eps".split()
indices = dict.fromkeys(["n", "first_index", "row_offset", "row_width", "row_stride"], "i64")
signature = pointers | indices | dict.fromkeys(scalars, "fp32")
bf16 = {"param_ptr": "*bf16", "weight_ptr": "*bf16"}
eight = {"exp_avg_ptr": "*u8", "exp_avg_sq_ptr": "*u8"}
weights = {
    None: {"param_ptr": "*fp32"},
    "HAS_MASTER": {"param_ptr": "*bf16"},
    "HAS_REMAINDER": bf16,
    "STOCHASTIC": bf16,
}
flags = {"HAS_MASTER": False, "HAS_REMAINDER": False, "STOCHASTIC": False}
grads, capabilities = ["*fp32", "*bf16"], [(8, 0), (9, 0)]
for capability, grad, weight, is_eight in itertools.product(
    capabilities, grads, weights, [False, True]
):
    values = flags | ({weight: True} if weight else {})
    values |= {"EIGHT_BITS": is_eight, "HAS_ROWS": is_eight}
    built = compile_kernel(
        _adamw_kernel,
        signature | weights[weight] | {"grad_ptr": grad} | (eight if is_eight else {}),
        values | {"HAS_CLIP": True, "HAS_FACTORS": True, "BLOCK": 1024, "GROUP": 256},
        capability,
        num_warps=warps(is_eight),
    )
    assert built.spill_bytes == 0, (capability, weight, is_eight, built.spill_bytes)
"""


def test_compiles_for_gpus():
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True, timeout=120)
