"""Race the launches of the products in Triton, beside the plain products of cuBLAS.

For each of PHASES at the sizes of a layer's MLP: tiles, then how many rows of them are walked
together. A candidate that spills registers or wants more shared memory than there is, is passed
over by what the compiler says; the others count only if every element is that of the plain product
in fp32, with the epilogue of reference.py, within the rounding of the dtype.

The plain product has the same operands and no epilogue: its result in 16 bits is all it writes.

defines: PHASES, Shape, candidates, compiled, refusal, right, tune
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from stellarator_kernels import _triton, matmul, reference, testing
from stellarator_kernels.layout import UNIT
from stellarator_kernels.matmul import PHASES
from stellarator_kernels.mlp import _down_gradient_kernel, _up_kernel
from stellarator_kernels.tuning import Found, Work, fastest, median_ms
from stellarator_kernels.weight_gradient import _weight_gradient_kernel, add_weight_gradient_

_KERNELS = dict(
    zip(PHASES, (_up_kernel, _down_gradient_kernel, _weight_gradient_kernel), strict=True)
)
_GROUPS = (1, 4, 16)  # beside that of the candidates, 8
# (rows, cols, depth, num_warps, num_stages), for 227 KB of shared memory and for 99 KB.
_WIDE = (
    (128, 256, 64, 8, 4), (256, 128, 64, 8, 4), (128, 256, 128, 8, 2), (256, 128, 128, 8, 2),
    (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 4, 3),
)  # fmt: skip
_NARROW = (
    (128, 128, 32, 8, 4), (128, 128, 32, 4, 4), (128, 256, 32, 8, 3), (256, 128, 32, 8, 3),
    (128, 128, 64, 8, 3), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4),
)  # fmt: skip
_NAMES = ("rows", "cols", "depth", "num_warps", "num_stages", "parts")
_LOADS = ("tma", "persistent", "flatten")
_ops = torch.ops.stellarator


@dataclass(frozen=True)
class Shape:
    """N tokens, model width C, MLP inner width F; bf16."""

    N: int
    C: int
    F: int


def candidates(capability: tuple[int, int]) -> list[dict]:
    """Tiles of one kernel on a GPU, most promising first; `refusal` says which of them fit it."""
    wide = capability[0] in (9, 10, 11)
    loads = [(0, 0, 0), (0, 1, 0)]
    if capability >= (9, 0):
        loads = [(1, 1, 0), (1, 1, 1), (1, 0, 0), (0, 0, 0)]
    grid = itertools.product(loads, _WIDE if wide else _NARROW, (2, 4, 8) if wide else (1, 2, 4))
    names = _NAMES + _LOADS
    return [dict(zip(names, (*t, n, *load), strict=True)) for load, t, n in grid]


def compiled(
    phase: str, tiles: matmul.Tiles, shape: Shape, capability: tuple[int, int]
) -> testing.Compiled:
    """The kernel of a phase as a launch at this shape has it compiled, with all it can do."""
    N, C, F = shape.N, shape.C, shape.F
    of_weight, kernel = phase == "weight gradient", _KERNELS[phase]
    values = matmul.constants(torch.bfloat16, N if of_weight else C, tiles)
    launch = {option: values.pop(option) for option in ("num_warps", "num_stages")}
    flags = ("HAS_BIAS", "TANH", "STORE_Y", "STORE_PRE")
    values |= {flag: True for flag in flags if flag in kernel.arg_names}
    units = dict.fromkeys(("C_units", "K_units", "x_stride_row", "dout_stride_row"), C // UNIT)
    units |= dict.fromkeys(("F_units", "M_units", "dy_stride_row"), F // UNIT)
    units |= {"N": N, "weight_stride_row": (C if phase == "up" else F) // UNIT}
    types = {}
    for argument in (a for a in kernel.arg_names if a not in values):
        if argument.endswith("_ptr"):
            types[argument] = "*fp32" if argument in ("dbias_ptr", "total_ptr") else "*bf16"
        else:
            types[argument] = "i32" if units[argument] % 16 else "i32:16"
    return testing.compile_kernel(kernel, types, values, capability, **launch)


def refusal(
    phase: str, tiles: matmul.Tiles, shape: Shape, capability: tuple[int, int]
) -> str | None:
    """Why a launch is not worth a race on this GPU, by compiling it; None: it may be."""
    try:
        built = compiled(phase, tiles, shape, capability)
    except Exception as error:  # Triton has an error of its own for each thing that is too much
        return f"does not compile: {type(error).__name__}"
    limit = testing.shared_memory_limit(capability)
    if built.shared_bytes > limit:
        return f"takes {built.shared_bytes} bytes of shared memory, of {limit}"
    return f"spills {built.spill_bytes} bytes" if built.spill_bytes else None


def _fitting(
    options: list[dict], phase: str, shape: Shape, capability: tuple[int, int]
) -> Iterator[dict]:
    """Those that are not refused; all in the interpreter, which compiles nothing."""
    for option in options:
        tiles = matmul.Tiles(**option)
        if _triton.INTERPRETED or refusal(phase, tiles, shape, capability) is None:
            yield option


def right(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], length: int) -> bool:
    """Whether each element of each result is the expected one, but for rounding.

    Not the norm of all: one wrong tile of 3,072 changes that by less than 16 bits round.

    Args:
        expected: fp32.
        length: of the sums, whose error an fp32 result shows.
    """
    for a, b in zip(results, expected, strict=True):
        eps = torch.finfo(a.dtype).eps * (length if a.dtype == torch.float32 else 1)
        limit = 2 * eps * (b.abs() + b.square().mean().sqrt())
        if not bool(((a.float() - b).abs() <= limit).all()):
            return False
    return True


def _raced(phase: str, shape: Shape, device: str) -> tuple[Work, Callable[[], object]]:
    """The work of a phase, and the plain products of the same operands."""
    generator = torch.Generator(device).manual_seed(0)
    # Triton's interpreter has no bf16 products.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    N, C, F = shape.N, shape.C, shape.F

    def make(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    if phase == "weight gradient":
        return _raced_sums(make, shape)
    if phase == "up":
        x, weight, bias = make(N, C), make(F, C, scale=C**-0.5), make(F)
        expected = reference.mlp_up_ref(x.float(), weight.float(), bias.float())
        call = functools.partial(_ops.mlp_up, x, weight, bias, "tanh", True, True, "triton")
        return _work(call, call, expected, C), lambda: x @ weight.t()
    dout, weight, pre, bias = make(N, C), make(C, F, scale=C**-0.5), make(N, F), make(F)
    expected = reference.mlp_down_gradient_ref(dout.float(), weight.float(), pre.float())
    given = (dout, weight, pre, bias, "tanh", True, True, "triton")
    call = functools.partial(_ops.mlp_down_gradient, *given)
    return _work(call, call, expected, max(C, N)), lambda: dout @ weight


def _raced_sums(make: Callable[..., torch.Tensor], shape: Shape) -> tuple[Work, Callable]:
    """The weight gradients of both products, one after the other, added to what is there."""
    N, C, F = shape.N, shape.C, shape.F
    pairs = [(make(N, F), make(N, C)), (make(N, C), make(N, F))]
    begun = [make(dy.shape[1], x.shape[1]).float() for dy, x in pairs]
    expected = [
        reference.add_weight_gradient_ref(total, dy.float(), x.float())
        for total, (dy, x) in zip(begun, pairs, strict=True)
    ]
    totals = [total.clone() for total in begun]

    def call() -> None:
        for total, (dy, x) in zip(totals, pairs, strict=True):
            add_weight_gradient_(total, dy, x, impl="triton")

    def check() -> tuple[torch.Tensor, ...]:
        for total, first in zip(totals, begun, strict=True):
            total.copy_(first)
        call()
        return tuple(totals)

    return _work(check, call, expected, N), lambda: [dy.t() @ x for dy, x in pairs]


def _work(check: Callable, call: Callable, expected: Sequence[torch.Tensor], length: int) -> Work:
    """Results are right by `right`."""
    return Work(check, lambda results: right(results, expected, length), call)


def tune(
    shape: Shape,
    device: str = "cuda",
    time_ms: Callable = median_ms,
    phases: Sequence[str] = PHASES,
) -> Iterator[Found]:
    """Yield what is found for each phase, with the time of the plain products.

    Args:
        shape: what is timed.
        device: "cuda", or "cpu" with TRITON_INTERPRET=1 to try it out.
        time_ms: of a call.
        phases: of PHASES, those to race.
    """
    capability = torch.cuda.get_device_capability() if device == "cuda" else (8, 0)
    for phase in phases:
        (work, plain), name = _raced(phase, shape, device), f"matmul {phase}"
        options = _fitting(candidates(capability), phase, shape, capability)
        found = fastest(name, options, work, time_ms)
        if found.entry is not None:
            again = [found.entry, *(found.entry | {"group": group} for group in _GROUPS)]
            found = fastest(name, again, work, time_ms)
        yield dataclasses.replace(found, plain_ms=time_ms(plain))
