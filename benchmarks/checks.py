"""Correctness before speed: errors against float64, measured by those of plain eager code.

defines: Errors, LIMIT, Judge

Two rules for every result and every gradient: the largest error is at most twice that of plain
eager torch in the same dtype, and so is the root mean square. A floor counts where eager code comes
out better than it can be expected to:
- 16 bits: eps/2 of a typical value for the largest error, eps/4 for the root mean square, which is
  what rounding the result alone does;
- 32 bits, where the order of the operations decides: 4 eps of the largest value, and of a typical
  one;
- a single number, which eager code may hit by luck: 1/64 of the eps of the run's dtype;
- a result that is zero but for the rounding of float64 (a gradient through the softmax of one key):
  it is the rest of a sum whose terms cancel, so its error is that of the terms, which have the size
  of the inputs and outgoing gradients and are added in fp32: 4 eps of fp32 of the largest of these,
  a quarter of it for the root mean square. Eager code that cancels without a rest proves nothing.
A third rule, for results of 16 bits, finds what hides in their rounding: a factor. Rounding errors
have either sign, so the factor that takes the exact result closest to ours is far closer to 1 than
eps: at most twice as far as that of eager code, or eps/16 + eps/sqrt(n) for n elements, if that is
more.
`stellarator_kernels.testing`, made for small shapes, has a floor that grows with the length of the
sums; at 49,152 classes in bf16 it would let everything pass.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.cases import Calls, Case, Maker
from stellarator_kernels.testing import poison_empty

LIMIT = 2.0  # of all ratios
_SAME_THING = {2: 0.1, 4: 1e-2, 8: 1e-6}  # by bytes of an element: relative error of a peer
_CANCELLED = 2.0**-40  # share of the inputs below which a float64 result is rounding alone
_BLOCK = 2**24  # elements that are compared at one time


@dataclass(frozen=True)
class Errors:
    """The worst result of a check."""

    maximum: float  # largest error as a multiple of that of eager code
    rms: float  # likewise, root mean square
    factor: float  # likewise, distance from 1 of the factor to the exact result; 0 for 32 bits
    where: str  # the result that the largest of them belongs to

    @property
    def wrong(self) -> bool:
        """A rule is broken. NaN breaks all."""
        return not all(x <= LIMIT for x in (self.maximum, self.rms, self.factor))

    def __str__(self) -> str:
        return (
            f"{self.where}: largest error {self.maximum:.3g} times that of eager code, "
            f"root mean square {self.rms:.3g} times, factor {self.factor:.3g} times; "
            f"allowed {LIMIT:g}"
        )

    def to_json(self) -> dict:
        """For a result file, which has no NaN: null."""
        known = asdict(self) | {"limit": LIMIT}
        for rule in ("maximum", "rms", "factor"):
            known[rule] = known[rule] if math.isfinite(known[rule]) else None
        return known


def _distance(x: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(largest, root mean square) of x - exact; NaN if x is not finite where `exact` is."""
    if x.shape != exact.shape:
        return math.nan, math.nan
    largest, squares = 0.0, 0.0
    for a, b in zip(x.reshape(-1).split(_BLOCK), exact.reshape(-1).split(_BLOCK), strict=True):
        error = torch.where(a == b, 0.0, a.double() - b.double()).abs()
        if not torch.isfinite(error).all():
            return math.nan, math.nan
        largest = max(largest, float(error.max()))
        squares += float(error.square().sum())
    return largest, math.sqrt(squares / max(1, x.numel()))


def _factor(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance from 1 of the factor with which `exact` comes closest to x."""
    product, square = 0.0, 0.0
    for a, b in zip(x.reshape(-1).split(_BLOCK), exact.reshape(-1).split(_BLOCK), strict=True):
        a, b = a.double(), b.double()
        product += float((a * b).sum())
        square += float(b.square().sum())
    return abs(product / square - 1) if square else 0.0


def _vanishes(exact: torch.Tensor, size: float) -> bool:
    """Whether terms of this size have cancelled, but for the rounding of float64."""
    return float(exact.abs().max()) <= _CANCELLED * size


def _floors(
    x: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, size: float
) -> tuple[float, float]:
    """What counts at least as the error of eager code: the largest, and the root mean square."""
    eps, typical = torch.finfo(x.dtype).eps, math.sqrt(float(exact.double().square().mean()))
    floors = (eps / 2 * typical, eps / 4 * typical)
    if x.dtype.itemsize > 2:
        floors = (4 * eps * float(exact.abs().max()), 4 * eps * typical)
    if x.numel() == 1:
        floors = tuple(max(floor, torch.finfo(dtype).eps * typical / 64) for floor in floors)
    if _vanishes(exact, size):
        rounding = torch.finfo(torch.float32).eps * size
        floors = (4 * rounding, rounding)
    return tuple(max(floor, 1e-300) for floor in floors)


def compare(
    got: list,
    exact: list,
    eager: list,
    names: list[str],
    dtype: torch.dtype = torch.float32,
    size: float = 0.0,
) -> Errors:
    """The worst of several results.

    Args:
        dtype: of the run.
        size: of the largest of the inputs and outgoing gradients.
    """
    worst = Errors(0.0, 0.0, 0.0, names[0])
    for x, exact_x, eager_x, name in zip(got, exact, eager, names, strict=True):
        if not x.numel():
            continue
        floors = _floors(x, exact_x, dtype, size)
        pairs = zip(_distance(x, exact_x), _distance(eager_x, exact_x), floors, strict=True)
        maximum, rms = (error / max(eager_error, floor) for error, eager_error, floor in pairs)
        if math.isnan(maximum):
            return Errors(maximum, rms, math.nan, name)
        factor = 0.0
        if x.dtype.itemsize == 2 and not _vanishes(exact_x, size):
            floor = torch.finfo(x.dtype).eps * (1 / 16 + x.numel() ** -0.5)
            factor = _factor(x, exact_x) / max(_factor(eager_x, exact_x), floor)
        found = Errors(maximum, rms, factor, name)
        if max(maximum, rms, factor) > max(worst.maximum, worst.rms, worst.factor):
            worst = found
    return worst


class Judge:
    """Float64 results and eager results of a case, and what others are beside them.

    Args:
        case: at the shape of the check.
        device, dtype: of the run.
    """

    def __init__(self, case: Case, device: str, dtype: torch.dtype):
        self.case, self.dtype = case, dtype
        self.calls = Calls(case.inputs(Maker(device, dtype)))
        # Eager first: it sets the gradients of the results, in the dtype of the run.
        self.eager = self._run(case.peers["eager"])
        exact = self.calls.copy(torch.float64)
        self.exact = exact.both(lambda *x: case.ours("reference", *x))
        self.names = self.calls.names(len(self.exact))
        self.size = self.calls.largest()

    def _run(self, function: Callable) -> list[torch.Tensor]:
        calls = self.calls.copy() if self.case.in_place else self.calls
        return calls.both(function)

    def errors(self, impl: str) -> Errors:
        """Of one of our implementations; memory that it leaves unwritten is NaN."""
        with poison_empty():
            got = self._run(lambda *x: self.case.ours(impl, *x))
        return compare(got, self.exact, self.eager, self.names, self.dtype, self.size)

    def peer_objection(self, peer: Callable) -> str:
        """Why a peer does not compute the same thing, or empty. Roughly: its dtype is its own."""
        results = self.calls.copy().both(peer)  # a copy: some peers work in place
        for x, exact, name in zip(results, self.exact, self.names, strict=True):
            size = math.sqrt(float(exact.double().square().mean()))
            size = self.size if _vanishes(exact, self.size) else size
            error = _distance(x, exact)[1] / size
            if not error <= _SAME_THING[self.dtype.itemsize]:
                return f"{name} is {error:.1%} off"
        return ""
