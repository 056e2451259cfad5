"""A recipe on a layout: everything that the other parts of a plan start from.

defines: Stage, Case, make_case
"""

from dataclasses import dataclass

from stellarator import sizes
from stellarator.config import ModelConfig, ParallelConfig, RunConfig
from stellarator.parallel.layout import Layout, layout_of, problems
from stellarator.parallel.pipeline.schedules import placement
from stellarator.parallel.pipeline.split import split_layers
from stellarator.settings import ConfigError


@dataclass(frozen=True)
class Stage:
    """A run of layers on one pipeline rank; the first one embeds, the last one has the loss."""

    index: int
    rank: int
    num_layers: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Case:
    """A run whose layout works."""

    config: RunConfig
    parallel: ParallelConfig
    layout: Layout
    stages: tuple[Stage, ...]

    @property
    def model(self) -> ModelConfig:
        """The model's shape."""
        return self.config.model

    @property
    def num_micro_batches(self) -> int:
        """m, of one replica in one step."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.layout.dp)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.config.train.micro_batch_size

    @property
    def tokens(self) -> int:
        """N, tokens of a micro-batch on one rank of the context axis."""
        return self.rows * self.config.data.seq_length // self.layout.cp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters: those of the data and the context axis."""
        return self.layout.dp * self.layout.cp

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.config.train.global_batch_size * self.config.data.seq_length

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter or of one value of an activation."""
        return sizes.ITEMSIZE[self.config.train.precision]

    @property
    def state_bytes(self) -> dict[str, float]:
        """Bytes of a parameter and of what belongs to it."""
        optim = self.config.optim
        return sizes.state_bytes(self.config.train.precision, optim.weights, optim.moments)

    def parameters(self, rank: int) -> int:
        """Parameters of one tensor rank of a pipeline rank.

        A tied model whose ends are on different ranks has its embedding on both.
        """
        model, tp, count = self.model, self.layout.tp, 0
        own = [stage for stage in self.stages if stage.rank == rank]
        for stage in own:
            count += stage.num_layers * sizes.layer_parameters(model, tp)
        first, last = (any(getattr(stage, end) for stage in own) for end in ("first", "last"))
        if first:
            count += sizes.position_parameters(model)
        if last:
            count += 2 * model.width
        matrices = max(first, last) if model.tie_embeddings else first + last
        return count + matrices * sizes.embedding_parameters(model, tp)

    @property
    def ties_ranks(self) -> bool:
        """Whether two pipeline ranks hold the same embedding."""
        return self.model.tie_embeddings and self.stages[0].rank != self.stages[-1].rank


def make_case(config: RunConfig, parallel: ParallelConfig, num_gpus: int) -> Case:
    """Layers on stages on ranks.

    Layers are shared out such that the slowest stage is as fast as it can be; the head counts as
    the layers that have as many weights.

    Raises:
        ConfigError: the layout cannot work; with every reason.
    """
    found = problems(
        config.model,
        parallel,
        num_gpus,
        seq_length=config.data.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
    )
    if found:
        raise ConfigError(found)
    model = config.model
    ranks = placement(parallel.schedule, parallel.pp, parallel.stages_per_rank)
    counts = split_layers(model.num_layers, len(ranks), 0, sizes.head_in_layers(model))
    last = len(ranks) - 1
    stages = tuple(
        Stage(index, rank, count, index == 0, index == last)
        for index, (rank, count) in enumerate(zip(ranks, counts, strict=True))
    )
    return Case(config, parallel, layout_of(parallel, num_gpus), stages)
