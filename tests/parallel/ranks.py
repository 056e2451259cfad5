"""Functions on several gloo processes of this machine, started by pytest.

defines: start, on_ranks, Failed
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist


class Failed(AssertionError):
    """A function raised on a rank, or gave nothing in time; the text is its traceback."""


def _one(function, rank: int, size: int, store: str, results, args, timeout: float) -> None:
    try:
        torch.set_num_threads(1)
        address = f"file://{store}"
        dist.init_process_group("gloo", address, timedelta(seconds=timeout), size, rank)
        dist.barrier()  # nobody leaves while others still connect to it
        results.send_bytes(pickle.dumps((function(rank, *args), None)))
        dist.destroy_process_group()
    except BaseException:
        results.send_bytes(pickle.dumps((None, traceback.format_exc())))
        os._exit(1)  # gloo's threads may still hold tensors


def start(function, size: int, *args, timeout: float = 60.0) -> list:
    """(process, end of a pipe) for `function(rank, *args)` on each rank."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the process from which the others are forked.
    context.set_forkserver_preload(["stellarator.train.loop"])
    store, started = str(Path(tempfile.mkdtemp(), "store")), []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        given = (function, rank, size, store, there, args, timeout)
        process = context.Process(target=_one, args=given, daemon=True)
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        started.append((process, here))
    return started


def on_ranks(function, size: int, *args, timeout: float = 60.0) -> list:
    """What `function(rank, *args)` returns on each rank; arguments and results are pickled.

    Raises:
        Failed: with the traceback of a rank.
    """
    started, found = start(function, size, *args, timeout=timeout), {}
    pipes = {pipe: rank for rank, (_, pipe) in enumerate(started)}
    deadline = time.monotonic() + timeout + 60
    try:
        while pipes:
            ready = wait(pipes, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Failed(f"ranks {sorted(pipes.values())} of {size} gave nothing in time")
            for pipe in ready:
                rank = pipes.pop(pipe)
                try:
                    found[rank], error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    error = "it ended without a result"
                if error is not None:
                    raise Failed(f"rank {rank} of {size}\n{error}")
    finally:
        for process, _ in started:
            process.join(timeout=10) if len(found) == size else process.kill()
    return [found[rank] for rank in range(size)]
