"""AdamW over flat tensors: one pass over memory, the clip coefficient folded in.

g = clip * grad
m = m + (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
w = (1 - lr * weight_decay) * w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
param = round_to_nearest_even(w) where there is a float32 master w

Moved: 24 bytes of float32 states per element (m, v, w, each read and written), the gradient read
and, with a master, the parameter written: 30 bytes for bfloat16 parameters and float32 gradients.
Saved: nothing; this op has no gradient. All arithmetic is float32, the factors that depend on the
step are computed in float64 first. `triton` and `cpu` make one pass, `torch` about ten.
Source: Loshchilov & Hutter 2019, arXiv:1711.05101; order of operations as torch.optim.AdamW;
clip folded in as in llm.c.
"""

from collections.abc import Sequence

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels._triton import tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose, narrowest

_BLOCK = 1024


@triton.jit
def _adamw_kernel(
    param_ptr,
    weight_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    clip_ptr,
    factors_ptr,
    n,
    decay,
    step_size,
    root_correction,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    HAS_MASTER: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of BLOCK elements. `factors_ptr` holds (decay, step_size, root_correction)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK) < tl.minimum(n - start, BLOCK).to(tl.int32)
    cols = start + tl.arange(0, BLOCK)
    if HAS_FACTORS:
        decay = tl.load(factors_ptr)
        step_size = tl.load(factors_ptr + 1)
        root_correction = tl.load(factors_ptr + 2)
    g = tl.load(grad_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_CLIP:
        g = g * tl.load(clip_ptr)
    m = tl.load(exp_avg_ptr + cols, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + cols, mask=inside, other=0.0)
    w = tl.load(weight_ptr + cols, mask=inside, other=0.0)
    m = m + beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * (g * g)
    w = w * decay - step_size * tl.div_rn(m, tl.sqrt_rn(v) * root_correction + eps)
    tl.store(exp_avg_ptr + cols, m, mask=inside)
    tl.store(exp_avg_sq_ptr + cols, v, mask=inside)
    tl.store(weight_ptr + cols, w, mask=inside)
    if HAS_MASTER:
        # Rounded by hand, because the interpreter's cast truncates; memory is the limit here.
        bits = w.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(w != w, 0x7FC0, rounded).to(tl.uint16)
        tl.store(param_ptr + cols, rounded.to(tl.bfloat16, bitcast=True), mask=inside)


def _factors(lr, step, beta1: float, beta2: float, weight_decay: float):
    """(decay, step_size, root_correction): numbers, or float64 0-d tensors if one of the two is.

    A number beside a tensor is written to the tensor's device by a fill, which waits for nothing.
    """
    device = next((x.device for x in (lr, step) if isinstance(x, torch.Tensor)), None)
    if device is not None:
        lr, step = (
            x.double()
            if isinstance(x, torch.Tensor)
            else torch.full((), x, dtype=torch.float64, device=device)
            for x in (lr, step)
        )
    return 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5


def _launch_triton(param, weight, grad, exp_avg, exp_avg_sq, clip, factors, beta1, beta2, eps):
    """One launch for one flat tensor. Does not wait for the device."""
    if param.numel() == 0:
        return
    memory, numbers = param, factors
    if isinstance(factors[0], torch.Tensor):
        memory, numbers = torch.stack(factors).float(), (0.0, 0.0, 0.0)
    grid = (triton.cdiv(param.numel(), _BLOCK),)
    with torch.cuda.device_of(param):
        _adamw_kernel[grid](
            param,
            weight,
            grad,
            exp_avg,
            exp_avg_sq,
            param if clip is None else clip,
            memory,
            param.numel(),
            *numbers,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            HAS_MASTER=param is not weight,
            HAS_CLIP=clip is not None,
            HAS_FACTORS=memory is not param,
            BLOCK=_BLOCK,
        )


def _update_cpu(param, weight, grad, exp_avg, exp_avg_sq, clip, factors, beta1, beta2, eps):
    """One call of the C++ kernel for one flat tensor."""
    decay, step_size, root_correction = map(float, factors)
    extension.load().adamw(
        weight=weight.data_ptr(),
        rounded=0 if param is weight else param.data_ptr(),
        grad=grad.data_ptr(),
        grad_is_bfloat16=grad.dtype == torch.bfloat16,
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        n=param.numel(),
        clip=1.0 if clip is None else float(clip),
        beta1=beta1,
        beta2=beta2,
        decay=decay,
        step_size=step_size,
        root_correction=root_correction,
        eps=eps,
        threads=torch.get_num_threads(),
        isa=extension.isa(),
    )


def _update_torch(param, weight, grad, exp_avg, exp_avg_sq, clip, factors, beta1, beta2, eps):
    """The update with ATen's elementwise kernels, in place."""
    decay, step_size, root_correction = factors
    g = grad.to(weight.dtype)
    if clip is not None:
        g = g * clip
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().mul_(root_correction).add_(eps)
    update = torch.div(exp_avg, denominator, out=denominator).mul_(step_size)
    weight.mul_(decay).sub_(update)
    if param is not weight:
        param.copy_(weight)


def _update_reference(param, weight, grad, exp_avg, exp_avg_sq, clip, factors, beta1, beta2, eps):
    """The formulas of `reference.adamw_ref`, copied into place."""
    new = reference.adamw_ref(
        weight, grad, exp_avg, exp_avg_sq, factors, beta1=beta1, beta2=beta2, eps=eps, clip=clip
    )
    for old, value in zip((weight, exp_avg, exp_avg_sq), new, strict=True):
        old.copy_(value)
    if param is not weight:
        param.copy_(weight)


_UPDATES = {
    "triton": _launch_triton,
    "cpu": _update_cpu,
    "torch": _update_torch,
    "reference": _update_reference,
}


@torch.library.custom_op(
    "stellarator::adamw", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "masters")
)
def _adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    lr: torch.Tensor,
    step: torch.Tensor,
    clip: torch.Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Sequence[float],
    impl: str,
) -> None:
    update = _UPDATES[choose("adamw_", impl, narrowest(params))]
    # On a GPU a tensor is not read by the host: the arithmetic is done there, in float64.
    lr, step = (x if x.device.type != "cpu" else x.item() for x in (lr, step))
    weights = masters if len(masters) else params
    tensors = zip(params, weights, grads, exp_avgs, exp_avg_sqs, weight_decay, strict=True)
    for param, weight, grad, exp_avg, exp_avg_sq, decay in tensors:
        factors = _factors(lr, step, beta1, beta2, decay)
        update(param, weight, grad, exp_avg, exp_avg_sq, clip, factors, beta1, beta2, eps)


@_adamw.register_fake
def _(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    masters,
    lr,
    step,
    clip,
    beta1,
    beta2,
    eps,
    weight_decay,
    impl,
):
    return None


def _scalar(op: str, name: str, value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`value` as a 0-d tensor; a number stays on the host."""
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    expect_shape(op, name, value, "()", (), "Pass a number or a 0-d tensor")
    if value.device.type != "cpu":
        expect_same_device(op, param=torch.empty(0, device=device), **{name: value})
    return value


def _check(params, grads, exp_avgs, exp_avg_sqs, masters, clip):
    """Shapes, dtypes, strides and devices of the lists."""
    op, device = "adamw_", params[0].device
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "master": masters}
    for i, param in enumerate(params):
        dtype = param.dtype
        names = f"params[{i}]"
        expect_dtype(
            op, names, param, (torch.bfloat16, torch.float32, torch.float64), "Cast the parameters"
        )
        expect(
            (len(masters) > 0) == (dtype == torch.bfloat16),
            op,
            "a float32 master for bfloat16 params and none for others",
            f"{names} {dtype} with {len(masters)} masters",
            "Pass master=[...], one per parameter, exactly when the parameters are bfloat16",
        )
        state = torch.float64 if dtype == torch.float64 else torch.float32
        for name, tensors in {"params": params, **lists}.items():
            if name == "master" and not masters:
                continue
            tensor = tensors[i]
            name = f"{name}[{i}]"
            if tensor.ndim != 1 or (tensor.numel() > 1 and tensor.stride(0) != 1):
                got = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
                expect(False, op, f"{name} flat, (n,) with stride 1", got, "Pass flat buffers")
            expect_shape(op, name, tensor, "(n,)", (param.numel(),), f"Match {names}")
            if tensor.device != device:
                expect_same_device(op, **{"params[0]": params[0], name: tensor})
            if name.startswith("grads"):
                allowed = (dtype, torch.float32, torch.bfloat16)
                expect_dtype(op, name, tensor, allowed, "Cast the gradient")
            elif not name.startswith("params"):
                expect_dtype(op, name, tensor, (state,), "Keep the states in that dtype")
    if clip is not None:
        expect_shape(op, "clip_coefficient", clip, "()", (), "Pass a 0-d tensor")
        is_wide = narrowest(params).dtype == torch.float64
        allowed = (torch.float32, torch.float64) if is_wide else (torch.float32,)
        expect_dtype(op, "clip_coefficient", clip, allowed, "Pass the dtype of the states")
        expect_same_device(op, params=params[0], clip_coefficient=clip)


@torch.no_grad()
def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Sequence[float],
    step: int | torch.Tensor,
    master: Sequence[torch.Tensor] | None = None,
    clip_coefficient: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One AdamW step on lists of flat tensors, in place.

    g = clip * grad;  m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    w = (1 - lr * weight_decay) * w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: (n,) each, contiguous; bfloat16 with `master`, or float32 (float64) without.
            Usually one per group of equal weight decay; slices of a larger buffer are fine.
        grads: (n,) each, float32 or bfloat16. Not changed.
        exp_avgs, exp_avg_sqs: (n,) each, float32; the states m and v.
        lr: learning rate, a number or a 0-d tensor on the same device (for CUDA graphs).
        weight_decay: one number, or one per tensor.
        step: t, counted from 1; a number or a 0-d tensor on the same device.
        master: (n,) each, float32; the weights w that are updated. Then params = w, rounded to the
            nearest, ties to even.
        clip_coefficient: 0-d float32 tensor (float64 beside float64 params) on the same device,
            multiplied into the gradients; the host does not wait for it.
    Raises:
        ValueError: shapes, dtypes, strides, devices or lengths disagree; `step` below 1.
        RuntimeError: `impl` cannot run here.
    Cost: 24 bytes per element for w, m, v, one read of the gradient, one write of a bfloat16 param.
    Source: arXiv:1711.05101.
    """
    masters = [] if master is None else list(master)
    counts = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    counts |= {} if master is None else {"master": masters}
    for name, tensors in counts.items():
        expect(
            len(tensors) == len(params),
            "adamw_",
            f"as many {name} as params, {len(params)}",
            len(tensors),
            "Pass lists of equal length",
        )
    if isinstance(weight_decay, (int, float)):
        weight_decay = [weight_decay] * len(params)
    expect(
        len(weight_decay) == len(params),
        "adamw_",
        f"one weight_decay, or one per tensor, {len(params)}",
        len(weight_decay),
        "Pass a number to use it for all",
    )
    expect(
        isinstance(step, torch.Tensor) or step >= 1,
        "adamw_",
        "step >= 1",
        step,
        "Count the first update as step 1",
    )
    if len(params) == 0:
        return
    _check(params, grads, exp_avgs, exp_avg_sqs, masters, clip_coefficient)
    device = params[0].device
    _adamw(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        masters,
        _scalar("adamw_", "lr", lr, device),
        _scalar("adamw_", "step", step, device),
        clip_coefficient,
        beta1,
        beta2,
        eps,
        [float(x) for x in weight_decay],
        impl,
    )
