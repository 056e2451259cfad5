"""Parameters in flat buffers that data-parallel ranks reduce, keep and gather as one.

defines: DataParallel, Bucket, plan

A bucket lies flat as [decayed | not decayed], padded so that every rank owns an equal part. The
part that is own is all there is of masters and moments (ZeRO 1), of gradients between backward
passes (ZeRO 2) and of parameters between their uses (ZeRO 3):

    zero    params          grads                       moments, masters
    0       whole           whole                       whole
    1       whole           whole; the sum of the own   own
    2       whole           own; whole while made       own
    3       own; whole      own; whole while made       own
            while used

Parts lie within each bucket and not across the model, so one collective serves one bucket.

Source: Rajbhandari et al. 2020, arXiv:1910.02054 (stages); Li et al. 2020, arXiv:2006.15704
(buckets).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from stellarator.parallel.gradients import SharedGradients, counted_spans
from stellarator.parallel.journal import NOWHERE, Tag
from stellarator.parallel.mesh import Axis
from stellarator.parallel.shard import FlatPart, Shard
from stellarator.parallel.states import Kinds, Run, States, numbered
from stellarator.parallel.tensor import TensorParallel
from stellarator.parallel.unfilled import values_of

# Elements: parts begin where kernels can read 16 bytes, and with a group of 8-bit moments.
_ALIGNMENT = 256


@dataclass(frozen=True)
class DataParallel:
    """The ranks that have other rows of a batch or other tokens of them, and what they share out.

    bucket_bytes: of gradients, from which a bucket is full.
    reduce_dtype: what gradients are rounded to for their sum; None: not rounded.
    """

    axis: Axis = Axis("dp")
    zero: int = 0
    bucket_bytes: int = 32 << 20
    reduce_dtype: torch.dtype | None = None

    @property
    def stage(self) -> int:
        """Of ZeRO; of one rank there is nothing to share out."""
        return self.zero if self.axis.size > 1 else 0


Named = list[tuple[str, torch.nn.Parameter]]


def plan(
    named: Named, shards: dict[str, Shard], layers: Iterable[torch.nn.Module], data: DataParallel
) -> list[Named]:
    """What goes into each bucket; the first ones get their gradients first.

    One process has one bucket. With ZeRO 3 a layer is a bucket, and the last one is what belongs
    to no layer. The sizes are those of whole parameters: the same on every tensor rank.
    """
    if data.axis.size == 1:
        return [named]
    if data.stage == 3:
        of_layers = [{id(p) for p in layer.parameters()} for layer in layers]
        inside = set().union(*of_layers)
        found = [[(n, p) for n, p in named if id(p) in ids] for ids in reversed(of_layers)]
        found.append([(n, p) for n, p in named if id(p) not in inside])
        return found
    found, size = [[]], 0
    for name, parameter in reversed(named):
        if size >= data.bucket_bytes:
            found, size = [*found, []], 0
        found[-1].append((name, parameter))
        size += math.prod(shards[name].shape) * _state_dtype(parameter.dtype).itemsize
    return found


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients, masters and moments."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Bucket:
    """The flat buffers of some parameters, which become views of `full_params`.

    params, grads, states: of the part that this rank owns.
    full_params, full_grads: of all parameters; without memory, or None, where that is not kept.
    in_backward: whether the parameters wait for the backward pass of their layer to be freed.

    Args:
        named: the parameters.
        shards: what part of each is here.
        dtype: of the parameters from now on.
        weight_decay: of tensors of two or more dimensions.
        states: how weights and moments lie.
    """

    def __init__(
        self,
        named: Named,
        shards: dict[str, Shard],
        dtype: torch.dtype,
        weight_decay: float,
        tp: TensorParallel,
        data: DataParallel,
        states: Kinds = Kinds(),  # noqa: B008, it is frozen
    ):
        self.weight_decay, self.tp, self.data, stage = weight_decay, tp, data, data.stage
        kinds = [
            [(n, p) for n, p in named if (p.dim() >= 2) == decayed] for decayed in (True, False)
        ]
        named = [*kinds[0], *kinds[1]]
        self.names = [name for name, _ in named]
        self.about = self.names[0] + " ..." * (len(self.names) > 1)  # for journals
        self.shards = {name: shards[name] for name in self.names}
        self.spans: dict[str, tuple[int, int, torch.Size]] = {}
        parts = data.axis.size if stage else 1
        coded = states.moments == "8bit"
        align = _ALIGNMENT if parts > 1 or coded else 1
        ends = [0]
        for kind in kinds:
            end = ends[-1]
            for name, parameter in kind:
                if coded and parameter.dim() >= 2:
                    end = -(-end // align) * align
                self.spans[name] = (end, end + parameter.numel(), parameter.shape)
                end += parameter.numel()
            ends.append(-(-end // align) * align)
        _, self._decayed, total = ends
        length = -(-total // (parts * align)) * align
        self.own = slice(length * data.axis.rank, length * (data.axis.rank + 1))
        if parts == 1:
            self.own = slice(0, length)
        device, state_dtype = named[0][1].device, _state_dtype(dtype)
        self.full_params = torch.zeros(parts * length, dtype=dtype, device=device)
        self.full_grads: torch.Tensor | None = None
        if stage < 2:
            self.full_grads = torch.zeros(parts * length, dtype=state_dtype, device=device)
            self.grads = self.full_grads[self.own]
        else:
            self.grads = torch.zeros(length, dtype=state_dtype, device=device)
        self.params = self.full_params[self.own]
        if stage == 3:
            self.params = self.params.clone()
        decayed = min(max(self._decayed - self.own.start, 0), length)
        self.states = States(self.params, state_dtype, decayed, states)
        for name, parameter in named:
            values, part = values_of(parameter), self.own_part(name)
            self.view(self.full_params, name).copy_(self.states.rounded(values))
            mine = values.reshape(-1)[part.start : part.end]
            self.states.write("master", self._own_run(name), mine)
            parameter.data = self.view(self.full_params, name)
        self._bytes = self.full_params.untyped_storage().nbytes()
        self._gathering = None
        self._reducing: tuple | None = None
        self.in_backward = False
        if stage == 3:
            self.params.copy_(self.full_params[self.own])
            self.free()

    # What is where.

    def view(self, full: torch.Tensor, name: str) -> torch.Tensor:
        """The part of a buffer of everything that belongs to one parameter, in its shape."""
        start, end, shape = self.spans[name]
        return full[start:end].view(shape)

    def own_part(self, name: str) -> FlatPart:
        """Which elements of a parameter are in the own part; it may be none."""
        start, end, _ = self.spans[name]
        first, last = max(start, self.own.start), min(end, self.own.stop)
        return FlatPart(self.shards[name], first - start, max(first, last) - start)

    def _own_run(self, name: str) -> slice:
        """Where they are in a buffer of the own part."""
        part, at = self.own_part(name), self.spans[name][0] - self.own.start
        return slice(at + part.start, at + part.end) if part.start < part.end else slice(0, 0)

    def own_view(self, own: torch.Tensor, name: str) -> torch.Tensor:
        """The elements of a parameter in a buffer of the own part.

        In its shape where every rank has all of it, else of one dimension.
        """
        found = own[self._own_run(name)]
        return found if self.data.stage else found.view(self.spans[name][2])

    def read(self, kind: str, name: str) -> torch.Tensor:
        """The same elements of "master", "exp_avg" or "exp_avg_sq", in fp32 (fp64 for fp64)."""
        found = self.states.read(kind, self._own_run(name))
        return found if self.data.stage else found.view(self.spans[name][2])

    def write(self, kind: str, name: str, values: torch.Tensor) -> None:
        """Keep what `read` would give."""
        self.states.write(kind, self._own_run(name), values.reshape(-1))

    def part_of(self, name: str) -> Shard | FlatPart:
        """What part of the whole parameter `own_view` gives."""
        return self.own_part(name) if self.data.stage else self.shards[name]

    def counted_grads(self) -> Iterator[torch.Tensor]:
        """The own gradients, of each element that several tensor ranks hold only one."""
        shards = [(start, self.shards[name]) for name, (start, _, _) in self.spans.items()]
        for start, end in counted_spans(shards):
            start, end = (min(max(x, self.own.start), self.own.stop) for x in (start, end))
            yield self.grads[start - self.own.start : end - self.own.start]

    def segments(self) -> list[tuple[slice, float]]:
        """Runs of the own part, each with its weight decay."""
        length = self.own.stop - self.own.start
        cut = min(max(self._decayed - self.own.start, 0), length)
        found = [(slice(0, cut), self.weight_decay), (slice(cut, length), 0.0)]
        return [(run, decay) for run, decay in found if run.start < run.stop]

    def runs(self) -> Iterator[Run]:
        """The same, cut by parameters where something is rounded at random."""
        for segment, decay in self.segments():
            coded = segment.start < self.states.coded
            if not coded and not self.states.stochastic:
                yield Run(segment, decay)
                continue
            for name in self.names:
                own = self._own_run(name)
                if own.start < own.stop and segment.start <= own.start < segment.stop:
                    yield from numbered(name, self.own_part(name), own.start, decay, coded)

    # Gradients.

    def zero_grad(self) -> None:
        """Forget the gradients."""
        (self.grads if self.data.stage >= 2 else self.full_grads).zero_()

    def room(self) -> torch.Tensor:
        """The buffer into which gradients of a backward pass are added."""
        if self.full_grads is None:
            self.full_grads = self.grads.new_zeros(self.full_params.numel())
        return self.full_grads

    def begin_reduce(self) -> None:
        """Sum the gradients over the ranks; `end_reduce` waits for it.

        Shares that tensor ranks have of a gradient are summed before: the own parts of ranks that
        hold different parameters do not line up.
        """
        full, axis = self.room(), self.data.axis
        SharedGradients({n: self.view(full, n) for n in self.names}, self.shards, self.tp).sum_()
        if axis.size == 1:
            return
        sent = full.to(self.data.reduce_dtype or full.dtype)
        self.end_reduce()  # of another micro-batch
        begin = axis.begin_scatter_sum_ if self.data.stage else axis.begin_sum_
        self._reducing = (sent, begin(sent, Tag(f"gradients of {self.about}", NOWHERE)))
        if self.data.stage >= 2:
            self.full_grads = None  # `sent` lives until the end of the reduction

    @property
    def summed_apart(self) -> bool:
        """Whether a sum has begun that holds memory of its own until `end_reduce`."""
        return self._reducing is not None and self._reducing[0] is not self.full_grads

    def end_reduce(self) -> None:
        """Wait until the sum is there, and take it over."""
        if self._reducing is None:
            return
        (sent, work), self._reducing = self._reducing, None
        work.wait()
        if self.data.stage >= 2:
            self.grads.add_(sent[self.own])
        elif sent is not self.full_grads:
            self.grads.copy_(sent[self.own])

    # Parameters.

    def begin_gather(self) -> None:
        """Get the parameters from all ranks, unless they are here or on their way."""
        if self._gathering is not None or self.full_params.untyped_storage().nbytes():
            return
        self.full_params.untyped_storage().resize_(self._bytes)
        self._get()

    def _get(self) -> None:
        """Begin to gather the own parts of all ranks."""
        tag = Tag(f"parameters of {self.about}", NOWHERE)
        self._gathering = self.data.axis.begin_gather(self.full_params, self.params, tag)

    def gather(self) -> None:
        """Have the parameters here."""
        self.begin_gather()
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def free(self) -> None:
        """Keep only the own parameters. The views of them stay, without memory behind them."""
        if self._gathering is not None:
            self.gather()
        self.full_params.untyped_storage().resize_(0)
        self.in_backward = False

    def begin_publish(self) -> None:
        """Show the ranks the own parameters, which are new; `gather` waits for it."""
        if self.data.stage == 3:
            self.free()  # they are gathered before their next use
        elif self.data.stage:
            self._get()
