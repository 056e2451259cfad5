"""Who this process is among all processes, as one explicit object.

defines: Group, Axis, Mesh, start

A mesh has an axis for each kind of parallelism and one, `world`, for all processes. There is no
other record of process groups: who needs one is given it.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

# Its functions have the process group as it is when they are defined as a default argument. What
# imports it after the group is there (torch._dynamo does) would keep the group, and its threads,
# alive beyond `stop`; one that still holds a tensor when Python ends aborts the process.
import torch.distributed.nn.functional  # noqa: F401

from stellarator.config import ParallelConfig
from stellarator.parallel.layout import AXES, Layout, layout_of


class Group:
    """A process group until its mesh stops: gloo's threads end with the last reference to it."""

    def __init__(self, process_group: dist.ProcessGroup):
        self.process_group: dist.ProcessGroup | None = process_group


@dataclass(frozen=True)
class Axis:
    """Ranks that share one kind of work: this one is `rank` of `size`. Of one rank: all no-ops."""

    name: str
    rank: int = 0
    size: int = 1
    group: Group | None = None

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group.process_group)
        return x

    def max_(self, x: torch.Tensor) -> torch.Tensor:
        """Maximum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group.process_group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The x of all ranks, one behind the other along the first dimension."""
        if self.size == 1:
            return x
        found = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(found, x.contiguous(), group=self.group.process_group)
        return found

    def scatter_sum(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum over the ranks, cut along the first dimension."""
        if self.size == 1:
            return x
        found = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        dist.reduce_scatter_tensor(found, x.contiguous(), group=self.group.process_group)
        return found

    # Begun here, and done when `wait` of what is returned comes back; flat tensors, in place.

    def begin_sum_(self, x: torch.Tensor) -> dist.Work:
        """Sum over the ranks."""
        return dist.all_reduce(x, group=self.group.process_group, async_op=True)

    def begin_scatter_sum_(self, x: torch.Tensor) -> dist.Work:
        """This rank's part of x becomes that of the sum; what the rest becomes is undefined."""
        part = x.view(self.size, -1)[self.rank]
        return dist.reduce_scatter_tensor(part, x, group=self.group.process_group, async_op=True)

    def begin_gather(self, x: torch.Tensor, part: torch.Tensor) -> dist.Work:
        """x becomes the parts of all ranks, one behind the other; `part` may be a view of x."""
        return dist.all_gather_into_tensor(x, part, group=self.group.process_group, async_op=True)


@dataclass(frozen=True)
class Mesh:
    """This process's place on every axis, and its device."""

    device: torch.device
    layout: Layout = Layout()
    world: Axis = Axis("world")
    tp: Axis = Axis("tp")
    cp: Axis = Axis("cp")
    dp: Axis = Axis("dp")
    pp: Axis = Axis("pp")
    replicas: Axis = Axis("replicas")  # dp and cp: who holds the same parameters
    groups: list[Group] = field(default_factory=list)

    def among(self, name: str, sets: list[list[int]]) -> Axis:
        """The axis of that set of ranks of the world which this one is in; alone if in none.

        Every process calls this with the same sets, as torch asks for.
        """
        found, rank = Axis(name), self.world.rank
        for ranks in sets:
            process_group = dist.new_group(ranks)
            if rank in ranks:
                self.groups.append(Group(process_group))
                found = Axis(name, ranks.index(rank), len(ranks), self.groups[-1])
        return found

    def stop(self) -> None:
        """Leave all process groups; nothing of this mesh can be used for collectives any more."""
        for group in self.groups:
            group.process_group = None
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.world.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        # Reading the result makes the host wait too; on a GPU the collective alone does not.
        self.world.sum_(torch.zeros(1, device=self.device)).item()

    def agrees_on(self, value: int) -> bool:
        """Whether every rank passed the same number, below 2**62; all ranks get the same answer."""
        both = torch.tensor([value, -value], dtype=torch.int64, device=self.device)
        self.world.max_(both)
        return int(both[0]) == -int(both[1])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block without collectives, which all ranks leave together, or none does.

        An error that every rank has alike is marked with `told` = True on all but rank 0: to print
        it once is enough.

        Raises:
            RuntimeError: it failed on another rank only.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        text = "" if error is None else f"{type(error).__name__}: {error}"
        alike = self.agrees_on(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))
        if error is not None:
            error.told = alike and not self.main
            raise error
        if not alike:
            raise RuntimeError(f"rank {self.world.rank} stops, as another rank failed.")


def start(
    device: str = "auto",
    timeout_seconds: float = 600.0,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008, it is frozen
) -> Mesh:
    """The mesh of this process; joins the process group when torchrun started more than one.

    Args:
        device: "cpu", "cuda", or "auto": cuda where there is one.
        timeout_seconds: of every collective.
        parallel: sizes of the axes.
    Raises:
        ValueError: the axes do not divide the processes; before any process group is there.
        RuntimeError: cuda was asked for and there is none.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    layout = layout_of(parallel, size)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "train.device: expected a usable NVIDIA GPU for cuda, got none. "
            "Pass train.device=cpu, or see `stellarator doctor`."
        )
    place = (
        torch.device(device, int(os.environ.get("LOCAL_RANK", 0)))
        if device == "cuda"
        else (torch.device("cpu"))
    )
    if device == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    world = Axis("world", rank, size, Group(dist.group.WORLD) if size > 1 else None)
    mesh = Mesh(place, layout, world)
    mesh.groups.extend([world.group] if size > 1 else [])
    axes = {}
    for name in AXES:  # groups only where an axis has more than one rank
        length, at = getattr(layout, name), layout.place(rank)[name]
        if length == size > 1:
            axes[name] = Axis(name, at, length, world.group)
        elif length > 1:
            axes[name] = mesh.among(name, layout.groups(name))
    replicas = axes.get("dp", mesh.replicas)
    if layout.cp > 1:  # not the group of cp: its messages would queue behind sums of gradients
        replicas = mesh.among("replicas", layout.groups("cp", "dp"))
    return replace(mesh, **axes, replicas=replicas)
