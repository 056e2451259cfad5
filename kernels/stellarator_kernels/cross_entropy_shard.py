"""Cross entropy when each rank has the logits of a part of the classes: a shard of the vocabulary.

defines: cross_entropy_statistics, cross_entropy_of_statistics, cross_entropy_gradient_

A rank computes three numbers of each token from its logits, the ranks exchange them, and the loss
and the gradient of every shard follow:

statistics: largest = max(logits), total = sum(exp(logits - largest)), picked = logits[target] or 0
loss:       as in cross_entropy.py with the largest of all, sum of total * exp(largest - that of
            all), and the sum of picked
gradient:   dlogits = ((1 + 2*z_loss*lse) * exp(logits - lse) - onehot(target)) * dloss, in place

Nothing is communicated here: a caller gathers the (3, N) statistics of its ranks, in one
collective, or reduces them. Merged in the order of the ranks they give the same bits everywhere.

Bytes: the statistics read the logits once, the gradient reads and writes them. Sums are fp32 (fp64
for fp64). Tokens whose target is ignored have the statistics 0, 1, 0.
Source: Megatron-LM, arXiv:1909.08053, section 3; online softmax, arXiv:1805.02867.
"""

import math

import torch

from stellarator_kernels import reference
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.cross_entropy import (
    blocks_of_rows,
    check_targets,
    launch_backward,
    running_statistics,
    tiles,
    zero_rows_,
)
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import dense_rows

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Targets as classes of the shard; what is not one of them.
ELSEWHERE, IGNORED, NO_CLASS = -1, -2, -3


@triton.jit
def _statistics_kernel(
    logits_ptr, logits_stride_row, targets_ptr, largest_ptr, total_ptr, picked_ptr, V,
    IGNORED: tl.constexpr, NO_CLASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The three statistics of one row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride_row
    target = tl.load(targets_ptr + row)
    other = tl.where(target == NO_CLASS, float("nan"), 0.0)
    picked = tl.load(logits_ptr + target, mask=target >= 0, other=0.0).to(tl.float32)
    picked = tl.where(target >= 0, picked, other)
    largest, total = running_statistics(logits_ptr, V, BLOCK)
    row_largest = tl.max(largest, 0)
    # A shard whose logits are all -inf adds nothing; exp(-inf + inf) would make it NaN.
    shift = tl.where(row_largest == float("-inf"), 0.0, row_largest)
    row_total = tl.sum(total * tl.exp(largest - shift), 0)
    valid = target != IGNORED
    tl.store(largest_ptr + row, tl.where(valid, row_largest, 0.0))
    tl.store(total_ptr + row, tl.where(valid, row_total, 1.0))
    tl.store(picked_ptr + row, tl.where(valid, picked, 0.0))


def _statistics_triton(logits, targets):
    """Allocate and launch."""
    logits = dense_rows(logits)
    N, V = logits.shape
    found = logits.new_empty((3, N), dtype=torch.float32)
    BLOCK, num_warps = tiles(V)
    if N > 0:
        with torch.cuda.device_of(logits):
            _statistics_kernel[(N,)](
                logits, logits.stride(0), targets.contiguous(), *found, V, IGNORED, NO_CLASS,
                BLOCK, num_warps=num_warps, **FUSED,
            )  # fmt: skip
    return found


def _statistics_torch(logits, targets):
    """ATen's kernels, by blocks of rows."""
    dtype = reference.compute_dtype(logits)
    found = logits.new_empty((3, logits.shape[0]), dtype=dtype)
    index = targets.clamp(min=0)[:, None]
    for block, x in blocks_of_rows(logits, dtype, False):
        largest = x.amax(1, keepdim=True)
        found[0, block], found[2, block] = largest[:, 0], x.gather(1, index[block])[:, 0]
        found[1, block] = x.sub_(largest.masked_fill(largest == -math.inf, 0.0)).exp_().sum(1)
    found[2].masked_fill_(targets < 0, 0.0)
    return _marked(found, targets)


def _marked(found, targets):
    """What the statistics of tokens without a class are."""
    found[2].masked_fill_(targets == NO_CLASS, math.nan)
    for row, value in zip(found, (0.0, 1.0, 0.0), strict=True):
        row.masked_fill_(targets == IGNORED, value)
    return found


def _statistics_reference(logits, targets):
    found = reference.cross_entropy_statistics_ref(logits, targets, targets == IGNORED)
    return _marked(found, targets)


def _gradient_triton(logits, targets, lse, dloss, z_loss):
    """In place if the elements of a row are adjacent."""
    dense = dense_rows(logits)
    launch_backward(dloss, dense, targets, lse, dense, IGNORED, z_loss)
    if dense is not logits:
        logits.copy_(dense)


def _gradient_torch(logits, targets, lse, dloss, z_loss):
    """ATen's kernels, by blocks of rows."""
    dloss = dloss.to(lse.dtype)[:, None]
    lse = lse[:, None]
    index, inside = targets.clamp(min=0)[:, None], (targets >= 0)[:, None]
    factor = dloss * (1 + 2 * z_loss * lse)
    picked = torch.where(inside, -dloss, 0.0)
    for block, x in blocks_of_rows(logits, lse.dtype, True):
        x.sub_(lse[block]).exp_().mul_(factor[block])
        x.scatter_add_(1, index[block], picked[block])
        zero_rows_(x, targets[block] == IGNORED)
        if x.dtype != logits.dtype:
            logits[block] = x


def _gradient_reference(logits, targets, lse, dloss, z_loss):
    logits.copy_(reference.cross_entropy_backward_ref(dloss, logits, targets, lse, IGNORED, z_loss))


STATISTICS = {
    "triton": _statistics_triton,
    "torch": _statistics_torch,
    "reference": _statistics_reference,
}
GRADIENTS = {
    "triton": _gradient_triton,
    "torch": _gradient_torch,
    "reference": _gradient_reference,
}


@torch.library.custom_op("stellarator::cross_entropy_statistics", mutates_args=())
def _cross_entropy_statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    impl: str,
) -> torch.Tensor:
    """(3, N)."""
    op = "cross_entropy_statistics"
    local = local_targets(op, targets, vocab_start, logits.shape[1], vocab_size, ignore_index)
    return STATISTICS[choose(op, impl, logits)](logits, local)


@_cross_entropy_statistics.register_fake
def _fake_statistics(logits, targets, vocab_start, vocab_size, ignore_index, impl):
    return logits.new_empty((3, logits.shape[0]), dtype=reference.compute_dtype(logits))


@torch.library.custom_op("stellarator::cross_entropy_gradient_", mutates_args=("logits",))
def _cross_entropy_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
    impl: str,
) -> None:
    """The logits become their gradient."""
    op = "cross_entropy_gradient_"
    local = local_targets(op, targets, vocab_start, logits.shape[1], vocab_size, ignore_index)
    gradient = GRADIENTS[choose("cross_entropy_statistics", impl, logits)]
    gradient(logits, local, lse.contiguous(), dloss, z_loss)


@_cross_entropy_gradient.register_fake
def _fake_gradient(
    logits, targets, lse, dloss, vocab_start, vocab_size, ignore_index, z_loss, impl
):
    return None


def local_targets(
    op: str, targets: torch.Tensor, vocab_start: int, V_tp: int, vocab_size: int, ignore_index: int
) -> torch.Tensor:
    """(N,) classes of the shard [vocab_start, vocab_start + V_tp), or one of the three constants.

    Raises:
        ValueError: on a CPU, a target that is no class.
    """
    check_targets(op, targets, vocab_size, ignore_index)
    local = targets - vocab_start
    local = torch.where((local >= 0) & (local < V_tp), local, ELSEWHERE)
    known = (targets >= 0) & (targets < vocab_size)
    return torch.where(targets == ignore_index, IGNORED, torch.where(known, local, NO_CLASS))


@torch.no_grad()
def cross_entropy_statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int = -100,
    impl: str = "auto",
) -> torch.Tensor:
    """What the cross entropy of a shard of the classes contributes, to be merged over shards.

    Args:
        logits: (N, V_tp) bf16/fp16/fp32/fp64, of the classes vocab_start, vocab_start + 1, ...
        targets: (N,) int64 in [0, vocab_size), or `ignore_index`; the same on every rank.
        vocab_start: first class of the shard. Shards may differ in size.
        vocab_size: classes of all shards together.
        ignore_index: target of tokens without a loss.
    Returns:
        statistics: (3, N) fp32 (fp64 for fp64): the largest logit, the sum of exp(logit - largest),
            the logit of the target or 0 where another shard has it; 0, 1, 0 where ignored. Without
            a gradient: see `cross_entropy_gradient_`.
    Raises:
        ValueError: shapes, dtypes or devices disagree, the shard lies outside of the vocabulary; on
            a CPU also a target that is no class. On a GPU such a target makes the loss NaN.
    Cost: the forward of `cost.cross_entropy` with V_tp.
    """
    op = "cross_entropy_statistics"
    _check(op, logits, targets)
    check_shard(op, vocab_start, logits.shape[1], vocab_size)
    return _cross_entropy_statistics(logits, targets, vocab_start, vocab_size, ignore_index, impl)


@torch.no_grad()
def cross_entropy_of_statistics(
    statistics: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses from the statistics of all P shards; plain torch on (P, 3, N) numbers.

    Args:
        statistics: (P, 3, N): those of every shard in one order, the same on every rank; or one
            that a caller has reduced (maximum; rescaled sum; sum) as (1, 3, N).
        targets: (N,) int64.
        ignore_index, z_loss: as in `cross_entropy`.
    Returns:
        loss: (N,) nats, 0 where ignored.  lse: (N,), what the gradients need.
    Raises:
        ValueError: shapes disagree.
    """
    op, form = "cross_entropy_of_statistics", "statistics (P, 3, N)"
    shape = tuple(statistics.shape)
    expect(len(shape) == 3 and shape[1] == 3, op, form, shape, "Stack those of the shards")
    expect_shape(op, "targets", targets, "(N,)", shape[2:], "Pass one target per token")
    largest, total, picked = statistics.unbind(1)
    overall = largest.amax(0)
    log_total = (total * (largest - overall).exp()).sum(0).log()
    lse = overall + log_total
    # Not lse - picked: lse is rounded to the last bit of the largest logit.
    loss = log_total + (overall - picked.sum(0)) + z_loss * lse.square()
    return torch.where(targets == ignore_index, 0.0, loss), lse


@torch.no_grad()
def cross_entropy_gradient_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Overwrite the logits of a shard by their gradient.

    Args:
        logits, targets, vocab_start, vocab_size, ignore_index: as in `cross_entropy_statistics`.
        lse: (N,) of all classes, from `cross_entropy_of_statistics`.
        dloss: (N,) floating, the gradient of each loss.
        z_loss: as there.
    Returns:
        logits, which now hold dlogits; zeros where ignored.
    Raises:
        ValueError: as `cross_entropy_statistics`.
    Cost: the backward of `cost.cross_entropy` with V_tp.
    """
    op = "cross_entropy_gradient_"
    _check(op, logits, targets)
    check_shard(op, vocab_start, logits.shape[1], vocab_size)
    check_of_tokens(op, logits, lse, dloss)
    _cross_entropy_gradient(
        logits, targets, lse, dloss, vocab_start, vocab_size, ignore_index, z_loss, impl
    )
    return logits


def check_shard(op, vocab_start, V_tp, vocab_size):
    """Raise ValueError unless the shard lies in the vocabulary."""
    expect(
        0 <= vocab_start <= vocab_size - V_tp,
        op,
        f"a shard of {V_tp} classes within vocab_size = {vocab_size}",
        f"vocab_start {vocab_start}",
        "Pass the first class of this shard and the size of the whole vocabulary",
    )


def check_of_tokens(op, x, lse, dloss):
    """Raise ValueError unless lse and dloss have one value for each row of x."""
    dtype = reference.compute_dtype(x)
    for name, value in (("lse", lse), ("dloss", dloss)):
        expect_shape(op, name, value, "(N,)", x.shape[:1], "Pass one value per token")
        expect_same_device(op, **{"targets": x, name: value})
    expect_dtype(op, "lse", lse, (dtype,), "Pass that of cross_entropy_of_statistics")
    expect_dtype(op, "dloss", dloss, _FLOATS, "Cast it to a floating dtype")


def _check(op, logits, targets):
    """Raise ValueError for arguments that do not fit together."""
    if logits.dim() != 2 or logits.shape[1] < 1:
        form = "logits (N, V_tp) with V_tp >= 1"
        expect(False, op, form, tuple(logits.shape), "Flatten the tokens")
    expect_dtype(op, "logits", logits, _FLOATS, "Cast them to a floating dtype")
    expect_shape(op, "targets", targets, "(N,)", logits.shape[:1], "Pass one target per row")
    expect_dtype(op, "targets", targets, (torch.int64,), "Cast them with .long()")
    expect_same_device(op, logits=logits, targets=targets)
