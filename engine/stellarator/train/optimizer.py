"""Parameters, gradients and AdamW state in flat buffers: one bucket, or some where ranks share.

defines: FlatOptimizer, KINDS

The parameters of the model become views of flat buffers, so that the norm is one pass and the
update one launch for each weight decay. In bf16 the buffers are: bf16 parameters, fp32 masters,
fp32 gradients (summed over micro-batches in fp32), two fp32 moments: 18 bytes a parameter. In fp32
the parameters are the masters: 16 bytes. Masters and moments may be narrower (`optim.weights`,
`optim.moments`): see stellarator.parallel.states. Of what ZeRO shares out a data-parallel rank has
its part: see stellarator.parallel.buckets.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch

from stellarator.config import OptimConfig
from stellarator.parallel.buckets import Bucket, DataParallel, plan
from stellarator.parallel.mesh import Axis
from stellarator.parallel.reducer import Reducer
from stellarator.parallel.shard import FlatPart, Shard, shards_of
from stellarator.parallel.states import Kinds, Run
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator.parallel.zero import Gatherer
from stellarator_kernels import adamw_, grad_norm

KINDS = ("master", "exp_avg", "exp_avg_sq")  # what a checkpoint holds of each parameter
# Added to the norm before dividing, as Megatron-LM and torch's clip_grad_norm_ do.
_CLIP_EPS = 1e-6


class FlatOptimizer:
    """AdamW over the flat buffers of a model.

    Gradients are those of the SUM of the token losses; `step` divides by the number of target
    tokens of the whole batch and clips in the same factor, inside the AdamW launch.

        optimizer.zero_grad()
        for batch in micro_batches:
            with optimizer.last_micro_batch(batch is micro_batches[-1]):
                loss(batch).backward()
        optimizer.complete_grads()
        optimizer.step(step, lr, num_targets, optimizer.norm(num_targets))

    Args:
        model: all of its parameters, of one dtype; they become views of the flat buffers. With
            ZeRO 3 its `layers` are gathered one by one.
        dtype: of the parameters from now on; None: as they are. With bf16 given to a model in fp32
            the masters keep all its digits.
        config: betas, eps, weight_decay (for tensors of two or more dimensions), clip_norm,
            weights, moments.
        kernels: `impl` of the ops.
        tp: the ranks that share the parameters.
        data: the ranks that sum their gradients.
        pp: the ranks that hold the other layers.
        seed: of what is rounded at random.
    Attributes:
        axes: over which parameters, or their states, are shared out.
        reducer: sums the gradients; for who makes them in another order than one backward pass.
    Cost: memory 18 bytes a parameter (bf16) or 16 (fp32), less what ZeRO shares out and what is
        narrower: `sizes.bytes_per_parameter`. Where something is rounded at random, an update is a
        launch for each parameter.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: OptimConfig,
        kernels: str = "auto",
        dtype: torch.dtype | None = None,
        tp: TensorParallel = ALONE,
        data: DataParallel = DataParallel(),  # noqa: B008, it is frozen
        pp: Axis = Axis("pp"),  # noqa: B008, it is frozen
        seed: int = 0,
    ):
        self.config, self.kernels, self.data, self.seed = config, kernels, data, seed
        holders = (tp.axis, pp, *((data.axis,) if data.stage else ()))
        self.axes = [axis for axis in holders if axis.size > 1]
        named, shards = list(model.named_parameters()), shards_of(model)
        dtype, layers = dtype or named[0][1].dtype, list(getattr(model, "layers", ()))
        kinds = Kinds(config.weights, config.moments)
        self.buckets = [
            Bucket(part, shards, dtype, config.weight_decay, tp, data, kinds)
            for part in plan(named, shards, layers, data)
        ]
        self._counted = [x for bucket in self.buckets for x in bucket.counted_grads()]
        self.reducer = Reducer(self.buckets, dict(named))
        if data.stage == 3:
            Gatherer(model, layers, self.buckets[-2::-1], self.buckets[-1])

    def grad(self, name: str) -> torch.Tensor:
        """What this rank's backward passes have made for one parameter; ZeRO 2 does not keep it."""
        return next(b.view(b.full_grads, name) for b in self.buckets if name in b.spans)

    @property
    def flat_grads(self) -> list[torch.Tensor]:
        """The gradient buffers of the own parts."""
        return [bucket.grads for bucket in self.buckets]

    def zero_grad(self) -> None:
        """Forget the gradients; the buffers stay."""
        self.reducer.zero_grad()

    def last_micro_batch(self, last: bool = True) -> AbstractContextManager:
        """Around the backward passes that make the last gradients of a step, if `last`.

        It lets their sum over the ranks begin while more are made; it is right without, too.
        """
        return self.reducer.last_micro_batch(last)

    def complete_grads(self) -> None:
        """Have the sums of the gradients over all ranks; after the last backward pass."""
        self.reducer.finish()

    def norm(self, num_targets: int) -> torch.Tensor:
        """L2 norm of the gradient of the mean loss: 0-d on the device, fp32 (fp64 for fp64)."""
        if not self.axes:
            return grad_norm(self._counted, impl=self.kernels) / num_targets
        squares = grad_norm(self._counted, squared=True, impl=self.kernels)  # fp64
        for axis in self.axes:
            axis.sum_(squares, "gradient norm")
        return squares.sqrt().to(self._counted[0].dtype) / num_targets

    def step(self, step: int, lr: float, num_targets: int, norm: torch.Tensor) -> None:
        """One AdamW update.

        Args:
            step: 1 for the first update, 2 for the second: updates that were skipped do not count
                (bias correction).
            lr: learning rate.
            num_targets: target tokens of the whole batch, over all ranks; >= 1.
            norm: what `norm(num_targets)` gave, over all ranks.
        """
        factor = torch.ones_like(norm)
        if self.config.clip_norm is not None:
            factor = (self.config.clip_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
        runs = [(bucket, run) for bucket in self.buckets for run in bucket.runs()]
        for coded in (False, True):
            self._update([x for x in runs if x[1].coded == coded], step, lr, factor / num_targets)
        self._publish()

    def _update(
        self, runs: list[tuple[Bucket, Run]], step: int, lr: float, factor: torch.Tensor
    ) -> None:
        """AdamW on runs whose moments are of one sort; factor: of their gradients."""
        if not runs:
            return
        states = [(bucket.states, run.run) for bucket, run in runs]
        averages = [state.exp_avg.parts(run) for state, run in states]
        squares = [state.exp_avg_sq.parts(run) for state, run in states]
        options = {}
        for kind in ("master", "remainder"):
            if getattr(states[0][0], kind) is not None:
                options[kind] = [getattr(state, kind)[run] for state, run in states]
        if runs[0][1].coded:
            options["exp_avg_scales"] = [scales for _, scales in averages]
            options["exp_avg_sq_scales"] = [scales for _, scales in squares]
        if runs[0][1].first_index is not None:
            options["seed"] = self.seed
            options["first_indices"] = [run.first_index for _, run in runs]
            options["index_rows"] = [run.index_rows for _, run in runs]
        adamw_(
            [bucket.params[run.run] for bucket, run in runs],
            [bucket.grads[run.run] for bucket, run in runs],
            [values for values, _ in averages],
            [values for values, _ in squares],
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            weight_decay=[run.decay for _, run in runs],
            step=step,
            clip_coefficient=factor,
            impl=self.kernels,
            **options,
        )

    def _publish(self) -> None:
        """Give every rank the parameters that others have changed."""
        for bucket in self.buckets:
            bucket.begin_publish()
        if self.data.stage < 3:
            for bucket in self.buckets:
                bucket.gather()

    # What a checkpoint has.

    def state(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint needs: master.*, exp_avg.*, exp_avg_sq.* by logical name.

        Views of what lies in memory like this; of what is narrower, copies made when asked for.
        """
        return _State(self.buckets)

    def put(self, name: str, values: torch.Tensor) -> None:
        """Keep what `state` then gives under this name; `after_load` when all are there.

        Of narrower kinds what they can hold: all digits, but weights "stochastic" round to the
        nearest, and moments of 8 bits are exact where they were saved in the same groups.
        """
        kind, name = name.split(".", 1)
        next(b for b in self.buckets if name in b.spans).write(kind, name, values)

    def shards(self) -> dict[str, Shard | FlatPart]:
        """What part each tensor of `state` is, of which whole."""
        return {
            f"{kind}.{name}": bucket.part_of(name)
            for bucket in self.buckets
            for kind in KINDS
            for name in bucket.names
        }

    def after_load(self) -> None:
        """Make the parameters follow the masters that were put here."""
        for bucket in self.buckets:
            if bucket.states.master is not None:
                bucket.params.copy_(bucket.states.master)
        self._publish()

    def not_finite(self, names: Iterable[str]) -> list[str]:
        """Those of the parameters whose gradient holds a value that is not finite, on any rank.

        names: of all parameters, whoever holds them, in one order on every rank.
        """
        views = {n: b.own_view(b.grads, n) for b in self.buckets for n in b.names}
        wrong = {name: ~torch.isfinite(view).all() for name, view in views.items()}
        none = torch.zeros_like(next(iter(wrong.values())))
        found = torch.stack([wrong.get(name, none) for name in names]).int()
        for axis in self.axes:
            axis.max_(found, "gradients that are not finite")
        return [name for name, is_wrong in zip(names, found.tolist(), strict=True) if is_wrong]


class _State(Mapping):
    """`FlatOptimizer.state`."""

    def __init__(self, buckets: list[Bucket]):
        self._buckets = {f"{k}.{n}": b for b in buckets for k in KINDS for n in b.names}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._buckets[key].read(*key.split(".", 1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._buckets)

    def __len__(self) -> int:
        return len(self._buckets)
