"""Layer normalisation, with the residual addition in front of it in the same pass.

forward:  s = x + residual;  y = n * weight + bias,  n = (s - mean) * rstd,  rows of width C
backward: g = dy * weight;  dx = rstd * (g - mean(g) - n * mean(g * n)) + dsummed  (= dresidual)
          dweight = sum(dy * n);  dbias = sum(dy)

s is rounded to the dtype of x first and the statistics are taken of the rounded values, which are
what is stored, so the backward recomputes exactly the n of the forward. Saved: s (or x), weight,
and mean and rstd (N, 1) in fp32. All sums are fp32: the variance is that of centred values, in a
second pass over registers. dweight and dbias: one fp32 partial sum per program, added in a fixed
order afterwards; no atomics, so the result is the same to the bit on every run (of GPUs with as
many multiprocessors).

A Triton program holds one row in registers as a block of the next power of two: of the lanes 25 %
(C = 3072, 6144) or 44 % (4608) idle, but they move no bytes, and one pass then feeds dx and both
partial sums. Rows wider than 8192 are refused (registers of the backward, stack of the C++).

The C++ kernel reads a row from memory once and keeps it in fp32 in the nearest cache; its partial
sums are those of blocks of 64 rows or more, whatever the number of threads.

Bytes: forward reads x (and residual), writes y (and s); backward reads dy and s (and dsummed),
writes dx.
Source: Ba et al. 2016, arXiv:1607.06450; partial sums per persistent program: QuACK, Fast-LLM.
"""

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels._triton import tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import dense_rows, multiprocessors
from stellarator_kernels.memory import empty_like

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROWS = 512  # of a block that `_parameter_sums` widens


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, x_stride_row, residual_ptr, residual_stride_row, weight_ptr, bias_ptr,
    y_ptr, summed_ptr, mean_ptr, rstd_ptr, eps, C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    in_row = cols < C
    x = tl.load(x_ptr + row * x_stride_row + cols, mask=in_row, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        offset = row * residual_stride_row + cols
        x += tl.load(residual_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        stored = x.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row * C + cols, stored, mask=in_row)
        x = stored.to(tl.float32)
    mean = tl.sum(x, 0) / C
    centred = tl.where(in_row, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    y = centred * rstd * tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=in_row)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dy_stride_row, dsummed_ptr, dsummed_stride_row, summed_ptr, summed_stride_row,
    weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, N, C: tl.constexpr,
    HAS_DSUMMED: tl.constexpr, HAS_BIAS: tl.constexpr, NEED_PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th row; one partial sum of dweight and dbias for them all."""
    program = tl.program_id(0).to(tl.int64)  # and so is each row
    cols = tl.arange(0, BLOCK)
    in_row = cols < C
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, N, tl.num_programs(0)):
        offset = row * dy_stride_row + cols
        dy = tl.load(dy_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        offset = row * summed_stride_row + cols
        x = tl.load(summed_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normalised = tl.where(in_row, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        if NEED_PARAMS:
            dweight += dy * normalised
            if HAS_BIAS:
                dbias += dy
        g = dy * weight
        dx = rstd * (g - tl.sum(g, 0) / C - normalised * (tl.sum(g * normalised, 0) / C))
        if HAS_DSUMMED:
            offset = row * dsummed_stride_row + cols
            dx += tl.load(dsummed_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * C + cols, dx.to(dx_ptr.dtype.element_ty), mask=in_row)
    if NEED_PARAMS:
        partial = program * C + cols
        tl.store(dweight_ptr + partial, dweight, mask=in_row)
        if HAS_BIAS:
            tl.store(dbias_ptr + partial, dbias, mask=in_row)


def tiles(C: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of a row of C: at most 16 elements per thread, so that none spills."""
    BLOCK = triton.next_power_of_2(C)
    return BLOCK, min(16, max(1, BLOCK // 512))


def num_partials(N: int, multiprocessors: int) -> int:
    """Programs of the backward: two per multiprocessor, no more than rows, at least one."""
    return max(1, min(N, 2 * multiprocessors))


def _forward_triton(x, residual, weight, bias, eps):
    """Allocate and launch the forward."""
    x, residual, weight, bias = (dense_rows(t) for t in (x, residual, weight, bias))
    N, C = x.shape
    y = x.new_empty(N, C)
    summed = x if residual is None else x.new_empty(N, C)
    mean, rstd = (x.new_empty((N, 1), dtype=torch.float32) for _ in range(2))
    BLOCK, num_warps = tiles(C)
    other = x if residual is None else residual
    if N > 0:
        with torch.cuda.device_of(x):
            _layer_norm_fwd_kernel[(N,)](
                x, x.stride(0), other, other.stride(0), weight, weight if bias is None else bias,
                y, summed, mean, rstd, eps, C,
                residual is not None, bias is not None, BLOCK, num_warps=num_warps,
            )  # fmt: skip
    return y, summed, mean, rstd


def _backward_triton(dy, dsummed, summed, weight, mean, rstd, has_bias, need_params):
    """Allocate and launch the backward, then add the partial sums."""
    dy, dsummed, summed, weight = (dense_rows(t) for t in (dy, dsummed, summed, weight))
    N, C = summed.shape
    dx = summed.new_empty(N, C)
    programs = num_partials(N, multiprocessors(summed.device))
    partials = [
        summed.new_empty((programs if need_params else 0, C), dtype=torch.float32)
        for _ in range(1 + has_bias)
    ]
    BLOCK, num_warps = tiles(C)
    other = dy if dsummed is None else dsummed
    with torch.cuda.device_of(summed):
        _layer_norm_bwd_kernel[(programs,)](
            dy, dy.stride(0), other, other.stride(0), summed, summed.stride(0),
            weight, mean, rstd, dx, partials[0], partials[-1], N, C,
            dsummed is not None, has_bias, need_params, BLOCK, num_warps=num_warps,
        )  # fmt: skip
    return dx, *(p.sum(0).to(weight.dtype) if need_params else None for p in partials)


def _forward_cpu(x, residual, weight, bias, eps):
    """Allocate and call the C++ kernel."""
    x, residual, weight, bias = (dense_rows(t) for t in (x, residual, weight, bias))
    N, C = x.shape
    y = empty_like(x, N, C)
    summed = None if residual is None else empty_like(x, N, C)
    mean, rstd = (x.new_empty((N, 1), dtype=torch.float32) for _ in range(2))
    results = {"y": y, "summed": summed, "mean": mean, "rstd": rstd}
    extension.load().layer_norm_forward(
        **{"is_bfloat16": x.dtype == torch.bfloat16, "N": N, "C": C, "eps": eps},
        **{"x": extension.rows(x), "residual": extension.rows(residual)},
        **{"weight": extension.address(weight), "bias": extension.address(bias)},
        **{name: extension.address(t) for name, t in results.items()},
        **{"threads": torch.get_num_threads(), "isa": extension.isa()},
    )
    return y, x if residual is None else summed, mean, rstd


def _backward_cpu(dy, dsummed, summed, weight, mean, rstd, has_bias, need_params):
    """Allocate and call the C++ kernel."""
    dy, dsummed, summed, weight = (dense_rows(t) for t in (dy, dsummed, summed, weight))
    module, (N, C) = extension.load(), summed.shape
    dx, dweight, dbias, sums = empty_like(summed, N, C), None, None, None
    if need_params:
        dweight, dbias = weight.new_empty(C), weight.new_empty(C) if has_bias else None
        sums = mean.new_empty(module.blocks_of_rows(N), 2, C)
    plain = {"weight": weight, "mean": mean, "rstd": rstd, "dx": dx}
    plain |= {"dweight": dweight, "dbias": dbias, "sums": sums}
    module.layer_norm_backward(
        **{"is_bfloat16": summed.dtype == torch.bfloat16, "N": N, "C": C},
        **{"dy": extension.rows(dy), "dsummed": extension.rows(dsummed)},
        **{"summed": extension.rows(summed)},
        **{name: extension.address(t) for name, t in plain.items()},
        **{"threads": torch.get_num_threads(), "isa": extension.isa()},
    )
    return dx, dweight, dbias


def _atens_parameters(x, *parameters):
    """fp32 for 16-bit x on a CPU: with 16-bit parameters ATen would round mean and rstd too."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return parameters
    return tuple(None if p is None else p.float() for p in parameters)


def _forward_torch(x, residual, weight, bias, eps):
    """ATen's native_layer_norm after an addition."""
    summed = x if residual is None else torch.add(x, residual, out=x.new_empty(x.shape))
    weight, bias = _atens_parameters(x, weight, bias)
    y, mean, rstd = torch.native_layer_norm(summed, x.shape[-1:], weight, bias, eps)
    return y, summed, mean, rstd


def _backward_torch(dy, dsummed, summed, weight, mean, rstd, has_bias, need_params):
    """ATen's native_layer_norm_backward, then the gradient of the sum added in place.

    For 16-bit rows ATen's CPU kernel adds dweight and dbias up in 16 bits, whatever the dtype of
    the weight: half of dbias is lost at 4,096 rows. So there they are summed here.
    """
    (weight32,) = _atens_parameters(summed, weight)
    own_sums = need_params and weight32 is not weight
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, summed, summed.shape[-1:], mean, rstd, weight32, weight32 if has_bias else None,
        [True, need_params and not own_sums, need_params and has_bias and not own_sums],
    )  # fmt: skip
    if own_sums:
        dweight, dbias = _parameter_sums(dy, summed, mean, rstd)
    if dsummed is not None:
        dx.add_(dsummed)
    return dx, *(None if p is None else p.to(weight.dtype) for p in (dweight, dbias))


def _parameter_sums(dy, summed, mean, rstd):
    """dweight and dbias in fp32, over blocks of rows so that the fp32 copies stay small."""
    dweight, dbias = (mean.new_zeros(summed.shape[1]) for _ in range(2))
    parts = (t.split(_ROWS) for t in (dy, summed, mean, rstd))
    for dy_part, summed_part, mean_part, rstd_part in zip(*parts, strict=True):
        dy32 = dy_part.float()
        dweight += torch.linalg.vecdot(dy32, (summed_part.float() - mean_part) * rstd_part, dim=0)
        dbias += dy32.sum(0)
    return dweight, dbias


@torch.library.custom_op("stellarator::layer_norm_forward", mutates_args=())
def _layer_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, summed (empty without a residual: an operator may not return its input), mean, rstd."""
    chosen = choose("layer_norm", impl, x)
    if chosen == "reference":
        y, summed, mean, rstd = reference.layer_norm_ref(x, weight, bias, eps, residual)
        # A formula's result takes the layout of its inputs, an operator's must not.
        y, summed = y.contiguous(), summed.contiguous()
    else:
        by = {"triton": _forward_triton, "cpu": _forward_cpu, "torch": _forward_torch}[chosen]
        y, summed, mean, rstd = by(x, residual, weight, bias, eps)
    return y, x.new_empty(0) if residual is None else summed, mean, rstd


@_layer_norm_forward.register_fake
def _fake_forward(x, residual, weight, bias, eps, impl):
    mean, rstd = (x.new_empty((x.shape[0], 1), dtype=reference.compute_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


@torch.library.custom_op("stellarator::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    has_bias: bool,
    need_params: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias; those that are not needed are empty."""
    chosen = choose("layer_norm", impl, summed)
    if chosen == "reference":
        gradients = reference.layer_norm_backward_ref(dy, summed, weight, mean, rstd, dsummed)
    else:
        by = {"triton": _backward_triton, "cpu": _backward_cpu, "torch": _backward_torch}[chosen]
        gradients = by(dy, dsummed, summed, weight, mean, rstd, has_bias, need_params)
    return (
        gradients[0].contiguous(),
        gradients[1] if need_params else weight.new_empty(0),
        gradients[2] if need_params and has_bias else weight.new_empty(0),
    )


@_layer_norm_backward.register_fake
def _fake_backward(dy, dsummed, summed, weight, mean, rstd, has_bias, need_params, impl):
    return (
        summed.new_empty(summed.shape),
        weight.new_empty(weight.shape if need_params else 0),
        weight.new_empty(weight.shape if need_params and has_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.impl = inputs
    _, summed, mean, rstd = output
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(summed if ctx.has_residual else x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dsummed, _dmean, _drstd):
    """One gradient for x and the residual; either of dy and dsummed may be undefined."""
    dsummed = dsummed if ctx.has_residual else None
    dx, dweight, dbias = dsummed, None, None
    if dy is not None:
        summed, weight, mean, rstd = ctx.saved_tensors
        need_params = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dx, dweight, dbias = _layer_norm_backward(
            dy, dsummed, summed, weight, mean, rstd, ctx.has_bias, need_params, ctx.impl
        )
        dweight = dweight if need_params else None
        dbias = dbias if need_params and ctx.has_bias else None
    return dx, dx if ctx.has_residual else None, dweight, dbias, None, None


_layer_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation over the last dimension, of x or of x + residual.

    Args:
        x: (..., C) bf16/fp16/fp32/fp64.
        weight: (C,), dtype of x.
        bias: (C,), dtype of x, or None.
        eps: added to the variance.
        residual: shape and dtype of x.
    Returns:
        y like x, contiguous; with a residual (y, summed), summed = x + residual in the dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices disagree.
    Cost: `cost.layer_norm`.
    """
    _check(x, weight, bias, residual)
    C = x.shape[-1]
    other = None if residual is None else residual.reshape(-1, C)
    y, summed, _, _ = _layer_norm_forward(x.reshape(-1, C), other, weight, bias, eps, impl)
    y = y.view(x.shape)
    return y if residual is None else (y, summed.view(x.shape))


def _check(x, weight, bias, residual):
    """Raise ValueError for arguments that do not fit together."""
    op = "layer_norm"
    if x.dim() < 1 or x.shape[-1] < 1:
        expect(False, op, "x (..., C) with C >= 1", tuple(x.shape), "Pass rows to normalise")
    expect_dtype(op, "x", x, _FLOATS, "Cast it to a floating dtype")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            expect_shape(op, name, parameter, "(C,)", x.shape[-1:], "Pass the local model width")
            expect_dtype(op, name, parameter, (x.dtype,), "Cast it to the dtype of x")
    if residual is not None:
        expect_shape(op, "residual", residual, "like x", x.shape, "Pass rows of the same tokens")
        expect_dtype(op, "residual", residual, (x.dtype,), "Cast it to the dtype of x")
    expect_same_device(op, x=x, weight=weight, bias=bias, residual=residual)
