"""Tensor and sequence parallelism: what a layer does before and after products that ranks share.

defines: TensorParallel, ALONE

A pair of products (qkv and out, up and down) is shared out by columns, then by rows, so that only
its ends communicate. `enter` stands before the first, `leave` behind the second:

                    forward                        backward
    enter           nothing                        sum over the ranks
    leave           sum over the ranks             nothing
    enter, sp       tokens of all ranks            sum, of which a rank keeps its tokens
    leave, sp       sum, of which a rank keeps     tokens of all ranks
                    its tokens

With sequence parallelism (`sp`) a rank keeps only its share of the B*T tokens between the pairs:
norms and residuals are computed once and not on every rank, in as many bytes of communication.

Letters: N tokens of the micro-batch, N_sp of this rank, C width.

Source: Shoeybi et al. 2019, arXiv:1909.08053 (pairs); Korthikanti et al. 2022, arXiv:2205.05198.
"""

from dataclasses import dataclass

import torch

from stellarator.parallel.journal import Tag
from stellarator.parallel.layout import kv_heads_of
from stellarator.parallel.mesh import Axis
from stellarator.parallel.shard import Piece, Shard


class _SumBackward(torch.autograd.Function):
    """x, whose gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, x, axis: Axis):
        ctx.axis, ctx.layer = axis, axis.layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        dx = dx.clone(memory_format=torch.contiguous_format)
        return ctx.axis.sum_(dx, Tag("enter, backward", ctx.layer)), None


class _Sum(torch.autograd.Function):
    """The sum over the ranks; each gets the whole gradient."""

    @staticmethod
    def forward(ctx, x, axis: Axis):
        x = x.clone(memory_format=torch.contiguous_format)
        return axis.sum_(x, Tag("leave", axis.layer))

    @staticmethod
    def backward(ctx, dx):
        return dx, None


class _Gather(torch.autograd.Function):
    """(N_sp, C) of each rank -> (N, C); gradients are summed and cut."""

    @staticmethod
    def forward(ctx, x, axis: Axis):
        ctx.axis, ctx.layer = axis, axis.layer
        return axis.gather(x, Tag("enter", axis.layer))

    @staticmethod
    def backward(ctx, dx):
        return ctx.axis.scatter_sum(dx, Tag("enter, backward", ctx.layer)), None


class _ScatterSum(torch.autograd.Function):
    """(N, C), one addend of each rank -> (N_sp, C) of the sum; gradients are gathered."""

    @staticmethod
    def forward(ctx, x, axis: Axis):
        ctx.axis, ctx.layer = axis, axis.layer
        return axis.scatter_sum(x, Tag("leave", axis.layer))

    @staticmethod
    def backward(ctx, dx):
        return ctx.axis.gather(dx, Tag("leave, backward", ctx.layer)), None


@dataclass(frozen=True)
class TensorParallel:
    """The tensor ranks, and whether they share out the tokens between products.

    Between a `leave` and the next `enter` activations are (B, T, C), with sp (1, N_sp, C).
    """

    axis: Axis
    sp: bool = False

    @property
    def alone(self) -> bool:
        """Whether there is one rank: nothing is shared."""
        return self.axis.size == 1

    def enter(self, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """(B, T, C) of all tokens, in front of products by columns; shape: (B, T)."""
        if self.alone:
            return x
        if self.sp:
            return _Gather.apply(x.flatten(0, 1), self.axis).unflatten(0, shape)
        return _SumBackward.apply(x, self.axis)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the (B, T, C) of all ranks, behind products by rows."""
        if self.alone:
            return x
        if self.sp:
            return _ScatterSum.apply(x.flatten(0, 1), self.axis)[None]
        return _Sum.apply(x, self.axis)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, on all of them; each gets the whole gradient."""
        return x if self.alone else _Sum.apply(x, self.axis)

    def own_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The part of (B, T) that this rank keeps between products, as (1, N_sp)."""
        if self.alone or not self.sp:
            return x
        return x.reshape(self.axis.size, -1)[self.axis.rank][None]

    # What of a parameter is here.

    def _part(self, n: int) -> Piece:
        """This rank's part of n rows or columns; the parts may differ in length by one."""
        start, end = (n * (self.axis.rank + k) // self.axis.size for k in (0, 1))
        return Piece(start, end - start)

    def by_columns(self, out_width: int, in_width: int | None = None) -> Shard:
        """Some outputs of a product: rows of its weight (out, in), or of its bias (out,)."""
        shape = (out_width,) if in_width is None else (out_width, in_width)
        return Shard(shape, 0, (self._part(out_width),))

    def by_rows(self, out_width: int, in_width: int) -> Shard:
        """Some inputs of a product: columns of its weight (out, in)."""
        return Shard((out_width, in_width), 1, (self._part(in_width),))

    def whole(self, *shape: int) -> Shard:
        """What every rank holds. With sp its gradient is of this rank's tokens."""
        return Shard(shape, 0, (Piece(0, shape[0], self.axis.size, self.axis.rank, self.sp),))

    def projection(self, H: int, G: int, D: int, in_width: int | None = None) -> Shard:
        """Heads of the projection to [Q | K | V]: H/tp query heads and the key/value heads of them.

        Where there are fewer key/value heads than ranks, several ranks hold the same one.
        """
        tp, rank = self.axis.size, self.axis.rank
        heads, copies = kv_heads_of(G, tp, rank), max(1, tp // G)
        queries = self._part(H)
        pieces = [Piece(queries.start * D, queries.length * D)]
        for first in (H, H + G):
            start, length = (first + heads.start) * D, len(heads) * D
            pieces.append(Piece(start, length, copies, rank % copies, partial=True))
        rows = (H + 2 * G) * D
        return Shard((rows,) if in_width is None else (rows, in_width), 0, tuple(pieces))


ALONE = TensorParallel(Axis("tp"))
