"""Cross entropy from logits, without storing the softmax.

forward:  loss[n] = lse[n] - logits[n, target[n]] + z_loss * lse[n]^2,  lse = log(sum(exp(logits)))
backward: dlogits = ((1 + 2*z_loss*lse) * softmax - onehot(target)) * dloss

Saved: the logits as they came and lse (N,), fp32; so the gradient has a relative error of about
eps * |lse|, far below the rounding of 16-bit logits. Exponentials and sums are fp32 whatever the
dtype of the logits. The Triton kernels read a row in blocks and keep the running maximum and sum of
each lane ("online" softmax). On a CPU a row stays in the cache: the C++ kernel reads it three
times, ATen's path takes blocks of rows, so that no fp32 copy of the logits is ever whole.

Bytes: forward reads the logits once, backward reads them and writes dlogits.
Source: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867; z_loss: PaLM, arXiv:2204.02311.
"""

import torch

from stellarator_kernels import extension, reference
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose
from stellarator_kernels.layout import dense_rows
from stellarator_kernels.memory import empty_like

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements of one fp32 block on a CPU: 2 MiB, measured as the fastest of 2^16 .. 2^20.
_BLOCK_ELEMENTS = 1 << 19


@triton.jit
def running_statistics(logits_ptr, V, BLOCK: tl.constexpr):
    """Of one row: the largest logit that each lane has seen, and its sum of exp(x - largest)."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        in_row = start + lanes < V
        x = tl.load(logits_ptr + start + lanes, mask=in_row, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        # A lane that has seen nothing but -inf would compute exp(-inf + inf).
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = new
    return largest, total


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr, logits_stride_row, targets_ptr, dloss_ptr, loss_ptr, lse_ptr,
    V, ignore_index, z_loss, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row; with GRADIENT the row of logits is then overwritten by its gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride_row
    target = tl.load(targets_ptr + row)
    valid = target != ignore_index
    known = (target >= 0) & (target < V)
    # Ahead of the reductions, which are barriers: behind them a slow warp would read the gradient
    # that a fast one has written there already.
    picked = tl.load(logits_ptr + target, mask=valid & known, other=float("nan")).to(tl.float32)
    largest, total = running_statistics(logits_ptr, V, BLOCK)
    row_largest = tl.max(largest, 0)
    log_total = tl.log(tl.sum(total * tl.exp(largest - row_largest), 0))
    lse = row_largest + log_total
    # Not lse - picked: lse is rounded to the last bit of the largest logit.
    loss = log_total + (row_largest - picked) + z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(valid, loss, 0.0))
    tl.store(lse_ptr + row, lse)
    if GRADIENT:
        dloss = tl.where(valid, tl.load(dloss_ptr + row).to(tl.float32), 0.0)
        factor = dloss * (1.0 + 2.0 * z_loss * lse)
        _write_gradient(
            logits_ptr, logits_ptr, target, valid, dloss, factor, row_largest, log_total, V, BLOCK
        )  # fmt: skip


@triton.jit
def _write_gradient(
    logits_ptr, dlogits_ptr, target, valid, dloss, factor, largest, log_total, V,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """factor * softmax - dloss * onehot of one row, by blocks; dlogits_ptr may be logits_ptr."""
    lanes = tl.arange(0, BLOCK)
    dtype = dlogits_ptr.dtype.element_ty
    for start in range(0, V, BLOCK):
        cols = start + lanes
        x = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        softmax = tl.exp((x - largest) - log_total)
        gradient = softmax * factor - tl.where(cols == target, dloss, 0.0)
        gradient = tl.where(valid, gradient, 0.0)
        tl.store(dlogits_ptr + cols, gradient.to(dtype), mask=cols < V)


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr, dloss_stride, logits_ptr, logits_stride_row, targets_ptr, lse_ptr, dlogits_ptr,
    dlogits_stride_row, V, ignore_index, z_loss, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of dlogits, which may be the row of logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    valid = target != ignore_index
    dloss = tl.where(valid, tl.load(dloss_ptr + row * dloss_stride).to(tl.float32), 0.0)
    lse = tl.load(lse_ptr + row)
    factor = dloss * (1.0 + 2.0 * z_loss * lse)
    _write_gradient(
        logits_ptr + row * logits_stride_row, dlogits_ptr + row * dlogits_stride_row, target,
        valid, dloss, factor, lse, 0.0, V, BLOCK,
    )  # fmt: skip


def tiles(V: int) -> tuple[int, int]:
    """(BLOCK, num_warps): 16 elements per thread and two fp32 statistics of each."""
    BLOCK = min(4096, triton.next_power_of_2(V))
    return BLOCK, max(1, BLOCK // 512)


def launch_forward(logits, targets, dloss, ignore_index, z_loss):
    """losses and lse (N,) fp32; with `dloss` (N,) contiguous the logits become their gradient.

    The elements of a row of logits must be adjacent.
    """
    N, V = logits.shape
    loss, lse = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
    BLOCK, num_warps = tiles(V)
    if N > 0:
        with torch.cuda.device_of(logits):
            _cross_entropy_fwd_kernel[(N,)](
                logits, logits.stride(0), targets.contiguous(), loss if dloss is None else dloss,
                loss, lse, V, ignore_index, z_loss, dloss is not None, BLOCK, num_warps=num_warps,
                **FUSED,
            )  # fmt: skip
    return loss, lse


def launch_backward(dloss, logits, targets, lse, dlogits, ignore_index, z_loss):
    """Write the gradient to `dlogits`, which may be `logits`; their rows are dense."""
    N, V = logits.shape
    BLOCK, num_warps = tiles(V)
    if N > 0:
        with torch.cuda.device_of(logits):
            _cross_entropy_bwd_kernel[(N,)](
                dloss, dloss.stride(0), logits, logits.stride(0), targets.contiguous(), lse,
                dlogits, dlogits.stride(0), V, ignore_index, z_loss, BLOCK, num_warps=num_warps,
                **FUSED,
            )  # fmt: skip


def _backward_triton(dloss, logits, targets, lse, ignore_index, z_loss):
    """Allocate and launch the backward."""
    logits, dlogits = dense_rows(logits), logits.new_empty(logits.shape)
    launch_backward(dloss, logits, targets, lse, dlogits, ignore_index, z_loss)
    return dlogits


def blocks_of_rows(logits, dtype, in_place):
    """(rows, their values in `dtype`) over all rows: on a CPU blocks that stay in its cache.

    The values lie in memory that the next block overwrites; with `in_place`, in the logits if
    these have that dtype.
    """
    N, V = logits.shape
    rows = max(1, min(N, _BLOCK_ELEMENTS // V) if logits.device.type == "cpu" else N)
    direct = in_place and logits.dtype == dtype
    buffer = None if direct else logits.new_empty((rows, V), dtype=dtype)
    for start in range(0, N, rows):
        block = slice(start, min(N, start + rows))
        yield block, logits[block] if direct else buffer[: block.stop - start].copy_(logits[block])


def forward_torch(logits, targets, dloss, ignore_index, z_loss):
    """What `launch_forward` does, with ATen's kernels: losses, lse, and the gradient in place."""
    dtype = reference.compute_dtype(logits)
    loss, lse = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(2))
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0)[:, None]
    for block, x in blocks_of_rows(logits, dtype, dloss is not None):
        x.sub_(largest := x.amax(1, keepdim=True))
        picked = x.gather(1, index[block])
        log_total = (total := x.exp_().sum(1, keepdim=True)).log()
        lse[block] = (log_total + largest)[:, 0]
        loss[block] = (log_total - picked)[:, 0]
        if dloss is not None:
            scale = dloss[block, None].to(dtype)
            x.mul_(scale * (1 + 2 * z_loss * lse[block, None]) / total)
            x.scatter_add_(1, index[block], -scale)
            zero_rows_(x, ignored[block])
            if x.dtype != logits.dtype:
                logits[block] = x
    if z_loss != 0.0:
        loss.add_(lse.square(), alpha=z_loss)
    return loss.masked_fill_(ignored, 0.0), lse


def _backward_torch(dloss, logits, targets, lse, ignore_index, z_loss):
    """ATen's path of the backward, by blocks of rows."""
    dlogits = empty_like(logits)
    ignored = (targets == ignore_index)[:, None]
    index = targets[:, None].masked_fill(ignored, 0)
    dloss, lse = dloss.to(lse.dtype)[:, None], lse[:, None]
    factor = dloss * (1 + 2 * z_loss * lse)
    for block, x in blocks_of_rows(logits, lse.dtype, False):
        x.sub_(lse[block]).exp_().mul_(factor[block])
        x.scatter_add_(1, index[block], -dloss[block])
        zero_rows_(x, ignored[block, 0])
        dlogits[block] = x
    return dlogits


def forward_cpu(logits, targets, dloss, ignore_index, z_loss):
    """What `launch_forward` does, in C++."""
    loss, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    _run_cpu(logits, targets, lse, loss, dloss, logits, ignore_index, z_loss)
    return loss, lse


def _backward_cpu(dloss, logits, targets, lse, ignore_index, z_loss):
    """The backward in C++."""
    logits, dlogits = dense_rows(logits), empty_like(logits)
    _run_cpu(logits, targets, lse, None, dloss, dlogits, ignore_index, z_loss)
    return dlogits


def _run_cpu(logits, targets, lse, loss, dloss, gradient, ignore_index, z_loss):
    """One call of the extension; forward with `loss`, with a gradient if there is `dloss`."""
    targets = targets.contiguous()
    extension.load().cross_entropy(
        is_bfloat16=logits.dtype == torch.bfloat16,
        N=logits.shape[0],
        V=logits.shape[1],
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        targets=targets.data_ptr(),
        ignore_index=ignore_index,
        z_loss=z_loss,
        forward=loss is not None,
        loss=0 if loss is None else loss.data_ptr(),
        lse=lse.data_ptr(),
        dloss=0 if dloss is None else dloss.data_ptr(),
        dloss_stride=0 if dloss is None else dloss.stride(0),
        gradient=gradient.data_ptr(),
        gradient_stride=gradient.stride(0),
        threads=torch.get_num_threads(),
        isa=extension.isa(),
    )


def zero_rows_(x, ignored):
    """Zeros, not a factor of zero, since what is ignored may be NaN; usually there is none."""
    if ignored.any():
        x.masked_fill_(ignored[:, None], 0.0)


def check_targets(op: str, targets: torch.Tensor, V: int, ignore_index: int) -> None:
    """Raise if a target is no class. On a CPU only: elsewhere looking would wait for the device."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if bad.any():
        got = int(targets[bad][0])
        expect(False, op, f"targets in [0, {V}) or {ignore_index}", got, "Look for a wrong shift")


@torch.library.custom_op("stellarator::cross_entropy_forward", mutates_args=())
def _cross_entropy_forward(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """losses and lse (N,)."""
    chosen = choose("cross_entropy", impl, logits)
    check_targets("cross_entropy", targets, logits.shape[1], ignore_index)
    if chosen == "triton":
        return launch_forward(dense_rows(logits), targets, None, ignore_index, z_loss)
    if chosen == "cpu":
        return forward_cpu(dense_rows(logits), targets, None, ignore_index, z_loss)
    if chosen == "torch":
        return forward_torch(logits, targets, None, ignore_index, z_loss)
    return reference.cross_entropy_ref(logits, targets, ignore_index, z_loss)


@_cross_entropy_forward.register_fake
def _fake_forward(logits, targets, ignore_index, z_loss, impl):
    dtype = reference.compute_dtype(logits)
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(2))


@torch.library.custom_op("stellarator::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    impl: str,
) -> torch.Tensor:
    backward = {
        "triton": _backward_triton,
        "cpu": _backward_cpu,
        "torch": _backward_torch,
        "reference": reference.cross_entropy_backward_ref,
    }[choose("cross_entropy", impl, logits)]
    return backward(dloss, logits, targets, lse, ignore_index, z_loss).contiguous()


@_cross_entropy_backward.register_fake
def _fake_backward(dloss, logits, targets, lse, ignore_index, z_loss, impl):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.ignore_index, ctx.z_loss, ctx.impl = inputs
    _, lse = output
    ctx.save_for_backward(logits, targets, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, _dlse):
    if dloss is None:
        return None, None, None, None, None
    logits, targets, lse = ctx.saved_tensors
    dlogits = _cross_entropy_backward(
        dloss, logits, targets, lse, ctx.ignore_index, ctx.z_loss, ctx.impl
    )
    return dlogits, None, None, None, None


_cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross entropy of each row.

    Args:
        logits: (N, V) bf16/fp16/fp32/fp64.
        targets: (N,) int64 in [0, V), or `ignore_index`.
        ignore_index: target of rows without a loss and without a gradient.
        z_loss: weight of lse^2, which keeps the logits from drifting.
    Returns:
        loss: (N,) fp32 (fp64 for fp64), nats; 0 where ignored.
    Raises:
        ValueError: shapes, dtypes or devices disagree; on a CPU also a target that is no class.
            On a GPU such a target gives NaN (triton) or a device assertion (torch).
    Cost: `cost.cross_entropy`.
    """
    op = "cross_entropy"
    if logits.dim() != 2 or logits.shape[1] < 1:
        expect(False, op, "logits (N, V) with V >= 1", tuple(logits.shape), "Flatten the tokens")
    expect_dtype(op, "logits", logits, _FLOATS, "Cast them to a floating dtype")
    expect_shape(op, "targets", targets, "(N,)", logits.shape[:1], "Pass one target per row")
    expect_dtype(op, "targets", targets, (torch.int64,), "Cast them with .long()")
    expect_same_device(op, logits=logits, targets=targets)
    return _cross_entropy_forward(logits, targets, ignore_index, z_loss, impl)[0]
