"""A fused projection: its bias added, divided into heads, queries and keys rotated, in one pass.

forward:  x = qkv + bias;  q, k, v = heads of x;  q and k rotated as in rope.py
backward: dqkv = [dq turned back | dk turned back | dv];  dbias = sum(dqkv) before it is rounded

Addition and rotation are in fp32, and each value is rounded once. q, k and v are three tensors with
the heads of a token side by side, each dense: attention reads whole rows of them, and the backward
takes three gradients as attention writes them and puts the projection's together without a copy.

dbias: one fp32 partial sum per program, added in a fixed order afterwards; no atomics, so the
result is the same to the bit on every run (of GPUs with as many multiprocessors). Saved: the table.

A Triton program takes a few heads of queries, keys or values and every num_programs-th block of
tokens; the table is read once for those heads, from the L2 cache but for the first of them.

Bytes: qkv is read and q, k and v are written; the backward the other way round.
Source: rotation as in rope.py; partial sums per persistent program as in layer_norm.py.
"""

import torch

from stellarator_kernels import reference
from stellarator_kernels._triton import UNFUSED, tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import dense_rows, multiprocessors
from stellarator_kernels.rope import rope_table, rotate_torch

_OP = "bias_rope"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TILE = 1024  # elements of the first halves of heads that a program holds


@triton.jit
def _part(
    q_ptr, q_stride_token, q_stride_head, k_ptr, k_stride_token, k_stride_head,
    v_ptr, v_stride_token, v_stride_head, H, G, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Where the heads of this program lie: pointer, strides, the first one here and in the whole,
    how many there are, and whether they are rotated, 1 or 0."""
    block = tl.program_id(1)
    key_block, value_block = tl.cdiv(H, BLOCK_H), tl.cdiv(H, BLOCK_H) + tl.cdiv(G, BLOCK_H)
    is_q, rotated = block < key_block, block < value_block
    ptr = tl.where(is_q, q_ptr, tl.where(rotated, k_ptr, v_ptr))
    stride_token = tl.where(is_q, q_stride_token, tl.where(rotated, k_stride_token, v_stride_token))
    stride_head = tl.where(is_q, q_stride_head, tl.where(rotated, k_stride_head, v_stride_head))
    before = tl.where(is_q, 0, tl.where(rotated, key_block, value_block))
    offset = tl.where(is_q, 0, tl.where(rotated, H, H + G))
    num_heads = tl.where(is_q, H, G)
    return (
        ptr,
        stride_token,
        stride_head,
        (block - before) * BLOCK_H,
        offset,
        num_heads,
        tl.where(rotated, 1, 0),
    )


@triton.jit
def _turned(x, y, cos_ptr, sin_ptr, tokens, cols, N, rotated, HALF: tl.constexpr):
    """Both halves (BLOCK_T, BLOCK_H, BLOCK_D) of heads after the rotation, if they have one."""
    inside = (tokens < N) & (cols < HALF * rotated)
    cos = tl.load(cos_ptr + tokens * HALF + cols, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + tokens * HALF + cols, mask=inside, other=0.0)
    turned_x, turned_y = x * cos - y * sin, y * cos + x * sin
    return tl.where(rotated > 0, turned_x, x), tl.where(rotated > 0, turned_y, y)


@triton.jit
def _bias_rope_fwd_kernel(
    qkv_ptr, qkv_stride_token, bias_ptr, cos_ptr, sin_ptr,
    q_ptr, q_stride_token, q_stride_head, k_ptr, k_stride_token, k_stride_head,
    v_ptr, v_stride_token, v_stride_head, N, H, G, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A few heads of every num_programs-th block of tokens."""
    HALF: tl.constexpr = D // 2
    program = tl.program_id(0).to(tl.int64)  # and so is each token
    part_ptr, stride_token, stride_head, first, offset, num_heads, rotated = _part(
        q_ptr, q_stride_token, q_stride_head, k_ptr, k_stride_token, k_stride_head,
        v_ptr, v_stride_token, v_stride_head, H, G, BLOCK_H,
    )  # fmt: skip
    heads = first + tl.arange(0, BLOCK_H)[None, :, None]
    cols = tl.arange(0, BLOCK_D)[None, None, :]
    in_heads = (heads < num_heads) & (cols < HALF)
    in_qkv, in_part = (offset + heads) * D + cols, heads * stride_head + cols
    if HAS_BIAS:
        bias_x = tl.load(bias_ptr + in_qkv, mask=in_heads, other=0.0).to(tl.float32)
        bias_y = tl.load(bias_ptr + in_qkv + HALF, mask=in_heads, other=0.0).to(tl.float32)
    dtype = part_ptr.dtype.element_ty
    for block in range(program, tl.cdiv(N, BLOCK_T), tl.num_programs(0)):
        tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
        inside = (tokens < N) & in_heads
        source = qkv_ptr + tokens * qkv_stride_token + in_qkv
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias_x
            y += bias_y
        if ROTATED:
            x, y = _turned(x, y, cos_ptr, sin_ptr, tokens, cols, N, rotated, HALF)
        target = part_ptr + tokens * stride_token + in_part
        tl.store(target, x.to(dtype), mask=inside)
        tl.store(target + HALF, y.to(dtype), mask=inside)


@triton.jit
def _bias_rope_bwd_kernel(
    dqkv_ptr, dqkv_stride_token, dbias_ptr, cos_ptr, sin_ptr,
    q_ptr, q_stride_token, q_stride_head, k_ptr, k_stride_token, k_stride_head,
    v_ptr, v_stride_token, v_stride_head, N, H, G, D: tl.constexpr,
    NEED_BIAS: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same from gradients of the heads; one partial sum of dbias for all blocks of tokens."""
    HALF: tl.constexpr = D // 2
    program = tl.program_id(0).to(tl.int64)  # and so is each token
    part_ptr, stride_token, stride_head, first, offset, num_heads, rotated = _part(
        q_ptr, q_stride_token, q_stride_head, k_ptr, k_stride_token, k_stride_head,
        v_ptr, v_stride_token, v_stride_head, H, G, BLOCK_H,
    )  # fmt: skip
    heads = first + tl.arange(0, BLOCK_H)[None, :, None]
    cols = tl.arange(0, BLOCK_D)[None, None, :]
    in_heads = (heads < num_heads) & (cols < HALF)
    in_qkv, in_part = (offset + heads) * D + cols, heads * stride_head + cols
    sum_x = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_D), dtype=tl.float32)
    sum_y = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_D), dtype=tl.float32)
    dtype = dqkv_ptr.dtype.element_ty
    for block in range(program, tl.cdiv(N, BLOCK_T), tl.num_programs(0)):
        tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
        inside = (tokens < N) & in_heads
        source = part_ptr + tokens * stride_token + in_part
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        if ROTATED:  # by the negative angle: the halves change places
            y, x = _turned(y, x, cos_ptr, sin_ptr, tokens, cols, N, rotated, HALF)
        if NEED_BIAS:
            sum_x += x
            sum_y += y
        target = dqkv_ptr + tokens * dqkv_stride_token + in_qkv
        tl.store(target, x.to(dtype), mask=inside)
        tl.store(target + HALF, y.to(dtype), mask=inside)
    if NEED_BIAS:
        head, col = first + tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
        target = dbias_ptr + (program * (H + 2 * G) + offset + head) * D + col
        inside = (head < num_heads) & (col < HALF)
        tl.store(target, tl.sum(sum_x, 0), mask=inside)
        tl.store(target + HALF, tl.sum(sum_y, 0), mask=inside)


def tiles(D: int) -> tuple[int, int, int, int]:
    """(BLOCK_T, BLOCK_H, BLOCK_D, num_warps): 8 heads, and tokens for 8 + 8 values a thread."""
    BLOCK_D = triton.next_power_of_2(max(1, D // 2))
    return max(1, _TILE // 8 // BLOCK_D), 8, BLOCK_D, 4


def grid(N: int, H: int, G: int, D: int, multiprocessors: int) -> tuple[int, int]:
    """(programs over tokens, groups of heads): eight programs a multiprocessor in all."""
    BLOCK_T, BLOCK_H, _, _ = tiles(D)
    groups = triton.cdiv(H, BLOCK_H) + 2 * triton.cdiv(G, BLOCK_H)
    most = triton.cdiv(8 * multiprocessors, groups)
    return max(1, min(triton.cdiv(N, BLOCK_T), most)), groups


def _launch(kernel, whole, vector, cos, sin, parts, shape, has_vector):
    """One launch of either kernel; `vector` is the bias, or the partial sums of its gradient."""
    N, H, G, D = shape
    BLOCK_T, BLOCK_H, BLOCK_D, num_warps = tiles(D)
    strided = [value for x in parts for value in (x, x.stride(0), x.stride(1))]
    table = (whole, whole) if cos is None else (cos.contiguous(), sin.contiguous())
    with torch.cuda.device_of(whole):
        kernel[grid(N, H, G, D, multiprocessors(whole.device))](
            whole, whole.stride(0), vector, *table, *strided, N, H, G, D,
            has_vector, cos is not None, BLOCK_T, BLOCK_H, BLOCK_D, num_warps=num_warps, **UNFUSED,
        )  # fmt: skip


def _forward_triton(qkv, bias, cos, sin, H, G):
    """Allocate and launch the forward."""
    qkv, bias = dense_rows(qkv), dense_rows(bias)
    N, D = len(qkv), qkv.shape[1] // (H + 2 * G)
    parts = [qkv.new_empty(N, heads, D) for heads in (H, G, G)]
    if N > 0:
        vector = qkv if bias is None else bias
        shape, given = (N, H, G, D), bias is not None
        _launch(_bias_rope_fwd_kernel, qkv, vector, cos, sin, parts, shape, given)
    return tuple(parts)


def _backward_triton(dq, dk, dv, cos, sin, need_bias):
    """Allocate and launch the backward, then add the partial sums."""
    parts = [dense_rows(x) for x in (dq, dk, dv)]
    (N, H, D), G = dq.shape, dk.shape[1]
    dqkv = dq.new_empty(N, (H + 2 * G) * D)
    programs, _ = grid(N, H, G, D, multiprocessors(dq.device))
    size = (programs, dqkv.shape[1]) if need_bias else (0,)
    sums = dq.new_empty(size, dtype=torch.float32)
    _launch(_bias_rope_bwd_kernel, dqkv, sums, cos, sin, parts, (N, H, G, D), need_bias)
    return dqkv, sums.sum(0).to(dq.dtype) if need_bias else None


def _forward_torch(qkv, bias, cos, sin, H, G):
    """ATen's addition, then rope's rotation; values are divided out by a copy."""
    x = qkv if bias is None else qkv + bias
    parts = x.unflatten(1, (H + 2 * G, -1)).split((H, G, G), 1)
    turned = [part if cos is None else rotate_torch(part, cos, sin) for part in parts[:2]]
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in (*turned, parts[2]))


def _backward_torch(dq, dk, dv, cos, sin, need_bias):
    """The parts joined by a copy; dbias from rounded values, added up in fp32."""
    dtype = reference.compute_dtype(dq)
    turned = [x if cos is None else rotate_torch(x, cos, -sin) for x in (dq, dk)]
    dqkv = torch.cat([x.flatten(1) for x in (*turned, dv)], 1)
    return dqkv, dqkv.sum(0, dtype=dtype).to(dq.dtype) if need_bias else None


@torch.library.custom_op("stellarator::bias_rope_forward", mutates_args=())
def _bias_rope_forward(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, (H + 2G) * D) -> (N, H, D), (N, G, D), (N, G, D)."""
    chosen = choose(_OP, impl, qkv)
    by = {"triton": _forward_triton, "torch": _forward_torch, "reference": reference.bias_rope_ref}
    return by[chosen](qkv, bias, cos, sin, num_heads, num_kv_heads)


@_bias_rope_forward.register_fake
def _fake_forward(qkv, bias, cos, sin, num_heads, num_kv_heads, impl):
    D = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    counts = (num_heads, num_kv_heads, num_kv_heads)
    return tuple(qkv.new_empty(qkv.shape[0], heads, D) for heads in counts)


@torch.library.custom_op("stellarator::bias_rope_backward", mutates_args=())
def _bias_rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    need_bias: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dqkv (N, (H + 2G) * D) and dbias, which is empty if it is not needed."""
    chosen = choose(_OP, impl, dq)
    by = {"triton": _backward_triton, "torch": _backward_torch}
    backward = by.get(chosen, reference.bias_rope_backward_ref)
    dqkv, dbias = backward(dq, dk, dv, cos, sin, need_bias)
    return dqkv, dbias if need_bias else dq.new_empty(0)


@_bias_rope_backward.register_fake
def _fake_backward(dq, dk, dv, cos, sin, need_bias, impl):
    width = (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2]
    return dq.new_empty(dq.shape[0], width), dq.new_empty(width if need_bias else 0)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, _, _, ctx.impl = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk, dv):
    need_bias = ctx.needs_input_grad[1]
    gradients = _bias_rope_backward(dq, dk, dv, *ctx.saved_tensors, need_bias, ctx.impl)
    return gradients[0], gradients[1] if need_bias else None, *(None,) * 5


_bias_rope_forward.register_autograd(_backward, setup_context=_setup_context)


def bias_rope(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
    theta: float | None,
    num_heads: int,
    num_kv_heads: int,
    *,
    table: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a fused projection without its bias, the former two rotated.

    Args:
        qkv: (..., T, (H + 2G) * D) bf16/fp16/fp32/fp64: all heads of Q, then K, then V.
        bias: ((H + 2G) * D,), dtype of qkv, or None.
        positions: (..., T) int64, of any offset, beginning anew in packed documents; None: no RoPE.
        theta: base of the frequencies; None without positions.
        num_heads, num_kv_heads: H and G.
        table: `rope_table(positions, D, theta)`, when the caller has it already.
        impl: "auto", "triton", "torch" or "reference".
    Returns:
        q (..., T, H, D), k and v (..., T, G, D): new tensors, contiguous, dtype of qkv.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or D is odd.
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.bias_rope`.
    """
    H, G = num_heads, num_kv_heads
    D = _check(qkv, bias, positions, theta, H, G, table)
    cos = sin = None
    if positions is not None:
        cos, sin = rope_table(positions, D, theta) if table is None else table
    parts = _bias_rope_forward(qkv.reshape(-1, qkv.shape[-1]), bias, cos, sin, H, G, impl)
    return tuple(part.view(*qkv.shape[:-1], *part.shape[1:]) for part in parts)


def _check(qkv, bias, positions, theta, H, G, table) -> int:
    """The width of a head; ValueError for arguments that do not fit together."""
    fits = qkv.dim() >= 2 and min(H, G) > 0 and qkv.shape[-1] % max(1, H + 2 * G) == 0
    form = f"qkv (..., T, (H + 2G) * D) with H = {H}, G = {G}"
    expect(fits, _OP, form, tuple(qkv.shape), "Pass the fused projection")
    expect_dtype(_OP, "qkv", qkv, _FLOATS, "Cast it to a floating dtype")
    width, D = qkv.shape[-1], qkv.shape[-1] // (H + 2 * G)
    expect(D > 0 and D % 2 == 0, _OP, "an even head width D > 0", D, "Pad the heads")
    if bias is not None:
        expect_shape(_OP, "bias", bias, "((H + 2G) * D,)", (width,), "Pass that of the projection")
        expect_dtype(_OP, "bias", bias, (qkv.dtype,), "Cast it to the dtype of qkv")
    if positions is None:
        alone = table is None and theta is None
        todo = "Pass the positions too, or neither for no RoPE"
        expect(alone, _OP, "no theta and no table without positions", (theta, table), todo)
    else:
        todo = "Pass one position per token"
        expect_shape(_OP, "positions", positions, "(..., T)", qkv.shape[:-1], todo)
        expect_dtype(_OP, "positions", positions, (torch.int64,), "Cast it with .long()")
        known = theta is not None or table is not None
        expect(known, _OP, "theta or a table with positions", None, "Pass the model's rope_theta")
    for name, part in zip(("cos", "sin"), table or (), strict=bool(table)):
        shape, todo = (positions.numel(), D // 2), "Make it with rope_table"
        expect_shape(_OP, name, part, "(N, D/2)", shape, todo)
        expect_dtype(_OP, name, part, (torch.float32,), todo)
        expect_same_device(_OP, qkv=qkv, **{name: part})
    expect_same_device(_OP, qkv=qkv, bias=bias, positions=positions)
    return D
