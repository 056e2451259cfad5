"""Flash attention in C++ for the CPU: csrc/cpu/attention.h says how it works.

defines: forward, backward

Here tensors become addresses; only their last dimension has to be contiguous. Scratch memory is a
tensor, so that torch accounts for it: the packed keys and values, a few hundred KB for each thread,
and in the backward pass float32 sums of dk and dv and one packed head for each thread.
"""

import torch

from stellarator_kernels import extension
from stellarator_kernels.layout import dense_rows
from stellarator_kernels.memory import aligned_bytes, empty_like


def forward(q, k, v, cu_seqlens, causal, window, scale):
    """q (B, T, H, D), k and v (B, S, G, D), B = 1 if packed -> out (B, T, H, D), lse (B, H, T)."""
    B, T, H, _ = q.shape
    q, k, v = (dense_rows(x) for x in (q, k, v))
    out = empty_like(q)
    lse = torch.empty((B, H, T), dtype=torch.float32)
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    _run("attention_forward", tensors, cu_seqlens, causal, window, scale)
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, cu_seqlens, causal, window, scale, into=None):
    """Gradients dq (B, T, H, D), dk and dv (B, S, G, D); dlse (B, H, T) or None.

    into: tensors for the three; None: new ones, contiguous.
    """
    dout, q, k, v = (dense_rows(x) for x in (dout, q, k, v))
    gradients = [empty_like(x) for x in (q, k, v)] if into is None else into
    tensors = {
        **{"q": q, "k": k, "v": v, "out": out.contiguous(), "lse": lse.contiguous()},
        **{"dout": dout, "dlse": None if dlse is None else dlse.float().contiguous()},
        **dict(zip(("dq", "dk", "dv"), gradients, strict=True)),
    }
    _run("attention_backward", tensors, cu_seqlens, causal, window, scale)
    return tuple(gradients)


def _run(function: str, tensors: dict, cu_seqlens, causal, window, scale) -> None:
    """Call one function of the extension."""
    module, isa, threads = extension.load(), extension.isa(), torch.get_num_threads()
    q, k = tensors["q"], tensors["k"]
    names = ("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv")
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    call = module.Attention(
        is_bfloat16=q.dtype == torch.bfloat16,
        sizes=(*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:]),
        cu_seqlens=_address(cu_seqlens),
        documents=0 if cu_seqlens is None else len(cu_seqlens) - 1,
        causal=causal,
        window=0 if window is None else min(window, k.shape[1]),
        scale=scale,
        addresses=[_address(tensors.get(name)) for name in names],
        strides=[
            s
            for x in (q, k, tensors["v"], *(tensors.get(n) for n in ("dout", "dq", "dk", "dv")))
            for s in ((0, 0, 0) if x is None else x.stride()[:3])
        ],
    )
    size = getattr(module, f"{function}_workspace")(call, threads, isa)
    workspace, start = aligned_bytes(size)
    getattr(module, function)(call, start, threads, isa)
    del workspace  # it had to live until here


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
