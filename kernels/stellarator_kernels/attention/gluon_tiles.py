"""What the kernels in Gluon share: what they refuse, descriptors for TMA, who sees whom.

defines: OWN, WIDTHS, refusal, block, row_block, descriptor_type, descriptor, row_descriptor,
    key_interval, query_interval, key_range, query_range, mask_scores
"""

import torch

from stellarator_kernels import _gluon
from stellarator_kernels._gluon import TensorDescriptor, gl, gluon
from stellarator_kernels.attention import tiles

# Who sees whom is said once, in Triton; Gluon compiles the same functions.
key_interval = gluon.jit(getattr(tiles.key_interval, "fn", tiles.key_interval))
query_interval = gluon.jit(getattr(tiles.query_interval, "fn", tiles.query_interval))

OWN = 64  # rows of a warpgroup: those of one matrix instruction
WIDTHS = (64, 128)  # of heads


@gluon.jit
def key_range(
    row, T, S, window, bounds_ptr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """begin, end, inner, inner_end of rows [row, row + ROWS): keys that one sees, that all see.

    Both ends of an interval grow with the row, so the first row and the last say it.
    """
    begin, inner_end = key_interval(row, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    last = row + (ROWS - 1)
    inner, end = key_interval(last, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    return begin, end, inner, inner_end


@gluon.jit
def query_range(
    key, T, S, window, bounds_ptr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """The same of keys [key, key + KEYS): rows that see one, that see all."""
    begin, inner_end = query_interval(key, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    last = key + (KEYS - 1)
    inner, end = query_interval(last, T, S, window, bounds_ptr, CAUSAL, WINDOW, PACKED)
    return begin, end, inner, inner_end


@gluon.jit
def mask_scores(scores, first, last, others):
    """-inf where the row of a score does not see its column; `others` are its columns."""
    visible = (others[None, :] >= first[:, None]) & (others[None, :] < last[:, None])
    return gl.where(visible, scores, float("-inf"))


def refusal(
    D: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    softcap: bool = False,
    dropout: bool = False,
) -> str | None:
    """Why the kernels in Gluon cannot serve a call; None: they can. capability None: no GPU."""
    if _gluon.FAILURE is not None:
        return f"Gluon cannot be imported: {_gluon.FAILURE}"
    if capability != (9, 0):
        return f"it is written for compute capability (9, 0), this is {capability}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies bfloat16 and float16, this is {dtype}"
    if D not in WIDTHS:
        return f"it is written for heads of {' and '.join(map(str, WIDTHS))}, this is {D}"
    if softcap or dropout:
        return f"it has no {'softcap' if softcap else 'dropout'}"
    return None


def block(rows: int, D: int):
    """Shape of what TMA copies at once, and how it lies in shared memory (16-bit elements)."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return [1, 1, rows, D], layout


def row_block(rows: int):
    """The same of one fp32 number a row."""
    return [1, rows], gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def descriptor_type(dtype: str, shape_and_layout) -> str:
    """Type of a descriptor, as a launch names it; dtype is Triton's, "bf16", "fp16" or "fp32"."""
    return "tensordesc<{}{},{!r}>".format(dtype, *shape_and_layout)


def descriptor(x: torch.Tensor, rows: int):
    """TMA's description of x (B, T, H, D), `aligned_rows`, as (B, H, T, D) in blocks of `rows`.

    A dimension of one element may have any stride, TMA takes multiples of 16 bytes.
    """
    D = x.shape[-1]
    shape, strides = zip(
        *((x.shape[i], x.stride(i) if x.shape[i] > 1 else D) for i in (0, 2, 1)), strict=True
    )
    return TensorDescriptor(x, [*shape, D], [*strides, 1], *block(rows, D))


def row_descriptor(x: torch.Tensor, rows: int):
    """The same of x (B, H, T) fp32, one number a row, as (B * H, T); copied if TMA needs it."""
    B, H, T = x.shape
    whole = -(-T // 4) * 4  # rows of whole 16 bytes; what fills them up is not read
    if whole != T or not x.is_contiguous() or x.data_ptr() % 16:
        x = torch.empty((B, H, whole), dtype=x.dtype, device=x.device)[..., :T].copy_(x)
    return TensorDescriptor(x, [B * H, T], [whole, 1], *row_block(rows))
