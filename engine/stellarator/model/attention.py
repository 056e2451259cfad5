"""Causal self-attention with the norm in front of it.

One fused projection, RoPE or none, grouped heads, window, cache.

defines: Attention, Context

Letters: B rows, T tokens, N = B*T, C width, H query heads, G key/value heads, D head width.
"""

from dataclasses import dataclass

import torch

from stellarator.config import ModelConfig
from stellarator.model.cache import KVCache
from stellarator.model.dropout import Masks
from stellarator.model.layers import LayerNorm, Linear, RowLinear, fusible, norm_again
from stellarator.parallel.layout import kv_heads_of
from stellarator.parallel.rows import Cut
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator_kernels import (
    bias_rope,
    decode_attention,
    flash_attention,
    projected_attention,
    rope,
)
from stellarator_kernels.attention.projected import adds_bias


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share."""

    positions: torch.Tensor  # (B, T) int64
    rotation: tuple[torch.Tensor, torch.Tensor] | None  # cos and sin (N, D/2); None: no RoPE
    cu_seqlens: torch.Tensor | None = None  # (E+1,) int32: bounds of documents in N tokens
    cache: KVCache | None = None
    masks: Masks | None = None  # None: nothing is dropped
    cut: Cut | None = None  # of rows whose tokens ranks share out; it has their documents

    @property
    def packed(self) -> bool:
        """Whether rows have bounds of documents."""
        return (self.cut.plan if self.cut else self).cu_seqlens is not None


class Attention(torch.nn.Module):
    """(branch, residual) -> (branch, residual), each (B, T, C).

    The projection is [Q of all heads | K | V], (B, T, (H + 2G) * D).
    """

    def __init__(
        self, config: ModelConfig, kernels: str, tp: TensorParallel = ALONE, *, device, dtype
    ):
        super().__init__()
        self.config, self.kernels, self.tp = config, kernels, tp
        C, H, G, D = config.width, config.num_heads, config.num_kv_heads, config.head_width
        to = {"device": device, "dtype": dtype}
        # Heads of this rank: the query heads of its key/value heads.
        self.heads = H // tp.axis.size
        self.kv_heads = len(kv_heads_of(G, tp.axis.size, tp.axis.rank))
        self.widths = [self.heads * D, self.kv_heads * D, self.kv_heads * D]
        self.qkv = Linear(tp.projection(H, G, D, C), tp.projection(H, G, D), tp, **to)
        self.out = RowLinear(H * D, C, tp, **to)

    def forward(
        self, norm: LayerNorm, branch, residual, context: Context, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dropout, bias = context.masks and context.masks.residual(2 * layer), None
        if fusible(norm, self.qkv):
            product = (self.qkv.weight, self.qkv.bias)
            if context.cache is None and adds_bias(residual, self.kernels):
                product, bias = (self.qkv.weight, None), self.qkv.bias
            qkv, residual = norm.into(*product, branch, residual, dropout)
        else:
            y, residual = norm(branch, residual, dropout)
            qkv = self.qkv(y, context.positions.shape, norm_again(norm, residual))
        config, shape = self.config, qkv.shape[:2]
        if context.cache is not None:
            y = self._attend_cached(qkv, context, layer)
        elif context.cut is not None or (context.masks is not None and config.attention_dropout):
            y = self._attend_parts(qkv, bias, context, layer)
        else:
            y = projected_attention(
                qkv,
                self.heads,
                self.kv_heads,
                context.rotation,
                bias=bias,
                window=config.window,
                cu_seqlens=context.cu_seqlens,
                impl=self.kernels,
            )
        return self.out(y.reshape(*shape, self.widths[0])), residual

    def _attend_parts(self, qkv, bias, context: Context, layer: int):
        """Attention with dropout of its weights, or to tokens of other ranks."""
        config, documents = self.config, context.cu_seqlens
        rotated = context.rotation is not None
        # It has fewer implementations than attention.
        impl = self.kernels if self.kernels in ("triton", "reference") else "auto"
        parts = bias_rope(
            *(qkv, bias, context.positions if rotated else None, None),
            *(self.heads, self.kv_heads),
            table=context.rotation,
            impl=impl,
        )
        options = {"impl": self.kernels}
        if context.masks is not None and config.attention_dropout:
            first_head = self.tp.axis.rank * self.heads
            options |= context.masks.attention(layer, context.packed, first_head)
        if context.cut is not None:
            return context.cut.attend(*parts, layer, **options)
        if documents is not None:
            parts = [part.flatten(0, 1) for part in parts]
        return flash_attention(*parts, window=config.window, cu_seqlens=documents, **options)

    def _attend_cached(self, qkv, context: Context, layer: int):
        """Attention to everything in the cache, which takes the new keys and values first."""
        D, cache = self.config.head_width, context.cache
        q, k, v = (part.unflatten(-1, (-1, D)) for part in qkv.split(self.widths, dim=-1))
        if context.rotation is not None:
            table, theta = context.rotation, self.config.rope_theta
            q, k = rope(q, k, context.positions, theta, table=table, impl=self.kernels)
        cache.append(layer, k, v)
        window, T = self.config.window, q.shape[1]
        if cache.empty:  # nothing before these tokens: ordinary attention, without the cache
            return flash_attention(q, k, v, window=window, impl=self.kernels)
        keys, values = cache.k[layer], cache.v[layer]
        impl = "reference" if self.kernels == "reference" else "auto"  # it has fewer than others
        return decode_attention(q, keys, values, cache.lengths + T, window=window, impl=impl)
