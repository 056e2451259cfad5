"""Matrix products of a layer, with what stands in front of them computed again in the backward.

defines: linear, layer_norm_linear, bias_gelu_linear

    linear             y = x @ weight^T + bias
    layer_norm_linear  y = linear(layer_norm(x + residual)), and the sum
    bias_gelu_linear   y = linear(gelu(x + bias))

The backward of a product needs its input. A norm or a gelu in front of it is cheap to compute from
what is kept anyway: of the widest tensors of a transformer half as many are kept. Its bits are the
same the second time, so the gradients are those of the ops one after the other, to the bit.

backward: dx = dy @ weight;  dweight = dy^T @ x;  dbias = sum(dy)

Each is made of registered operators: `stellarator::product` (ATen's product into memory that is
used again, see memory.py and widened.py), `stellarator::weight_gradient` (the same; in bf16 on AMX
the C++ of csrc/cpu/weight_gradient.h), and those of layer_norm.py and bias_gelu.py. A pair has no
implementations of its own: `explain` answers for the op in front and for `linear`.

Under autocast they do what F.linear does: the product is in autocast's dtype.

Each takes memory to add dweight to, unrounded, with `add_weight_gradient_` where that has a kernel
(Triton, C++ on AMX) or ATen multiplies in fp32 anyway (widened.py). Elsewhere autograd hands the
gradient on as ever.
"""

import math
from collections.abc import Callable

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels.bias_gelu import bias_gelu
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.dropout import check_dropout
from stellarator_kernels.layer_norm import layer_norm
from stellarator_kernels.layout import dense_rows
from stellarator_kernels.memory import aligned_bytes, empty_like
from stellarator_kernels.widened import multiply, widens

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ops = torch.ops.stellarator
Room = Callable[[], torch.Tensor]  # gives the memory for a gradient when the backward needs it


@torch.library.custom_op("stellarator::product", mutates_args=())
def _product(
    left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None, impl: str = "auto"
) -> torch.Tensor:
    """(N, K) @ (K, M) + bias (M,), of any strides -> (N, M). An `impl` that cannot run raises."""
    if choose("linear", impl, left) == "reference":
        return reference.product_ref(left, right, bias)
    out = empty_like(left, left.shape[0], right.shape[1])
    return multiply(left, right, bias, out=out)


@_product.register_fake
def _fake_product(left, right, bias=None, impl="auto"):
    return left.new_empty(left.shape[0], right.shape[1])


@torch.library.custom_op("stellarator::weight_gradient", mutates_args=())
def _weight_gradient(dy: torch.Tensor, x: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """dy^T @ x, (N, M) and (N, K) -> (M, K)."""
    expect_dtype("weight_gradient", "x", x, (dy.dtype,), "Cast it to the dtype of dy")
    chosen = choose("linear", impl, dy)
    if chosen == "reference":
        return reference.product_ref(dy.t(), x)
    out = empty_like(dy, dy.shape[1], x.shape[1])
    if chosen != "cpu" or not dy.numel():
        return multiply(dy.t(), x, out=out)
    _run_cpu(dy, x, out.data_ptr(), 0)
    return out


def add_weight_gradient(total: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    """total (M, K) fp32 += dy^T @ x, unrounded; only where `linear` is in C++."""
    _run_cpu(dy, x, 0, total.data_ptr())


def _run_cpu(dy, x, dweight: int, total: int) -> None:
    """Call the C++ kernel with the address of one of its two results."""
    dy, x = dense_rows(dy), dense_rows(x)
    module, isa, threads = extension.load(), extension.isa(), torch.get_num_threads()
    workspace, start = aligned_bytes(module.weight_gradient_workspace(threads, isa))
    module.weight_gradient(
        **{"N": dy.shape[0], "M": dy.shape[1], "K": x.shape[1]},
        **{"dy": extension.rows(dy), "x": extension.rows(x), "dweight": dweight, "total": total},
        **{"workspace": start, "threads": threads, "isa": isa},
    )
    del workspace  # it had to live until here


@_weight_gradient.register_fake
def _fake_weight_gradient(dy, x, impl="auto"):
    return dy.new_empty(dy.shape[1], x.shape[1])


def of_product(impl: str) -> str:
    """The `impl` of the product in a pair whose other op was given `impl`: it has fewer."""
    return impl if impl in ("torch", "reference") else "auto"


def _autocast(x: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def gradient_or_add(
    dy: torch.Tensor, x: torch.Tensor, impl: str, room: Room | None
) -> torch.Tensor | None:
    """dy^T @ x, (N, M) and (N, K); None where it was added to what `room` gives."""
    if room is not None and impl != "reference":
        chosen = choose("add_weight_gradient_", "torch" if impl == "torch" else "auto", dy, x=x)
        if chosen in ("triton", "cpu") or widens(dy.dtype, dy.device):
            total, shape = room(), (dy.shape[1], x.shape[1])
            dtypes = (reference.compute_dtype(dy),)
            expect_dtype("linear", "what room gives", total, dtypes, "Sum gradients in it")
            expect_shape("linear", "what room gives", total, "(out, in)", shape, "Give its place")
            dense = total.is_contiguous()
            expect(dense, "linear", "a contiguous room", total.stride(), "Give a dense view")
            with torch.no_grad():
                _ops.add_weight_gradient_(total, dy, x, chosen)
            return None
    return _weight_gradient(dy, x, impl)


def _parameter_gradients(ctx, dy, make_input, first: int, impl: str):
    """dweight and dbias of the product, whose place among the inputs is `first`; None: unneeded."""
    dweight = dbias = None
    if ctx.needs_input_grad[first]:
        dweight = gradient_or_add(dy, make_input(), impl, ctx.room)
    if ctx.needs_input_grad[first + 1]:
        dbias = dy.sum(0)
    return dweight, dbias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, impl, room):
        ctx.impl, ctx.room = impl, room
        ctx.save_for_backward(x, weight)
        return _product(x, weight.t(), bias, impl)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dweight, dbias = _parameter_gradients(ctx, dy, lambda: x, 1, ctx.impl)
        dx = _product(dy, weight, None, ctx.impl) if ctx.needs_input_grad[0] else None
        return dx, dweight, dbias, None, None


class _LayerNormLinear(torch.autograd.Function):
    """Inputs: rows, residual rows or None, weight and bias of the norm, and of the product."""

    @staticmethod
    def forward(ctx, x, residual, norm_weight, norm_bias, weight, bias, eps, impl, room, *dropout):
        y, summed, mean, rstd = _ops.layer_norm_forward(
            x, residual, norm_weight, norm_bias, eps, impl, *dropout
        )
        ctx.eps, ctx.impl, ctx.room, ctx.has_residual = eps, impl, room, residual is not None
        kept, (*keys, ctx.dropout_p) = summed if ctx.has_residual else x, dropout
        ctx.save_for_backward(kept, norm_weight, norm_bias, mean, rstd, weight, *keys)
        ctx.set_materialize_grads(False)
        return _product(y, weight.t(), bias, of_product(impl)), summed

    @staticmethod
    def backward(ctx, dout, dsummed):
        summed, norm_weight, norm_bias, mean, rstd, weight, *keys = ctx.saved_tensors
        dsummed = dsummed if ctx.has_residual else None
        if dout is None and (keys[0] is None or dsummed is None):
            return dsummed, dsummed if ctx.has_residual else None, *(None,) * 10
        dout = summed.new_zeros(len(summed), len(weight)) if dout is None else dout

        def normalised():
            return _ops.layer_norm_forward(summed, None, norm_weight, norm_bias, ctx.eps, ctx.impl)[
                0
            ]

        impl = of_product(ctx.impl)
        dweight, dbias = _parameter_gradients(ctx, dout, normalised, 4, impl)
        need_params = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        has_bias = norm_bias is not None
        dx, dnorm_weight, dnorm_bias, dresidual = _ops.layer_norm_backward(
            _product(dout, weight, None, impl), dsummed, summed, norm_weight, mean, rstd, has_bias,
            need_params, ctx.impl, *keys, ctx.dropout_p,
        )  # fmt: skip
        dresidual = dx if keys[0] is None else dresidual
        return (
            dx,
            dresidual if ctx.has_residual else None,
            dnorm_weight if need_params else None,
            dnorm_bias if need_params and has_bias else None,
            *(dweight, dbias, *(None,) * 6),
        )


class _BiasGeluLinear(torch.autograd.Function):
    """Inputs: rows, bias of the gelu or None, weight and bias of the product."""

    @staticmethod
    def forward(ctx, x, gelu_bias, weight, bias, approximate, impl, room):
        ctx.approximate, ctx.impl, ctx.room = approximate, impl, room
        ctx.save_for_backward(x, gelu_bias, weight)
        y = _ops.bias_gelu_forward(x, gelu_bias, approximate, impl)
        return _product(y, weight.t(), bias, of_product(impl))

    @staticmethod
    def backward(ctx, dout):
        x, gelu_bias, weight = ctx.saved_tensors
        impl = of_product(ctx.impl)
        dx, dgelu_bias, y = _ops.bias_gelu_backward(
            _product(dout, weight, None, impl), x, gelu_bias, ctx.approximate, ctx.impl,
            need_y=ctx.needs_input_grad[2],
        )  # fmt: skip
        dweight, dbias = _parameter_gradients(ctx, dout, lambda: y, 2, impl)
        return dx, None if gelu_bias is None else dgelu_bias, dweight, dbias, None, None, None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    room: Room | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """x @ weight^T + bias.

    Args:
        x: (..., in) bf16/fp16/fp32/fp64.
        weight: (out, in), dtype of x.
        bias: (out,), dtype of x, or None.
        room: gives (out, in) fp32 (fp64 for fp64), contiguous, when the backward has the gradient
            of the weight. A kernel that can, or ATen where it multiplies in fp32, adds it there,
            unrounded, and autograd hands on none; else autograd does, as if there were no room.
            Not under autocast.
        impl: "auto", "cpu" (the weight gradient in C++, bf16 on AMX; ATen's other products),
            "torch" (all ATen's) or "reference".
    Returns:
        (..., out), contiguous, the dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.linear`.
    """
    if _autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, room = x.to(dtype), weight.to(dtype), None
        bias = None if bias is None else bias.to(dtype)
    _check("linear", x, weight, bias)
    return _Linear.apply(rows_of(x), weight, bias, impl, room).view(*x.shape[:-1], weight.shape[0])


def layer_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    dropout_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    room: Room | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """linear(layer_norm(x), weight, bias), or of x + residual; the normalised rows are not kept.

    Args:
        x: (..., C) bf16/fp16/fp32/fp64.
        norm_weight, norm_bias: (C,), the latter may be None.
        weight, bias: (out, C) and (out,) or None.
        eps: added to the variance.
        residual: shape and dtype of x.
        dropout_p, dropout_keys: as of `layer_norm`.
        room: as of `linear`, for the weight of the product.
        impl: of the norm; "torch" and "reference" also of the product.
    Returns:
        y (..., out); with a residual (y, summed), summed = x + residual in the dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices disagree.
    Cost: `cost.layer_norm` and `linear`, and in the backward once more the forward of the norm.
    """
    if _autocast(x):  # the product has another dtype than the norm
        options = {"dropout_p": dropout_p, "dropout_keys": dropout_keys, "impl": impl}
        y = layer_norm(x, norm_weight, norm_bias, eps, residual, **options)
        y, *summed = (y,) if residual is None else y
        y = linear(y, weight, bias, impl=of_product(impl))
        return (y, *summed) if summed else y
    op = "layer_norm_linear"
    _check(op, x, weight, bias)
    check_vectors(op, x, norm_weight=norm_weight, norm_bias=norm_bias)
    check_residual(op, x, residual)
    keys = check_dropout(op, x, residual, dropout_p, dropout_keys)
    y, summed = _LayerNormLinear.apply(
        rows_of(x), None if residual is None else rows_of(residual), norm_weight, norm_bias,
        weight, bias, eps, impl, room, *keys, float(dropout_p),
    )  # fmt: skip
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if residual is None else (y, summed.view(x.shape))


def bias_gelu_linear(
    x: torch.Tensor,
    gelu_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    approximate: str = "tanh",
    room: Room | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """linear(bias_gelu(x, gelu_bias), weight, bias); the activated rows are not kept.

    Args:
        x: (..., F) bf16/fp16/fp32/fp64.
        gelu_bias: (F,) or None.
        weight, bias: (out, F) and (out,) or None.
        approximate: "tanh" or "none" (erf).
        room: as of `linear`.
        impl: of the gelu; "torch" and "reference" also of the product.
    Returns:
        (..., out), contiguous, the dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices disagree.
    Cost: `cost.bias_gelu` and `linear`, and in the backward once more the forward of the gelu.
    """
    if _autocast(x):
        y = bias_gelu(x, gelu_bias, approximate=approximate, impl=impl)
        return linear(y, weight, bias, impl=of_product(impl))
    op = "bias_gelu_linear"
    _check(op, x, weight, bias)
    check_vectors(op, x, gelu_bias=gelu_bias)
    forms = ("tanh", "none")
    expect(approximate in forms, op, f"approximate in {forms}", repr(approximate), "Use one")
    y = _BiasGeluLinear.apply(rows_of(x), gelu_bias, weight, bias, approximate, impl, room)
    return y.view(*x.shape[:-1], weight.shape[0])


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """(N, width)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check(op, x, weight, bias):
    """Raise ValueError for a product whose arguments do not fit together."""
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        form = "x (..., in) and weight (out, in)"
        got = (tuple(x.shape), tuple(weight.shape))
        expect(False, op, form, got, "Pass the weight as torch.nn.Linear has it")
    expect_dtype(op, "x", x, _FLOATS, "Cast it to a floating dtype")
    expect_dtype(op, "weight", weight, (x.dtype,), "Cast it to the dtype of x")
    if bias is not None:
        expect_shape(op, "bias", bias, "(out,)", weight.shape[:1], "Pass one value per output")
        expect_dtype(op, "bias", bias, (x.dtype,), "Cast it to the dtype of x")
    expect_same_device(op, x=x, weight=weight, bias=bias)


def check_residual(op, x, residual):
    """Raise ValueError unless rows that are added to x are like x."""
    if residual is not None:
        expect_shape(op, "residual", residual, "like x", x.shape, "Pass rows of the same tokens")
        expect_dtype(op, "residual", residual, (x.dtype,), "Cast it to the dtype of x")
        expect_same_device(op, x=x, residual=residual)


def check_vectors(op, x, **vectors):
    """Raise ValueError unless each vector that is there is as wide as x."""
    for name, vector in vectors.items():
        if vector is not None:
            expect_shape(op, name, vector, "(width of x,)", x.shape[-1:], "Pass that width")
            expect_dtype(op, name, vector, (x.dtype,), "Cast it to the dtype of x")
            expect_same_device(op, x=x, **{name: vector})
