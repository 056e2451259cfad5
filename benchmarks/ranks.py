"""Functions on several processes of this machine that form one process group.

defines: on_ranks
"""

import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.memory import interrupts_held
from benchmarks.usage import UsageError

TIMEOUT_SECONDS = 120  # of every collective


def _one(rank: int, function: Callable, size: int, device: str, folder: str, args: tuple) -> None:
    """What a process does: its result is a file."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    store, timeout = f"file://{folder}/store", timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group(backend, store, timeout, size, rank)
    dist.barrier()  # nobody leaves while others still connect to it
    Path(folder, f"{rank}.json").write_text(json.dumps(function(rank, size, *args)))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(function: Callable, size: int, device: str, *args) -> list:
    """What `function(rank, size, *args)` returns on each rank, as JSON has it.

    Args:
        function: of a module; arguments and results are sent from process to process.
        device: "cpu" (gloo, one thread each) or "cuda" (NCCL, a GPU each).
    Raises:
        UsageError: more ranks than GPUs.
        torch.multiprocessing.ProcessRaisedException: with the traceback of a rank.
    """
    if device == "cuda" and torch.cuda.device_count() < size:
        found = torch.cuda.device_count()
        raise UsageError(f"--device cuda: expected a GPU for each of {size} ranks, got {found}.")
    with tempfile.TemporaryDirectory() as folder:
        with interrupts_held():
            started = torch.multiprocessing.start_processes(
                _one, (function, size, device, folder, args), size,
                join=False, daemon=True, start_method="spawn",
            )  # fmt: skip
        try:
            while not started.join():
                pass
        except KeyboardInterrupt:
            for process in started.processes:
                process.kill()
            raise
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
