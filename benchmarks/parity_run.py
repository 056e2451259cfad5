"""Processes that train runs of `python -m benchmarks parity` together, one run after the other.

defines: Pool

They are forked from one that has imported torch, which saves most of the time. Into the folder of a
run rank 0 writes first.json, {parameter: SHA-256 of its bytes}, and every rank first-RANK.json, the
same of each piece that it holds, of masters and of parameters: of several copies `first.json` has
one.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections import deque
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from benchmarks.memory import interrupts_held
from stellarator import settings
from stellarator.config import RunConfig
from stellarator.parallel.shard import FlatPart, shards_of
from stellarator.train.loop import Trainer

TIMEOUT_SECONDS = 240  # without any process being done with anything


def _hash(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


class Recording(Trainer):
    """A run that writes down the weights of step 0."""

    def _loop(self, started: float) -> float:
        if self.step == 0:
            self._write(f"first-{self.mesh.world.rank}.json", self._own())
            if (wholes := self.wholes()) is not None:
                names = list(wholes.described)
                read = ((name, wholes.read(name)) for name in names)
                found = {n: _hash(whole) for n, whole in read if n.startswith("master.")}
                if self.mesh.main:
                    self._write("first.json", found)
        return super()._loop(started)

    def _own(self) -> dict[str, str]:
        """Of each piece that this rank holds; its key says which elements of the whole."""
        parts, shards, found = self.optimizer.state(), self.optimizer.shards(), {}
        for name in (n for n in parts if n.startswith("master.")):
            shard, local = shards[name], parts[name]
            if isinstance(shard, FlatPart):
                places = [(p.start, p.length) for p in shard.shard.pieces]
                pieces = [(f"{places} {shard.start}", local)]
            else:
                pieces = [(f"{p.start} {p.length}", part) for p, part in shard.parts(local)]
            found |= {f"{name} {place} {part.numel()}": _hash(part) for place, part in pieces}
        if self.data.stage < 3:  # else they are made of the own parts when they are used
            for name, shard in shards_of(self.model).items():
                local = self.model.get_parameter(name).detach()
                pieces = [(f"{p.start} {p.length}", part) for p, part in shard.parts(local)]
                found |= {f"{name} {place}": _hash(part) for place, part in pieces}
        return found

    def _write(self, name: str, found: dict[str, str]) -> None:
        Path(self.folder, name).write_text(json.dumps(found))


def _work(pipe: Connection) -> None:
    """A process of a pool: trains what it is told to, until it is told nothing or a run fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    torch.set_num_threads(1)
    while (told := pipe.recv()) is not None:
        environment, path = told
        os.environ.update(environment)
        error = ""
        try:
            Recording(settings.resolve(RunConfig(), path)).run()
        except BaseException as caught:
            error = f"{type(caught).__name__}: {caught}"
        pipe.send(error)
        if error:
            os._exit(1)  # gloo's threads may still hold tensors


class Pool:
    """So many processes; a context manager that ends them.

        with Pool(4) as pool:
            pool.begin(one, folder_of_one, [3])
            pool.begin(many, folder_of_many, [0, 1])
            while (error := pool.next()) == "": ...

    Each does its part of the runs in the order in which they were begun.
    """

    def __init__(self, processes: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["stellarator.train.loop"])
        self._processes, self._pipes = [], []
        self._todo: list[deque[Path]] = [deque() for _ in range(processes)]
        self._left: dict[Path, int] = {}  # how many processes are not done with a run
        for _ in range(processes):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=True)
            with interrupts_held():
                process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self._processes.append(process)
            self._pipes.append(here)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    @property
    def pending(self) -> int:
        """Runs that are not done."""
        return len(self._left)

    def begin(self, config: RunConfig, folder: Path, processes: list[int]) -> None:
        """Have these processes train a run, the first of them as rank 0."""
        path = folder.with_suffix(".toml")
        path.write_text(settings.to_toml(dataclasses.replace(config, folder=str(folder))))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        address["WORLD_SIZE"] = str(len(processes))
        self._left[folder] = len(processes)
        for rank, process in enumerate(processes):
            self._todo[process].append(folder)
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._pipes[process].send((address | place, str(path)))

    def next(self) -> tuple[Path, str]:
        """Wait until a run is done or fails; its folder, and what went wrong.

        After a failure the pool is of no more use: other ranks wait for the one that failed.
        """
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            busy = [pipe for pipe, todo in zip(self._pipes, self._todo, strict=True) if todo]
            assert busy, "something was begun"
            for pipe in wait(busy, deadline - time.monotonic()):
                folder = self._todo[self._pipes.index(pipe)].popleft()
                try:
                    error = pipe.recv()
                except EOFError:
                    error = "a process ended"
                self._left[folder] -= 1
                if error or not self._left[folder]:
                    del self._left[folder]
                    return folder, error
                deadline = time.monotonic() + TIMEOUT_SECONDS
            if time.monotonic() >= deadline:
                return next(iter(self._left)), f"nothing was done within {TIMEOUT_SECONDS} s"
