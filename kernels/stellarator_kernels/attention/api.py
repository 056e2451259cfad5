"""Flash attention: the public function, the two registered operators, and dispatch.

`stellarator::flash_attention_forward` and `..._backward` are opaque to torch.compile: which
implementation runs is decided inside their bodies. Packed input, (N, H, D), becomes one row,
(1, N, H, D), on the way in.
"""

import torch

from stellarator_kernels import checks, dispatch, random, reference, tuned
from stellarator_kernels.attention import aten, cpu, designs

_OP = "flash_attention"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor = 0,
    dropout_origin: tuple[int, int, int, int] = (0, 0, 0, 0),
    return_lse: bool = False,
    deterministic: bool = True,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention without the (T, S) matrix of weights, forward and backward.

    out = dropout(softmax(cap(scale q k^T) + mask)) v

    Query head h reads key/value head h // (H/G). With T != S queries and keys are aligned at their
    ends: the last query is at the last key. A query that sees no key gives 0 (and lse -inf).

    Args:
        q: (B, T, H, D) bf16/fp16/fp32/fp64; packed documents: (N, H, D). Any strides.
        k, v: (B, S, G, D) or (N, G, D), the dtype of q, H a multiple of G. Never expanded to H
            heads by the Triton kernels.
        causal: a query sees its own key and those before it.
        window: keys that a query sees at most, its own included; needs `causal`. None: all.
        cu_seqlens: (E+1,) int32 on the device of q: 0, ends of the documents, the last one N. A
            query sees keys of its own document only. Its values are checked on the CPU only.
        scale: of the scores, above 0; None: D**-0.5.
        softcap: scores become softcap * tanh(score / softcap); None: they stay.
        dropout_p: probability in [0, 1) with which a weight becomes 0; the others are divided by
            1 - dropout_p. lse does not see it.
        dropout_seed: 64 bits; a tensor () int64 is read on its device only. The weight of (row b,
            head h, query i, key j) is dropped by a function of the seed and these four numbers:
            give every layer and step its own seed.
        dropout_origin: b, h, i and j of the first ones here, where they are a part of a larger
            whole (heads of one rank, rows of one micro-batch).
        return_lse: also return lse; gradients flow through it.
        deterministic: the backward gives the same bits on every run. False: "triton" adds up dq in
            whatever order, in five products instead of seven.
        impl: "auto", "triton" or "cpu" (D a multiple of 8 from 16 to 256), "torch" or "reference";
            softcap and dropout are in "triton" and "reference", the latter in O(T*S) memory.
    Returns:
        out, of the shape and dtype of q; with `return_lse` also lse = log sum exp(scale q k^T) in
        nats, (B, H, T) or (H, N), fp32 (fp64 for fp64).
    Raises:
        ValueError: shapes, dtypes or devices disagree, a window without `causal`, a scale or
            softcap that is not above 0, a probability outside [0, 1).
        RuntimeError: the requested `impl` cannot run here.
    Cost: `cost.flash_attention`: 4*D*H FLOPs per visible pair forward, 10*D*H backward.
    Source: FlashAttention-2, Dao 2023, arXiv:2307.08691.
    """
    check_call(q, k, v, causal, window, cu_seqlens)
    scale = checked_scale(_OP, scale, q.shape[-1])
    if softcap is not None:
        softcap = float(softcap)
        right = 0.0 < softcap < float("inf")
        checks.expect(right, _OP, "a finite softcap above 0, or None", softcap, "None: no cap")
    right = isinstance(dropout_p, (int, float)) and 0.0 <= dropout_p < 1.0
    checks.expect(right, _OP, "dropout_p in [0, 1)", dropout_p, "Pass 0.0 for no dropout")
    if cu_seqlens is not None:
        q, k, v = q[None], k[None], v[None]
    row_keys = column_keys = None
    if dropout_p > 0.0:
        row_keys, column_keys = dropout_keys(dropout_seed, dropout_origin, q, k)
    out, lse = torch.ops.stellarator.flash_attention_forward(
        q, k, v, cu_seqlens, row_keys, column_keys, causal, window, scale, softcap,
        float(dropout_p), return_lse, deterministic, impl,
    )  # fmt: skip
    if cu_seqlens is not None:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def dropout_keys(seed, origin, q, k) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 keys of the rows (B, H, T) and columns (B, S) of the weights; see random.py."""
    (B, T, H, _), S = q.shape, k.shape[1]
    right = len(origin) == 4 and all(isinstance(n, int) and n >= 0 for n in origin)
    todo = "Pass the global indices of the first row, head, query and key"
    checks.expect(right, _OP, "dropout_origin, four indices >= 0", origin, todo)
    b, h, i, j = origin
    rows = random.element_keys(seed, 0, (b, h, i), (B, H, T), q.device)
    return rows, random.element_keys(seed, 1, (b, j), (B, S), q.device)


def _dropped(q, row_keys, column_keys, p: float) -> torch.Tensor | None:
    """Factors (B, H, T, S) of the weights."""
    if row_keys is None:
        return None
    kept = random.kept(row_keys[..., None], column_keys[:, None, None], p)
    return kept.to(reference.compute_dtype(q)) / (1.0 - p)


def check_call(q, k, v, causal, window, cu_seqlens) -> None:
    """Shapes, dtypes and devices of one call; not the values of `cu_seqlens`."""
    packed = cu_seqlens is not None
    forms = ("(N, H, D)", "(N, G, D)") if packed else ("(B, T, H, D)", "(B, S, G, D)")
    todo = "Packed rows go with cu_seqlens, batches without"
    shapes = tuple(q.shape), tuple(k.shape)
    checks.expect(q.dim() == (3 if packed else 4), _OP, f"q {forms[0]}", shapes[0], todo)
    checks.expect(k.dim() == q.dim(), _OP, f"k {forms[1]}", shapes[1], todo)
    checks.expect(
        q.shape[-1] == k.shape[-1] and q.shape[-1] > 0,
        _OP,
        "q and k of one head width D > 0",
        shapes,
        "Pass heads of one width",
    )
    checks.expect(
        q.shape[0] == k.shape[0],
        _OP,
        "q and k with the same number of " + ("tokens N" if packed else "rows B"),
        shapes,
        "Packed queries and keys share cu_seqlens" if packed else "Pass the same rows",
    )
    checks.expect(
        k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0,
        _OP,
        "a multiple of G query heads",
        f"H={q.shape[-2]}, G={k.shape[-2]}",
        "Every key/value head serves H/G query heads",
    )
    checks.expect_shape(_OP, "v", v, forms[1], k.shape, "Keys and values have one shape")
    checks.expect_dtype(_OP, "q", q, _FLOATS, "Cast it")
    for name, x in (("k", k), ("v", v)):
        checks.expect_dtype(_OP, name, x, (q.dtype,), "Give q, k and v one dtype")
    checks.expect_same_device(_OP, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    check_window(_OP, window)
    checks.expect(
        window is None or causal,
        _OP,
        "window=None without causal=True",
        f"window={window}",
        "A bidirectional window is not supported",
    )
    if packed:
        checks.expect_dtype(_OP, "cu_seqlens", cu_seqlens, (torch.int32,), "Cast it to int32")
        checks.expect(
            cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 2,
            _OP,
            "cu_seqlens (E+1,) with E >= 1",
            tuple(cu_seqlens.shape),
            "Pass 0 and the end of each document",
        )


def check_window(op: str, window: int | None) -> None:
    """A number of keys, or None."""
    right = window is None or (isinstance(window, int) and 1 <= window < 2**31)
    checks.expect(right, op, "window, a number of keys >= 1, or None", window, "None: no window")


def checked_scale(op: str, scale: float | None, D: int) -> float:
    """The scale of the scores; one that is not above 0 would make masked scores the largest."""
    scale = D**-0.5 if scale is None else float(scale)
    todo = "Pass None for D**-0.5"
    checks.expect(0.0 < scale < float("inf"), op, "a finite scale above 0", scale, todo)
    return scale


def _check_documents(cu_seqlens: torch.Tensor | None, N: int) -> None:
    """The values of `cu_seqlens`, where looking at them does not wait for a GPU."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    checks.expect(
        ends[0] == 0 and ends[-1] == N and ends == sorted(ends),
        _OP,
        f"cu_seqlens that rises from 0 to N = {N}",
        ends if len(ends) <= 8 else f"{ends[:4]} ... {ends[-3:]}",
        "Pass 0 and the end of each document",
    )


@torch.library.custom_op("stellarator::flash_attention_forward", mutates_args=())
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    row_keys: torch.Tensor | None,
    column_keys: torch.Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
    deterministic: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, T, H, D) and lse (B, H, T), contiguous.

    `return_lse`: lse will be differentiated. `deterministic` is for the backward.
    """
    chosen = dispatch.choose(_OP, impl, q, softcap=softcap, dropout_p=dropout_p)
    _check_documents(cu_seqlens, q.shape[1])
    B, T, H, _ = q.shape
    if q.numel() == 0 or k.shape[1] == 0:
        lse = q.new_full((B, H, T), -torch.inf, dtype=reference.compute_dtype(q))
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse
    if chosen == "reference":
        visible = _visible(q, k, cu_seqlens, causal, window)
        dropped = _dropped(q, row_keys, column_keys, dropout_p)
        out, lse = reference.flash_attention_ref(q, k, v, visible, scale, softcap, dropped)
    else:
        extras = _extras(chosen, softcap, dropout_p, row_keys, column_keys)
        run = _module(chosen, "forward").forward
        if chosen == "triton":
            plan = designs.forward_plan(*_call(q, softcap, row_keys))
            if plan is not None:
                from stellarator_kernels.attention import gluon_forward

                run, extras = gluon_forward.forward, {"plan": plan}
        out, lse = run(q, k, v, cu_seqlens, causal, window, scale, **extras)
    return out.contiguous(), lse.contiguous()


@_forward_op.register_fake
def _(
    q, k, v, cu_seqlens, row_keys, column_keys, causal, window, scale, softcap, dropout_p,
    return_lse, deterministic, impl,
):  # fmt: skip
    B, T, H, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((B, H, T), dtype=reference.compute_dtype(q))


@torch.library.custom_op("stellarator::flash_attention_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    row_keys: torch.Tensor | None,
    column_keys: torch.Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq (B, T, H, D), dk and dv (B, S, G, D), contiguous."""
    chosen = dispatch.choose(_OP, impl, q, softcap=softcap, dropout_p=dropout_p)
    if q.numel() == 0 or k.shape[1] == 0:
        contiguous = torch.contiguous_format
        return tuple(torch.zeros_like(x, memory_format=contiguous) for x in (q, k, v))
    if chosen == "reference":
        visible = _visible(q, k, cu_seqlens, causal, window)
        dropped = _dropped(q, row_keys, column_keys, dropout_p)
        gradients = reference.flash_attention_backward_ref(
            dout, dlse, q, k, v, out, lse, visible, scale, softcap, dropped
        )
    else:
        extras = _extras(chosen, softcap, dropout_p, row_keys, column_keys)
        run = _module(chosen, "backward").backward
        if chosen == "triton":
            call = _call(q, softcap, row_keys)
            if (plan := designs.backward_plan(deterministic, *call)) is not None:
                from stellarator_kernels.attention import gluon_backward

                run, extras = gluon_backward.backward, {"plan": plan}
            else:
                extras["design"] = designs.backward_design(deterministic, call[0], call[-1])
        gradients = run(dout, dlse, q, k, v, out, lse, cu_seqlens, causal, window, scale, **extras)
    return tuple(x.contiguous() for x in gradients)


@_backward_op.register_fake
def _(
    dout, dlse, q, k, v, out, lse, cu_seqlens, row_keys, column_keys, causal, window, scale,
    softcap, dropout_p, deterministic, impl,
):  # fmt: skip
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (q, k, v))


def _extras(chosen: str, softcap, dropout_p, row_keys, column_keys) -> dict:
    """Keyword arguments of the Triton launchers; the others are not chosen with these options."""
    if chosen != "triton":
        return {}
    keys = None if row_keys is None else (row_keys.contiguous(), column_keys.contiguous())
    return {"softcap": softcap, "dropout_p": dropout_p, "dropout_keys": keys}


def _call(q, softcap, row_keys) -> tuple:
    """What the choice of a design depends on: arguments of `designs.forward_plan`."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    options = softcap is not None, row_keys is not None, tuned.gpu_name(q.device)
    return q.shape[-1], q.dtype, capability, *options


def _module(chosen: str, phase: str):
    """The module with `forward` or `backward`; the kernels' own modules import Triton."""
    if chosen == "torch":
        return aten
    if chosen == "cpu":
        return cpu
    if phase == "forward":
        from stellarator_kernels.attention import forward as module
    else:
        from stellarator_kernels.attention import backward as module
    return module


def _visible(q, k, cu_seqlens, causal, window):
    """The mask of the reference."""
    return reference.visible_keys(
        q.shape[1],
        k.shape[1],
        causal=causal,
        window=window,
        cu_seqlens=cu_seqlens,
        device=q.device,
    )


def _setup_context(ctx, inputs, output):
    *tensors, causal, window, scale, softcap, dropout_p, ctx.return_lse, deterministic, impl = (
        inputs
    )
    ctx.options = (causal, window, scale, softcap, dropout_p, deterministic, impl)
    q, k, v, cu_seqlens, row_keys, column_keys = tensors
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, row_keys, column_keys)


def _backward(ctx, dout, dlse):
    dlse = dlse if ctx.return_lse else None
    gradients = torch.ops.stellarator.flash_attention_backward(
        dout, dlse, *ctx.saved_tensors, *ctx.options
    )
    return (*gradients, *(None,) * 11)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
