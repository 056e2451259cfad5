"""AdamW of one flat tensor by every implementation, and its Triton kernel.

defines: UPDATES, factors_of_step, launch_triton, launch_cuda, warps

The formulas and what they move: adamw.py. Narrower storage: adamw_states.py; in Triton within the
kernel, elsewhere widened before and put back after.
"""

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels._triton import UNFUSED, tl, triton
from stellarator_kernels.adamw_states import (
    GROUP,
    Storage,
    dequantise_block,
    join_block,
    quantise_block,
    round_block,
    split_block,
    store_,
    widen,
)
from stellarator_kernels.random import counter_block

_BLOCK = 1024
_PLAIN = Storage()


@triton.jit
def _adamw_kernel(
    param_ptr,
    weight_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    remainder_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_scale_ptr,
    clip_ptr,
    factors_ptr,
    key_ptr,
    n,
    first_index,
    row_offset,
    row_width,
    row_stride,
    decay,
    step_size,
    root_correction,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    HAS_MASTER: tl.constexpr,
    HAS_REMAINDER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of BLOCK elements. `factors_ptr` holds (decay, step_size, root_correction)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if EIGHT_BITS:
        groups = tl.arange(0, BLOCK // GROUP)
        lanes = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        has_group = start + groups * GROUP < n
        groups = start // GROUP + groups
    else:
        lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.minimum(n - start, BLOCK).to(tl.int32)
    cols = start + lanes
    if HAS_FACTORS:
        decay = tl.load(factors_ptr)
        step_size = tl.load(factors_ptr + 1)
        root_correction = tl.load(factors_ptr + 2)
    if STOCHASTIC or EIGHT_BITS:
        index = cols
        if HAS_ROWS:
            index = (cols + row_offset) // row_width * row_stride + (cols + row_offset) % row_width
        random_bits = counter_block(tl.load(key_ptr), first_index + index)
    g = tl.load(grad_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_CLIP:
        g = g * tl.load(clip_ptr)
    if EIGHT_BITS:
        codes = tl.load(exp_avg_ptr + cols, mask=inside, other=0)
        scales = tl.load(exp_avg_scale_ptr + groups, mask=has_group, other=0.0)
        m = dequantise_block(codes, scales, True)
        codes = tl.load(exp_avg_sq_ptr + cols, mask=inside, other=0)
        scales = tl.load(exp_avg_sq_scale_ptr + groups, mask=has_group, other=0.0)
        v = dequantise_block(codes, scales, False)
    else:
        m = tl.load(exp_avg_ptr + cols, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq_ptr + cols, mask=inside, other=0.0)
    w = tl.load(weight_ptr + cols, mask=inside, other=0.0)
    if HAS_REMAINDER:
        w = join_block(w, tl.load(remainder_ptr + cols, mask=inside, other=0))
    elif STOCHASTIC:
        w = w.to(tl.float32)
    m = m + beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * (g * g)
    w = w * decay - step_size * tl.div_rn(m, tl.sqrt_rn(v) * root_correction + eps)
    if EIGHT_BITS:
        # Lanes behind the end have the moments 0, and so no part in a scale.
        codes, scales = quantise_block(m, ((random_bits >> 32) & 0xFFFF).to(tl.int32), True)
        tl.store(exp_avg_ptr + cols, codes, mask=inside)
        tl.store(exp_avg_scale_ptr + groups, scales, mask=has_group)
        codes, scales = quantise_block(v, ((random_bits >> 16) & 0xFFFF).to(tl.int32), False)
        tl.store(exp_avg_sq_ptr + cols, codes, mask=inside)
        tl.store(exp_avg_sq_scale_ptr + groups, scales, mask=has_group)
    else:
        tl.store(exp_avg_ptr + cols, m, mask=inside)
        tl.store(exp_avg_sq_ptr + cols, v, mask=inside)
    if HAS_REMAINDER:
        param, remainder = split_block(w)
        tl.store(param_ptr + cols, param, mask=inside)
        tl.store(remainder_ptr + cols, remainder, mask=inside)
    elif STOCHASTIC:
        param = round_block(w, (random_bits >> 48).to(tl.int32))
        tl.store(param_ptr + cols, param, mask=inside)
    else:
        tl.store(weight_ptr + cols, w, mask=inside)
    if HAS_MASTER:
        # Rounded by hand, because the interpreter's cast truncates; memory is the limit here.
        bits = w.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(w != w, 0x7FC0, rounded).to(tl.uint16)
        tl.store(param_ptr + cols, rounded.to(tl.bfloat16, bitcast=True), mask=inside)


def factors_of_step(lr, step, beta1: float, beta2: float, weight_decay: float):
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


def _in_memory(factors) -> tuple[torch.Tensor | None, tuple[float, float, float]]:
    """Tensors as one, (3,) fp32, which a kernel reads instead of numbers; None beside numbers."""
    if isinstance(factors[0], torch.Tensor):
        return torch.stack(factors).float(), (0.0, 0.0, 0.0)
    return None, factors


def launch_triton(
    param, weight, grad, exp_avg, exp_avg_sq, clip, factors, beta1, beta2, eps, storage=_PLAIN
):
    """One launch for one flat tensor. Does not wait for the device."""
    if param.numel() == 0:
        return
    memory, numbers = _in_memory(factors)
    grid = (triton.cdiv(param.numel(), _BLOCK),)
    with torch.cuda.device_of(param):
        _adamw_kernel[grid](
            param,
            weight,
            grad,
            exp_avg,
            exp_avg_sq,
            *(param if x is None else x for x in storage[:3]),
            param if clip is None else clip,
            param if memory is None else memory,
            param if storage.key is None else storage.key,
            param.numel(),
            storage.first_index,
            *(storage.rows or (0, 0, 0)),
            *numbers,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            HAS_MASTER=param is not weight,
            HAS_REMAINDER=storage.remainder is not None,
            STOCHASTIC=_is_stochastic(weight, storage),
            EIGHT_BITS=storage.exp_avg_scale is not None,
            HAS_CLIP=clip is not None,
            HAS_FACTORS=memory is not None,
            HAS_ROWS=storage.rows is not None,
            GROUP=GROUP,
            BLOCK=_BLOCK,
            num_warps=warps(storage.exp_avg_scale is not None),
            **UNFUSED,
        )


def warps(has_eight_bits: bool) -> int:
    """More where a thread codes and decodes: with 4 the registers spill (24 bytes on sm_90a)."""
    return 8 if has_eight_bits else 4


def _is_stochastic(weight, storage) -> bool:
    """The bf16 parameter is all there is of the weight."""
    return weight.dtype == torch.bfloat16 and storage.remainder is None


def _tensors(param, weight, grad, exp_avg, exp_avg_sq) -> dict:
    """What both kernels in C++ take of them."""
    return {
        "weight": weight.data_ptr(),
        "rounded": 0 if param is weight else param.data_ptr(),
        "grad": grad.data_ptr(),
        "grad_is_bfloat16": grad.dtype == torch.bfloat16,
        "exp_avg": exp_avg.data_ptr(),
        "exp_avg_sq": exp_avg_sq.data_ptr(),
        "n": param.numel(),
    }


def launch_cuda(param, weight, grad, exp_avg, exp_avg_sq, clip, factors, beta1, beta2, eps):
    """One launch of the CUDA kernel for one flat tensor, on torch's stream."""
    memory, (decay, step_size, root_correction) = _in_memory(factors)
    with torch.cuda.device_of(param):
        extension.load("_cuda").adamw(
            **_tensors(param, weight, grad, exp_avg, exp_avg_sq),
            clip=extension.address(clip),
            factors=extension.address(memory),
            decay=decay,
            step_size=step_size,
            root_correction=root_correction,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            stream=extension.stream(param),
        )


def _update_cpu(param, weight, grad, exp_avg, exp_avg_sq, clip, factors, beta1, beta2, eps):
    """One call of the C++ kernel for one flat tensor."""
    decay, step_size, root_correction = map(float, factors)
    extension.load().adamw(
        **_tensors(param, weight, grad, exp_avg, exp_avg_sq),
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


def _widened(update):
    """An update of fp32 tensors for narrower ones: widened before, put back after it."""

    def run(param, weight, grad, exp_avg, exp_avg_sq, *rest):
        *rest, storage = rest
        if all(x is None for x in storage[:4]):
            return update(param, weight, grad, exp_avg, exp_avg_sq, *rest)
        wide = widen(weight, exp_avg, exp_avg_sq, storage)
        # With a master that is the weight, `param` follows it; else there is only the wide one.
        update(param if wide[0] is weight else wide[0], wide[0], grad, *wide[1:], *rest)
        return store_(param, exp_avg, exp_avg_sq, wide, storage, wide[0] is not weight)

    return run


UPDATES = {
    "triton": launch_triton,
    "cuda": _widened(launch_cuda),
    "cpu": _widened(_update_cpu),
    "torch": _widened(_update_torch),
    "reference": _widened(_update_reference),
}
