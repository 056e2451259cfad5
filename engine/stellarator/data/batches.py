"""Global batches of packed rows as tensors: the same samples for any number of ranks.

defines: Batch, Batches, Steps

Letters: B rows of the micro-batch, T tokens per row, E documents in it.

Step s consists of the samples s*G .. s*G + G-1, with G the global batch size. Micro-batch m of rank
r out of `size` holds B of them, from s*G + (m*size + r) * B on (Megatron's order). So the state of
the loader is one integer, the step, and a run resumes at any data-parallel size that divides G / B.

Targets are the next tokens, and -100 where there is none to learn: before padding and, unless
`attend_across_documents`, before the first token of another document. Documents restart their
positions and are bounded by `cu_seqlens`, so attention never crosses them. Padding continues the
last document of its row: being causal, attention lets nothing see it, and rows of one document
stay of one length, which attention computes in one call.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from stellarator.data.packing import PackedDataset, Row

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    tokens: (B, T) int64.  targets: (B, T) int64, -100 where ignored.  positions: (B, T) int64.
    cu_seqlens: (E+1,) int32, bounds of documents over the flattened (B*T,) tokens.
    num_targets: how many targets are not ignored.
    first_row: number of the first row among those of all steps; the others follow it.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    num_targets: int
    first_row: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on a device."""
        names = ("tokens", "targets", "positions", "cu_seqlens")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return replace(self, **moved)


class Batches:
    """Micro-batches of a dataset by (step, micro-batch, rank, size).

    Args:
        dataset: where rows come from.
        global_batch_size: G, rows of a step over all ranks.
        micro_batch_size: B, rows of one forward pass on one rank.
    Raises:
        ValueError: B does not divide G.
    """

    def __init__(self, dataset: PackedDataset, global_batch_size: int, micro_batch_size: int):
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % micro_batch_size:
            raise ValueError(
                "batches: expected train.global_batch_size to be a positive multiple of "
                f"train.micro_batch_size, got {global_batch_size} and {micro_batch_size}."
            )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size

    def num_micro_batches(self, size: int = 1) -> int:
        """Micro-batches of a step on each of `size` ranks.

        Raises:
            ValueError: the step cannot be shared equally.
        """
        total = self.global_batch_size // self.micro_batch_size
        if size < 1 or total % size:
            raise ValueError(
                f"batches: expected micro-batches that {size} ranks can share equally, got {total} "
                f"(train.global_batch_size={self.global_batch_size} by "
                f"train.micro_batch_size={self.micro_batch_size}). {self._advice(size)}"
            )
        return total // size

    def _advice(self, size: int) -> str:
        """A value with which `size` ranks share a step; the batch stays as it is if it can."""
        rows, rest = divmod(self.global_batch_size, max(1, size))
        if rest or not rows:
            unit = self.micro_batch_size * max(1, size)
            return f"Pass train.global_batch_size={-(-self.global_batch_size // unit) * unit}."
        width = next(b for b in range(min(self.micro_batch_size, rows), 0, -1) if rows % b == 0)
        return f"Pass train.micro_batch_size={width}."

    def batch(self, step: int, micro_index: int = 0, rank: int = 0, size: int = 1) -> Batch:
        """One micro-batch, a pure function of the arguments.

        Raises:
            ValueError: an index out of range, or `size` does not divide the step.
        """
        count = self.num_micro_batches(size)
        if step < 0 or not 0 <= micro_index < count or not 0 <= rank < size:
            raise ValueError(
                f"batches: expected step >= 0, micro_index in [0, {count}) and "
                f"rank in [0, {size}), got {step}, {micro_index} and {rank}."
            )
        first = step * self.global_batch_size
        first += (micro_index * size + rank) * self.micro_batch_size
        rows = [self.dataset.row(first + k) for k in range(self.micro_batch_size)]
        return replace(collate(rows, self.dataset.attend_across_documents), first_row=first)

    def micro_batches(self, step: int, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """The micro-batches of a step for one rank, made one at a time."""
        for micro_index in range(self.num_micro_batches(size)):
            yield self.batch(step, micro_index, rank, size)

    def steps(self, start: int = 0, rank: int = 0, size: int = 1, prefetch: int = 2) -> "Steps":
        """An endless iterator over steps from `start`, made ahead of time by a thread."""
        return Steps(self, start, rank, size, prefetch)

    def evaluation(
        self, max_rows: int | None = None, rank: int = 0, size: int = 1
    ) -> Iterator[Batch]:
        """The rows of one epoch, each once over all ranks, in micro-batches of equal shape.

        Every rank gets the same number of batches; past the end, rows are padding without targets.
        Add up the losses and `num_targets` over all batches and ranks, then divide.

        Args:
            max_rows: use only this many, spread evenly: neighbours are of one repository.
        Raises:
            ValueError: the dataset has weights, so that an epoch of it is not defined.
        """
        if self.dataset.num_corpora > 1:
            raise ValueError(
                "batches: expected a dataset without weights for an evaluation, got a blend of "
                f"{self.dataset.num_corpora}. Evaluate each corpus, or leave the weights out."
            )
        rows = self.dataset.rows_per_epoch
        rows = rows if max_rows is None else min(rows, max_rows)
        width = self.micro_batch_size
        total = self.dataset.rows_per_epoch
        for first in range(rank * width, -(-rows // (size * width)) * size * width, size * width):
            numbers = range(first, min(first + width, rows))
            found = [self.dataset.row(k * total // rows) for k in numbers]
            found += [self._empty_row()] * (width - len(found))
            yield collate(found, self.dataset.attend_across_documents)

    def _empty_row(self) -> Row:
        tokens = np.full(self.dataset.seq_length + 1, self.dataset.tokenizer.fim_pad, np.int64)
        return Row(tokens, np.empty(0, dtype=np.int64), 0)


class Steps:
    """Lists of micro-batches, one list per step; a context manager.

    With `prefetch` > 0 one thread keeps that many steps ready; with 0 each is made when asked for.
    Both give the same batches. An error while making one is raised where that step is asked for.

    Attributes:
        step: the next step that will be given.
        data_wait_seconds: time that the caller has waited for batches so far.
    """

    def __init__(self, batches: Batches, start: int, rank: int, size: int, prefetch: int):
        batches.num_micro_batches(size)  # an impossible layout is reported here, not by the thread
        self.step = start
        self.data_wait_seconds = 0.0
        self._closed = False
        self._make = lambda step: list(batches.micro_batches(step, rank, size))
        self._pending: deque[Future] = deque()
        self._executor = None
        if prefetch > 0:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
            for ahead in range(prefetch):
                self._pending.append(self._executor.submit(self._make, start + ahead))

    def __iter__(self) -> "Steps":
        return self

    def __next__(self) -> list[Batch]:
        if self._closed:
            raise RuntimeError("batches: expected open steps, got closed ones. Call steps() again.")
        began = time.perf_counter()
        step = self.step
        self.step += 1  # also where making it fails: then the step after it comes next
        try:
            if self._executor is None:
                return self._make(step)
            ready = self._pending.popleft()
            ahead = step + 1 + len(self._pending)
            self._pending.append(self._executor.submit(self._make, ahead))
            return ready.result()
        finally:
            self.data_wait_seconds += time.perf_counter() - began

    def close(self) -> None:
        """Stop the thread: what it has begun is finished, the rest is dropped."""
        self._closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def collate(rows: list[Row], attend_across_documents: bool) -> Batch:
    """Rows as tensors: targets, positions and bounds of documents."""
    tokens = np.stack([row.tokens for row in rows])
    B, T = tokens.shape[0], tokens.shape[1] - 1
    targets = tokens[:, 1:].copy()
    bounds = np.zeros((B, T), dtype=bool)  # where a document begins
    bounds[:, 0] = True
    for b, row in enumerate(rows):
        if not attend_across_documents:
            targets[b, row.starts[1:] - 1] = IGNORED
            bounds[b, row.starts[row.starts < T]] = True
        targets[b, max(row.length - 1, 0) :] = IGNORED
    flat = np.flatnonzero(bounds)
    lengths = np.diff(flat, append=B * T)
    positions = np.arange(B * T) - np.repeat(flat, lengths)
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions.reshape(B, T)),
        cu_seqlens=torch.from_numpy(np.append(flat, B * T).astype(np.int32)),
        num_targets=int((targets != IGNORED).sum()),
    )
