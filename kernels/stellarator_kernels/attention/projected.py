"""Attention on the result of a fused projection, with RoPE in front of it.

defines: projected_attention, adds_bias

    q, k, v = split(qkv + bias);  out = flash_attention(rope(q), rope(k), v)

The gradient of the projection is one tensor. Op by op autograd would put it together from three,
with a copy of all; here the C++ kernels write it in place, and RoPE turns it there. On a GPU
`bias_rope` divides, turns and adds the bias in one pass, and its backward puts the gradient
together and sums that of the bias. Elsewhere it is put together from the gradients of the ops,
which are the same to the bit. With RoPE q, k and v are kept instead of the projection.
"""

import torch

from stellarator_kernels import dispatch
from stellarator_kernels.attention import cpu
from stellarator_kernels.attention.api import check_call
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.memory import empty_like
from stellarator_kernels.rope import rotate_into

_OP = "projected_attention"
_ops = torch.ops.stellarator


def _heads(qkv: torch.Tensor, H: int, G: int) -> list[torch.Tensor]:
    """Views (B, T, H or G, D) of (B, T, (H + 2G) * D)."""
    D = qkv.shape[-1] // (H + 2 * G)
    return list(qkv.unflatten(-1, (H + 2 * G, D)).split([H, G, G], dim=2))


@torch.library.custom_op("stellarator::projected_attention_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    window: int | None,
    scale: float,
    impl: str,
) -> torch.Tensor:
    """dqkv; q and k are rotated."""
    (B, T, H, D), G = q.shape, k.shape[2]
    if q.numel() and dispatch.choose("flash_attention", impl, q) == "cpu":
        dqkv = empty_like(q, B, T, (H + 2 * G) * D)
        into = _heads(dqkv, H, G)
        _attend_backward_cpu(dout, q, k, v, out, lse, cu_seqlens, window, scale, into)
        if cos is not None:
            dq, dk = (x.view(B * T, -1, D) for x in into[:2])
            rotate_into(dq, dk, dq, dk, cos.contiguous(), sin.contiguous(), True)
        return dqkv
    if cu_seqlens is not None:
        flat = [x.flatten(0, 1)[None] for x in (dout, q, k, v, out)]
    else:
        flat = [dout, q, k, v, out]
    dq, dk, dv = _ops.flash_attention_backward(
        flat[0],
        None,
        *flat[1:],
        lse,
        cu_seqlens,
        None,
        None,
        True,
        window,
        scale,
        None,
        0.0,
        True,
        impl,
    )
    if cos is not None:
        dq, dk = _ops.rope_backward(dq.view(B * T, H, D), dk.view(B * T, G, D), cos, sin, impl)
    shapes = ((B, T, H * D), (B, T, G * D), (B, T, G * D))
    parts = zip((dq, dk, dv), shapes, strict=True)
    return torch.cat([x.reshape(shape) for x, shape in parts], dim=-1)


def _attend_backward_cpu(dout, q, k, v, out, lse, cu_seqlens, window, scale, into):
    """The C++ kernel; packed documents are one row for it."""
    tensors = [dout, q, k, v, out, *into]
    if cu_seqlens is not None:
        tensors = [x.flatten(0, 1)[None] for x in tensors]
    dout, q, k, v, out, *into = tensors
    cpu.backward(dout, None, q, k, v, out, lse, cu_seqlens, True, window, scale, into)


@_backward_op.register_fake
def _fake_backward(dout, q, k, v, out, lse, cos, sin, cu_seqlens, window, scale, impl):
    (B, T, H, D), G = q.shape, k.shape[2]
    return q.new_empty(B, T, (H + 2 * G) * D)


class _DividedAttention(torch.autograd.Function):
    """`bias_rope` and attention on its three results, of their own."""

    @staticmethod
    def forward(ctx, qkv, bias, cos, sin, H, G, cu_seqlens, window, impl):
        B, T, width = qkv.shape
        D = width // (H + 2 * G)
        rows = _ops.bias_rope_forward(qkv.view(B * T, width), bias, cos, sin, H, G, "triton")
        shape = (B, T) if cu_seqlens is None else (1, B * T)
        rows = [x.view(*shape, *x.shape[1:]) for x in rows]
        ctx.options = (True, window, D**-0.5, None, 0.0)
        ctx.impl, ctx.has_bias = impl, bias is not None
        out, lse = _ops.flash_attention_forward(
            *rows, cu_seqlens, None, None, *ctx.options, False, True, impl
        )
        ctx.save_for_backward(*rows, out, lse, cos, sin, cu_seqlens)
        return out.view(B, T, H, D)

    @staticmethod
    def backward(ctx, dout):
        *rows, out, lse, cos, sin, cu_seqlens = ctx.saved_tensors
        parts = _ops.flash_attention_backward(
            dout.reshape(out.shape), None, *rows, out, lse, cu_seqlens, None, None,
            *ctx.options, True, ctx.impl,
        )  # fmt: skip
        need_bias = ctx.has_bias and ctx.needs_input_grad[1]
        parts = [x.flatten(0, 1) for x in parts]
        dqkv, dbias = _ops.bias_rope_backward(*parts, cos, sin, need_bias, "triton")
        dqkv = dqkv.view(*dout.shape[:2], -1)
        return dqkv, dbias if need_bias else None, *(None,) * 7


def adds_bias(x: torch.Tensor, impl: str) -> bool:
    """Whether a projection of x may leave its bias to `projected_attention`, at no cost.

    Not in a graph of torch.compile, which cannot ask the dispatcher.
    """
    if torch.compiler.is_compiling() or impl not in ("auto", "triton"):
        return False
    return dispatch.choose("bias_rope", impl, x) == "triton"


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, H, G, cu_seqlens, window, impl):
        q, k, v = _heads(qkv, H, G)
        B, T, _, D = q.shape
        if cos is not None:
            q, k = _ops.rope_forward(q.reshape(B * T, H, D), k.reshape(B * T, G, D), cos, sin, impl)
            q, k = q.view(B, T, H, D), k.view(B, T, G, D)
            v = v.contiguous()  # of its own, so that the projection is freed
        rows = [q, k, v]
        if cu_seqlens is not None:
            rows = [x.flatten(0, 1)[None] for x in rows]
        scale = D**-0.5
        ctx.options = (window, scale, impl)
        out, lse = _ops.flash_attention_forward(
            *rows, cu_seqlens, None, None, True, window, scale, None, 0.0, False, True, impl
        )
        out = out.view(B, T, H, D)
        ctx.save_for_backward(q, k, v, out, lse, cos, sin, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cos, sin, cu_seqlens = ctx.saved_tensors
        dqkv = _ops.projected_attention_backward(
            dout, q, k, v, out, lse, cos, sin, cu_seqlens, *ctx.options
        )
        return (dqkv, *(None,) * 7)


def projected_attention(
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    table: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    bias: torch.Tensor | None = None,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Causal attention of a fused projection, whose gradient is written in one piece.

    Args:
        qkv: (B, T, (H + 2G) * D) bf16/fp16/fp32/fp64: all heads of Q, then K, then V.
        num_heads, num_kv_heads: H and G, H a multiple of G.
        table: cos and sin (B*T, D/2) of `rope_table`; None: no RoPE.
        bias: ((H + 2G) * D,) of the projection if it is not in qkv yet, dtype of qkv; `adds_bias`
            tells where that is better.
        window: keys that a query sees at most, its own included; None: all before it.
        cu_seqlens: (E+1,) int32: bounds of documents over the B*T flattened tokens; None: a row is
            one document.
        impl: of the ops; see `rope`, `bias_rope` and `flash_attention`.
    Returns:
        (B, T, H, D), the dtype of qkv.
    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.rope` and `cost.flash_attention`.
    """
    H, G = num_heads, num_kv_heads
    fits = qkv.dim() == 3 and min(H, G) > 0 and H % G == 0 and qkv.shape[-1] % (H + 2 * G) == 0
    form = f"qkv (B, T, (H + 2G) * D) with H = {H}, G = {G}, H % G == 0"
    expect(fits, _OP, form, tuple(qkv.shape), "Pass the fused projection")
    cos = sin = None
    if table is not None:
        B, T, width = qkv.shape
        D = width // (H + 2 * G)
        expect(D % 2 == 0, _OP, "an even head width D for RoPE", D, "Pass table=None without RoPE")
        for name, part in zip(("cos", "sin"), table, strict=True):
            shape = (B * T, D // 2)
            expect_shape(_OP, name, part, "(B*T, D/2)", shape, "Make it with rope_table")
            expect_dtype(_OP, name, part, (torch.float32,), "Make it with rope_table")
        cos, sin = table
    check_call(*_rows_of(qkv, H, G, cu_seqlens), True, window, cu_seqlens)
    if bias is not None:
        width = qkv.shape[-1:]
        expect_shape(_OP, "bias", bias, "((H + 2G) * D,)", width, "Pass that of the projection")
        expect_dtype(_OP, "bias", bias, (qkv.dtype,), "Cast it to the dtype of qkv")
        expect_same_device(_OP, qkv=qkv, bias=bias)
    if adds_bias(qkv, impl):
        options = (H, G, cu_seqlens, window, impl)
        return _DividedAttention.apply(qkv.contiguous(), bias, cos, sin, *options)
    qkv = qkv if bias is None else qkv + bias
    return _ProjectedAttention.apply(qkv, cos, sin, H, G, cu_seqlens, window, impl)


def _rows_of(qkv, H, G, cu_seqlens):
    """q, k and v in the form that flash_attention takes."""
    heads = _heads(qkv, H, G)
    return heads if cu_seqlens is None else [x.flatten(0, 1) for x in heads]
