"""Layer normalisation, with dropout and the residual addition in front of it in the same pass.

forward:  s = x + residual;  y = n * weight + bias,  n = (s - mean) * rstd,  rows of width C
backward: g = dy * weight;  dx = rstd * (g - mean(g) - n * mean(g * n)) + dsummed  (= dresidual)
          dweight = sum(dy * n);  dbias = sum(dy)

s is rounded to the dtype of x first and the statistics are taken of the rounded values, which are
what is stored, so the backward recomputes exactly the n of the forward. Saved: s (or x), weight,
and mean and rstd (N, 1) in fp32. All sums are fp32: the variance is that of centred values, in a
second pass over registers. dweight and dbias: one fp32 partial sum per program, added in a fixed
order afterwards; no atomics, so the result is the same to the bit on every run (of GPUs with as
many multiprocessors).

With dropout s = dropout(x) + residual; dx is masked and scaled in the same way, dresidual is not.
The mask is made from keys of rows and columns (random.py), in the backward again.

The Triton kernels are in norm_kernels.py: a program holds a row in registers. Rows wider than 8192
are refused (registers of the backward, stack of the C++).

In CUDA C++ (csrc/cuda/layer_norm.cu, `impl="cuda"`) a block holds a row of at most 6144, and of
16-bit rows the next one is under way while the sums of this one are made.

The C++ kernel reads a row from memory once and keeps it in fp32 in the nearest cache; its partial
sums are those of blocks of 64 rows or more, whatever the number of threads.

Bytes: forward reads x (and residual), writes y (and s); backward reads dy and s (and dsummed),
writes dx.
Source: Ba et al. 2016, arXiv:1607.06450; partial sums per persistent program: QuACK, Fast-LLM.
"""

import torch

from stellarator_kernels import extension, norm_kernels, reference
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.dropout import check_dropout, dropout_factors
from stellarator_kernels.layout import dense_rows, multiprocessors
from stellarator_kernels.memory import empty_like

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROWS = 512  # of a block that `_parameter_sums` widens


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
    return dx, dweight, dbias, None


def _forward_cuda(x, residual, weight, bias, eps):
    """Allocate and launch the kernel in CUDA C++."""
    x, residual, weight, bias = (dense_rows(t) for t in (x, residual, weight, bias))
    N, C = x.shape
    y, summed = x.new_empty(N, C), None if residual is None else x.new_empty(N, C)
    mean, rstd = (x.new_empty((N, 1), dtype=torch.float32) for _ in range(2))
    plain = {"weight": weight, "bias": bias, "y": y, "summed": summed, "mean": mean, "rstd": rstd}
    with torch.cuda.device_of(x):
        extension.load("_cuda").layer_norm_forward(
            **{"is_bfloat16": x.dtype == torch.bfloat16, "N": N, "C": C, "eps": eps},
            **{"x": extension.rows(x), "residual": extension.rows(residual)},
            **{name: extension.address(t) for name, t in plain.items()},
            stream=extension.stream(x),
        )
    return y, x if residual is None else summed, mean, rstd


def _backward_cuda(dy, dsummed, summed, weight, mean, rstd, has_bias, need_params):
    """Allocate and launch the kernels in CUDA C++."""
    dy, dsummed, summed, weight = (dense_rows(t) for t in (dy, dsummed, summed, weight))
    module, (N, C) = extension.load("_cuda"), summed.shape
    dx, dweight, dbias, partials = summed.new_empty(N, C), None, None, None
    blocks = module.layer_norm_blocks(N, C, multiprocessors(summed.device))
    if need_params:  # without rows no kernel runs
        dweight, dbias = weight.new_zeros(C), weight.new_zeros(C) if has_bias else None
        partials = mean.new_empty(blocks, 2, C)
    plain = {"weight": weight, "mean": mean, "rstd": rstd, "dx": dx}
    plain |= {"dweight": dweight, "dbias": dbias, "partials": partials}
    with torch.cuda.device_of(summed):
        module.layer_norm_backward(
            **{"is_bfloat16": summed.dtype == torch.bfloat16, "N": N, "C": C, "blocks": blocks},
            **{"dy": extension.rows(dy), "dsummed": extension.rows(dsummed)},
            **{"summed": extension.rows(summed)},
            **{name: extension.address(t) for name, t in plain.items()},
            stream=extension.stream(summed),
        )
    return dx, dweight, dbias, None


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
    return dx, *(None if p is None else p.to(weight.dtype) for p in (dweight, dbias)), None


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
    row_keys: torch.Tensor | None = None,
    column_keys: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, summed (empty without a residual: an operator may not return its input), mean, rstd."""
    chosen = choose("layer_norm", impl, x, dropout_p=dropout_p)
    keys = None if row_keys is None else (row_keys, column_keys)
    if chosen == "triton":
        y, summed, mean, rstd = norm_kernels.forward(
            x, residual, weight, bias, eps, centred=True, keys=keys, p=dropout_p
        )
    elif chosen == "reference":
        dropped = dropout_factors(keys, dropout_p, x)
        y, summed, mean, rstd = reference.layer_norm_ref(x, weight, bias, eps, residual, dropped)
        # A formula's result takes the layout of its inputs, an operator's must not.
        y, summed = y.contiguous(), summed.contiguous()
    else:
        x = x if keys is None else _drop(x, keys, dropout_p)
        by = {"cuda": _forward_cuda, "cpu": _forward_cpu, "torch": _forward_torch}[chosen]
        y, summed, mean, rstd = by(x, residual, weight, bias, eps)
    return y, x.new_empty(0) if residual is None else summed, mean, rstd


@_layer_norm_forward.register_fake
def _fake_forward(
    x, residual, weight, bias, eps, impl, row_keys=None, column_keys=None, dropout_p=0.0
):
    mean, rstd = (x.new_empty((x.shape[0], 1), dtype=reference.compute_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


def _drop(x: torch.Tensor, keys, p: float) -> torch.Tensor:
    """dropout(x), rounded to its dtype."""
    return reference.dropout_ref(x, dropout_factors(keys, p, x))


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
    row_keys: torch.Tensor | None = None,
    column_keys: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias, dresidual; empty if not needed, dresidual also where dx is the same."""
    chosen = choose("layer_norm", impl, summed, dropout_p=dropout_p)
    keys = None if row_keys is None else (row_keys, column_keys)
    rows = (dy, dsummed, summed, weight, mean, rstd)
    if chosen == "triton":
        gradients = norm_kernels.backward(*rows, has_bias, need_params, keys=keys, p=dropout_p)
    elif chosen == "reference":
        dropped = dropout_factors(keys, dropout_p, summed)
        rows = (dy, summed, weight, mean, rstd, dsummed)
        gradients = reference.layer_norm_backward_ref(*rows, dropped)
    else:
        by = {"cuda": _backward_cuda, "cpu": _backward_cpu, "torch": _backward_torch}[chosen]
        gradients = by(*rows, has_bias, need_params)
        if keys is not None:
            gradients = _drop(gradients[0], keys, dropout_p), *gradients[1:3], gradients[0]
    return (
        gradients[0].contiguous(),
        gradients[1] if need_params else weight.new_empty(0),
        gradients[2] if need_params and has_bias else weight.new_empty(0),
        gradients[3].contiguous() if keys is not None else summed.new_empty(0),
    )


@_layer_norm_backward.register_fake
def _fake_backward(
    dy, dsummed, summed, weight, mean, rstd, has_bias, need_params, impl, row_keys=None,
    column_keys=None, dropout_p=0.0,
):  # fmt: skip
    return (
        summed.new_empty(summed.shape),
        weight.new_empty(weight.shape if need_params else 0),
        weight.new_empty(weight.shape if need_params and has_bias else 0),
        summed.new_empty(summed.shape if row_keys is not None else 0),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.impl, row_keys, column_keys, ctx.dropout_p = inputs
    _, summed, mean, rstd = output
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    kept = summed if ctx.has_residual else x
    ctx.save_for_backward(kept, weight, mean, rstd, row_keys, column_keys)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dsummed, _dmean, _drstd):
    """Without dropout one gradient for x and the residual; dy or dsummed may be undefined."""
    summed, weight, mean, rstd, row_keys, column_keys = ctx.saved_tensors
    dsummed = dsummed if ctx.has_residual else None
    dx, dweight, dbias, dresidual = dsummed, None, None, dsummed
    if dy is None and row_keys is not None and dsummed is not None:
        dy = torch.zeros_like(dsummed)
    if dy is not None:
        need_params = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dx, dweight, dbias, dresidual = _layer_norm_backward(
            dy, dsummed, summed, weight, mean, rstd, ctx.has_bias, need_params, ctx.impl,
            row_keys, column_keys, ctx.dropout_p,
        )  # fmt: skip
        dweight = dweight if need_params else None
        dbias = dbias if need_params and ctx.has_bias else None
        dresidual = dx if row_keys is None else dresidual
    return dx, dresidual if ctx.has_residual else None, dweight, dbias, *(None,) * 5


_layer_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    dropout_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation over the last dimension, of x or of dropout(x) + residual.

    Args:
        x: (..., C) bf16/fp16/fp32/fp64.
        weight: (C,), dtype of x.
        bias: (C,), dtype of x, or None.
        eps: added to the variance.
        residual: shape and dtype of x.
        dropout_p: probability in [0, 1) with which an element of x becomes 0 before the residual is
            added; the others are divided by 1 - dropout_p.
        dropout_keys: `random.matrix_keys` of the N rows and C columns, needed for dropout.
        impl: "auto", "triton", "cuda", "cpu" (dropout of both is torch's), "torch" or "reference".
    Returns:
        y like x, contiguous; with a residual (y, summed), summed = dropout(x) + residual in the
        dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or dropout without a residual or keys.
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.layer_norm`.
    """
    _check(x, weight, bias, residual)
    keys = check_dropout("layer_norm", x, residual, dropout_p, dropout_keys)
    C = x.shape[-1]
    other = None if residual is None else residual.reshape(-1, C)
    y, summed, _, _ = _layer_norm_forward(
        x.reshape(-1, C), other, weight, bias, eps, impl, *keys, float(dropout_p)
    )
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
