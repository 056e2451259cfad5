"""gelu(x + bias) in one pass, in its tanh and its erf form.

forward:  y = u * Phi(u), u = x + bias; "tanh": Phi(u) = sigmoid(2*a*(u + b*u^3)),
          a = sqrt(2/pi), b = 0.044715, which is (1 + tanh(a*(u + b*u^3))) / 2
backward: dx = dy * (Phi(u) + u * Phi'(u));  dbias = sum(dx)
          "none": Phi' is the normal density;  "tanh": Phi' = 2*a*(1 + 3*b*u^2) * Phi * (1 - Phi)

Saved: x and bias; u is recomputed. The Triton and C++ kernels and the reference compute in fp32
from the unrounded u; ATen's path rounds u to the dtype of x, as eager code does. dbias is summed in
fp32 (ATen: by its own reduction, also fp32 inside): a partial sum per program (C++: per block of
rows), added in a fixed order afterwards; no atomics, the same to the bit on every run.

Bytes: forward reads x, writes y; backward reads dy and x, writes dx.
Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import dense_rows
from stellarator_kernels.memory import empty_like

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def cdf_and_density(u, TANH: tl.constexpr):
    """Phi(u) and Phi'(u) of the chosen form, in fp32."""
    if TANH:
        inner = 1.5957691216057308 * u * (1.0 + 0.044715 * u * u)
        cdf = tl.sigmoid(inner)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * u * u)
        # Not 1 - cdf: near 1 that loses all digits, and the slope grows with u^2.
        return cdf, slope * cdf * tl.sigmoid(-inner)
    cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
    return cdf, 0.3989422804014327 * tl.exp(-0.5 * u * u)


@triton.jit
def _bias_gelu_fwd_kernel(
    x_ptr, x_stride_row, bias_ptr, y_ptr, N, C,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N rows and BLOCK_C columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (rows < N) & (cols < C)
    u = tl.load(x_ptr + rows * x_stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    cdf, _ = cdf_and_density(u, TANH)
    tl.store(y_ptr + rows * C + cols, (u * cdf).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_bwd_kernel(
    dy_ptr, dy_stride_row, x_ptr, x_stride_row, bias_ptr, dx_ptr, dbias_ptr, N, C,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C columns of every num_programs-th block of rows; one partial sum of dbias."""
    program = tl.program_id(0).to(tl.int64)  # and so is each row
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for block in range(program, tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        inside = (rows < N) & (cols < C)
        u = tl.load(x_ptr + rows * x_stride_row + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * dy_stride_row + cols, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            u += bias
        cdf, density = cdf_and_density(u, TANH)
        dx = dy * (cdf + u * density)
        dbias += dx
        tl.store(dx_ptr + rows * C + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        partial = dbias_ptr + program * C + cols
        tl.store(partial, tl.sum(dbias, 0)[None, :], mask=cols < C)


def tiles(C: int) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_C, num_warps): tiles of at most 4 x 512, 16 elements per thread."""
    BLOCK_C = min(512, triton.next_power_of_2(C))
    return 4, BLOCK_C, max(1, BLOCK_C // 128)


def num_partials(N: int) -> int:
    """Row programs of the backward: one per 64 rows, at most 64 partial sums to add afterwards."""
    return max(1, min(64, -(-N // 64)))


def _forward_triton(x, bias, approximate):
    """Allocate and launch the forward."""
    x, bias = dense_rows(x), dense_rows(bias)
    (N, C), y = x.shape, x.new_empty(x.shape)
    BLOCK_N, BLOCK_C, num_warps = tiles(C)
    if N > 0:
        grid = (triton.cdiv(N, BLOCK_N), triton.cdiv(C, BLOCK_C))
        with torch.cuda.device_of(x):
            _bias_gelu_fwd_kernel[grid](
                x, x.stride(0), x if bias is None else bias, y, N, C,
                bias is not None, approximate == "tanh", BLOCK_N, BLOCK_C, num_warps=num_warps,
                **FUSED,
            )  # fmt: skip
    return y


def _backward_triton(dy, x, bias, approximate):
    """Allocate and launch the backward, then add the partial sums."""
    dy, x, bias = (dense_rows(t) for t in (dy, x, bias))
    (N, C), dx = x.shape, x.new_empty(x.shape)
    BLOCK_N, BLOCK_C, num_warps = tiles(C)
    programs = num_partials(N)
    partials = x.new_empty((0 if bias is None else programs, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _bias_gelu_bwd_kernel[(programs, triton.cdiv(C, BLOCK_C))](
            dy, dy.stride(0), x, x.stride(0), x if bias is None else bias, dx, partials, N, C,
            bias is not None, approximate == "tanh", BLOCK_N, BLOCK_C, num_warps=num_warps, **FUSED,
        )  # fmt: skip
    return dx, None if bias is None else partials.sum(0).to(bias.dtype)


def _arguments_cpu(x, bias, approximate):
    """What both C++ functions take."""
    return {
        **{"is_bfloat16": x.dtype == torch.bfloat16, "is_tanh": approximate == "tanh"},
        **{"N": x.shape[0], "C": x.shape[1]},
        **{"x": extension.rows(x), "bias": extension.address(bias)},
        **{"threads": torch.get_num_threads(), "isa": extension.isa()},
    }


def _forward_cpu(x, bias, approximate):
    """Allocate and call the C++ kernel."""
    x, bias = dense_rows(x), dense_rows(bias)
    y = empty_like(x)
    arguments = _arguments_cpu(x, bias, approximate)
    extension.load().bias_gelu_forward(**arguments, y=y.data_ptr())
    return y


def _backward_cpu(dy, x, bias, approximate, need_y):
    """Allocate and call the C++ kernel: dx, dbias, and y in the same pass if it is needed."""
    dy, x, bias = (dense_rows(t) for t in (dy, x, bias))
    module, (N, C) = extension.load(), x.shape
    dx, dbias, sums = empty_like(x, N, C), None, None
    if bias is not None:
        dbias = bias.new_empty(C)
        sums = x.new_empty((module.blocks_of_rows(N), C), dtype=torch.float32)
    y = empty_like(x, N, C) if need_y else None
    results = {"y": y, "dx": dx, "dbias": dbias, "sums": sums}
    module.bias_gelu_backward(
        **_arguments_cpu(x, bias, approximate),
        dy=extension.rows(dy),
        **{name: extension.address(t) for name, t in results.items()},
    )
    return dx, dbias, y


def _forward_torch(x, bias, approximate):
    """ATen's gelu, in place on x + bias."""
    u = empty_like(x)
    source = x if bias is None else torch.add(x, bias, out=u)
    return torch.ops.aten.gelu.out(source, approximate=approximate, out=u)


def _backward_torch(dy, x, bias, approximate):
    """ATen's gelu_backward, in place on x + bias."""
    u = empty_like(x)
    source = x if bias is None else torch.add(x, bias, out=u)
    dx = torch.ops.aten.gelu_backward.grad_input(dy, source, approximate=approximate, grad_input=u)
    return dx, None if bias is None else dx.sum(0)


def _backward_reference(dy, x, bias, approximate):
    """The formula; its result takes the layout of its inputs, an operator's must not."""
    dx, dbias = reference.bias_gelu_backward_ref(dy, x, bias, approximate)
    return dx.contiguous(), dbias


@torch.library.custom_op("stellarator::bias_gelu_forward", mutates_args=())
def _bias_gelu_forward(
    x: torch.Tensor, bias: torch.Tensor | None, approximate: str, impl: str
) -> torch.Tensor:
    chosen = choose("bias_gelu", impl, x)
    if chosen == "reference":
        return reference.bias_gelu_ref(x, bias, approximate).contiguous()
    forward = {"triton": _forward_triton, "cpu": _forward_cpu, "torch": _forward_torch}[chosen]
    return forward(x, bias, approximate)


@_bias_gelu_forward.register_fake
def _fake_forward(x, bias, approximate, impl):
    return x.new_empty(x.shape)


@torch.library.custom_op("stellarator::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    impl: str,
    need_y: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dbias (empty without a bias), and y, the result of the forward (empty unless needed)."""
    chosen = choose("bias_gelu", impl, x)
    if chosen == "cpu":
        dx, dbias, y = _backward_cpu(dy, x, bias, approximate, need_y)
    else:
        backward = {
            "triton": _backward_triton,
            "torch": _backward_torch,
            "reference": _backward_reference,
        }[chosen]
        dx, dbias = backward(dy, x, bias, approximate)
        y = _bias_gelu_forward(x, bias, approximate, impl) if need_y else None
    return dx, x.new_empty(0) if dbias is None else dbias, x.new_empty(0) if y is None else y


@_bias_gelu_backward.register_fake
def _fake_backward(dy, x, bias, approximate, impl, need_y=False):
    dbias = x.new_empty(0 if bias is None else bias.shape)
    return x.new_empty(x.shape), dbias, x.new_empty(x.shape if need_y else 0)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.approximate, ctx.impl = inputs
    ctx.save_for_backward(x, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy):
    if dy is None:
        return None, None, None, None
    x, bias = ctx.saved_tensors
    dx, dbias, _ = _bias_gelu_backward(dy, x, bias, ctx.approximate, ctx.impl)
    return dx, None if bias is None else dbias, None, None


_bias_gelu_forward.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    approximate: str = "tanh",
    impl: str = "auto",
) -> torch.Tensor:
    """gelu(x + bias).

    Args:
        x: (..., F) bf16/fp16/fp32/fp64.
        bias: (F,), dtype of x, or None.
        approximate: "tanh" (StarCoder2 and the 1B and 3B of StarCoder) or "none" (erf).
    Returns:
        like x, contiguous.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or an unknown form.
    Cost: `cost.bias_gelu`.
    """
    op = "bias_gelu"
    if approximate not in ("tanh", "none"):
        forms = "approximate 'tanh' or 'none'"
        expect(False, op, forms, repr(approximate), "Use the model's activation string")
    if x.dim() < 1 or x.shape[-1] < 1:
        expect(False, op, "x (..., F) with F >= 1", tuple(x.shape), "Pass rows of activations")
    expect_dtype(op, "x", x, _FLOATS, "Cast it to a floating dtype")
    if bias is not None:
        expect_shape(op, "bias", bias, "(F,)", x.shape[-1:], "Pass the local inner width")
        expect_dtype(op, "bias", bias, (x.dtype,), "Cast it to the dtype of x")
        expect_same_device(op, x=x, bias=bias)
    return _bias_gelu_forward(x.reshape(-1, x.shape[-1]), bias, approximate, impl).view(x.shape)
