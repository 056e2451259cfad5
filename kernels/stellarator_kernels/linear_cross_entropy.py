"""Cross entropy of logits = hidden @ weight^T + bias, whose (N, V) logits are never stored whole.

forward:  losses as in cross_entropy.py; "mean" divides by the number of targets that count
backward: dhidden = dlogits @ weight;  dweight = dlogits^T @ hidden;  dbias = sum(dlogits)

Tokens whose target is ignored are left out before any product, up to a multiple of 256. The others
are taken in chunks: one product gives the logits of a chunk, one kernel computes their losses and
overwrites them by their gradient, two products use it up: 6*N*V*C operations, nothing is computed
twice. So "mean" and "sum" compute their gradients in the forward pass, when one is wanted, and the
backward only multiplies them by the incoming scalar. For "none" the gradient of each loss is known
in the backward alone, which computes the logits of a chunk again (8*N*V*C).

`cpu` is `torch` with the losses and their gradient in C++, and on AMX the product of dweight
(linear.py); the other two products are those of torch.

Precision: the logits of a chunk have the dtype of hidden (under autocast that of F.linear), rounded
once from an fp32 accumulator, and are overwritten in place. (fp32 logits out of a 16-bit product do
not exist on a CPU that has one, where the fp32 product takes 7 times as long; on a GPU they would
triple the memory of a chunk.) A CPU that has none takes fp32 copies of hidden and weight, and its
logits are fp32 (widened.py). Softmax and losses are fp32. dweight and dbias are added over the
chunks in fp32 and cast once, or not at all where the caller gives memory to add dweight to; on a
CPU the product of each chunk is rounded first if it is one of 16 bits, but not in bf16 on AMX. With
fp16 and "mean" the gradient of many tokens can underflow: use "sum".

Memory beside the results: one chunk of logits, the product and the fp32 sum of dweight; where ATen
multiplies in fp32 the copies of hidden and weight, and dhidden in fp32.
Source: chunking, pytorch issue 124480; gradient in the forward pass, Liger, arXiv:2410.10989.
"""

import torch

from stellarator_kernels import reference, widened
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.cross_entropy import (
    check_targets,
    forward_cpu,
    forward_torch,
    launch_forward,
)
from stellarator_kernels.dispatch import choose
from stellarator_kernels.memory import empty_like

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")
_MIN_CHUNK_BYTES = 64 << 20
_GRANULE = 256


def chunk_rows(N: int, C: int, V: int, itemsize: int) -> int:
    """Tokens per chunk: chunks of even size whose logits take no more than the gradients do.

    The gradients (N + V) * C have to exist in any case, so logits of that size cost little more,
    and the larger the chunk the less often the fp32 sum of dweight is read and written. 64 MiB are
    always allowed; at least 128 tokens. A multiple of 128 unless there is one chunk.
    """
    if N == 0:
        return 1
    budget = max(_MIN_CHUNK_BYTES, (N + V) * C * itemsize)
    most = max(128, budget // (V * itemsize) // 128 * 128)
    num_chunks = -(-N // most)
    return min(N, -(-N // num_chunks // 128) * 128)


def default_rows(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """`chunk_rows` of the operands as they are multiplied."""
    return chunk_rows(*hidden.shape, weight.shape[0], hidden.element_size())


def operands_of(chosen: str, kept, *matrices: torch.Tensor | None):
    """The matrices, or fp32 copies where ATen multiplies them so; Triton takes them as they are."""
    few = kept[0].numel() < widened.FEWEST
    return matrices if few or chosen == "triton" else widened.operands(*matrices)


def counted(targets: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, int]:
    """(K,) indices of tokens that count, then of ignored ones that fill them up; how many count.

    K is a multiple of 256, or N. Otherwise nearly every step of a run has a K of its own, and on a
    CPU oneDNN compiles and keeps a product for each: memory grew by a quarter in 60 steps.
    """
    ignored = targets == ignore_index
    kept = (~ignored).nonzero()[:, 0]
    count = kept.numel()
    missing = min(-count % _GRANULE, targets.numel() - count)
    if count and missing:
        kept = torch.cat([kept, ignored.nonzero()[:missing, 0]])
    return kept, count


def add_product(total, product, dlogits, h, only, impl):
    """total += dlogits^T @ h, in fp32 or more; returns it and a buffer for the next call.

    The only chunk needs no sum: its product already has the dtype of the result.
    impl: of `linear` and `add_weight_gradient_`.
    """
    dtype = reference.compute_dtype(h)
    if total is None and (only or h.dtype == dtype):
        return torch.ops.stellarator.weight_gradient(dlogits, h, impl), None
    chosen = choose("add_weight_gradient_", impl, dlogits, x=h)
    if chosen in ("triton", "cpu"):
        if total is None:
            total = empty_like(h, dlogits.shape[1], h.shape[1], dtype=dtype).zero_()
        torch.ops.stellarator.add_weight_gradient_(total, dlogits, h, chosen)
        return total, None
    left, right = dlogits.t(), h
    if left.dtype == dtype:
        return torch.addmm(total, left, right, out=total), None
    if left.device.type == "cuda":
        product = torch.mm(left, right, out_dtype=dtype)
        return product if total is None else total.add_(product), None
    # The same memory for every product: on a CPU fresh pages cost as much as the product itself.
    product = torch.mm(left, right, out=product)
    return product.to(dtype) if total is None else total.add_(product), product


def put_product(out, index, left, right):
    """out[index] = left @ right, written once if index is a slice."""
    if isinstance(index, slice):
        torch.mm(left, right, out=out[index])
    else:
        product = empty_like(left, left.shape[0], right.shape[1])  # autocast would round its own
        out[index] = torch.mm(left, right, out=product)


def logits_in_chunks(hidden, weight, bias, kept, rows):
    """(index, hidden[index], logits) of at most `rows` tokens at a time, by what `counted` gave.

    The logits lie in memory that the next chunk overwrites.
    """
    kept, count = kept
    N, K, V = hidden.shape[0], kept.numel(), weight.shape[0]
    buffer = empty_like(hidden, min(rows, K), V)
    for start in range(0, K, rows):
        stop = min(K, start + rows)
        index = slice(start, stop) if count == N else kept[start:stop]
        h, logits = hidden[index], buffer[: stop - start]
        if stop > count:
            h[max(0, count - start) :] = 0  # a copy; ignored tokens may hold anything, also NaN
        if bias is None:
            torch.mm(h, weight.t(), out=logits)
        else:
            torch.addmm(bias, h, weight.t(), out=logits)
        yield index, h, logits


def _chunked(
    hidden, weight, bias, targets, kept, dloss, ignore_index, z_loss, rows, need, wide, chosen
):  # fmt: skip
    """Losses of all tokens and, unless `dloss` (N,) is None, the gradients that `need` asks for.

    kept: (K,) indices and how many of them count, from `counted`.  need: for hidden, weight, bias.
    wide: dweight is not to be rounded. What is summed in fp32 stays fp32.
    """
    N, all_count = hidden.shape[0], kept[1] == hidden.shape[0]
    dtype = reference.compute_dtype(hidden)
    losses = hidden.new_zeros(N, dtype=dtype)
    dhidden = dweight = product = dbias = None
    if need[0]:
        dhidden = empty_like(hidden)
        if not all_count:
            dhidden.zero_()
    compute = {"triton": launch_forward, "cpu": forward_cpu, "torch": forward_torch}[chosen]
    only = rows >= kept[0].numel() and not wide
    for index, h, logits in logits_in_chunks(hidden, weight, bias, kept, rows):
        scale = None if dloss is None else dloss[index].contiguous()
        losses[index] = compute(logits, targets[index], scale, ignore_index, z_loss)[0]
        if dloss is None:
            continue
        if need[0]:
            put_product(dhidden, index, logits, weight)
        if need[1]:
            impl = "torch" if chosen == "torch" else "auto"
            dweight, product = add_product(dweight, product, logits, h, only, impl)
        if need[2]:
            partial = logits.sum(0).to(dtype)
            dbias = partial if dbias is None else dbias.add_(partial)
    if need[1] and dweight is None:
        dweight = torch.zeros_like(weight)
    if need[2] and dbias is None:
        dbias = torch.zeros_like(bias)
    return losses, dhidden, dweight, dbias


def _whole(hidden, weight, bias, targets, dloss, ignore_index, z_loss, wide):
    """The same by the formulas of reference.py."""
    losses, lse, logits = reference.linear_cross_entropy_ref(
        hidden, weight, targets, bias, ignore_index, z_loss
    )
    if dloss is None:
        return losses, None, None, None
    # The gradient has the dtype of the weight.
    weight = weight.to(reference.compute_dtype(hidden)) if wide else weight
    return losses, *reference.linear_cross_entropy_backward_ref(
        dloss, hidden, weight, targets, lse, logits, bias, ignore_index, z_loss
    )


def _compute(
    hidden, weight, bias, targets, kept, dloss, ignore_index, z_loss, rows, need, wide, impl
):  # fmt: skip
    """losses and the three gradients by the chosen implementation; what is not needed is empty."""
    chosen = choose("linear_cross_entropy", impl, hidden)
    if chosen == "reference":
        results = _whole(hidden, weight, bias, targets, dloss, ignore_index, z_loss, wide)
    else:
        operands = operands_of(chosen, kept, hidden, weight, bias)
        rows = rows or default_rows(*operands[:2])
        results = _chunked(
            *operands, targets, kept, dloss, ignore_index, z_loss, rows, need, wide, chosen
        )
    losses, *gradients = results
    dtypes = (hidden.dtype, reference.compute_dtype(hidden) if wide else weight.dtype, hidden.dtype)
    return losses, *(
        g.to(dtype).contiguous() if n and g is not None else hidden.new_empty(0)
        for g, n, dtype in zip(gradients, need, dtypes, strict=True)
    )


@torch.library.custom_op("stellarator::linear_cross_entropy_forward", mutates_args=())
def _linear_cross_entropy_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    total: torch.Tensor | None,
    ignore_index: int,
    z_loss: float,
    reduction: str,
    rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and for "mean" and "sum" its gradients where they are needed (else empty).

    rows: of a chunk; 0: `default_rows`.
    total: only says that dweight is not to be rounded; the backward adds to it.
    """
    check_targets("linear_cross_entropy", targets, weight.shape[0], ignore_index)
    need = (need_hidden, need_weight, need_bias)
    kept = counted(targets, ignore_index)
    factor = 1.0 / max(1, kept[1]) if reduction == "mean" else 1.0
    dloss = None
    if any(need):
        dtype = reference.compute_dtype(hidden)
        dloss = torch.full(targets.shape, factor, dtype=dtype, device=hidden.device)
    losses, *gradients = _compute(
        hidden, weight, bias, targets, kept, dloss, ignore_index, z_loss, rows, need,
        total is not None, impl,
    )  # fmt: skip
    return losses if reduction == "none" else losses.sum() * factor, *gradients


@_linear_cross_entropy_forward.register_fake
def _fake_forward(
    hidden, weight, bias, targets, total, ignore_index, z_loss, reduction, rows,
    need_hidden, need_weight, need_bias, impl,
):  # fmt: skip
    shape = targets.shape if reduction == "none" else ()
    loss = hidden.new_empty(shape, dtype=reference.compute_dtype(hidden))
    need = (need_hidden, need_weight, need_bias)
    return loss, *_fake_gradients(hidden, weight, bias, need, total is not None)


def _fake_gradients(hidden, weight, bias, need, wide):
    """Shapes of the gradients; what is not needed is empty."""
    dhidden, dweight, dbias = (
        hidden.new_empty(x.shape if n else 0)
        for x, n in zip((hidden, weight, bias), need, strict=True)
    )
    wide = wide and need[1]
    return dhidden, dweight.to(reference.compute_dtype(hidden)) if wide else dweight, dbias


@torch.library.custom_op("stellarator::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    wide: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for "none", from dloss (N,); dweight is not rounded if it is to be `wide`."""
    need = (need_hidden, need_weight, need_bias)
    kept = counted(targets, ignore_index)
    return _compute(
        hidden, weight, bias, targets, kept, dloss, ignore_index, z_loss, rows, need, wide, impl
    )[1:]


@_linear_cross_entropy_backward.register_fake
def _fake_backward(
    dloss, hidden, weight, bias, targets, ignore_index, z_loss, rows,
    need_hidden, need_weight, need_bias, wide, impl,
):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, (need_hidden, need_weight, need_bias), wide)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, ctx.total, *options = inputs
    ctx.ignore_index, ctx.z_loss, ctx.reduction, ctx.rows, *ctx.need, ctx.impl = options
    if ctx.reduction == "none":
        ctx.need = ctx.needs_input_grad[:3]
        ctx.save_for_backward(hidden, weight, bias, targets)
    else:
        ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd makes zeros (V, C) for the other outputs


def _times(gradient, dloss):
    """gradient * dloss, with dloss (0-d, fp32) unrounded whatever the dtype of the gradient.

    On a CPU, where looking at dloss costs nothing, a factor of 1 needs no copy of (V, C). It is
    then what the forward saved: changed in place, autograd refuses another backward through it.
    """
    if gradient.device.type == "cpu":
        known = type(dloss) is torch.Tensor  # not one that torch.compile traces with
        return gradient if known and dloss.item() == 1.0 else gradient * dloss
    # A 0-d tensor on a GPU would be rounded to 16 bits before the product; one of one element not.
    return (gradient * dloss.reshape((1,) * gradient.dim())).to(gradient.dtype)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 13
    wide = ctx.total is not None
    if ctx.reduction == "none":
        gradients = list(
            _linear_cross_entropy_backward(
                dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.z_loss, ctx.rows, *ctx.need, wide,
                ctx.impl,
            )
        )  # fmt: skip
        factor = None
    else:
        gradients, factor = list(ctx.saved_tensors), dloss
    if wide and ctx.need[1]:
        _add(ctx.total, gradients[1], factor)
        gradients[1] = None
    dhidden, dweight, dbias = (
        None if g is None or not n else g if factor is None else _times(g, factor)
        for g, n in zip(gradients, ctx.need, strict=True)
    )
    return dhidden, dweight, dbias, *(None,) * 10


@torch.no_grad()
def _add(total, gradient, factor):
    """total += gradient * factor, in one pass."""
    if factor is None:
        total.add_(gradient)
    else:
        total.addcmul_(gradient, factor.reshape(1, 1))


_linear_cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    dweight: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross entropy of logits = hidden @ weight^T + bias, without the (N, V) logits.

    Args:
        hidden: (N, C) bf16/fp16/fp32/fp64.
        weight: (V, C), dtype of hidden.
        targets: (N,) int64 in [0, V), or `ignore_index`.
        bias: (V,), dtype of hidden, or None.
        ignore_index: target of tokens without a loss and without a gradient.
        z_loss: weight of lse^2.
        reduction: "mean" over the tokens that count (0 if there is none), "sum", or "none".
        dweight: (V, C) fp32 (fp64 for fp64), to which the backward adds the gradient of the weight
            without rounding it; autograd then hands on none. Another layer that shares the weight,
            as the embedding of a tied model, can add to the same memory.
        chunk_size: tokens whose logits exist at one time; None: `chunk_rows`.
    Returns:
        loss: fp32 (fp64 for fp64) scalar, or (N,) for "none", nats.
    Raises:
        ValueError: shapes, dtypes or devices disagree; on a CPU also a target that is no class.
    Cost: `cost.linear_cross_entropy`. On a GPU it waits once for the number of tokens that count.
    """
    op = "linear_cross_entropy"
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_arguments(op, hidden, weight, targets, bias, chunk_size)
    if reduction not in _REDUCTIONS:
        expect(False, op, f"reduction in {_REDUCTIONS}", repr(reduction), "Use one of them")
    if dweight is not None:
        expect_shape(op, "dweight", dweight, "like weight", weight.shape, "Match the weight")
        allowed = (reference.compute_dtype(hidden),)
        expect_dtype(op, "dweight", dweight, allowed, "Pass memory of that dtype")
        expect_same_device(op, hidden=hidden, dweight=dweight)
    wanted = torch.is_grad_enabled() and reduction != "none"
    need = (wanted and x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _linear_cross_entropy_forward(
        hidden, weight, bias, targets, dweight, ignore_index, z_loss, reduction, chunk_size or 0,
        *need, impl,
    )[0]  # fmt: skip


def check_arguments(op, hidden, weight, targets, bias, chunk_size):
    """Raise ValueError for arguments that do not fit together."""
    if hidden.dim() != 2:
        expect(False, op, "hidden (N, C)", tuple(hidden.shape), "Flatten the tokens")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        form = f"weight (V, C) with C = {hidden.shape[1]} and V >= 1"
        expect(False, op, form, tuple(weight.shape), "Pass the output embedding, not its transpose")
    expect_shape(op, "targets", targets, "(N,)", hidden.shape[:1], "Pass one target per token")
    expect_dtype(op, "targets", targets, (torch.int64,), "Cast them with .long()")
    expect_dtype(op, "hidden", hidden, _FLOATS, "Cast it to a floating dtype")
    expect_dtype(op, "weight", weight, (hidden.dtype,), "Cast it to the dtype of hidden")
    if bias is not None:
        expect_shape(op, "bias", bias, "(V,)", weight.shape[:1], "Pass one value per class")
        expect_dtype(op, "bias", bias, (hidden.dtype,), "Cast it to the dtype of hidden")
    expect_same_device(op, hidden=hidden, weight=weight, targets=targets, bias=bias)
    if chunk_size is not None and chunk_size < 1:
        expect(False, op, "chunk_size >= 1 or None", chunk_size, "Pass a number of tokens")
