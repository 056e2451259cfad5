"""What the executor does on gloo processes, beside the schedule and its simulation.

What is done is noted where it happens: in the forward of a stage, in its backward pass, and where
its weight gradient is made; activations are counted until the memory of their tensors is free. The
gradients are those of one process. Not covered: NCCL; time.
"""

import os
import weakref

import pytest
import torch
from ranks import on_ranks

from stellarator.config import ParallelConfig
from stellarator.parallel import mesh as meshes
from stellarator.parallel.pipeline.deferred import Deferred
from stellarator.parallel.pipeline.execute import Executor, Links
from stellarator.parallel.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NAMES,
    SPLIT,
    WEIGHT_GRADIENT,
    Action,
    default_stages_per_rank,
    make,
    placement,
)
from stellarator.parallel.pipeline.simulate import Costs, simulate
from stellarator.parallel.products import column_product
from stellarator.parallel.tensor import ALONE

WIDTH = 5
# (schedule, p, m, v) on four processes: p ranks, and 4 / p such pipelines beside each other.
CASES = [
    (name, p, m, v)
    for name in NAMES
    for p, m in ((2, 5), (2, 24), (4, 3), (4, 9))
    for v in ((2, 3) if name == "interleaved" else (default_stages_per_rank(name),))
]


class Noted(torch.autograd.Function):
    """x; the backward pass says that it was here."""

    @staticmethod
    def forward(ctx, x, say):
        ctx.say = say
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        ctx.say()
        return dx, None


class Watching(Deferred):
    """Weight gradients apart, and what was done when, of one rank."""

    def __init__(self):
        super().__init__()
        self.done: list[Action] = []
        self.held = self.most = 0

    def run(self, key) -> None:
        self.done.append(Action(WEIGHT_GRADIENT, *key))
        super().run(key)

    def stage(self, x: torch.Tensor, weight: torch.Tensor, place: tuple[int, int], split: bool):
        """tanh of a product, with notes."""
        self.done.append(Action(FORWARD, *place))
        kind = INPUT_GRADIENT if split else BACKWARD

        def say():
            assert self.key == (place if split else None)
            self.done.append(Action(kind, *place))

        kept = Noted.apply(x, say)
        self.held += 1
        self.most = max(self.most, self.held)
        weakref.finalize(kept.untyped_storage(), self.free)
        product = kept[None], weight, weight.new_zeros(WIDTH)
        return torch.tanh(column_product(*product, (1, len(kept)), ALONE, self)[0])

    def free(self) -> None:
        self.held -= 1


class Counting(Links):
    """Counts the messages whose tensors are kept until they are waited for."""

    pending = most = 0

    def send(self, x, to, key):
        handle = super().send(x, to, key)
        self.pending += 1
        self.most = max(self.most, self.pending)
        wait = handle.wait

        def counted():
            self.pending -= 1
            return wait()

        handle.wait = counted
        return handle


def weights_and_rows(num_stages: int, m: int):
    """The same on every rank."""
    generator = torch.Generator().manual_seed(1)
    to = {"generator": generator, "dtype": torch.float64}
    weights = [torch.randn(WIDTH, WIDTH, **to).requires_grad_() for _ in range(num_stages)]
    return weights, [torch.randn(3, WIDTH, **to) for _ in range(m)]


def executed(rank: int) -> list:
    """[(what was done, most activations, loss, {stage: gradient})] of each case."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4"}
    found, places = [], {}
    for p in (2, 4):
        mesh = meshes.start("cpu", parallel=ParallelConfig(pp=p, timeout_seconds=77.0))
        places[p] = mesh.pp, Counting(mesh)
        # No group is given up before the watchdog can say why.
        backends = [group.process_group._get_backend(mesh.device) for group in mesh.groups]
        assert {b.options._timeout.total_seconds() for b in backends[1:]} == {77.0 + 60.0}
    for name, p, m, v in CASES:
        axis, links = places[p]
        weights, rows = weights_and_rows(p * v, m)
        ranks, watching, split = placement(name, p, v), Watching(), name in SPLIT
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
            weight.main_grad = lambda weight=weight: weight.grad

        def forward(stage, micro_batch, x, *, of=(watching, weights, rows, split)):
            watching, weights, rows, split = of
            x = rows[micro_batch].clone().requires_grad_() if x is None else x
            y = watching.stage(x, weights[stage], (stage, micro_batch), split)
            return y if stage < len(weights) - 1 else y.square().sum()

        executor = Executor(axis, links, ranks, watching)
        loss = executor.run(make(name, p, m, v), forward, lambda _, x=rows[0]: torch.empty_like(x))
        mine = [s for s, owner in enumerate(ranks) if owner == axis.rank]
        assert executor.done == watching.done and watching.held == 0
        # A few a stage, however many micro-batches there are; GPipe hears nothing for a while.
        limit = m if name == "gpipe" else 2 * p * v
        assert links.pending == 0 and links.most <= limit, (name, p, m, v, links.most)
        links.most = 0
        found.append(
            (watching.done, watching.most, float(loss), {s: weights[s].grad for s in mine})
        )
    return found


@pytest.mark.dist
def test_ranks_do_what_the_schedule_says_and_hold_what_the_simulation_says():
    by_rank = on_ranks(executed, 4)
    for index, (name, p, m, v) in enumerate(CASES):
        weights, rows = weights_and_rows(p * v, m)
        total = 0.0
        for x in rows:
            for weight in weights:
                x = torch.tanh(x @ weight.T)
            total = total + x.square().sum()
        total.backward()
        total = total.item()
        schedule, simulated = (
            make(name, p, m, v),
            simulate(make(name, p, m, v), Costs.uniform(p * v)),
        )
        last = placement(name, p, v)[-1]
        for rank in range(4):
            done, most, loss, grads = by_rank[rank][index]
            at = rank // (4 // p)  # the pipeline is the slowest axis
            assert done == schedule[at], (name, p, m, v, rank)
            assert most == simulated.peak_activations[at], (name, p, m, v, rank)
            assert loss == pytest.approx(total if at == last else 0.0, rel=1e-13)
            for stage, grad in grads.items():
                torch.testing.assert_close(grad, weights[stage].grad, rtol=1e-12, atol=1e-14)
