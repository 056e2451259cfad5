"""Which part of a whole parameter a tensor rank holds.

defines: Piece, Shard, FlatPart, shards_of

A parallel layer keeps the shards of its parameters in a dictionary `shards`. Initial weights, the
gradient norm and checkpoints are of the whole parameter: they ask the shard which elements are
here, and which of them count here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """Rows (or columns) [start, start + length) of the whole, held by `copies` ranks.

    copy: which of them this is; the first is the one that counts.
    partial: each of the copies gets only a share of the gradient.
    """

    start: int
    length: int
    copies: int = 1
    copy: int = 0
    partial: bool = False


@dataclass(frozen=True)
class Shard:
    """`pieces` of a whole of this shape, one behind the other along `dim`."""

    shape: tuple[int, ...]
    dim: int
    pieces: tuple[Piece, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of what this rank holds."""
        length = sum(piece.length for piece in self.pieces)
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def parts(self, local: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
        """The pieces of a local tensor, as views."""
        at = 0
        for piece in self.pieces:
            yield piece, local.narrow(self.dim, at, piece.length)
            at += piece.length

    def take_(self, local: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Fill `local` from the whole tensor."""
        for piece, part in self.parts(local):
            part.copy_(whole.narrow(self.dim, piece.start, piece.length))
        return local

    def counted_into_(self, whole: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Put what counts here in its place in a whole tensor; the rest of that is untouched."""
        for piece, part in self.parts(local):
            if piece.copy == 0:
                whole.narrow(self.dim, piece.start, piece.length).copy_(part)
        return whole

    def runs(self) -> Iterator[tuple[int, int]]:
        """(start, count) of the local elements in the flattened whole, in the local order.

        Neighbours within a piece are one run where they are neighbours in the whole.
        """
        outer = inner = 1
        for size in self.shape[: self.dim]:
            outer *= size
        for size in self.shape[self.dim + 1 :]:
            inner *= size
        stride = self.shape[self.dim] * inner
        for row in range(outer):
            for piece in self.pieces:
                yield row * stride + piece.start * inner, piece.length * inner


@dataclass(frozen=True)
class FlatPart:
    """Elements [start, end) of a tensor rank's part, flattened: what one of its replicas keeps."""

    shard: Shard
    start: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self.shard.shape

    def take_(self, local: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Fill `local`, of one dimension, from the whole tensor."""
        if self.start < self.end:
            part = self.shard.take_(whole.new_empty(self.shard.local_shape), whole)
            local.copy_(part.view(-1)[self.start : self.end])
        return local

    def counted_into_(self, whole: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Put what counts here in its place in a whole of zeros."""
        if self.start < self.end:
            part = local.new_zeros(self.shard.local_shape)
            part.view(-1)[self.start : self.end].copy_(local)
            self.shard.counted_into_(whole, part)
        return whole


def shards_of(model: torch.nn.Module) -> dict[str, Shard]:
    """What part of each parameter is here; all of it where a layer does not say."""
    said = {
        f"{path}.{name}" if path else name: shard
        for path, module in model.named_modules()
        for name, shard in getattr(module, "shards", {}).items()
    }
    found = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape) or (1,)
        found[name] = said.get(name) or Shard(shape, 0, (Piece(0, shape[0]),))
    return found
