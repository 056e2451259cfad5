"""Bytes moved and floating-point operations of each op, from shapes alone.

Docstrings, benchmarks and the MFU figure of a run all use these functions.
A multiply-add counts as two operations. Bytes are what must cross memory once; caches are ignored.

defines: Cost, visible_pairs, flash_attention, adamw, grad_norm
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """flops and bytes of one call, forward and backward apart."""

    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int


def visible_pairs(T: int, *, causal: bool = True, window: int | None = None) -> int:
    """(query, key) pairs that attention computes in one document of T tokens.

    Causal: T(T+1)/2. With a window of W < T keys: T*W - W(W-1)/2.
    """
    if not causal:
        return T * T
    if window is None or window >= T:
        return T * (T + 1) // 2
    return T * window - window * (window - 1) // 2


def flash_attention(
    pairs: int, N_q: int, N_k: int, H: int, G: int, D: int, itemsize: int
) -> Cost:
    """Attention over `pairs` (query, key) pairs in all, for H heads of width D.

    Forward 4*D*H*pairs (two products), backward 10*D*H*pairs (five products).
    """
    q, kv = N_q * H * D * itemsize, 2 * N_k * G * D * itemsize
    return Cost(
        4 * D * H * pairs,
        10 * D * H * pairs,
        2 * q + kv + 4 * N_q * H,
        4 * q + 2 * kv + 8 * N_q * H,
    )


def adamw(n: int, param_itemsize: int, grad_itemsize: int, *, master: bool) -> Cost:
    """One AdamW step on n elements.

    16 operations each; w, m and v are float32, read and written, the gradient is read; with a
    master the parameter is written beside it.
    """
    return Cost(16 * n, 0, n * (24 + grad_itemsize + (param_itemsize if master else 0)), 0)


def grad_norm(n: int, itemsize: int) -> Cost:
    """The L2 norm of n elements: each is read once."""
    return Cost(2 * n, 0, n * itemsize, 0)
