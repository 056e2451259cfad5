"""The gate of a gated MLP in one pass: act(gate) * up, act = silu (SwiGLU) or gelu (GeGLU).

forward:  y = act(gate) * up
backward: dgate = dy * up * act'(gate);  dup = dy * act(gate)
          silu(x) = x * s, s = sigmoid(x): silu' = s * (1 + x * (1 - s)); gelu as in bias_gelu.py

gate and up are two tensors, or the two halves of one (..., 2F), which is what one product of both
weights leaves; then the gradient is one tensor, too. Computed in fp32, rounded once; ATen's path
rounds act(gate), as eager code does.

Saved: gate and up. Bytes: the forward reads two and writes one of (N, F), the backward reads three
and writes two.
Source: Shazeer 2020, arXiv:2002.05202.
"""

import torch

from stellarator_kernels import reference
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.bias_gelu import cdf_and_density, tiles
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import dense_rows

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x), fp32; ACTIVATION is a place in _ACTIVATIONS."""
    if ACTIVATION == 0:
        sigmoid = tl.sigmoid(x)
        # Not 1 - sigmoid: near 1 that loses all digits.
        return x * sigmoid, sigmoid * (1.0 + x * tl.sigmoid(-x))
    cdf, density = cdf_and_density(x, ACTIVATION == 1)
    return x * cdf, cdf + x * density


@triton.jit
def _swiglu_fwd_kernel(
    gate_ptr, gate_stride_row, up_ptr, up_stride_row, y_ptr, N, F,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N rows and BLOCK_F columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    inside = (rows < N) & (cols < F)
    gate = tl.load(gate_ptr + rows * gate_stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, ACTIVATION)
    tl.store(y_ptr + rows * F + cols, (value * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, dy_stride_row, gate_ptr, gate_stride_row, up_ptr, up_stride_row,
    dgate_ptr, dup_ptr, out_stride_row, N, F,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One tile of both gradients, whose rows are `out_stride_row` apart."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    inside = (rows < N) & (cols < F)
    dy = tl.load(dy_ptr + rows * dy_stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(gate, ACTIVATION)
    out = rows * out_stride_row + cols
    tl.store(dgate_ptr + out, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + out, (dy * value).to(dup_ptr.dtype.element_ty), mask=inside)


def _forward_triton(gate, up, activation):
    """Allocate and launch the forward."""
    gate, up = dense_rows(gate), dense_rows(up)
    (N, F), y = gate.shape, gate.new_empty(gate.shape)
    BLOCK_N, BLOCK_F, num_warps = tiles(F)
    if N > 0:
        with torch.cuda.device_of(gate):
            _swiglu_fwd_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(F, BLOCK_F))](
                gate, gate.stride(0), up, up.stride(0), y, N, F,
                _ACTIVATIONS.index(activation), BLOCK_N, BLOCK_F, num_warps=num_warps, **FUSED,
            )  # fmt: skip
    return y


def _backward_triton(dy, gate, up, activation, dgate, dup):
    """Launch the backward, into two tensors with rows as far apart."""
    dy, gate, up = (dense_rows(t) for t in (dy, gate, up))
    N, F = gate.shape
    BLOCK_N, BLOCK_F, num_warps = tiles(F)
    if N > 0:
        with torch.cuda.device_of(gate):
            _swiglu_bwd_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(F, BLOCK_F))](
                dy, dy.stride(0), gate, gate.stride(0), up, up.stride(0),
                dgate, dup, dgate.stride(0), N, F,
                _ACTIVATIONS.index(activation), BLOCK_N, BLOCK_F, num_warps=num_warps, **FUSED,
            )  # fmt: skip


def _activate_torch(gate, activation):
    """ATen's kernel of the activation."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(
        gate, approximate="tanh" if activation == "gelu_tanh" else "none"
    )


def _backward_torch(dy, gate, up, activation, dgate, dup):
    """ATen's kernels."""
    torch.mul(dy, _activate_torch(gate, activation), out=dup)
    product = dy * up
    if activation == "silu":
        dgate.copy_(torch.ops.aten.silu_backward(product, gate))
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dgate.copy_(torch.ops.aten.gelu_backward(product, gate, approximate=approximate))


def _backward_reference(dy, gate, up, activation, dgate, dup):
    """The formula."""
    for into, gradient in zip(
        (dgate, dup), reference.swiglu_backward_ref(dy, gate, up, activation), strict=True
    ):
        into.copy_(gradient)


def _split(gate, up):
    """Both as (N, F); without `up` the halves of `gate` (N, 2F)."""
    return gate.chunk(2, -1) if up is None else (gate, up)


@torch.library.custom_op("stellarator::swiglu_forward", mutates_args=())
def _swiglu_forward(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str, impl: str
) -> torch.Tensor:
    """(N, F) from two of them, or from gate and up side by side in (N, 2F)."""
    chosen = choose("swiglu", impl, gate)
    gate, up = _split(gate, up)
    if chosen == "triton":
        return _forward_triton(gate, up, activation)
    if chosen == "reference":
        return reference.swiglu_ref(gate, up, activation).contiguous()
    return _activate_torch(gate, activation).mul_(up).contiguous()


@_swiglu_forward.register_fake
def _fake_forward(gate, up, activation, impl):
    return gate.new_empty(gate.shape[0], gate.shape[1] // (2 if up is None else 1))


@torch.library.custom_op("stellarator::swiglu_backward", mutates_args=())
def _swiglu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and of up (empty without it)."""
    backward = {
        "triton": _backward_triton,
        "torch": _backward_torch,
        "reference": _backward_reference,
    }[choose("swiglu", impl, gate)]
    dgate = gate.new_empty(gate.shape)
    dup = gate.new_empty(0 if up is None else up.shape)
    backward(dy, *_split(gate, up), activation, *_split(dgate, None if up is None else dup))
    return dgate, dup


@_swiglu_backward.register_fake
def _fake_backward(dy, gate, up, activation, impl):
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def _setup_context(ctx, inputs, output):
    gate, up, ctx.activation, ctx.impl = inputs
    ctx.save_for_backward(gate, up)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy):
    if dy is None:
        return None, None, None, None
    gate, up = ctx.saved_tensors
    dgate, dup = _swiglu_backward(dy, gate, up, ctx.activation, ctx.impl)
    return dgate, None if up is None else dup, None, None


_swiglu_forward.register_autograd(_backward, setup_context=_setup_context)


def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    impl: str = "auto",
) -> torch.Tensor:
    """act(gate) * up.

    Args:
        gate: (..., F) bf16/fp16/fp32/fp64; without `up` (..., 2F), gate and up side by side.
        up: like gate, or None.
        activation: "silu" (SwiGLU), "gelu_tanh" or "gelu_erf" (GeGLU).
    Returns:
        (..., F), contiguous, the dtype of gate.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or an unknown activation.
    Cost: `cost.swiglu`.
    """
    op = "swiglu"
    known = activation in _ACTIVATIONS
    expect(known, op, f"activation in {_ACTIVATIONS}", repr(activation), "Use one of them")
    expect_dtype(op, "gate", gate, _FLOATS, "Cast it to a floating dtype")
    if up is None:
        if gate.dim() < 1 or gate.shape[-1] < 2 or gate.shape[-1] % 2:
            expect(False, op, "gate (..., 2F)", tuple(gate.shape), "Pass up, or both side by side")
    else:
        if gate.dim() < 1 or gate.shape[-1] < 1:
            expect(False, op, "gate (..., F) with F >= 1", tuple(gate.shape), "Pass rows of them")
        expect_shape(op, "up", up, "like gate", gate.shape, "Pass rows of the same tokens")
        expect_dtype(op, "up", up, (gate.dtype,), "Cast it to the dtype of gate")
        expect_same_device(op, gate=gate, up=up)
    width = gate.shape[-1]
    rows = None if up is None else up.reshape(-1, width)
    y = _swiglu_forward(gate.reshape(-1, width), rows, activation, impl)
    return y.view(*gate.shape[:-1], y.shape[-1])
