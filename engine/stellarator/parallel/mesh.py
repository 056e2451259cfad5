"""Who this process is among all processes, as one explicit object.

defines: Axis, Mesh, start

A mesh has an axis for each kind of parallelism and one, `world`, for all processes. There is no
other record of process groups: who needs one is given it. What they do is in a journal
(`stellarator.parallel.journal`), if the mesh has one.
"""

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist

# Its functions have the process group as it is when they are defined as a default argument. What
# imports it after the group is there (torch._dynamo does) would keep the group, and its threads,
# alive beyond `stop`; one that still holds a tensor when Python ends aborts the process.
import torch.distributed.nn.functional  # noqa: F401

from stellarator.config import ParallelConfig
from stellarator.parallel.collectives import Group, Pending
from stellarator.parallel.journal import NOWHERE, Journal, Tag
from stellarator.parallel.layout import AXES, Layout, layout_of

_LATER_SECONDS = 60.0


@dataclass(frozen=True)
class Axis:
    """Ranks that share one kind of work: this one is `rank` of `size`. Of one rank: all no-ops.

    `tag` of each call says what it is for: the name of an op, or a `Tag`.
    """

    name: str
    rank: int = 0
    size: int = 1
    group: Group | None = None

    def at(self, **places: int | None) -> None:
        """Where the run is from now on (step, micro_batch, layer), for the journal."""
        if self.group is not None and self.group.journal is not None:
            self.group.journal.at(**places)

    @property
    def layer(self) -> int:
        """Where the run is now; for autograd functions, whose backward comes later."""
        if self.group is None or self.group.journal is None:
            return NOWHERE
        layer = self.group.journal.where.layer
        return NOWHERE if layer is None else layer

    def sum_(self, x: torch.Tensor, tag: Tag | str) -> torch.Tensor:
        """Sum over the ranks, in place; the same bits on every rank."""
        return self.group.all_reduce(x, tag) if self.size > 1 else x

    def max_(self, x: torch.Tensor, tag: Tag | str) -> torch.Tensor:
        """Maximum over the ranks, in place."""
        return self.group.all_reduce(x, tag, maximum=True) if self.size > 1 else x

    def gather(self, x: torch.Tensor, tag: Tag | str) -> torch.Tensor:
        """The x of all ranks, one behind the other along the first dimension."""
        return self.group.all_gather(x.contiguous(), tag) if self.size > 1 else x

    def scatter_sum(self, x: torch.Tensor, tag: Tag | str) -> torch.Tensor:
        """This rank's part of the sum over the ranks, cut along the first dimension."""
        return self.group.reduce_scatter(x.contiguous(), tag) if self.size > 1 else x

    # Begun here, and done when `wait` of what is returned comes back; flat tensors, in place.

    def begin_sum_(self, x: torch.Tensor, tag: Tag | str) -> Pending:
        """Sum over the ranks."""
        if self.size == 1:
            return Pending(result=x)
        return self.group.all_reduce(x, tag, wait=False)

    def begin_scatter_sum_(self, x: torch.Tensor, tag: Tag | str) -> Pending:
        """This rank's part of x becomes that of the sum; what the rest becomes is undefined."""
        if self.size == 1:
            return Pending(result=x)
        part = x.view(self.size, -1)[self.rank]
        return self.group.reduce_scatter(x, tag, wait=False, into=part)

    def begin_gather(self, x: torch.Tensor, part: torch.Tensor, tag: Tag | str) -> Pending:
        """x becomes the parts of all ranks, one behind the other; `part` may be a view of x."""
        if self.size == 1:
            return Pending(result=x.copy_(part))
        return self.group.all_gather(part, tag, wait=False, into=x)


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
    journal: Journal | None = None
    timeout: timedelta | None = None  # of every collective; None: of one process
    groups: list[Group] = field(default_factory=list)

    def among(self, name: str, sets: list[list[int]]) -> Axis:
        """The axis of that set of ranks of the world which this one is in; alone if in none.

        Every process calls this with the same sets, as torch asks for.
        """
        found, rank = Axis(name, group=self._alone(name)), self.world.rank
        for ranks in sets:
            process_group = dist.new_group(ranks, timeout=self.timeout)
            if rank in ranks:
                # Until `stop`: gloo's threads end with the last reference to the process group.
                self.groups.append(Group(process_group, name, self.journal))
                found = Axis(name, ranks.index(rank), len(ranks), self.groups[-1])
        return found

    def _alone(self, name: str) -> Group | None:
        """For an axis of one rank: it has the journal, so that it is told where the run is."""
        return None if self.journal is None else Group(None, name, self.journal)

    def at(self, **places: int | None) -> None:
        """Where the run is from now on (step, micro_batch, layer), for the journal."""
        self.world.at(**places)

    def stop(self) -> None:
        """Leave all process groups; nothing of this mesh can be used for collectives any more."""
        for group in self.groups:
            group.process_group = None
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.journal is not None:
            self.journal.close()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.world.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        # Reading the result makes the host wait too; on a GPU the collective alone does not.
        self.world.sum_(torch.zeros(1, device=self.device), "barrier").item()

    def agrees_on(self, value: int, tag: Tag | str = "agreement") -> bool:
        """Whether every rank passed the same number, below 2**62; all ranks get the same answer."""
        both = torch.tensor([value, -value], dtype=torch.int64, device=self.device)
        self.world.max_(both, tag)
        return int(both[0]) == -int(both[1])

    def of_all(self, error: Exception) -> Exception:
        """The error, marked as one that every rank raises: rank 0 prints it for all."""
        error.told = not self.main
        return error

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
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        alike = self.agrees_on(number, "whether all ranks can go on")
        if error is not None:
            error.told = alike and not self.main
            raise error
        if not alike:
            error = RuntimeError(f"rank {self.world.rank} stops, as another rank failed.")
            error.told = False
            raise error


def start(
    device: str = "auto",
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008, it is frozen
    journals: Path | None = None,
    alike: Mapping[str, object] = MappingProxyType({}),
) -> Mesh:
    """The mesh of this process; joins the process group when torchrun started more than one.

    Args:
        device: "cpu", "cuda", or "auto": cuda where there is one.
        parallel: sizes of the axes, and the timeout of every collective.
        journals: a folder that all processes see, in which each run gets a folder of its own for
            the journals of its processes; None, or one process: no journal.
        alike: what all processes must have alike, by name.
    Raises:
        ValueError: the axes do not divide the processes, before any process group is there; or the
            processes have not the same in `alike`.
        RuntimeError: cuda was asked for and there is none; not all processes have come.
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
    # A watchdog looks after the same time, and has more to say.
    timeout = timedelta(seconds=parallel.timeout_seconds + _LATER_SECONDS)
    if size == 1:
        return Mesh(place, layout)
    if not dist.is_initialized():
        with _ended_by_signals():
            try:
                dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timeout)
            except dist.DistStoreError as error:
                raise RuntimeError(
                    f"rank {rank} has waited {timeout.total_seconds():.0f} s for {size} processes "
                    "to begin, and not all have come. See what the others say, or pass a longer "
                    "parallel.timeout_seconds."
                ) from error
    _expect_alike(alike, rank, size)
    journal = Journal(_new_folder(journals, rank, place), rank) if journals is not None else None
    world = Axis("world", rank, size, Group(dist.group.WORLD, "world", journal))
    mesh = Mesh(place, layout, world, journal=journal, timeout=timeout)
    mesh.groups.append(world.group)
    axes = {}
    for name in AXES:  # groups only where an axis has more than one rank
        length, at = getattr(layout, name), layout.place(rank)[name]
        axes[name] = Axis(name, group=mesh._alone(name))
        if length == size:
            axes[name] = Axis(name, at, length, world.group)
        elif length > 1:
            axes[name] = mesh.among(name, layout.groups(name))
    replicas = axes.get("dp", mesh.replicas)
    if layout.cp > 1:  # not the group of cp: its messages would queue behind sums of gradients
        replicas = mesh.among("replicas", layout.groups("cp", "dp"))
    return replace(mesh, **axes, replicas=replicas)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A block that waits in C, where no handler of Python runs: SIGTERM ends it at once."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _expect_alike(alike: Mapping[str, object], rank: int, size: int) -> None:
    """Raise ValueError on all ranks, told by the first, with what one of them has otherwise."""
    found: list = [None] * size
    dist.all_gather_object(found, {name: repr(value) for name, value in alike.items()})
    for other, theirs in enumerate(found):
        names = sorted(n for n in found[0] | theirs if found[0].get(n) != theirs.get(n))
        if names:
            parts = [
                f"{name}: expected the same on all ranks, got {found[0].get(name)} on rank 0 and "
                f"{theirs.get(name)} on rank {other}"
                for name in names[:5]
            ]
            error = ValueError(
                "; ".join(parts) + f" ({len(names)} in all). Start all processes with the same "
                "command line and files."
            )
            error.told = rank > 0
            dist.destroy_process_group()
            raise error


def _new_folder(journals: Path, rank: int, device: torch.device) -> Path:
    """A name that rank 0 makes for this run, so that no process reads journals of an older one."""
    started = torch.tensor([time.time_ns() // 1000 if rank == 0 else 0], device=device)
    dist.all_reduce(started, op=dist.ReduceOp.MAX)
    at = datetime.fromtimestamp(started.item() / 1e6, UTC)  # machines may be in other time zones
    return journals / at.strftime("%Y%m%d-%H%M%S-%f")
