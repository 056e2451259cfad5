"""A model in stages over the ranks of a pipeline.

defines: Pipeline
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from stellarator import sizes
from stellarator.config import RunConfig
from stellarator.model import Transformer
from stellarator.parallel.layout import Part
from stellarator.parallel.mesh import Axis, Mesh
from stellarator.parallel.pipeline.deferred import Deferred
from stellarator.parallel.pipeline.execute import Executor, Last, Links
from stellarator.parallel.pipeline.schedules import FORWARD, SPLIT, Action, make, placement
from stellarator.parallel.pipeline.split import layer_ranges, split_layers
from stellarator.parallel.reducer import Reducer
from stellarator.train.inputs import Inputs


class _Reducing(Last):
    """Begins to sum gradients over the data-parallel ranks while others are still made."""

    def __init__(self, reducer: Reducer, names: list[set[str]]):
        self._reducer, self._names = reducer, names  # the latter of each stage

    def backward(self) -> AbstractContextManager:
        return self._reducer.last_micro_batch()

    def made(self, stage: int) -> None:
        self._reducer.made(self._names[stage])


class Pipeline:
    """Which stages are here, and a step of them.

    Args:
        config: of the run.
        mesh: of this process.
    """

    def __init__(self, config: RunConfig, mesh: Mesh):
        model, self.parallel, self.axis = config.model, config.parallel, mesh.pp
        self.ranks = placement(
            self.parallel.schedule, self.axis.size, self.parallel.stages_per_rank
        )
        counts = split_layers(model.num_layers, len(self.ranks), 0, sizes.head_in_layers(model))
        self.stages = layer_ranges(counts)
        mine = [s for s, rank in enumerate(self.ranks) if rank == self.axis.rank]
        layers = tuple(layer for stage in mine for layer in self.stages[stage])
        self.last = len(self.ranks) - 1
        self.part = Part(layers, first=0 in mine, last=self.last in mine)
        self.deferred = Deferred()
        # Both ends of a tied model have the embedding; where one rank has both ends, once.
        first, end, columns = self.ranks[0], self.ranks[-1], mesh.layout.groups("pp")
        links, self.tie = None, Axis("tie")
        if self.axis.size > 1:
            links = Links(mesh)
        if model.tie_embeddings and first != end:
            ends = [[column[first], column[end]] for column in columns]
            self.tie = mesh.among("tie", ends)
        self.executor = Executor(self.axis, links, self.ranks, self.deferred)

    def attach(self, model: Transformer, reducer: Reducer) -> None:
        """Use the model; its layers make weight gradients apart if the schedule asks for it.

        reducer: begins to sum over the data-parallel ranks what no stage adds to any more.
        """
        self.model = model
        names = [name for name, _ in model.named_parameters()]
        self.reducing = _Reducing(reducer, [self._names(s, names) for s in range(self.last + 1)])
        if model.config.tie_embeddings:  # two stages add to it, maybe on two ranks
            reducer.hold("embedding.weight")
        if self.parallel.schedule in SPLIT:
            for module in model.modules():
                if hasattr(module, "deferred"):
                    module.deferred = self.deferred

    def _names(self, stage: int, names: Sequence[str]) -> set[str]:
        """Those of the parameters that belong to a stage."""
        layers = {f"layers.{layer}" for layer in self.stages[stage]}
        ends = set()
        if stage == 0:
            ends |= {"embedding", "position_embedding"}
        if stage == self.last:
            ends |= {"final_norm", "head"}
        return {n for n in names if n.split(".")[0] in ends or ".".join(n.split(".")[:2]) in layers}

    def step(self, batches: Sequence[Inputs]) -> torch.Tensor | float:
        """Forward and backward of the micro-batches of a step; the sum of their losses, if here."""
        v = self.parallel.stages_per_rank
        schedule = make(self.parallel.schedule, self.axis.size, len(batches), v)
        return self._run(schedule, batches, self.reducing)

    def evaluate(self, batch: Inputs) -> torch.Tensor | float:
        """The sum of the losses of one batch, if here; forward only."""
        schedule = [[] for _ in range(self.axis.size)]
        for stage, rank in enumerate(self.ranks):
            schedule[rank].append(Action(FORWARD, stage, 0))
        return self._run(schedule, [batch])

    def _run(
        self,
        schedule: list[list[Action]],
        batches: Sequence[Inputs],
        last: Last | None = None,
    ) -> torch.Tensor | float:
        def forward(stage: int, micro_batch: int, x: torch.Tensor | None) -> torch.Tensor:
            batch = batches[micro_batch]
            given = batch.tokens, batch.targets
            return self.model.stage(self.stages[stage], x, *given, **batch.options)

        def empty(micro_batch: int) -> torch.Tensor:
            like = self.model.layers[self.part.layers[0]].mlp_norm.weight
            shape = self.model.tp.own_tokens(batches[micro_batch].tokens).shape
            return like.new_empty((*shape, self.model.config.width))

        return self.executor.run(schedule, forward, empty, last)

    def sum_tied_(self, grad_of) -> None:
        """Make the gradient of the embedding whole where both ends have it.

        grad_of: name of a parameter -> its gradient.
        """
        if self.tie.size > 1:
            self.tie.sum_(grad_of("embedding.weight"), "gradient of the tied embedding")
