"""Flash attention from ATen's own CPU flash kernels, given only the work that there is.

ATen's kernels know "causal from the top left" and a dense mask, not documents, windows or T != S.
So the work is cut up: documents become slices (equal neighbours one batch), rows under a window
become blocks of 256 that get just the keys they may see and a small mask. The forward keeps lse,
from which the backward kernel starts: nothing is computed again.

Two facts about the 16-bit backward kernel of torch 2.13 (measured on a Xeon with AMX):
- it adds dk and dv of all heads of a group in the input dtype, so their error grows with the group:
  with 12 heads it is twice that of plain bf16 code, with 48 four times. Larger groups are therefore
  split into calls of at most 12 heads each, whose dk and dv are added in fp32.
- each of its small products costs about 20 us, so that a document of 64 tokens takes 0.9 ms. In
  fp32 it takes 0.2 ms: short pieces are computed in fp32.

On other devices (where `auto` takes Triton) the formulas of `reference.py` compute each document.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from stellarator_kernels import reference

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_ROWS = 256  # rows of a masked block: best of 32 to 2048 for windows from 32 to 2048
_FP32_BACKWARD_LIMIT = 2**22  # T * S * D up to which fp32 is the faster backward
_GROUP_LIMIT = 12  # query heads of a group that may add up in 16 bits


@dataclass(frozen=True)
class Piece:
    """Queries [q_start, q_stop) see keys [k_start, k_stop), all of them or as `mask` says.

    mask: "none"; "causal", a square in which row i sees keys up to i; "band", the general case.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    mask: str


def pieces(T: int, S: int, causal: bool, window: int | None) -> list[Piece]:
    """The calls that make up attention of T queries to S keys; rows that see nothing are left out.

    Pure. Aligned at the bottom right: row i sees keys up to i + S - T, the last `window` of them.
    """
    if S == 0 or T == 0:
        return []
    if not causal:
        return [Piece(0, T, 0, S, "none")]
    shift = S - T
    window = S if window is None else min(window, S)
    row, parts = max(0, -shift), []
    if shift <= 0:
        square = min(window, T - row)
        parts.append(Piece(row, row + square, 0, square, "causal"))
        row += square
    while row < T:
        stop = min(row + _ROWS, T)
        k_start, k_stop = max(0, row + shift + 1 - window), stop + shift
        parts.append(Piece(row, stop, k_start, k_stop, "none" if stop - row == 1 else "band"))
        row = stop
    return parts


def document_runs(cu_seqlens: list[int]) -> list[tuple[int, int, int]]:
    """(first token, length, count) of each run of neighbouring documents of equal length."""
    runs, start = [], 0
    lengths = (stop - begin for begin, stop in itertools.pairwise(cu_seqlens))
    for length, group in itertools.groupby(lengths):
        count = sum(1 for _ in group)
        if length:
            runs.append((start, length, count))
        start += length * count
    return runs


def forward(q, k, v, cu_seqlens, causal, window, scale):
    """q (B, T, H, D), k and v (B, S, G, D), B = 1 if packed -> out (B, T, H, D), lse (B, H, T)."""
    if cu_seqlens is None:
        return _dense_forward(q, k, v, causal, window, scale)
    outs, lses = [], []
    for run in document_runs(cu_seqlens.tolist()):
        out, lse = _dense_forward(*(_batch(x, run) for x in (q, k, v)), causal, window, scale)
        outs.append(out.flatten(0, 1))
        lses.append(lse.transpose(0, 1).flatten(1, 2))
    return _join(outs, 0)[None], _join(lses, 1)[None]


def backward(dout, dlse, q, k, v, out, lse, cu_seqlens, causal, window, scale):
    """Gradients dq (B, T, H, D), dk and dv (B, S, G, D), contiguous; dlse (B, H, T) or None."""
    if cu_seqlens is None:
        return _dense_backward(dout, dlse, q, k, v, out, lse, causal, window, scale)
    gradients = []
    for run in document_runs(cu_seqlens.tolist()):
        dout_, q_, k_, v_, out_ = (_batch(x, run) for x in (dout, q, k, v, out))
        dlse_, lse_ = (None if x is None else _batch(x.mT, run).mT for x in (dlse, lse))
        run_gradients = _dense_backward(dout_, dlse_, q_, k_, v_, out_, lse_, causal, window, scale)
        gradients.append([x.flatten(0, 1) for x in run_gradients])
    return tuple(_join(parts, 0)[None] for parts in zip(*gradients, strict=True))


def _batch(x: torch.Tensor, run: tuple[int, int, int]) -> torch.Tensor:
    """The run's documents as a batch, (1, N, ...) -> (count, length, ...), without a copy."""
    start, length, count = run
    return x[0, start : start + length * count].unflatten(0, (count, length))


def _join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate; a single part is not copied unless it is strided."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)


def _has_kernels(x: torch.Tensor) -> bool:
    """Whether ATen's CPU kernels can be called; other devices take the formulas."""
    return x.device.type == "cpu"


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(B, T, H, D) -> (B, H, T, D), a view; the kernels need the last dimension contiguous."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


class _Masks:
    """Additive masks (rows, keys), made once for all pieces of the same form."""

    def __init__(self, T: int, S: int, window: int | None, dtype: torch.dtype):
        self.shift, self.window, self.dtype = S - T, window, dtype
        self.made = {}

    def of(self, part: Piece) -> torch.Tensor | None:
        """The mask of a "band"; None for the others, which need none."""
        if part.mask != "band":
            return None
        rows, keys = part.q_stop - part.q_start, part.k_stop - part.k_start
        offset = part.q_start + self.shift - part.k_start  # the first row is at this key
        if (rows, keys, offset) not in self.made:
            distance = torch.arange(rows)[:, None] + offset - torch.arange(keys)
            hidden = distance < 0
            if self.window is not None:
                hidden |= distance >= self.window
            mask = torch.zeros(rows, keys, dtype=self.dtype).masked_fill_(hidden, -math.inf)
            self.made[rows, keys, offset] = mask
        return self.made[rows, keys, offset]


def _dense_forward(q, k, v, causal, window, scale):
    """One batch without documents."""
    B, T, H, _ = q.shape
    S = k.shape[1]
    if not _has_kernels(q):
        visible = reference.visible_keys(T, S, causal=causal, window=window, device=q.device)
        return reference.flash_attention_ref(q, k, v, visible, scale)
    q_BHTD, k_BGSD, v_BGSD = (_heads_first(x) for x in (q, k, v))
    outs, lses, masks = [], [], _Masks(T, S, window, q.dtype)
    parts = pieces(T, S, causal, window)
    blind = T if not parts else parts[0].q_start  # rows that see no key
    if blind:
        outs.append(q.new_zeros(q[:, :blind].shape))
        lses.append(torch.full((B, H, blind), -math.inf, dtype=reference.compute_dtype(q)))
    for part in parts:
        keys = slice(part.k_start, part.k_stop)
        out, lse = _forward_kernel(
            q_BHTD[:, :, part.q_start : part.q_stop],
            k_BGSD[:, :, keys],
            v_BGSD[:, :, keys],
            0.0,
            part.mask == "causal",
            attn_mask=masks.of(part),
            scale=scale,
        )
        outs.append(out.transpose(1, 2))
        lses.append(lse)
    return _join(outs, 1), _join(lses, 2)


def _dense_backward(dout, dlse, q, k, v, out, lse, causal, window, scale):
    """One batch without documents."""
    T, S = q.shape[1], k.shape[1]
    if not _has_kernels(q):
        visible = reference.visible_keys(T, S, causal=causal, window=window, device=q.device)
        return reference.flash_attention_backward_ref(dout, dlse, q, k, v, out, lse, visible, scale)
    parts = pieces(T, S, causal, window)
    masks = _Masks(T, S, window, q.dtype)
    dout_BHTD, q_BHTD, out_BHTD, k_BGSD, v_BGSD = (_heads_first(x) for x in (dout, q, out, k, v))
    alone = len(parts) == 1 and parts[0].k_stop - parts[0].k_start == S
    dtype = q.dtype if alone else reference.compute_dtype(q)
    dqs, blind = [], T if not parts else parts[0].q_start
    if blind:
        dqs.append(q.new_zeros(q[:, :blind].shape))
    dk, dv = (None, None) if alone else (x.new_zeros(x.shape, dtype=dtype) for x in (k, v))
    for part in parts:
        rows, keys = slice(part.q_start, part.q_stop), slice(part.k_start, part.k_stop)
        dq_part, dk_part, dv_part = _piece_backward(
            dout_BHTD[:, :, rows],
            None if dlse is None else dlse[..., rows],
            q_BHTD[:, :, rows],
            k_BGSD[:, :, keys],
            v_BGSD[:, :, keys],
            out_BHTD[:, :, rows],
            lse[..., rows],
            masks.of(part),
            part.mask == "causal",
            scale,
        )
        dqs.append(dq_part.transpose(1, 2))
        dk_part, dv_part = dk_part.transpose(1, 2), dv_part.transpose(1, 2)
        if alone:
            dk, dv = dk_part, dv_part
        else:
            dk[:, keys] += dk_part
            dv[:, keys] += dv_part
    return _join(dqs, 1), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _piece_backward(dout, dlse, q, k, v, out, lse, mask, causal, scale):
    """dq, dk, dv of one piece; all (B, heads, rows, D), `mask` None or (T, S)."""
    H, T, D = q.shape[1:]
    G, S = k.shape[1:3]
    dtype = q.dtype
    if dtype.itemsize == 2 and T * S * D <= _FP32_BACKWARD_LIMIT:
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
        mask = None if mask is None else mask.float()
    if dlse is not None:
        dout, q, k, v, out = _fold_dlse(dlse, dout, q, k, v, out)
    options = {"dropout_p": 0.0, "is_causal": causal, "attn_mask": mask, "scale": scale}
    calls = _group_calls(H // G) if q.dtype.itemsize == 2 else 1
    if calls == 1:
        dq, dk, dv = _backward_kernel(dout, q, k, v, out, lse, **options)
    else:
        dq, dk, dv = torch.empty_like(q), 0.0, 0.0
        for first in range(calls):
            heads = slice(first, None, calls)  # H/G/calls heads of every group
            dq[:, heads], dk_part, dv_part = _backward_kernel(
                dout[:, heads], q[:, heads], k, v, out[:, heads], lse[:, heads], **options
            )
            dk, dv = dk_part.float() + dk, dv_part.float() + dv
    return (x[..., :D].to(dtype) for x in (dq, dk, dv))


def _group_calls(group: int) -> int:
    """The fewest equal calls of at most `_GROUP_LIMIT` heads that make up a group. Pure."""
    return next(n for n in range(1, group + 1) if group % n == 0 and group // n <= _GROUP_LIMIT)


def _fold_dlse(dlse, dout, q, k, v, out):
    """Widen the heads so that rowsum(dout * out), which the kernel subtracts, becomes that - dlse.

    One new column is -dlse in dout and 1 in out, which changes the row sum; it is 0 in q, k and v,
    so that nothing else changes.
    """
    width = 8  # keeps rows aligned
    dout, q, k, v, out = (torch.nn.functional.pad(x, (0, width)) for x in (dout, q, k, v, out))
    dout[..., -1], out[..., -1] = -dlse, 1.0
    return dout, q, k, v, out
