"""Weights and moments of AdamW in memory: in fp32, or narrower.

defines: Kinds, Run, States, numbered

    weights        beside a bf16 parameter there is    bytes    the weight is
    masters        the weight in fp32                  4        that
    remainders     its lower 16 bits                   2        the same, to the bit
    stochastic     nothing                             0        the parameter, rounded at random

    moments        each of the two                     bytes
    fp32           the moment                          4
    8bit           a code, a scale for 256 of them     1 1/64

Only tensors that are decayed (two or more dimensions) have moments of 8 bits: the others are few,
and tensor ranks that hold copies of one of them would scale it with different neighbours. Groups of
256 begin where a parameter begins. Whoever asks gets values in fp32; checkpoints hold those.

What is rounded at random has the bits of (seed, update, parameter, element of the whole parameter),
so it does not depend on how parameters lie or are shared out.

Source: see stellarator_kernels.adamw_states; that small tensors keep fp32 moments, after Dettmers
et al. 2021, arXiv:2110.02861.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stellarator.parallel.shard import FlatPart
from stellarator_kernels.adamw_states import (
    GROUP,
    dequantise,
    join_master,
    num_groups,
    quantise,
    split_master,
)


@dataclass(frozen=True)
class Kinds:
    """`weights` and `moments` of a run; see above."""

    weights: str = "masters"
    moments: str = "fp32"


@dataclass(frozen=True)
class Run:
    """Elements of a flat buffer that are updated alike.

    coded: they have moments of 8 bits.
    first_index, index_rows: where their random bits are, as in `adamw_`; None: they need none.
    """

    run: slice
    decay: float
    coded: bool = False
    first_index: int | None = None
    index_rows: tuple[int, int, int] | None = None


class Moment:
    """One of the two moments of a flat buffer: codes first, then what is wide.

    codes, scales: of the first elements; there may be none.
    wide: the rest.
    """

    def __init__(self, length: int, coded: int, signed: bool, dtype: torch.dtype, device):
        self.signed = signed
        self.codes = torch.zeros(coded, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(num_groups(coded), device=device)
        self.wide = torch.zeros(length - coded, dtype=dtype, device=device)

    def parts(self, run: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The moment of a run as it lies, and its scales; a run is of one sort."""
        coded = self.codes.numel()
        if run.start >= coded:
            return self.wide[run.start - coded : run.stop - coded], None
        assert run.start % GROUP == 0 and run.stop <= coded, "parameters begin with a group"
        return self.codes[run], self.scales[run.start // GROUP : num_groups(run.stop)]

    def read(self, run: slice) -> torch.Tensor:
        """(n,) in fp32: a view where it is wide."""
        values, scales = self.parts(run)
        return values if scales is None else dequantise(values, scales, self.signed)

    def write(self, run: slice, values: torch.Tensor) -> None:
        """Keep (n,) values. Those that `read` has given come back to the bit."""
        kept, scales = self.parts(run)
        if scales is None:
            kept.copy_(values)
            return
        half = torch.full_like(values, 1 << 15, dtype=torch.int64)
        for old, new in zip((kept, scales), quantise(values, half, self.signed), strict=True):
            old.copy_(new)


class States:
    """What AdamW keeps of the elements of a flat buffer beside their gradients.

    Args:
        params: the buffer, of the parameters.
        dtype: of what is not narrow.
        decayed: so many of them are, the first ones.
        kinds: without effect on weights that are not bf16.
    """

    def __init__(self, params: torch.Tensor, dtype: torch.dtype, decayed: int, kinds: Kinds):
        self.params, self.kinds, narrow = params, kinds, params.dtype != dtype
        self.master = self.remainder = None
        if narrow and kinds.weights == "masters":
            self.master = torch.zeros_like(params, dtype=dtype)
        if narrow and kinds.weights == "remainders":
            self.remainder = torch.zeros_like(params, dtype=torch.int16)
        self.stochastic = narrow and kinds.weights == "stochastic"
        self.coded = decayed if kinds.moments == "8bit" else 0
        options = {"dtype": dtype, "device": params.device}
        self.exp_avg = Moment(params.numel(), self.coded, True, **options)
        self.exp_avg_sq = Moment(params.numel(), self.coded, False, **options)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Weights as their parameters show them."""
        return values if self.remainder is None else split_master(values.float())[0]

    def read(self, kind: str, run: slice) -> torch.Tensor:
        """(n,) of "master", "exp_avg" or "exp_avg_sq": a view where it lies like this."""
        if kind != "master":
            return getattr(self, kind).read(run)
        if self.master is not None:
            return self.master[run]
        if self.remainder is not None:
            return join_master(self.params[run], self.remainder[run])
        return self.params[run].float() if self.stochastic else self.params[run]

    def write(self, kind: str, run: slice, values: torch.Tensor) -> None:
        """Keep (n,) values; the parameters of masters do not follow them here."""
        if kind != "master":
            getattr(self, kind).write(run, values)
        elif self.master is not None:
            self.master[run].copy_(values)
        elif self.remainder is not None:
            upper, low = split_master(values.float())
            self.params[run].copy_(upper)
            self.remainder[run].copy_(low)
        else:
            self.params[run].copy_(values)

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """All buffers, by what `stellarator plan` calls them."""
        moments = [x for m in (self.exp_avg, self.exp_avg_sq) for x in (m.codes, m.scales, m.wide)]
        masters = [x for x in (self.master, self.remainder) if x is not None]
        return {"masters": masters, "moments": moments}


def numbered(name: str, part: FlatPart, at: int, decay: float, coded: bool) -> Iterator[Run]:
    """The runs of a part of a parameter whose indices in the whole follow one rule.

    Args:
        part: its elements.
        at: where the first of these lies in the buffer.
    """
    shard, digest = part.shard, hashlib.sha256(name.encode()).digest()
    # Of 62 bits, so that the ranges of two parameters do not meet.
    base = int.from_bytes(digest[:8], "little") >> 2

    def run(start: int, end: int, index: int, rows=None) -> Run:
        here = slice(at + start - part.start, at + end - part.start)
        return Run(here, decay, coded, base + index, rows)

    if shard.dim:
        (piece,) = shard.pieces
        width, stride = piece.length, shard.shape[1]
        row, column = divmod(part.start, width)
        rows = (column, width, stride)
        yield run(part.start, part.end, row * stride + piece.start, rows)
        return
    inner = math.prod(shard.shape[1:])
    spans, local = [], 0  # of pieces that follow each other here and in the whole: [start, index]
    for piece in shard.pieces:
        if not spans or piece.start * inner - spans[-1][1] != local - spans[-1][0]:
            spans.append((local, piece.start * inner))
        local += piece.length * inner
    ends = [start for start, _ in spans[1:]] + [local]
    for (start, index), end in zip(spans, ends, strict=True):
        first, last = max(start, part.start), min(end, part.end)
        if first < last:
            yield run(first, last, index + first - start)
