"""Measure which launch configurations are fastest on this GPU; runs only when asked.

defines: PHASES, Shape, Work, Found, candidates, fastest, rows_right, median_ms, tune, write

Here for flash attention, in tuning_matmul.py for the products. By head width: tiles of the forward,
of one document and of several; tiles of the two kernels of the split backward, one after the other;
tiles of the backward in five products; then which design is fastest: of the backward with and
without determinism, of the forward. A candidate counts only if it computes what the built-in
configuration computes (within the rounding of the dtype); one that does not compile or fit is
passed over.

`tuned.py` says how the file is used. Tuning is not exact: two runs may choose different tiles of
nearly the same speed. That is why tables are files, the same on every rank, and not measured there.
"""

import datetime
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stellarator_kernels import tuned
from stellarator_kernels.attention import flash_attention
from stellarator_kernels.testing import poison_empty

PHASES = ("forward", "forward packed", "dq", "dkdv", "dqdkdv", "design")
_TURNS = 15  # timings of a candidate
_QUEUE_CYCLES = 2_000_000  # about 1 ms, in which the host queues a call
_DOCUMENTS = 8  # in the row, where it is packed
_MARGIN = 0.02  # another candidate must be so much faster to replace one that was found before


@dataclass(frozen=True)
class Shape:
    """One row of T tokens, H query heads, G key/value heads of width D, causal, bf16."""

    T: int
    H: int
    G: int
    D: int


def candidates(phase: str, tma: bool) -> list[dict]:
    """Configurations of one kernel, most promising first.

    Args:
        phase: as of `tiles.tile_sizes`.
        tma: the GPU has a copy engine (sm_90 and newer): loads by it are raced, too, and warps that
            do nothing but start them. Triton adds those warps to 4 that compute.

    Warps of their own for the loads are raced where Triton (3.6 and 3.9) makes right code of them:
    of dk and dv it makes wrong one, of the others with 128 rows none, but for the forward.
    """
    rows_of_warps = [(128, 8), (64, 4)] if phase not in ("dkdv", "dqdkdv") else [(128, 8), (64, 8)]
    loads = [(0, 0), (1, 0)] if tma else [(0, 0)]
    grid = [
        (own, step, num_warps, num_stages, *load)
        for load, (own, num_warps), step, num_stages in itertools.product(
            loads, rows_of_warps, (128, 64, 32), (2, 3)
        )
    ]
    rows = {"forward": (128, 64), "forward packed": (64,), "dq": (64,)}.get(phase, ())
    if tma:
        specialized = itertools.product(rows, (128, 64, 32), (4,), (2, 3), (1,), (1,))
        grid = [*specialized, *grid]
    names = ("own", "step", "num_warps", "num_stages", "tma", "specialize")
    return [dict(zip(names, values, strict=True)) for values in grid]


def forward_designs(tma: bool) -> list[dict]:
    """The forward in Triton, and plans of that in Gluon."""
    grid = itertools.product((128, 64), (2, 3, 4), (1, 0)) if tma else ()
    names = ("step", "stages", "turns")
    plans = [dict(zip(names, values, strict=True)) for values in grid]
    return [{"design": "triton"}, *({"design": "gluon"} | plan for plan in plans)]


def backward_designs(tma: bool) -> list[dict]:
    """Plans of the backward in Gluon."""
    dkdv = ((64, 2), (64, 4), (32, 4))
    dq = ((64, 2), (64, 3))
    names = ("step", "stages", "dq_step", "dq_stages")
    plans = ((*a, *b) for a, b in itertools.product(dkdv, dq)) if tma else ()
    return [{"design": "gluon"} | dict(zip(names, plan, strict=True)) for plan in plans]


def median_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call on the GPU, by its own clock.

    The GPU waits a moment first, so that the host's time for the launches is not measured.
    """
    call()
    times = []
    for _ in range(_TURNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_QUEUE_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@dataclass(frozen=True)
class Work:
    """What is raced.

    check: gives the results.
    right: says whether they are.
    call: is timed.
    """

    check: Callable[[], tuple[torch.Tensor, ...]]
    right: Callable[[tuple[torch.Tensor, ...]], bool]
    call: Callable[[], object]


@dataclass(frozen=True)
class Found:
    """The name of an entry, the entry (None: nothing runs), its time and that of a plain peer."""

    name: str
    entry: dict | None
    ms: float
    plain_ms: float | None = None


def fastest(
    name: str, options: Iterable[dict], work: Work, time_ms: Callable, others: dict | None = None
) -> Found:
    """Race the options of one entry.

    An option has to give results that are right, with all memory that is not written poisoned; one
    that raises is passed over.

    Args:
        name: of the entry.
        options: most promising first.
        time_ms: of a call.
        others: entries that are in use as well.
    """
    best = Found(name, None, float("inf"))
    for option in options:
        with tuned.use((others or {}) | {name: option}):
            try:
                with poison_empty():
                    right = work.right(work.check())
            except Exception:  # Triton has an error of its own for each thing that is too much
                continue
            if not right:
                continue
            ms = time_ms(work.call)
        if ms < best.ms * (1 - _MARGIN):
            best = Found(name, option, ms)
    return best


def rows_right(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether each row of each head is the expected one, but for the rounding of the dtype.

    Not the norm of all: one wrong tile of thousands changes that by less than 16 bits round.
    """
    for a, b in zip(results, expected, strict=True):
        sizes, errors = b.double().norm(dim=-1), (a.double() - b.double()).norm(dim=-1)
        limit = 8 * torch.finfo(a.dtype).eps
        if not bool((errors <= limit * (sizes + sizes.square().mean().sqrt())).all()):
            return False
    return True


class _Race:
    """Calls of one shape, and the entries found so far."""

    def __init__(self, shape: Shape, device: str, time_ms: Callable):
        generator = torch.Generator(device).manual_seed(0)
        kind = {"generator": generator, "device": device}
        heads = (shape.H, shape.G, shape.G)
        # Triton's interpreter has no bf16 products.
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.inputs = [
            torch.randn(1, shape.T, n, shape.D, **kind).to(self.dtype).requires_grad_()
            for n in heads
        ]
        self.dout = torch.randn(self.inputs[0].shape, **kind).to(self.dtype)
        ends = [shape.T * n // _DOCUMENTS for n in range(_DOCUMENTS + 1)]
        self.documents = torch.tensor(ends, dtype=torch.int32, device=device)
        self.width = max(64, 1 << (shape.D - 1).bit_length())
        self.time_ms, self.entries = time_ms, {}
        with tuned.use({}):  # the built-in configurations
            self.expected = {
                "forward": (self.forward(),),
                "forward packed": (self.forward(self.documents),),
                "backward": self.backward(),
            }

    def forward(self, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        inputs = self.inputs if cu_seqlens is None else [x[0] for x in self.inputs]
        return flash_attention(*inputs, cu_seqlens=cu_seqlens, impl="triton")

    def backward(self, deterministic: bool = True) -> tuple[torch.Tensor, ...]:
        out = flash_attention(*self.inputs, impl="triton", deterministic=deterministic)
        return torch.autograd.grad(out, self.inputs, self.dout)

    def name(self, phase: str) -> str:
        return f"flash_attention {phase} {self.width}"

    def fastest(self, phase: str, options: list[dict], meanwhile: dict) -> Found:
        """Race the options of one entry, keep the best.

        meanwhile: entries that are in use as well, and not kept.
        """
        of_forward = phase.startswith("forward")
        same = phase if phase in self.expected else "forward" if of_forward else "backward"

        def call() -> tuple[torch.Tensor, ...]:
            if of_forward:
                return (self.forward(self.documents if "packed" in phase else None),)
            return self.backward(deterministic="any order" not in phase)

        work = Work(call, lambda results: rows_right(results, self.expected[same]), call)
        name = self.name(phase)
        found = fastest(name, options, work, self.time_ms, self.entries | meanwhile)
        if found.entry is not None:
            self.entries[name] = found.entry
        return found


def tune(
    shape: Shape,
    device: str = "cuda",
    time_ms: Callable = median_ms,
    phases: tuple[str, ...] = PHASES,
    entries: dict | None = None,
) -> Iterator[Found]:
    """Yield what is found for every entry of one head width.

    Args:
        shape: what is timed; the larger, the less a launch counts.
        device: "cuda", or "cpu" with TRITON_INTERPRET=1 to try it out.
        time_ms: of a call.
        phases: of PHASES, those to race.
        entries: in use where a phase is not raced.
    """
    race = _Race(shape, device, time_ms)
    race.entries.update(entries or {})
    tma = device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    for phase in phases:
        if phase == "design":
            continue
        design = "ordered" if phase == "dqdkdv" else "split"
        meanwhile = {
            race.name("backward"): {"design": design},
            race.name("forward design"): {"design": "triton"},
        }
        yield race.fastest(phase, candidates(phase, tma), meanwhile)
    if "design" not in phases:
        return
    split, ordered, atomic = ({"design": name} for name in ("split", "ordered", "atomic"))
    in_gluon = backward_designs(tma)
    for phase, options in (
        ("backward", [split, ordered, *in_gluon]),
        ("backward in any order", [split, ordered, atomic, *in_gluon]),
        ("forward design", forward_designs(tma)),
    ):
        yield race.fastest(phase, options, {})


def write(folder: Path, entries: dict[str, dict], gpu: str, command: str) -> Path:
    """Write the file of a GPU into a folder; returns its path."""
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (gpu.lower().replace(" ", "_").replace("/", "_") + ".json")
    table = {
        "gpu": gpu,
        "triton": triton.__version__,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "entries": dict(sorted(entries.items())),
    }
    path.write_text(json.dumps(table, indent=1) + "\n")
    tuned.read(path)
    return path
