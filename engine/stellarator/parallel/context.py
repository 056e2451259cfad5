"""Attention of rows whose tokens are cut over the ranks of a context group.

defines: context_attention

    out = softmax(scale q k^T + mask) v,    merged from parts by lse = log sum exp:
    lse = logaddexp(lse_1, lse_2),  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2
    backward of a part, from the merged out and lse: P = exp(s - lse), dS = P (dP - delta + dlse)

Two forms. "ring": keys and values go from rank to rank as `zigzag` plans it, the next ones while
the present ones are attended; memory is that of a rank's own tokens. Backward they go round again,
and the sums of their gradients one step behind them, then home. "gather": every rank gets all keys
and values at once, and the gradients of all are reduced and scattered; one message more or less
hidden, memory of whole rows, and no saving from windows.

Sums of parts are in fp32 (fp64 for fp64), in an order that the plan fixes: the same bits each run.
The parts are the operators of `flash_attention`. Letters: P ranks, B rows, T tokens of a row, H
query heads, G key/value heads, D head width, n = T/2P tokens of a chunk; (B, T_cp) with T_cp = T/P.

Source: ring attention, Liu et al. 2023, arXiv:2310.01889; balanced chunks: Brandon et al. 2023,
arXiv:2311.09431, in the form of two chunks per rank that Megatron-LM and others use.
"""

from dataclasses import dataclass

import torch

from stellarator.parallel.collectives import Group, Message, Pending
from stellarator.parallel.journal import Tag
from stellarator.parallel.zigzag import Block, Call, Plan, chunks_of, shard, unshard
from stellarator_kernels import flash_attention, random
from stellarator_kernels.attention.api import check_call, checked_scale
from stellarator_kernels.reference import compute_dtype

_OP = "context_attention"


@dataclass(frozen=True)
class _Options:
    """What does not change from call to call."""

    plan: Plan
    scale: float
    softcap: float | None
    dropout_p: float
    dropout_seed: int | torch.Tensor
    dropout_origin: tuple[int, int, int, int]
    deterministic: bool
    impl: str


def context_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    group: Group,
    *,
    form: str = "ring",
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor = 0,
    dropout_origin: tuple[int, int, int, int] = (0, 0, 0, 0),
    return_lse: bool = False,
    deterministic: bool = True,
    impl: str = "auto",
    tag: Tag | str = "attention",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attention` of whole rows, of which each rank has `zigzag.shard`.

    All ranks of the group call it, with the same options; gradients flow to q, k and v, and through
    lse. A group of one rank calls flash_attention.

    Args:
        q: (B, T_cp, H, D).
        k, v: (B, T_cp, G, D).
        plan: of this rank, with mask and documents.
        group: the context group.
        form: "ring" or "gather".
        dropout_origin: of the whole rows; with documents the rows are one of B*T tokens, as they
            are for flash_attention.
        tag: of its collectives.
        scale, softcap, dropout_p, dropout_seed, return_lse, deterministic, impl: as there.
    Returns:
        out (B, T_cp, H, D); with `return_lse` also lse (B, H, T_cp).
    Raises:
        ValueError: shapes do not fit the plan, or the plan not the group.
    Cost: ring: forward each rank sends each key and value to those who see it, backward again, and
        their gradients, in fp32, once. gather: P - 1 times a rank's keys and values, twice, and the
        gradients P - 1 times.
    """
    if (group.rank, group.size) != (plan.rank, plan.size):
        raise ValueError(
            f"{_OP}: expected a plan for rank {group.rank} of {group.size}, got one for "
            f"{plan.rank} of {plan.size}. Make it with the rank and size of {group.name}."
        )
    if form not in ("ring", "gather"):
        raise ValueError(f"{_OP}: expected form 'ring' or 'gather', got {form!r}. Pass one.")
    check_call(q, k, v, plan.causal, plan.window, None)
    expected = plan.B, plan.T // plan.size
    for name, x in (("q", q), ("k", k)):
        if tuple(x.shape[:2]) != expected:
            raise ValueError(
                f"{_OP}: expected {name} (B, T/P, heads, D) with (B, T/P) = {expected}, got "
                f"{tuple(x.shape)}. Pass zigzag.shard of the rows of the plan."
            )
    options = {"scale": scale, "softcap": softcap, "dropout_p": dropout_p}
    options |= {"dropout_seed": dropout_seed, "dropout_origin": tuple(dropout_origin)}
    options |= {"deterministic": deterministic, "impl": impl}
    if group.size == 1:
        return _alone(q, k, v, plan, options, return_lse)
    options["scale"] = checked_scale(_OP, scale, q.shape[-1])
    out, lse = _ContextAttention.apply(q, k, v, _Options(plan, **options), group, form, tag)
    return (out, lse) if return_lse else out


def _alone(q, k, v, plan: Plan, options: dict, return_lse: bool):
    """All tokens are here."""
    options |= {"causal": plan.causal, "window": plan.window, "return_lse": return_lse}
    if plan.cu_seqlens is None:
        return flash_attention(q, k, v, **options)
    bounds = torch.tensor(plan.cu_seqlens, dtype=torch.int32, device=q.device)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    done = flash_attention(*packed, cu_seqlens=bounds, **options)
    if not return_lse:
        return done.view_as(q)
    out, lse = done
    return out.view_as(q), lse.unflatten(1, (plan.B, plan.T)).transpose(0, 1)


class _ContextAttention(torch.autograd.Function):
    """Both forms; saved: q, k, v, out, lse of this rank's tokens."""

    @staticmethod
    def forward(ctx, q, k, v, options, group, form, tag):
        ctx.options, ctx.group, ctx.form, ctx.tag = options, group, form, tag
        B, T, H, _ = q.shape
        out = q.new_zeros(q.shape, dtype=compute_dtype(q))
        lse = out.new_full((B, H, T), -torch.inf)
        forward = _ring_forward if form == "ring" else _gather_forward
        forward(q, k.contiguous(), v.contiguous(), out, lse, options, group, tag)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        rows = _Rows(q, out, lse, torch.zeros_like(out) if dout is None else dout, dlse)
        dq, dk, dv = (x.new_zeros(x.shape, dtype=compute_dtype(x)) for x in (q, k, v))
        backward = _ring_backward if ctx.form == "ring" else _gather_backward
        backward(rows, k.contiguous(), v.contiguous(), dq, dk, dv, ctx.options, ctx.group, ctx.tag)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


@dataclass(frozen=True)
class _Rows:
    """What the backward of a part needs of its queries."""

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None


# One part.


def _queries(plan: Plan, slot: int, call: Call) -> tuple[slice, slice]:
    """Rows and tokens of the queries of a call, among those of the rank."""
    start = plan.local(call.q[0])
    return plan.slots[slot][0], slice(start, start + call.q[1] - call.q[0])


def _flipped(call: Call, x: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    """Tokens in reverse order where the call is mirrored."""
    return x.flip(dim) if call.mask == "mirrored" and x is not None else x


def _mask_and_dropout(options: _Options, slot: int, call: Call, H: int, device):
    """(cu_seqlens, row_keys, column_keys, causal, window) of the operators of flash_attention."""
    plan, rows = options.plan, options.plan.slots[slot][0]
    row_keys = column_keys = None
    if options.dropout_p > 0.0:
        b, h, i, j = options.dropout_origin
        packed = plan.cu_seqlens is not None
        b, first = (b, rows.start * plan.T) if packed else (b + rows.start, 0)
        R, T, S = rows.stop - rows.start, call.q[1] - call.q[0], call.k[1] - call.k[0]
        starts = b, h, i + first + call.q[0]
        row_keys = random.element_keys(options.dropout_seed, 0, starts, (R, H, T), device)
        starts = b, j + first + call.k[0]
        column_keys = random.element_keys(options.dropout_seed, 1, starts, (R, S), device)
        row_keys, column_keys = _flipped(call, row_keys, 2), _flipped(call, column_keys, 1)
    return plan.documents(call, device), row_keys, column_keys, call.mask != "full", call.window


def _attend(q, k, v, out, lse, options: _Options, slot: int, call: Call) -> None:
    """Merge one part into `out` and `lse`; k and v are the keys and values of the call."""
    rows, tokens = _queries(options.plan, slot, call)
    parts = (_flipped(call, x, 1) for x in (q[rows, tokens], k, v))
    part_out, part_lse = torch.ops.stellarator.flash_attention_forward(
        *parts, *_mask_and_dropout(options, slot, call, q.shape[2], q.device),
        options.scale, options.softcap, options.dropout_p, True, options.deterministic,
        options.impl,
    )  # fmt: skip
    part_out, part_lse = _flipped(call, part_out, 1), _flipped(call, part_lse, 2)
    _merge_(out[rows, tokens], lse[rows, :, tokens], part_out, part_lse)


def _merge_(out, lse, part_out, part_lse) -> None:
    """Add a part of the keys to the softmax; a query that sees none has lse -inf."""
    total = torch.logaddexp(lse, part_lse)
    finite = total.nan_to_num(neginf=0.0)
    share, part_share = ((x - finite).exp().mT[..., None] for x in (lse, part_lse))
    out.mul_(share).add_(part_out * part_share)
    lse.copy_(total)


def _attend_backward(rows_: _Rows, k, v, dq, dk, dv, options: _Options, slot: int, call: Call):
    """Add the gradients of one part; k, v, dk, dv are those of the keys of the call."""
    rows, tokens = _queries(options.plan, slot, call)
    q, out, dout = (_flipped(call, x[rows, tokens], 1) for x in (rows_.q, rows_.out, rows_.dout))
    lse, dlse = (
        None if x is None else _flipped(call, x[rows, :, tokens], 2).contiguous()
        for x in (rows_.lse, rows_.dlse)
    )
    gradients = torch.ops.stellarator.flash_attention_backward(
        dout, dlse, q, _flipped(call, k, 1), _flipped(call, v, 1), out, lse,
        *_mask_and_dropout(options, slot, call, q.shape[2], q.device),
        options.scale, options.softcap, options.dropout_p, options.deterministic, options.impl,
    )  # fmt: skip
    for whole, part in zip((dq[rows, tokens], dk, dv), gradients, strict=True):
        whole += _flipped(call, part, 1)


# The ring.


def _own(plan: Plan, k, v) -> dict[Block, tuple[torch.Tensor, torch.Tensor]]:
    """This rank's blocks, as views (R, n, G, D) of its keys and values."""
    n, found = plan.chunk_length, {}
    for half, chunk in enumerate(chunks_of(plan.rank, plan.size)):
        for slot, (rows, _) in enumerate(plan.slots):
            tokens = slice(half * n, (half + 1) * n)
            found[Block(slot, chunk)] = k[rows, tokens], v[rows, tokens]
    return found


def _of_call(plan: Plan, block: Block, call: Call, pair):
    """The keys of a call among those of its block."""
    start = call.k[0] - plan.place(block.chunk)[0]
    return (x[:, start : start + call.k[1] - call.k[0]] for x in pair)


def _start(sends, receives, held: dict, like, group: Group, tag) -> tuple[Pending, list]:
    """Start to send blocks that are held and to receive others.

    Returns what waits, and (block, its pair of tensors) of all that comes; the sums of one block
    may come from both sides.
    """
    outgoing = [
        Message(torch.stack([torch.stack(held[b]) for b in blocks]), peer) for peer, blocks in sends
    ]
    incoming, arriving = [], []
    for peer, blocks in receives:
        buffer = like.new_empty((len(blocks), 2, *like.shape))  # (blocks, k and v, R, n, G, D)
        incoming.append(Message(buffer, peer))
        arriving += [(b, (buffer[i, 0], buffer[i, 1])) for i, b in enumerate(blocks)]
    return group.exchange(outgoing, incoming, tag), arriving


def _ring_forward(q, k, v, out, lse, options: _Options, group: Group, tag) -> None:
    """Each step attends what came in during the one before."""
    plan = options.plan
    held = _own(plan, k, v)
    like = next(iter(held.values()))[0]
    for step, then in zip(plan.steps, (*plan.steps[1:], None), strict=True):
        if then is not None:
            pending, arriving = _start(then.sends, then.receives, held, like, group, tag)
        for block, call in step.calls:
            keys = _of_call(plan, block, call, held[block])
            _attend(q, *keys, out, lse, options, block.slot, call)
        if then is not None:
            pending.wait()
            held = dict(arriving)


def _ring_backward(rows, k, v, dq, dk, dv, options: _Options, group: Group, tag) -> None:
    """Keys and values as forward; what is summed of their gradients arrives one step later."""
    plan = options.plan
    held, own_sums = _own(plan, k, v), _own(plan, dk, dv)
    like, sum_like = next(iter(held.values()))[0], next(iter(own_sums.values()))[0]
    sums, waiting, received, came_home = own_sums, Pending(), [], []
    for step, then in zip(plan.steps, (*plan.steps[1:], None), strict=True):
        onward = ()
        if then is not None:
            pending, arriving = _start(then.sends, then.receives, held, like, group, tag)
            onward = then.sends
        for block, call in step.calls:
            keys = _of_call(plan, block, call, held[block])
            gradients = _of_call(plan, block, call, sums[block])
            _attend_backward(rows, *keys, dq, *gradients, options, block.slot, call)
        waiting.wait()
        _add(sums, received)
        _add(own_sums, came_home)
        received, came_home = [], []
        if step is not plan.steps[0]:
            after = then.receives if then is not None else ()
            waiting, both = _start(
                (*onward, *step.home_sends),
                (*after, *step.home_receives),
                sums,
                sum_like,
                group,
                tag,
            )
            came_home = [item for item in both if item[0] in own_sums]
            received = [item for item in both if item[0] not in own_sums]
        if then is not None:
            pending.wait()
            held = dict(arriving)
            sums = {b: tuple(torch.zeros_like(sum_like) for _ in pair) for b, pair in held.items()}
    waiting.wait()
    _add(own_sums, came_home)


def _add(sums: dict, others: list) -> None:
    for block, pair in others:
        for x, other in zip(sums[block], pair, strict=True):
            x += other


# All keys and values on every rank.


def _gathered(k, v, group: Group, tag) -> torch.Tensor:
    """(2, B, T, G, D): keys and values of whole rows."""
    parts = group.all_gather(torch.stack((k, v))[None], tag)
    return unshard(list(parts), dim=2)


def _gather_forward(q, k, v, out, lse, options: _Options, group: Group, tag) -> None:
    whole = _gathered(k, v, group, tag)
    for slot, call in options.plan.row_calls:
        k_rows, v_rows = whole[:, options.plan.slots[slot][0], slice(*call.k)]
        _attend(q, k_rows, v_rows, out, lse, options, slot, call)


def _gather_backward(rows, k, v, dq, dk, dv, options: _Options, group: Group, tag) -> None:
    whole = _gathered(k, v, group, tag)
    gradients = torch.zeros_like(whole, dtype=dk.dtype)
    for slot, call in options.plan.row_calls:
        place = slice(None), options.plan.slots[slot][0], slice(*call.k)
        _attend_backward(rows, *whole[place], dq, *gradients[place], options, slot, call)
    parts = torch.stack([shard(gradients, r, group.size, dim=2) for r in range(group.size)])
    summed = group.reduce_scatter(parts, tag)[0]
    dk.copy_(summed[0])
    dv.copy_(summed[1])
