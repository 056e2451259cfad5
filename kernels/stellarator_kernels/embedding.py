"""Rows of a matrix by their numbers; the backward adds in fp32.

forward:  y[i] = weight[ids[i]]
backward: dweight[v] = sum of dy[i] over all i with ids[i] = v

For 16-bit gradients ATen's CPU kernel adds in 16 bits: 4,096 gradients of 1 for one id give 256 in
bf16, and a text repeats its newlines and its indentation that often. So dy is widened first and
dweight is rounded once. ATen's kernels add in a fixed order (a GPU sorts the ids, the threads of a
CPU share them out by their value), so the result is the same to the bit on every run.

Bytes: forward reads and writes (N, C); backward reads dy and an fp32 copy of it, and writes (V, C).
"""

import torch

from stellarator_kernels import reference
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device
from stellarator_kernels.dispatch import choose
from stellarator_kernels.memory import empty_like

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.library.custom_op("stellarator::embedding_forward", mutates_args=())
def _embedding_forward(ids: torch.Tensor, weight: torch.Tensor, impl: str) -> torch.Tensor:
    """(N,) and (V, C) -> (N, C)."""
    chosen = choose("embedding", impl, weight)
    if chosen == "reference":
        return weight[ids]
    return torch.index_select(weight, 0, ids, out=empty_like(weight, len(ids), weight.shape[1]))


@_embedding_forward.register_fake
def _fake_forward(ids, weight, impl):
    return weight.new_empty((ids.shape[0], weight.shape[1]))


@torch.library.custom_op("stellarator::embedding_backward", mutates_args=())
def _embedding_backward(
    dy: torch.Tensor, ids: torch.Tensor, num_rows: int, impl: str
) -> torch.Tensor:
    """(N, C) and (N,) -> (V, C)."""
    if choose("embedding", impl, dy) == "reference":
        return reference.embedding_backward_ref(dy, ids, num_rows)
    wide = dy.to(reference.compute_dtype(dy))
    sums = torch.ops.aten.embedding_dense_backward(wide, ids, num_rows, -1, False)
    return sums.to(dy.dtype)


@_embedding_backward.register_fake
def _fake_backward(dy, ids, num_rows, impl):
    return dy.new_empty((num_rows, dy.shape[1]))


def _setup_context(ctx, inputs, output):
    ids, weight, ctx.impl = inputs
    ctx.num_rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx, dy):
    (ids,) = ctx.saved_tensors
    return None, _embedding_backward(dy, ids, ctx.num_rows, ctx.impl), None


_embedding_forward.register_autograd(_backward, setup_context=_setup_context)


def embedding(ids: torch.Tensor, weight: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """weight[ids].

    Args:
        ids: any shape, int64 in [0, V). A CPU raises IndexError for others, a GPU asserts.
        weight: (V, C) bf16/fp16/fp32/fp64.
        impl: "auto", "torch" or "reference".
    Returns:
        (*ids.shape, C), contiguous, the dtype of weight.
    Raises:
        ValueError: dtypes, shapes or devices disagree.
    Cost: `cost.embedding`.
    """
    op = "embedding"
    expect(weight.dim() == 2, op, "weight (V, C)", tuple(weight.shape), "Pass a matrix of rows")
    expect_dtype(op, "ids", ids, (torch.int64,), "Pass ids.long()")
    expect_dtype(op, "weight", weight, _FLOATS, "Cast it to a floating dtype")
    expect_same_device(op, ids=ids, weight=weight)
    rows = _embedding_forward(ids.reshape(-1), weight, impl)
    return rows.view(*ids.shape, weight.shape[1])
