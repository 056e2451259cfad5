"""Linear cross entropy when each rank has a shard of the output matrix; no logits are stored whole.

defines: linear_cross_entropy_statistics, linear_cross_entropy_gradients

statistics: those of cross_entropy_shard.py for logits = hidden @ weight^T + bias
gradients:  dhidden = dlogits @ weight, to be summed over the ranks;  dweight += dlogits^T @ hidden;
            dbias += sum(dlogits), both of the shard

Between the two a caller exchanges 3 numbers a token and calls `cross_entropy_of_statistics`. The
gradient of a token is known only then, so its logits are computed again: 8*N*V_tp*C operations in
all. A caller whose ranks exchange the statistics of one chunk after the other needs 6: it forms the
logits of a chunk itself and uses `cross_entropy_statistics` and `cross_entropy_gradient_`.

Chunks, ignored tokens and precision are those of linear_cross_entropy.py; dweight and dbias are
fp32 (fp64 for fp64) and added into memory of the caller if it gives some, so that micro-batches,
and the embedding of a tied model, add up there without a rounding to 16 bits.
Source: as linear_cross_entropy.py and cross_entropy_shard.py.
"""

import torch

from stellarator_kernels import reference
from stellarator_kernels.checks import expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.cross_entropy_shard import (
    GRADIENTS,
    IGNORED,
    STATISTICS,
    check_of_tokens,
    check_shard,
    local_targets,
)
from stellarator_kernels.dispatch import choose
from stellarator_kernels.linear_cross_entropy import (
    add_product,
    check_arguments,
    counted,
    default_rows,
    logits_in_chunks,
    operands_of,
    put_product,
)
from stellarator_kernels.memory import empty_like

_OP = "linear_cross_entropy_statistics"  # the name that `explain` and the dispatcher know


@torch.library.custom_op("stellarator::linear_cross_entropy_statistics", mutates_args=())
def _linear_cross_entropy_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    rows: int,
    impl: str,
) -> torch.Tensor:
    """(3, N)."""
    local = local_targets(_OP, targets, vocab_start, weight.shape[0], vocab_size, ignore_index)
    chosen = choose(_OP, impl, hidden)
    if chosen == "reference":
        return STATISTICS[chosen](_logits_ref(hidden, weight, bias), local)
    found = hidden.new_zeros((3, hidden.shape[0]), dtype=reference.compute_dtype(hidden))
    found[1] = 1.0
    kept = counted(local, IGNORED)
    hidden, weight, bias = operands_of(chosen, kept, hidden, weight, bias)
    rows = rows or default_rows(hidden, weight)
    for index, _, logits in logits_in_chunks(hidden, weight, bias, kept, rows):
        found[:, index] = STATISTICS[chosen](logits, local[index])
    return found


@_linear_cross_entropy_statistics.register_fake
def _fake_statistics(
    hidden, weight, bias, targets, vocab_start, vocab_size, ignore_index, rows, impl
):
    return hidden.new_empty((3, hidden.shape[0]), dtype=reference.compute_dtype(hidden))


@torch.library.custom_op(
    "stellarator::linear_cross_entropy_gradients", mutates_args=("dweight", "dbias")
)
def _linear_cross_entropy_gradients(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor | None,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
    rows: int,
    impl: str,
) -> torch.Tensor:
    """dhidden; the other two are added to dweight and dbias."""
    op = "linear_cross_entropy_gradients"
    local = local_targets(op, targets, vocab_start, weight.shape[0], vocab_size, ignore_index)
    chosen = choose(_OP, impl, hidden)
    if chosen == "reference":
        return _gradients_ref(dloss, hidden, weight, bias, local, lse, dweight, dbias, z_loss)
    kept, dtype = counted(local, IGNORED), hidden.dtype
    hidden, weight, bias = operands_of(chosen, kept, hidden, weight, bias)
    rows = rows or default_rows(hidden, weight)
    dhidden, product = empty_like(hidden), None
    if kept[1] != hidden.shape[0]:
        dhidden.zero_()
    for index, h, logits in logits_in_chunks(hidden, weight, bias, kept, rows):
        GRADIENTS[chosen](logits, local[index], lse[index], dloss[index].contiguous(), z_loss)
        put_product(dhidden, index, logits, weight)
        product = add_product(
            dweight, product, logits, h, False, "torch" if chosen == "torch" else "auto"
        )[1]
        if dbias is not None:
            dbias += logits.sum(0, dtype=dbias.dtype)
    return dhidden.to(dtype)


@_linear_cross_entropy_gradients.register_fake
def _fake_gradients(
    dloss, hidden, weight, bias, targets, lse, dweight, dbias,
    vocab_start, vocab_size, ignore_index, z_loss, rows, impl,
):  # fmt: skip
    return hidden.new_empty(hidden.shape)


def _logits_ref(hidden, weight, bias):
    """Unrounded logits."""
    dtype = reference.compute_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias.to(dtype)


def _gradients_ref(dloss, hidden, weight, bias, local, lse, dweight, dbias, z_loss):
    """By the formulas of reference.py."""
    logits = _logits_ref(hidden, weight, bias)
    dlogits = reference.cross_entropy_backward_ref(dloss, logits, local, lse, IGNORED, z_loss)
    dweight += dlogits.t() @ hidden.to(dlogits.dtype)
    if dbias is not None:
        dbias += dlogits.sum(0)
    return (dlogits @ weight.to(dlogits.dtype)).to(hidden.dtype)


@torch.no_grad()
def linear_cross_entropy_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """`cross_entropy_statistics` of logits = hidden @ weight^T + bias, without the logits.

    Args:
        hidden: (N, C) bf16/fp16/fp32/fp64.
        weight: (V_tp, C), dtype of hidden: rows vocab_start, vocab_start + 1, ... of the whole.
        targets: (N,) int64 in [0, vocab_size), or `ignore_index`.
        bias: (V_tp,), dtype of hidden, or None.
        vocab_start, vocab_size: first class of the shard; classes of all shards.
        ignore_index: target of tokens without a loss and without a gradient.
        chunk_size: tokens whose logits exist at one time; None: `chunk_rows`.
    Returns:
        (3, N) fp32 (fp64 for fp64), for `cross_entropy_of_statistics`.
    Raises:
        ValueError: shapes, dtypes or devices disagree, the shard lies outside of the vocabulary; on
            a CPU also a target that is no class.
    Cost: the forward of `cost.linear_cross_entropy` with V_tp. On a GPU it waits once for the
        number of tokens that count.
    """
    check_arguments(_OP, hidden, weight, targets, bias, chunk_size)
    check_shard(_OP, vocab_start, weight.shape[0], vocab_size)
    rows = chunk_size or 0  # 0: `default_rows`
    return _linear_cross_entropy_statistics(
        hidden, weight, bias, targets, vocab_start, vocab_size, ignore_index, rows, impl
    )


@torch.no_grad()
def linear_cross_entropy_gradients(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    vocab_start: int,
    vocab_size: int,
    dweight: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of a shard, its logits computed again by chunks.

    Args:
        dloss: (N,) floating, the gradient of each loss.
        hidden, weight, targets, bias: as in `linear_cross_entropy_statistics`.
        lse: (N,) of all classes, from `cross_entropy_of_statistics`.
        dweight, dbias: (V_tp, C), (V_tp,) fp32 (fp64 for fp64) to add to; None: new zeros.
        z_loss: weight of lse^2.
    Returns:
        dhidden: (N, C), dtype of hidden: this shard's part of the sum over all shards.
        dweight, dbias: as given, or new; None without a bias.
    Raises:
        ValueError: as `linear_cross_entropy_statistics`.
    Cost: the backward of `cost.linear_cross_entropy` with V_tp, and its forward again.
    """
    op = "linear_cross_entropy_gradients"
    check_arguments(op, hidden, weight, targets, bias, chunk_size)
    check_shard(op, vocab_start, weight.shape[0], vocab_size)
    check_of_tokens(op, hidden, lse, dloss)
    dtype = reference.compute_dtype(hidden)
    dweight = torch.zeros_like(weight, dtype=dtype) if dweight is None else dweight
    if bias is not None and dbias is None:
        dbias = torch.zeros_like(bias, dtype=dtype)
    for name, gradient, parameter in (("dweight", dweight, weight), ("dbias", dbias, bias)):
        if parameter is not None:
            form = f"like {name[1:]}"
            expect_shape(op, name, gradient, form, parameter.shape, "Pass a buffer of that shape")
            expect_dtype(op, name, gradient, (dtype,), "Pass a buffer of that dtype")
            expect_same_device(op, hidden=hidden, **{name: gradient})
    rows = chunk_size or 0  # 0: `default_rows`
    dhidden = _linear_cross_entropy_gradients(
        dloss, hidden, weight, bias, targets, lse, dweight, None if bias is None else dbias,
        vocab_start, vocab_size, ignore_index, z_loss, rows, impl,
    )  # fmt: skip
    return dhidden, dweight, None if bias is None else dbias
