"""Rows whose tokens are cut over the context ranks: what of them is here, and how it attends.

defines: ContextParallel, Cut

Letters: P ranks, B rows, T tokens of a row.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from stellarator.parallel import zigzag
from stellarator.parallel.collectives import Group
from stellarator.parallel.context import context_attention
from stellarator.parallel.journal import Tag
from stellarator.parallel.mesh import Axis

_KEPT_PLANS = 64  # rows without bounds inside, and those of an evaluation, come again


@dataclass(frozen=True)
class Cut:
    """(B, T) rows, of which each rank of a context group has (B, T/P) tokens.

    plan: of this rank; its mask is that of the model.
    form: of `context_attention`.
    """

    plan: zigzag.Plan
    group: Group
    form: str = "ring"

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of (B, T)."""
        return zigzag.shard(x, self.plan.rank, self.plan.size)

    def positions(self, device) -> torch.Tensor:
        """(B, T/P): where in their row this rank's tokens are."""
        plan = self.plan
        return zigzag.positions(plan.rank, plan.size, plan.T, device).expand(plan.B, -1)

    def attend(self, q, k, v, layer: int, **options) -> torch.Tensor:
        """`context_attention` of this rank's tokens, (B, T/P, heads, D) each."""
        options |= {"form": self.form, "tag": Tag("attention", layer)}
        return context_attention(q, k, v, self.plan, self.group, **options)


class ContextParallel:
    """The ranks that have other tokens of the same rows.

    Args:
        axis: these ranks; all of them make this object at once.
        form: "ring" or "gather", see `context_attention`.
        window: of the model.
        device: of this rank.
    """

    def __init__(
        self,
        axis: Axis,
        form: str = "ring",
        window: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.axis, self.form = axis, form

        @lru_cache(_KEPT_PLANS)
        def plan(B: int, T: int, bounds: tuple[int, ...]) -> zigzag.Plan:
            return zigzag.Plan(axis.rank, axis.size, B, T, bounds, window=window)

        self._plan = plan
        # NCCL connects a group in its first collective, which all ranks must enter. That of a ring
        # may be of some: a window or documents let the others send nothing.
        axis.sum_(torch.zeros(1, device=device))

    @property
    def group(self) -> Group:
        """For a while only: the threads of gloo end with the last reference to its group."""
        return Group(self.axis.group.process_group, self.axis.name)

    def cut(self, shape: tuple[int, int], cu_seqlens: torch.Tensor) -> Cut | None:
        """How (B, T) rows with these documents are cut; None: one rank has them whole.

        cu_seqlens: on the host, where it is read.
        """
        if self.axis.size == 1:
            return None
        return Cut(self._plan(*shape, tuple(cu_seqlens.tolist())), self.group, self.form)
