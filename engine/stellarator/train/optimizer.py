"""Parameters, gradients and AdamW state in flat buffers, two groups: decayed and not.

defines: FlatOptimizer, KINDS

The parameters of the model become views of one buffer per group, so that the norm is one pass and
the update one launch. In bf16 the buffers are: bf16 parameters, fp32 masters, fp32 gradients
(summed over micro-batches in fp32), two fp32 moments: 18 bytes a parameter. In fp32 the parameters
are the masters: 16 bytes.
"""

from collections.abc import Iterator

import torch

from stellarator.config import OptimConfig
from stellarator.parallel.gradients import SharedGradients, counted_spans
from stellarator.parallel.mesh import Axis
from stellarator.parallel.shard import Shard, shards_of
from stellarator.parallel.tensor import ALONE, TensorParallel
from stellarator_kernels import adamw_, grad_norm

KINDS = ("master", "exp_avg", "exp_avg_sq")  # what a checkpoint holds of each parameter
# Added to the norm before dividing, as Megatron-LM and torch's clip_grad_norm_ do.
_CLIP_EPS = 1e-6


class _Group:
    """The flat buffers of the parameters that share one weight decay."""

    def __init__(
        self,
        named: list[tuple[str, torch.nn.Parameter]],
        shards: dict[str, Shard],
        weight_decay: float,
        dtype: torch.dtype,
    ):
        self.weight_decay = weight_decay
        self.shards = {name: shards[name] for name, _ in named}
        self.spans: dict[str, tuple[int, int, torch.Size]] = {}
        first = named[0][1]
        total = sum(p.numel() for _, p in named)
        self.params = torch.empty(total, dtype=dtype, device=first.device)
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.grads = torch.zeros(total, dtype=state_dtype, device=first.device)
        self.exp_avg = torch.zeros_like(self.grads)
        self.exp_avg_sq = torch.zeros_like(self.grads)
        self.master = None if dtype == state_dtype else torch.empty_like(self.grads)
        start = 0
        for name, parameter in named:
            end = start + parameter.numel()
            self.spans[name] = (start, end, parameter.shape)
            self.params[start:end].copy_(parameter.detach().reshape(-1))
            if self.master is not None:
                self.master[start:end].copy_(parameter.detach().reshape(-1))
            parameter.data = self.params[start:end].view(parameter.shape)
            start = end

    def counted_grads(self) -> list[torch.Tensor]:
        """The gradients that count here, where several ranks hold a parameter."""
        spans = counted_spans(list(self.shards.values()))
        return [self.grads[start:end] for start, end in spans]

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The part of a flat buffer that belongs to one parameter, in its shape."""
        start, end, shape = self.spans[name]
        return flat[start:end].view(shape)


class FlatOptimizer:
    """AdamW over the flat buffers of a model.

    Gradients are those of the SUM of the token losses; `step` divides by the number of target
    tokens of the whole batch and clips in the same factor, inside the AdamW launch.

    Args:
        model: all of its parameters, of one dtype; they become views of the flat buffers.
        dtype: of the parameters from now on; None: as they are. With bf16 given to a model in fp32
            the masters keep all its digits.
        config: betas, eps, weight_decay (for tensors of two or more dimensions), clip_norm.
        kernels: `impl` of the ops.
        tp: the ranks that share the parameters.
        pp: the ranks that hold the other layers.
    Cost: memory 18 bytes a parameter (bf16) or 16 (fp32).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: OptimConfig,
        kernels: str = "auto",
        dtype: torch.dtype | None = None,
        tp: TensorParallel = ALONE,
        pp: Axis = Axis("pp"),  # noqa: B008, it is frozen
    ):
        self.config, self.kernels = config, kernels
        self._axes = [axis for axis in (tp.axis, pp) if axis.size > 1]
        named, shards = list(model.named_parameters()), shards_of(model)
        dtype = dtype or named[0][1].dtype
        self.groups = [
            _Group([(n, p) for n, p in named if p.dim() >= 2], shards, config.weight_decay, dtype),
            _Group([(n, p) for n, p in named if p.dim() < 2], shards, 0.0, dtype),
        ]
        self._counted = [x for group in self.groups for x in group.counted_grads()]
        grads = {n: g.view(g.grads, n) for g in self.groups for n in g.spans}
        self._shared = SharedGradients(grads, {n: shards[n] for n in grads}, tp)
        self._hooks = [h for group in self.groups for h in self._attach(group, dict(named))]

    def _attach(self, group: _Group, parameters: dict[str, torch.nn.Parameter]) -> Iterator:
        """Make autograd add every gradient into the group's fp32 buffer."""
        for name in group.spans:
            parameter, total = parameters[name], group.view(group.grads, name)
            parameter.main_grad = total  # for who makes gradients without autograd
            if parameter.dtype == total.dtype:
                parameter.grad = total  # autograd adds in place to a gradient that is there
                continue

            def add(p: torch.nn.Parameter, total: torch.Tensor = total) -> None:
                total.add_(p.grad)
                p.grad = None

            yield parameter.register_post_accumulate_grad_hook(add)

    def grad(self, name: str) -> torch.Tensor:
        """The gradient of one parameter, a view of its buffer."""
        return next(g.view(g.grads, name) for g in self.groups if name in g.spans)

    @property
    def flat_grads(self) -> list[torch.Tensor]:
        """The gradient buffers; data parallelism sums these over ranks."""
        return [group.grads for group in self.groups]

    def zero_grad(self) -> None:
        """Forget the gradients; the buffers stay."""
        for grads in self.flat_grads:
            grads.zero_()

    def complete_grads(self) -> None:
        """Make gradients whole of which each tensor rank has a share; after the last backward."""
        self._shared.sum_()

    def norm(self, num_targets: int) -> torch.Tensor:
        """L2 norm of the gradient of the mean loss: 0-d on the device, fp32 (fp64 for fp64)."""
        norm = grad_norm(self._counted, impl=self.kernels)
        if self._axes:
            squares = norm.square()
            for axis in self._axes:
                axis.sum_(squares)
            norm = squares.sqrt()
        return norm / num_targets

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
        masters = [group.master for group in self.groups]
        adamw_(
            [group.params for group in self.groups],
            self.flat_grads,
            [group.exp_avg for group in self.groups],
            [group.exp_avg_sq for group in self.groups],
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            weight_decay=[group.weight_decay for group in self.groups],
            step=step,
            master=None if masters[0] is None else masters,
            clip_coefficient=factor / num_targets,
            impl=self.kernels,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Views of what a checkpoint needs: master.*, exp_avg.*, exp_avg_sq.* by logical name."""
        found = {}
        for group in self.groups:
            master = group.params if group.master is None else group.master
            buffers = {"master": master, "exp_avg": group.exp_avg, "exp_avg_sq": group.exp_avg_sq}
            for kind, flat in buffers.items():
                found |= {f"{kind}.{name}": group.view(flat, name) for name in group.spans}
        return found

    def shards(self) -> dict[str, Shard]:
        """What part each tensor of `state` is, of which whole."""
        return {f"{k}.{n}": s for g in self.groups for k in KINDS for n, s in g.shards.items()}

    def after_load(self) -> None:
        """Make the parameters follow the masters that `state()` was filled with."""
        for group in self.groups:
            if group.master is not None:
                group.params.copy_(group.master)

    def not_finite(self) -> list[str]:
        """Names of the parameters whose gradient holds a value that is not finite."""
        return [
            name
            for group in self.groups
            for name in group.spans
            if not torch.isfinite(group.view(group.grads, name)).all()
        ]
