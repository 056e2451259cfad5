"""Who this process is among all processes, as one explicit object.

defines: Mesh, start, stop

Only the data-parallel axis exists so far: every rank holds the whole model.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Its functions have the process group as it is when they are defined as a default argument. What
# imports it after the group is there (torch._dynamo does) would keep the group, and its threads,
# alive beyond `stop`; one that still holds a tensor when Python ends aborts the process.
import torch.distributed.nn.functional  # noqa: F401


@dataclass(frozen=True)
class Mesh:
    """This process's place: `dp_rank` of `dp_size`, and its device."""

    dp_rank: int
    dp_size: int
    device: torch.device

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the data-parallel ranks, in place."""
        if self.dp_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum over the data-parallel ranks, in place."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank is here."""
        # Reading the result makes the host wait too; on a GPU the collective alone does not.
        self.sum_(torch.zeros(1, device=self.device)).item()

    def agrees_on(self, value: int) -> bool:
        """Whether every rank passed the same number, below 2**62; all ranks get the same answer."""
        both = self.max_(torch.tensor([value, -value], dtype=torch.int64, device=self.device))
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
            error.told = alike and self.dp_rank > 0
            raise error
        if not alike:
            raise RuntimeError(f"rank {self.dp_rank} stops, as another rank failed.")


def start(device: str = "auto", timeout_seconds: float = 600.0) -> Mesh:
    """The mesh of this process; joins the process group when torchrun started more than one.

    Args:
        device: "cpu", "cuda", or "auto": cuda where there is one.
        timeout_seconds: of every collective.
    Raises:
        RuntimeError: cuda was asked for and there is none.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
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
    return Mesh(rank, size, place)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
