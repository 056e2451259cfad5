"""Rotary position embedding of queries and keys, rotate-half layout, both in one call.

forward:  y[i] = x[i] * cos - x[i + D/2] * sin;  y[i + D/2] = x[i + D/2] * cos + x[i] * sin
backward: the same rotation by the negative angle; only the table is saved.

Angles are position * theta^(-2i/D), i < D/2, in fp32 and in Hugging Face's order of operations.
`rope_table` computes their cosines and sines once for all layers of a step. Every implementation
reads 16-bit values, rotates them in fp32 and rounds once.

Bytes: q and k are read and written once; the fp32 table is read once per token.
Source: Su et al. 2021, arXiv:2104.09864.
"""

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels._triton import UNFUSED, tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.memory import empty_like
from stellarator_kernels.reference import rope_table

__all__ = ["rope", "rope_table"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements of one fp32 block on a CPU: two such blocks stay in a 2 MiB cache.
_BLOCK_ELEMENTS = 1 << 18


@triton.jit
def _rotate_heads(
    x_ptr, x_stride, y_ptr, cos, sin, start, num_heads, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate heads start .. start + BLOCK_H of one token; x_stride is between heads."""
    HALF: tl.constexpr = D // 2
    heads = start + tl.arange(0, BLOCK_H)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < num_heads) & (cols < HALF)
    x_ptr += heads * x_stride + cols
    first = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    y_ptr += heads * D + cols
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(y_ptr + HALF, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _rope_kernel(
    q_ptr, q_stride_token, q_stride_head, k_ptr, k_stride_token, k_stride_head,
    q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, H, G,
    D: tl.constexpr, CONJUGATE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token: all heads of q, then all heads of k. Outputs are contiguous."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    table = token * (D // 2) + cols
    cos = tl.load(cos_ptr + table, mask=cols < D // 2, other=0.0)
    sin = tl.load(sin_ptr + table, mask=cols < D // 2, other=0.0)
    sin = -sin if CONJUGATE else sin
    q_ptr += token * q_stride_token
    k_ptr += token * k_stride_token
    q_out_ptr += token * H * D
    k_out_ptr += token * G * D
    for start in range(0, H, BLOCK_H):
        _rotate_heads(
            q_ptr, q_stride_head, q_out_ptr, cos, sin, start, H, D, BLOCK_H, BLOCK_D
        )  # fmt: skip
    for start in range(0, G, BLOCK_H):
        _rotate_heads(
            k_ptr, k_stride_head, k_out_ptr, cos, sin, start, G, D, BLOCK_H, BLOCK_D
        )  # fmt: skip


def tiles(H: int, D: int) -> tuple[int, int, int]:
    """(BLOCK_H, BLOCK_D, num_warps): 16 heads at most, one half of a head wide."""
    BLOCK_D = triton.next_power_of_2(max(1, D // 2))
    BLOCK_H = min(16, triton.next_power_of_2(max(1, H)))
    return BLOCK_H, BLOCK_D, 4 if BLOCK_H * BLOCK_D >= 512 else 1


def _rotate_triton(q, k, cos, sin, conjugate):
    """Launch the kernel; heads may be strided, the elements of one head may not."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    (M, H, D), G = q.shape, k.shape[1]
    BLOCK_H, BLOCK_D, num_warps = tiles(max(H, G), D)
    if M > 0:
        with torch.cuda.device_of(q):
            _rope_kernel[(M,)](
                q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), q_out, k_out, cos, sin,
                H, G, D, conjugate, BLOCK_H, BLOCK_D, num_warps=num_warps, **UNFUSED,
            )  # fmt: skip
    return q_out, k_out


def _rotate_cpu(q, k, cos, sin, conjugate):
    """Call the C++ kernel; heads may be strided, the elements of one head may not."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out = empty_like(q), empty_like(k)
    rotate_into(q_out, k_out, q, k, cos, sin, conjugate)
    return q_out, k_out


def rotate_into(q_out, k_out, q, k, cos, sin, conjugate):
    """The C++ kernel: (M, H, D) and (M, G, D) of any strides but 1 in a head; may be in place."""
    heads = {"q": q, "k": k, "q_out": q_out, "k_out": k_out}
    extension.load().rope(
        **{"is_bfloat16": q.dtype == torch.bfloat16, "conjugate": conjugate},
        **{"M": q.shape[0], "D": q.shape[2], "cos": cos.data_ptr(), "sin": sin.data_ptr()},
        **{n: (x.data_ptr(), *x.stride()[:2], x.shape[1]) for n, x in heads.items()},
        **{"threads": torch.get_num_threads(), "isa": extension.isa()},
    )


def rotate_torch(x, cos, sin):
    """The rotation with ATen's elementwise kernels.

    On a CPU by blocks of tokens that stay in the cache in fp32: as fast as 16-bit arithmetic over
    the whole tensor (which rounds four times), and 1.4 to 3 times faster than eager code.
    """
    dtype = reference.compute_dtype(x)
    M, H, D = x.shape
    y = empty_like(x)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    rows = max(1, M if x.device.type != "cpu" else min(M, _BLOCK_ELEMENTS // max(1, H * D)))
    x32 = y32 = None
    if x.dtype != dtype:
        x32, y32 = (torch.empty(rows, H, D, dtype=dtype, device=x.device) for _ in range(2))
    for start in range(0, M, rows):
        block = slice(start, min(M, start + rows))
        source = x[block] if x32 is None else x32[: block.stop - start].copy_(x[block])
        target = y[block] if y32 is None else y32[: block.stop - start]
        (first, second), (y_first, y_second) = source.chunk(2, -1), target.chunk(2, -1)
        torch.mul(first, cos[block], out=y_first).addcmul_(second, sin[block], value=-1)
        torch.mul(second, cos[block], out=y_second).addcmul_(first, sin[block])
        if y32 is not None:
            y[block] = target
    return y


def _rotate(q, k, cos, sin, conjugate, impl):
    """Both tensors by the chosen implementation."""
    chosen = choose("rope", impl, q)
    if chosen in ("triton", "cpu"):
        rotate = _rotate_triton if chosen == "triton" else _rotate_cpu
        return rotate(q, k, cos, sin, conjugate)
    sin = -sin if conjugate else sin
    rotate = rotate_torch if chosen == "torch" else reference.rope_ref
    return rotate(q, cos, sin), rotate(k, cos, sin)


@torch.library.custom_op("stellarator::rope_forward", mutates_args=())
def _rope_forward(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotate(q, k, cos, sin, False, impl)


@torch.library.custom_op("stellarator::rope_backward", mutates_args=())
def _rope_backward(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotate(dq, dk, cos, sin, True, impl)


@_rope_forward.register_fake
@_rope_backward.register_fake
def _fake(q, k, cos, sin, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.impl = inputs
    ctx.save_for_backward(cos, sin)
    ctx.set_materialize_grads(False)


def _backward(ctx, dq, dk):
    given = dq if dq is not None else dk
    if given is None:
        return None, None, None, None, None
    # An output that was not used has no gradient: zero heads stand for it and cost nothing.
    none = given.new_empty(given.shape[0], 0, given.shape[2])
    cos, sin = ctx.saved_tensors
    dq_in, dk_in = _rope_backward(
        none if dq is None else dq, none if dk is None else dk, cos, sin, ctx.impl
    )
    return None if dq is None else dq_in, None if dk is None else dk_in, None, None, None


_rope_forward.register_autograd(_backward, setup_context=_setup_context)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    theta: float,
    *,
    table: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: (..., T, H, D) bf16/fp16/fp32/fp64; heads may be strided (slices of a fused projection).
        k: (..., T, G, D), same dtype; any G, also 1.
        positions: (..., T) int64.
        theta: base of the frequencies.
        table: `rope_table(positions, D, theta)`, when the caller has it already.
    Returns:
        q and k rotated: new tensors, contiguous.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or D is odd.
    Cost: `cost.rope`.
    """
    D, leading = q.shape[-1], q.shape[:-2]
    _check(q, k, positions, table)
    cos, sin = rope_table(positions, D, theta) if table is None else table
    M = cos.shape[0]
    rotated_q, rotated_k = _rope_forward(
        q.reshape(M, q.shape[-2], D), k.reshape(M, k.shape[-2], D), cos, sin, impl
    )
    return rotated_q.view(q.shape), rotated_k.view(*leading, k.shape[-2], D)


def _check(q, k, positions, table):
    """Raise ValueError for arguments that do not fit together."""
    if q.dim() < 3 or q.shape[-1] % 2 != 0:
        expect(False, "rope", "q (..., T, H, D) with even D", tuple(q.shape), "Pad or reshape it")
    if k.dim() < 3 or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        form = f"k (..., T, G, D) with T and D of q {tuple(q.shape)}"
        expect(False, "rope", form, tuple(k.shape), "Pass the keys of the same tokens")
    expect_shape(
        "rope", "positions", positions, "(..., T)", q.shape[:-2], "Pass one position per token"
    )
    expect_dtype("rope", "positions", positions, (torch.int64,), "Cast it with .long()")
    expect_dtype("rope", "q", q, _FLOATS, "Cast it to a floating dtype")
    expect_dtype("rope", "k", k, (q.dtype,), "Cast it to the dtype of q")
    expect_same_device("rope", q=q, k=k, positions=positions)
    if table is not None:
        for name, part in zip(("cos", "sin"), table, strict=True):
            shape = (positions.numel(), q.shape[-1] // 2)
            expect_shape("rope", name, part, "(M, D/2)", shape, "Make it with rope_table")
            expect_dtype("rope", name, part, (torch.float32,), "Make it with rope_table")
            expect_same_device("rope", q=q, **{name: part})
