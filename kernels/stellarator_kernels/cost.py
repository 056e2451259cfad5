"""Bytes moved and floating-point operations of each op, from shapes alone.

Docstrings, benchmarks and the MFU figure of a run all use these functions.
A multiply-add counts as two operations. Bytes are what must cross memory once; caches are ignored.

defines: Cost, visible_pairs, flash_attention, embedding, rope, bias_rope, layer_norm, rms_norm,
    dropout, bias_gelu, linear, mlp, add_weight_gradient, swiglu, cross_entropy,
    linear_cross_entropy, adamw, grad_norm
"""

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Cost:
    """flops and bytes of one call, forward and backward apart."""

    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        """Of two calls, one after the other."""
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def visible_pairs(T: int, *, causal: bool = True, window: int | None = None) -> int:
    """(query, key) pairs that attention computes in one document of T tokens.

    Causal: T(T+1)/2. With a window of W < T keys: T*W - W(W-1)/2.
    """
    if not causal:
        return T * T
    if window is None or window >= T:
        return T * (T + 1) // 2
    return T * window - window * (window - 1) // 2


def flash_attention(pairs: int, N_q: int, N_k: int, H: int, G: int, D: int, itemsize: int) -> Cost:
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


def embedding(N: int, V: int, C: int, itemsize: int, *, P: int = 0) -> Cost:
    """N rows of C are read and written; back, they are read and added into (V, C) in fp32.

    With P learned positions their rows are read too; back, the N rows are read once more.
    """
    backward = N * C * itemsize + 8 * N * C + (V + P) * C * itemsize
    rows = 3 if P else 2
    backward += (rows - 2) * N * C * itemsize
    return Cost(0, (rows - 1) * N * C, rows * N * C * itemsize, backward)


def linear(N: int, K: int, M: int, itemsize: int) -> Cost:
    """(N, K) times (M, K) transposed: one product forward, two backward."""
    flops, once = 2 * N * K * M, (N * K + M * K + N * M) * itemsize
    return Cost(flops, 2 * flops, once, 2 * once)


def rope(M: int, H: int, G: int, D: int, itemsize: int) -> Cost:
    """M tokens: q and k are read and written, the fp32 table (M, D/2) of cos and sin is read."""
    flops = 3 * M * (H + G) * D
    size = 2 * M * (H + G) * D * itemsize + 4 * M * D
    return Cost(flops, flops, size, size)


def bias_rope(M: int, H: int, G: int, D: int, itemsize: int, *, rotated: bool = True) -> Cost:
    """M tokens: the projection is read, q, k and v are written; with RoPE the fp32 table is read.

    The bias, one row, is left out.
    """
    turns = 3 * M * (H + G) * D if rotated else 0
    flops = M * (H + 2 * G) * D + turns
    size = 2 * M * (H + 2 * G) * D * itemsize + (4 * M * D if rotated else 0)
    return Cost(flops, flops, size, size)


def layer_norm(N: int, C: int, itemsize: int, *, residual: bool = False) -> Cost:
    """N rows of C: x (and residual) to y (and summed); back dy, summed (and dsummed) to dx.

    The parameters and the statistics, a row and two columns, are left out.
    """
    tensor = N * C * itemsize
    forward, backward = (4, 4) if residual else (2, 3)
    flops = N * C
    return Cost(8 * flops, 14 * flops, forward * tensor, backward * tensor)


def rms_norm(N: int, C: int, itemsize: int, *, residual: bool = False) -> Cost:
    """The same tensors as of `layer_norm`; without the mean fewer operations."""
    moved = layer_norm(N, C, itemsize, residual=residual)
    return Cost(5 * N * C, 10 * N * C, moved.forward_bytes, moved.backward_bytes)


def dropout(N: int, C: int, itemsize: int) -> Cost:
    """N rows of C are read and written, back too; the keys are left out."""
    return Cost(N * C, N * C, 2 * N * C * itemsize, 2 * N * C * itemsize)


def bias_gelu(N: int, F: int, itemsize: int) -> Cost:
    """N rows of F: x to y; back dy and x to dx. A sigmoid or erf counts as one operation."""
    tensor = N * F * itemsize
    return Cost(8 * N * F, 15 * N * F, 2 * tensor, 3 * tensor)


def mlp(N: int, C: int, F: int, itemsize: int, *, recompute: bool = False) -> Cost:
    """The two products of an MLP, N rows: 2 forward, 4 back, and one more where pre is not kept.

    Each product reads its operands and writes its result once. Beside the products the forward
    writes pre, and the backward reads it and writes y; gelu and its slope count as in `bias_gelu`.
    """
    one, inner = 2 * N * C * F, N * F * itemsize
    once = (N * C + C * F) * itemsize + inner
    more = 1 if recompute else 0
    return Cost(
        2 * one + 8 * N * F,
        (4 + more) * one + 15 * N * F,
        2 * once + (1 - more) * inner,
        (4 + more) * once + 2 * inner,
    )


def add_weight_gradient(N: int, M: int, K: int, itemsize: int) -> Cost:
    """total (M, K) fp32 += dy^T @ x: both are read once, total is read and written."""
    return Cost(2 * N * M * K, 0, N * (M + K) * itemsize + 8 * M * K, 0)


def swiglu(N: int, F: int, itemsize: int) -> Cost:
    """N rows of F: gate and up to y; back dy, gate and up to dgate and dup."""
    tensor = N * F * itemsize
    return Cost(6 * N * F, 10 * N * F, 3 * tensor, 5 * tensor)


def cross_entropy(N: int, V: int, itemsize: int) -> Cost:
    """N rows of V logits: read once, back read and their gradient written."""
    logits = N * V * itemsize
    return Cost(4 * N * V, 4 * N * V, logits, 2 * logits)


def linear_cross_entropy(N: int, C: int, V: int, itemsize: int, *, chunks: int = 1) -> Cost:
    """N tokens that count: 2*N*C*V operations forward, 4*N*C*V for the two gradients.

    The gradients belong to the backward here even where they are computed in the forward pass. The
    logits of a chunk are written, read and overwritten by their gradient, which is read twice;
    every chunk reads the weight twice and adds to the fp32 gradient of the weight.
    """
    hidden, logits, weight = N * C * itemsize, N * V * itemsize, V * C
    return Cost(
        2 * N * C * V,
        4 * N * C * V,
        hidden + chunks * weight * itemsize + 2 * logits,
        2 * hidden + chunks * weight * (itemsize + 8) + weight * itemsize + 3 * logits,
    )


def adamw(
    n: int,
    param_itemsize: int,
    grad_itemsize: int,
    *,
    master: bool,
    remainder: bool = False,
    eight_bits: bool = False,
) -> Cost:
    """One AdamW step on n elements.

    16 operations each. Weights are read and written: a float32 master, beside which the parameter
    is written, or the parameter alone or with its remainder of 2 bytes. Both moments are read and
    written, 4 bytes each, or one and two scales for 256 elements. The gradient is read.
    """
    weight = 8 + param_itemsize if master else 2 * (param_itemsize + 2 * remainder)
    moments = 4 * n + 16 * -(-n // 256) if eight_bits else 16 * n
    return Cost(16 * n, 0, n * (weight + grad_itemsize) + moments, 0)


def grad_norm(n: int, itemsize: int) -> Cost:
    """The L2 norm of n elements: each is read once."""
    return Cost(2 * n, 0, n * itemsize, 0)
