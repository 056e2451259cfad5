"""The two-matrix MLP: down(gelu(up(x))), as products with nothing between them.

defines: mlp, How, forward, backward

forward:  pre = x @ up^T + up_bias;  y = gelu(pre);  out = y @ down^T + down_bias
backward: dpre = (dout @ down) * gelu'(pre);  dup_bias = sum(dpre);  y = gelu(pre) again
          dx = dpre @ up;  dup = dpre^T @ x;  ddown = dout^T @ y;  ddown_bias = sum(dout)

In Triton the first line of each is one kernel: bias and gelu are the epilogue of the product, which
writes y, and pre where it is kept; so are gelu' and the sums of the backward, which writes dpre and
y. pre is rounded before its gelu, so that y and gelu' are of the same numbers, to the bit; gelu and
its derivative are computed in fp32. dup_bias is summed in fp32 before dpre is rounded: a partial
sum per tile of rows, added in one order; no atomics. The other products are ATen's.

Elsewhere the first lines are ATen's product and the gelu of bias_gelu.py, which adds the bias and
sums its gradient; pre is kept without it.

Saved: x, the weights and pre; with `recompute` not pre, which the backward then makes by one more
product. Bytes, as products: beside the operands the forward writes y and pre, the backward reads
pre and writes dpre and y, each (N, F).

Source: the epilogues, cuBLASLt's BIAS_GELU_AUX and DGELU_BGRAD; gelu, arXiv:1606.08415.
"""

from dataclasses import dataclass

import torch

from stellarator_kernels import matmul, reference, tuned
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.attention.tiles import chip, with_scratch
from stellarator_kernels.bias_gelu import cdf_and_density
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import UNIT, aligned_rows
from stellarator_kernels.linear import Room, gradient_or_add, of_product, rows_of
from stellarator_kernels.matmul import halves, matrix, tile_at, tile_product, where_of

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ops = torch.ops.stellarator


@triton.jit
def _activate(
    pre, bias_ptr, y_ptr, pre_ptr, row, col, N, F,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, STORE_Y: tl.constexpr, STORE_PRE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Epilogue of `_up_kernel`, on (ROWS, COLS) accumulators."""
    if PARTS > 1:
        HALF: tl.constexpr = COLS // 2
        left, right = halves(pre, ROWS, COLS)
        _activate(
            left, bias_ptr, y_ptr, pre_ptr, row, col, N, F,
            HAS_BIAS, TANH, STORE_Y, STORE_PRE, ROWS, HALF, PARTS // 2,
        )  # fmt: skip
        _activate(
            right, bias_ptr, y_ptr, pre_ptr, row, col + HALF, N, F,
            HAS_BIAS, TANH, STORE_Y, STORE_PRE, ROWS, HALF, PARTS // 2,
        )  # fmt: skip
    else:
        offsets, inside = where_of(row, col, N, F, ROWS, COLS)
        if HAS_BIAS:
            cols = col + tl.arange(0, COLS)
            pre += tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
        rounded = pre.to(y_ptr.dtype.element_ty)
        if STORE_PRE:
            tl.store(pre_ptr + offsets, rounded, mask=inside)
        if STORE_Y:
            u = rounded.to(tl.float32)
            cdf, _ = cdf_and_density(u, TANH)
            tl.store(y_ptr + offsets, (u * cdf).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _up_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, pre_ptr,
    x_stride_row, weight_stride_row, N, C_units, F_units,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, STORE_Y: tl.constexpr, STORE_PRE: tl.constexpr,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles of pre = x @ weight^T + bias and of y = gelu(pre), both (N, F)."""
    C, F = C_units * 8, F_units * 8
    x = matrix(x_ptr, N, C, x_stride_row, ROWS, DEPTH, TMA)
    weight = matrix(weight_ptr, F, C, weight_stride_row, COLS, DEPTH, TMA)
    num_tiles = tl.cdiv(N, ROWS) * tl.cdiv(F, COLS)
    for number in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, col = tile_at(number, N, F, ROWS, COLS, GROUP)
        pre = tile_product(
            x, weight, row, col, N, F, C, x_stride_row, weight_stride_row,
            False, True, EVEN_K, ROWS, COLS, DEPTH, TMA, UPCAST,
        )  # fmt: skip
        _activate(
            pre, bias_ptr, y_ptr, pre_ptr, row, col, N, F,
            HAS_BIAS, TANH, STORE_Y, STORE_PRE, ROWS, COLS, PARTS,
        )  # fmt: skip


@triton.jit
def _differentiate(
    dy, pre_ptr, dpre_ptr, y_ptr, sums_ptr, row, col, N, F,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, STORE_Y: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Epilogue of `_down_gradient_kernel`, on (ROWS, COLS) accumulators."""
    if PARTS > 1:
        HALF: tl.constexpr = COLS // 2
        left, right = halves(dy, ROWS, COLS)
        _differentiate(
            left, pre_ptr, dpre_ptr, y_ptr, sums_ptr, row, col, N, F,
            HAS_BIAS, TANH, STORE_Y, ROWS, HALF, PARTS // 2,
        )  # fmt: skip
        _differentiate(
            right, pre_ptr, dpre_ptr, y_ptr, sums_ptr, row, col + HALF, N, F,
            HAS_BIAS, TANH, STORE_Y, ROWS, HALF, PARTS // 2,
        )  # fmt: skip
    else:
        offsets, inside = where_of(row, col, N, F, ROWS, COLS)
        u = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        cdf, density = cdf_and_density(u, TANH)
        if STORE_Y:
            tl.store(y_ptr + offsets, (u * cdf).to(y_ptr.dtype.element_ty), mask=inside)
        dpre = dy * (cdf + u * density)
        tl.store(dpre_ptr + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
        if HAS_BIAS:  # rows past the end are 0
            cols = col + tl.arange(0, COLS)
            tl.store(sums_ptr + cols, tl.sum(dpre, 0), mask=cols < F)


@triton.jit
def _down_gradient_kernel(
    dout_ptr, weight_ptr, pre_ptr, dpre_ptr, y_ptr, dbias_ptr,
    dout_stride_row, weight_stride_row, N, C_units, F_units,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, STORE_Y: tl.constexpr,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles of dpre = (dout @ weight) * gelu'(pre) and of y = gelu(pre), and the sums of dpre.

    weight (C, F); dbias (row tiles, F) fp32, one partial sum per tile of rows.
    """
    C, F = C_units * 8, F_units * 8
    dout = matrix(dout_ptr, N, C, dout_stride_row, ROWS, DEPTH, TMA)
    weight = matrix(weight_ptr, C, F, weight_stride_row, DEPTH, COLS, TMA)
    num_tiles = tl.cdiv(N, ROWS) * tl.cdiv(F, COLS)
    for number in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, col = tile_at(number, N, F, ROWS, COLS, GROUP)
        dy = tile_product(
            dout, weight, row, col, N, F, C, dout_stride_row, weight_stride_row,
            False, False, EVEN_K, ROWS, COLS, DEPTH, TMA, UPCAST,
        )  # fmt: skip
        sums_ptr = dbias_ptr + (row // ROWS).to(tl.int64) * F
        _differentiate(
            dy, pre_ptr, dpre_ptr, y_ptr, sums_ptr, row, col, N, F,
            HAS_BIAS, TANH, STORE_Y, ROWS, COLS, PARTS,
        )  # fmt: skip


def _plan(phase: str, x: torch.Tensor, N: int, C: int, F: int) -> tuple[matmul.Tiles, tuple, dict]:
    """Tiles, grid and further arguments of one of the two kernels: an inner width of C, (N, F)."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    tiles = matmul.tile_sizes(phase, x.dtype, capability, tuned.gpu_name(x.device))
    grid = (matmul.num_programs(N, F, tiles, chip(x.device).num_sms),)
    sizes = {"N": N, "C_units": C // UNIT, "F_units": F // UNIT}
    return tiles, grid, sizes | matmul.constants(x.dtype, C, tiles)


@with_scratch
def _up_triton(x, weight, bias, approximate, need_y, need_pre):
    """y and pre, each empty if it is not needed."""
    x, weight = aligned_rows(x), aligned_rows(weight)
    bias = bias if bias is None else bias.contiguous()
    (N, C), F = x.shape, weight.shape[0]
    y, pre = (x.new_empty((N, F) if need else 0) for need in (need_y, need_pre))
    if N > 0:
        _, grid, arguments = _plan("up", x, N, C, F)
        with torch.cuda.device_of(x):
            _up_kernel[grid](
                x, weight, x if bias is None else bias, y, pre,
                x.stride(0) // UNIT, weight.stride(0) // UNIT, **arguments,
                HAS_BIAS=bias is not None, TANH=approximate == "tanh",
                STORE_Y=need_y, STORE_PRE=need_pre, **FUSED,
            )  # fmt: skip
    return y, pre


@with_scratch
def _down_gradient_triton(dout, weight, pre, approximate, need_y, need_dbias):
    """dpre, dbias and y; the last two empty if they are not needed."""
    dout, weight, pre = aligned_rows(dout), aligned_rows(weight), pre.contiguous()
    (N, C), F = dout.shape, weight.shape[1]
    tiles, grid, arguments = _plan("down gradient", dout, N, C, F)
    dpre, y = dout.new_empty(N, F), dout.new_empty((N, F) if need_y else 0)
    partials = (triton.cdiv(N, tiles.rows), F) if need_dbias else 0
    partials = dout.new_empty(partials, dtype=torch.float32)
    if N > 0:
        with torch.cuda.device_of(dout):
            _down_gradient_kernel[grid](
                dout, weight, pre, dpre, y, partials,
                dout.stride(0) // UNIT, weight.stride(0) // UNIT, **arguments,
                HAS_BIAS=need_dbias, TANH=approximate == "tanh", STORE_Y=need_y, **FUSED,
            )  # fmt: skip
    return dpre, partials.sum(0).to(dout.dtype) if need_dbias else partials.to(dout.dtype), y


@torch.library.custom_op("stellarator::mlp_up", mutates_args=())
def _up(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    need_y: bool,
    need_pre: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and pre of rows x (N, C), each empty if it is not needed.

    Whether pre has the bias is a matter of the implementation, whose `mlp_down_gradient` takes it.
    """
    chosen = choose("mlp", impl, x, up_weight=weight)
    if chosen == "triton":
        return _up_triton(x, weight, bias, approximate, need_y, need_pre)
    if chosen == "reference":
        y, pre = reference.mlp_up_ref(x, weight, bias, approximate)
    else:
        pre = _ops.product(x, weight.t(), None, "torch")
        y = _ops.bias_gelu_forward(pre, bias, approximate, chosen) if need_y else pre
    return y if need_y else x.new_empty(0), pre if need_pre else x.new_empty(0)


@_up.register_fake
def _fake_up(x, weight, bias, approximate, need_y, need_pre, impl):
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape if need_y else 0), x.new_empty(shape if need_pre else 0)


@torch.library.custom_op("stellarator::mlp_down_gradient", mutates_args=())
def _down_gradient(
    dout: torch.Tensor,
    weight: torch.Tensor,
    pre: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    need_y: bool,
    need_dbias: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dpre, dbias and y from dout (N, C), weight (C, F), pre (N, F) and bias (F,)."""
    chosen = choose("mlp", impl, dout, up_weight=weight.t())
    if chosen == "triton":
        return _down_gradient_triton(dout, weight, pre, approximate, need_y, need_dbias)
    if chosen == "reference":
        dpre, dbias, y = reference.mlp_down_gradient_ref(dout, weight, pre, approximate)
    else:
        dy = _ops.product(dout, weight, None, "torch")
        dpre, dbias, y = _ops.bias_gelu_backward(dy, pre, bias, approximate, chosen, need_y)
    dbias = dbias if need_dbias else dout.new_empty(0)
    return dpre, dbias, y if need_y else dout.new_empty(0)


@_down_gradient.register_fake
def _fake_down_gradient(dout, weight, pre, bias, approximate, need_y, need_dbias, impl):
    dbias = dout.new_empty(weight.shape[1] if need_dbias else 0)
    return dout.new_empty(pre.shape), dbias, dout.new_empty(pre.shape if need_y else 0)


@dataclass(frozen=True)
class How:
    """Options of a call. `keep`: there will be a backward, for which pre is kept."""

    approximate: str
    keep: bool
    impl: str
    rooms: tuple[Room | None, Room | None]


def forward(ctx, x, parameters, how: How, wanted: bool):
    """The result of rows x, and pre, which is None where nobody keeps it."""
    up, up_bias, down, down_bias = parameters
    keep = wanted and how.keep
    y, pre = _up(x, up, up_bias, how.approximate, True, keep, how.impl)
    ctx.how = how
    return _ops.product(y, down.t(), down_bias, of_product(how.impl)), pre if keep else None


def backward(ctx, dout, kept, make_x, first: int):
    """dx, and the gradients of the four parameters, the first of which is input number `first`.

    kept: up, up_bias, down, pre. make_x: gives the rows, as often as it is called.
    """
    (up, up_bias, down, pre), how = kept, ctx.how
    need_up, need_up_bias, need_down, need_down_bias = ctx.needs_input_grad[first : first + 4]
    need_x, impl = any(ctx.needs_input_grad[:first]), of_product(how.impl)
    dx = dup = dup_bias = ddown = None
    if any(ctx.needs_input_grad[: first + 3]):
        x = None
        if pre is None:
            x = make_x()
            _, pre = _up(x, up, up_bias, how.approximate, False, True, how.impl)
        need_dbias = up_bias is not None and need_up_bias
        dpre, dup_bias, y = _down_gradient(
            dout, down, pre, up_bias, how.approximate, need_down, need_dbias, how.impl
        )
        dup_bias = dup_bias if need_dbias else None
        if need_down:
            ddown = gradient_or_add(dout, y, impl, how.rooms[1])
        dx = _ops.product(dpre, up, None, impl) if need_x else None
        if need_up:
            x = make_x() if x is None else x
            dup = gradient_or_add(dpre, x, impl, how.rooms[0])
    return dx, dup, dup_bias, ddown, dout.sum(0) if need_down_bias else None


class _Mlp(torch.autograd.Function):
    """Inputs: rows, the four parameters."""

    @staticmethod
    def forward(ctx, x, up, up_bias, down, down_bias, how):
        wanted = any(ctx.needs_input_grad[:4])
        out, pre = forward(ctx, x, (up, up_bias, down, down_bias), how, wanted)
        ctx.save_for_backward(x, up, up_bias, down, pre)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, *kept = ctx.saved_tensors
        return *backward(ctx, dout, kept, lambda: x, 1), None


def mlp(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    *,
    approximate: str = "tanh",
    recompute: bool = False,
    rooms: tuple[Room | None, Room | None] = (None, None),
    impl: str = "auto",
) -> torch.Tensor:
    """gelu(x @ up_weight^T + up_bias) @ down_weight^T + down_bias.

    Args:
        x: (..., C) bf16/fp16/fp32/fp64.
        up_weight, up_bias: (F, C) and (F,) or None, dtype of x.
        down_weight, down_bias: (C, F) and (C,) or None, dtype of x.
        approximate: "tanh" (StarCoder2) or "none" (erf).
        recompute: keep no tensor of (N, F) for the backward, which makes one more product.
        rooms: of up_weight and down_weight, as the `room` of `linear`.
        impl: "auto", "triton" (C and F multiples of 8), "cpu" (the gelu in C++), "torch",
            "reference"; the plain products are those of `linear`.
    Returns:
        (..., C), contiguous, the dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or an unknown form.
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.mlp`.
    """
    tensors = {
        "x": x, "up_weight": up_weight, "up_bias": up_bias,
        "down_weight": down_weight, "down_bias": down_bias,
    }  # fmt: skip
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = {n: t if t is None else t.to(dtype) for n, t in tensors.items()}
        rooms = (None, None)
    check("mlp", approximate, **tensors)
    x, *parameters = tensors.values()
    how = How(approximate, torch.is_grad_enabled() and not recompute, impl, rooms)
    return _Mlp.apply(rows_of(x), *parameters, how).view(x.shape)


def check(op, approximate, x, up_weight, down_weight, **biases):
    """Raise ValueError for arguments that do not fit together."""
    forms = ("tanh", "none")
    expect(approximate in forms, op, f"approximate in {forms}", repr(approximate), "Use one")
    if x.dim() < 1 or up_weight.dim() != 2 or up_weight.shape[1] != x.shape[-1]:
        got = (tuple(x.shape), tuple(up_weight.shape))
        expect(False, op, "x (..., C) and up_weight (F, C)", got, "Pass it as nn.Linear has it")
    expect_dtype(op, "x", x, _FLOATS, "Cast it to a floating dtype")
    F, C = up_weight.shape
    shapes = {"down_weight": (C, F), "up_bias": (F,), "down_bias": (C,)}
    forms = {"down_weight": "(C, F)", "up_bias": "(F,)", "down_bias": "(C,)"}
    given = {"up_weight": up_weight, "down_weight": down_weight, **biases}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if name in shapes:
            expect_shape(op, name, tensor, forms[name], shapes[name], "Pass one of this layer")
        expect_dtype(op, name, tensor, (x.dtype,), "Cast it to the dtype of x")
    expect_same_device(op, x=x, **given)
