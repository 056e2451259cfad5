"""Rows of a matrix by their numbers, with those of learned positions; the backward adds in fp32.

forward:  y[i] = weight[ids[i]]  (+ position_weight[positions[i]], rounded once)
backward: dweight[v] = sum of dy[i] over all i with ids[i] = v; the same for the positions

For 16-bit gradients ATen's CPU kernel adds in 16 bits: 4,096 gradients of 1 for one id give 256 in
bf16, and a text repeats its newlines and its indentation that often. So there dy is widened first,
and dweight is rounded once. ATen's kernels add in a fixed order (a GPU sorts the ids, the threads
of a CPU share them out by their value), so the result is the same to the bit on every run.

Triton: the ids are sorted (stably). A program adds up to 32 rows of one id in fp32; an id with more
of them has several programs, whose sums are added in order by a second kernel. No atomics and no
copy of dy; nothing waits for the device. In CUDA C++ (csrc/cuda/embedding.cu, `impl="cuda"`, whose
forward is ATen's) a block adds 32 sorted rows, whatever their ids. With `add_embedding_gradient`,
or `room`, the sums go into an fp32 buffer, so rows of ids that do not occur are not touched at all.

Bytes: forward reads and writes (N, C); backward reads dy (ATen: and an fp32 copy of it), and writes
(V, C).
"""

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import dense_rows
from stellarator_kernels.linear import Room
from stellarator_kernels.memory import empty_like

_OP = "embedding"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK, _SUM_BLOCK = 1024, 512  # columns of a program, forward and backward
_UNIT, _ROWS = 32, 8  # rows that one program adds, and those that it loads at once


@triton.jit
def _embedding_fwd_kernel(
    ids_ptr, weight_ptr, weight_stride_row, positions_ptr, table_ptr, table_stride_row, y_ptr, C,
    HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < C
    y = tl.load(weight_ptr + tl.load(ids_ptr + row) * weight_stride_row + cols, mask=in_row)
    if HAS_POSITIONS:
        offset = tl.load(positions_ptr + row) * table_stride_row + cols
        y = y.to(tl.float32) + tl.load(table_ptr + offset, mask=in_row).to(tl.float32)
    tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _put(sums_ptr, value, mask, ADD: tl.constexpr):
    """Write, or add to what is there."""
    if ADD:
        value += tl.load(sums_ptr, mask=mask, other=0.0)
    tl.store(sums_ptr, value.to(sums_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _embedding_units_kernel(
    dy_ptr, dy_stride_row, ids_ptr, order_ptr, starts_ptr, ends_ptr, sums_ptr, part_ptr, C,
    ADD: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to UNIT rows of one id, from sorted place i on; other places have nothing to do.

    The sum of an id with more rows goes to a part: at most two of them begin within UNIT places,
    the last one of an id and the first one of the next.
    """
    i = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts_ptr + i), tl.load(ends_ptr + i)
    if (i - start) % UNIT == 0:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        in_row, last = cols < C, tl.minimum(i + UNIT, end)
        acc = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for first in range(i, last, ROWS):
            places = first + tl.arange(0, ROWS)
            rows = tl.load(order_ptr + places, mask=places < last, other=0)
            inside = (places < last)[:, None] & in_row[None, :]
            source = dy_ptr + rows[:, None] * dy_stride_row + cols[None, :]
            acc += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(acc, 0)
        if end - start <= UNIT:
            _put(sums_ptr + tl.load(ids_ptr + i) * C + cols, total, in_row, ADD)
        else:
            part = 2 * (i // UNIT) + tl.where(i == start, 1, 0)
            tl.store(part_ptr + part * C + cols, total, mask=in_row)


@triton.jit
def _embedding_parts_kernel(
    ids_ptr, starts_ptr, ends_ptr, sums_ptr, part_ptr, C,
    ADD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of an id with more than UNIT rows, in order, if it begins at sorted place i."""
    i = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts_ptr + i), tl.load(ends_ptr + i)
    if (i == start) & (end - start > UNIT):
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        in_row = cols < C
        first = (2 * (i // UNIT) + 1) * C + cols
        total = tl.load(part_ptr + first, mask=in_row, other=0.0)
        for place in range(i + UNIT, end, UNIT):
            source = part_ptr + 2 * (place // UNIT) * C + cols
            total += tl.load(source, mask=in_row, other=0.0)
        _put(sums_ptr + tl.load(ids_ptr + i) * C + cols, total, in_row, ADD)


def _forward_triton(ids, weight, positions, table):
    """Allocate and launch the forward."""
    weight, table = dense_rows(weight), dense_rows(table)
    N, C = len(ids), weight.shape[1]
    y = weight.new_empty(N, C)
    given = (ids, weight) if positions is None else (positions.contiguous(), table)
    if y.numel():
        with torch.cuda.device_of(weight):
            _embedding_fwd_kernel[(N, triton.cdiv(C, _BLOCK))](
                ids.contiguous(), weight, weight.stride(0), *given, given[1].stride(0), y, C,
                positions is not None, _BLOCK, **FUSED,
            )  # fmt: skip
    return y


def _add_triton(sums, dy, ids, add):
    """Write the sums of the rows of dy into `sums`, or add them."""
    dy, (N, C) = dense_rows(dy), dy.shape
    if not dy.numel():
        return
    ids, order = ids.sort(stable=True)
    starts, ends = (torch.searchsorted(ids, ids, right=right) for right in (False, True))
    parts = dy.new_empty((2 * triton.cdiv(N, _UNIT), C), dtype=torch.float32)
    grid = (N, triton.cdiv(C, _SUM_BLOCK))
    with torch.cuda.device_of(dy):
        _embedding_units_kernel[grid](
            dy, dy.stride(0), ids, order, starts, ends, sums, parts, C,
            add, _UNIT, _ROWS, _SUM_BLOCK, **FUSED,
        )  # fmt: skip
        _embedding_parts_kernel[grid](
            ids, starts, ends, sums, parts, C, add, _UNIT, _SUM_BLOCK, **FUSED,
        )  # fmt: skip


def _add_cuda(sums, dy, ids, add):
    """The same in CUDA C++."""
    dy, (N, C) = dense_rows(dy), dy.shape
    module = extension.load("_cuda")
    ids, order = ids.sort(stable=True)
    parts = dy.new_empty((-(-N // module.rows_of_chunk), 2, C), dtype=torch.float32)
    with torch.cuda.device_of(dy):
        module.embedding_backward(
            **{"is_bfloat16": dy.dtype == torch.bfloat16, "add": add, "N": N, "C": C},
            **{"sums_are_bfloat16": sums.dtype == torch.bfloat16, "dy": extension.rows(dy)},
            **{"ids": extension.address(ids), "order": extension.address(order)},
            **{"sums": extension.address(sums), "parts": extension.address(parts)},
            stream=extension.stream(dy),
        )


_ADD = {"triton": _add_triton, "cuda": _add_cuda}


@torch.library.custom_op("stellarator::embedding_forward", mutates_args=())
def _embedding_forward(
    ids: torch.Tensor,
    weight: torch.Tensor,
    impl: str,
    positions: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N,) and (V, C) -> (N, C); positions (N,) and position_weight (P, C)."""
    chosen = choose(_OP, impl, weight)
    if chosen == "triton":
        return _forward_triton(ids, weight, positions, position_weight)
    if chosen == "reference":
        return reference.embedding_ref(ids, weight, positions, position_weight)
    y = torch.index_select(weight, 0, ids, out=empty_like(weight, len(ids), weight.shape[1]))
    return y if positions is None else y.add_(position_weight[positions])


@_embedding_forward.register_fake
def _fake_forward(ids, weight, impl, positions=None, position_weight=None):
    return weight.new_empty((ids.shape[0], weight.shape[1]))


@torch.library.custom_op("stellarator::embedding_backward", mutates_args=())
def _embedding_backward(
    dy: torch.Tensor, ids: torch.Tensor, num_rows: int, impl: str
) -> torch.Tensor:
    """(N, C) and (N,) -> (V, C)."""
    chosen = choose(_OP, impl, dy)
    if chosen == "reference":
        return reference.embedding_backward_ref(dy, ids, num_rows)
    if chosen in _ADD:
        sums = dy.new_zeros(num_rows, dy.shape[1])
        _ADD[chosen](sums, dy, ids, False)
        return sums
    wide = dy.to(reference.compute_dtype(dy))
    sums = torch.ops.aten.embedding_dense_backward(wide, ids, num_rows, -1, False)
    return sums.to(dy.dtype)


@_embedding_backward.register_fake
def _fake_backward(dy, ids, num_rows, impl):
    return dy.new_empty((num_rows, dy.shape[1]))


def add_embedding_gradient(
    total: torch.Tensor, dy: torch.Tensor, ids: torch.Tensor, *, impl: str = "auto"
) -> None:
    """total (V, C) fp32 += the gradient of the embedding, unrounded and in a fixed order.

    dy (N, C) of any float dtype, ids (N,) int64; with float64 total is that. For a buffer that the
    gradient of a tied output matrix is added to as well.
    """
    op = "add_embedding_gradient"
    dtype = reference.compute_dtype(dy)
    expect_dtype(op, "total", total, (dtype,), f"Accumulate in {dtype}")
    expect_dtype(op, "ids", ids, (torch.int64,), "Pass ids.long()")
    expect(ids.dim() == 1, op, "ids (N,)", tuple(ids.shape), "Flatten the tokens")
    expect_same_device(op, total=total, dy=dy, ids=ids)
    expect_shape(op, "dy", dy, "(N, C)", (len(ids), total.shape[1]), "Flatten the tokens")
    expect(total.is_contiguous(), op, "contiguous total", total.stride(), "Pass the whole buffer")
    if (chosen := choose(_OP, impl, dy)) in _ADD:
        _ADD[chosen](total, dy, ids, True)
    else:
        total += _embedding_backward(dy.to(dtype), ids, len(total), impl)


def _setup_context(ctx, inputs, output):
    ids, weight, ctx.impl, positions, position_weight = inputs
    ctx.num_rows = weight.shape[0]
    ctx.num_positions = 0 if positions is None else position_weight.shape[0]
    ctx.save_for_backward(ids, positions)


def _backward(ctx, dy):
    ids, positions = ctx.saved_tensors
    dweight = dtable = None
    if ctx.needs_input_grad[1]:
        dweight = _embedding_backward(dy, ids, ctx.num_rows, ctx.impl)
    if positions is not None and ctx.needs_input_grad[4]:
        dtable = _embedding_backward(dy, positions, ctx.num_positions, ctx.impl)
    return None, dweight, None, None, dtable


_embedding_forward.register_autograd(_backward, setup_context=_setup_context)


class _Adding(torch.autograd.Function):
    """The same, with dweight added to what `room` gives."""

    @staticmethod
    def forward(ctx, ids, weight, impl, positions, position_weight, room):
        _setup_context(ctx, (ids, weight, impl, positions, position_weight), None)
        ctx.room = room
        return _embedding_forward(ids, weight, impl, positions, position_weight)

    @staticmethod
    def backward(ctx, dy):
        ids, positions = ctx.saved_tensors
        dtable = None
        if ctx.needs_input_grad[1]:
            add_embedding_gradient(ctx.room(), dy, ids, impl=ctx.impl)
        if positions is not None and ctx.needs_input_grad[4]:
            dtable = _embedding_backward(dy, positions, ctx.num_positions, ctx.impl)
        return None, None, None, None, dtable, None


def embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
    room: Room | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """weight[ids], or weight[ids] + position_weight[positions].

    Args:
        ids: any shape, int64 in [0, V). A CPU raises IndexError for others, a GPU asserts; "triton"
            does not look, nor does the backward of "cuda".
        weight: (V, C) bf16/fp16/fp32/fp64.
        positions: shape of ids, int64 in [0, P); None: no learned positions.
        position_weight: (P, C), dtype of weight; goes with positions.
        room: gives (V, C) fp32 (fp64 for fp64), contiguous, to which the backward adds the gradient
            of the weight without rounding it; autograd then hands on none. `linear_cross_entropy`
            of a tied model can add to the same memory.
        impl: "auto", "triton", "cuda", "torch" or "reference".
    Returns:
        (*ids.shape, C), contiguous, the dtype of weight.
    Raises:
        ValueError: dtypes, shapes or devices disagree.
    Cost: `cost.embedding`.
    """
    expect(weight.dim() == 2, _OP, "weight (V, C)", tuple(weight.shape), "Pass a matrix of rows")
    expect_dtype(_OP, "ids", ids, (torch.int64,), "Pass ids.long()")
    expect_dtype(_OP, "weight", weight, _FLOATS, "Cast it to a floating dtype")
    both = (positions is None) == (position_weight is None)
    expect(both, _OP, "positions with position_weight", "one of them", "Pass both or neither")
    if positions is not None:
        todo = "Pass one position per id"
        expect_shape(_OP, "positions", positions, "like ids", tuple(ids.shape), todo)
        expect_dtype(_OP, "positions", positions, (torch.int64,), "Pass positions.long()")
        shape = (len(position_weight), weight.shape[1])
        todo = "Pass rows of the same width"
        expect_shape(_OP, "position_weight", position_weight, "(P, C)", shape, todo)
        expect_dtype(_OP, "position_weight", position_weight, (weight.dtype,), "Cast it")
        expect_same_device(_OP, weight=weight, positions=positions, table=position_weight)
        positions = positions.reshape(-1)
    expect_same_device(_OP, ids=ids, weight=weight)
    given = ids.reshape(-1), weight, impl, positions, position_weight
    rows = _embedding_forward(*given) if room is None else _Adding.apply(*given, room)
    return rows.view(*ids.shape, weight.shape[1])
