"""What a point of a result file must be.

defines: FIELDS, COMPILED_FIELDS, UNTIMED, PHASES, validate

A point is one op (or the training step, or a stage of the data path) at one shape in one phase, by
one of our implementations beside one peer; or one compiled kernel. A point with `wrong` has errors
and no times. Every number is finite: NaN passes any comparison that is written the wrong way round.
"""

import reprlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

PHASES = ("forward", "backward", "both", "whole")  # "whole" where there is one only


@dataclass(frozen=True)
class _Kind:
    """What a value must be, in words and as a function."""

    what: str
    holds: Callable[[object], bool]


def _is_number(value: object) -> bool:
    """Finite; neither true nor false, which are integers to Python."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return numeric and abs(value) <= sys.float_info.max


def _optional(kind: _Kind) -> _Kind:
    return _Kind(f"{kind.what} or null", lambda v: v is None or kind.holds(v))


def _values(kind: _Kind) -> _Kind:
    """An object whose values are of one kind."""
    what = f"an object with values of {kind.what}"
    return _Kind(what, lambda v: isinstance(v, dict) and all(map(kind.holds, v.values())))


def _object(**kinds: _Kind) -> _Kind:
    """An object with these fields; it may have others."""

    def holds(value: object) -> bool:
        return isinstance(value, dict) and all(
            name in value and kind.holds(value[name]) for name, kind in kinds.items()
        )

    fields = "; ".join(f"{name}, {kind.what}" for name, kind in kinds.items())
    return _Kind(f"an object of {fields}", holds)


_TEXT = _Kind("a string", lambda v: isinstance(v, str))
_NAME = _Kind("a string that is not empty", lambda v: isinstance(v, str) and v != "")
_FLAG = _Kind("true or false", lambda v: isinstance(v, bool))
_NUMBER = _Kind("a number of at least 0", lambda v: _is_number(v) and v >= 0)
_POSITIVE = _Kind("a number above 0", lambda v: _is_number(v) and v > 0)
_COUNT = _Kind("a whole number of at least 0", lambda v: _is_number(v) and v == int(v) and v >= 0)
_TIMES = _object(p20=_POSITIVE, p50=_POSITIVE, p80=_POSITIVE)
_LIMITS = _object(copy_gbps=_POSITIVE, matmul_tflops=_POSITIVE)
# null: not finite, which only what is wrong may be.
_ERROR = _object(maximum=_optional(_NUMBER), rms=_optional(_NUMBER))
# And `command`, which files of earlier versions lack.
_ENVIRONMENT = _object(
    cpu=_optional(_TEXT), gpu=_optional(_TEXT), threads=_COUNT, isa=_optional(_TEXT), torch=_TEXT,
    commit=_TEXT, dirty=_FLAG, date=_TEXT,
)  # fmt: skip

# Every field of a point.
FIELDS = {
    "op": _NAME,
    "variant": _TEXT,
    "model": _TEXT,
    "sizes": _values(_COUNT),
    "dtype": _TEXT,
    "device": _NAME,
    "phase": _Kind(f"one of {', '.join(PHASES)}", lambda v: v in PHASES),
    "impl": _NAME,  # what ran, not what was asked for
    "peer": _TEXT,
    "ms": _optional(_TIMES),  # null: wrong, not timed
    "peer_ms": _optional(_TIMES),
    "ratio": _optional(_POSITIVE),  # median of the peer over ours: above 1, ours is faster
    "ratio_p20": _optional(_POSITIVE),  # quantiles of the ratio of the two times of one turn
    "ratio_p80": _optional(_POSITIVE),
    "gbps": _optional(_NUMBER),
    "tflops": _optional(_NUMBER),
    "copy_share": _optional(_NUMBER),  # of the copy bandwidth that the run measured
    "matmul_share": _optional(_NUMBER),  # of the matrix-product peak that the run measured
    "flops_per_byte": _optional(_NUMBER),
    "peak_bytes": _optional(_COUNT),  # what the call adds; of the phase "both", or the only one
    "peer_peak_bytes": _optional(_COUNT),
    "memory_ratio": _optional(_NUMBER),  # ours over the peer: below 1, ours needs less
    "errors": _values(_ERROR),  # "small" and "timed": the worst result, see checks.Errors
    "wrong": _optional(_NAME),
    "clock": _NAME,
    "limits": _Kind(f"{{}} or {_LIMITS.what}", lambda v: v == {} or _LIMITS.holds(v)),
    "quiet": _optional(_object(quiet=_FLAG, others=_NUMBER, drift=_NUMBER)),
    "environment": _ENVIRONMENT,
}
# The fields that a point may lack a value for.
UNTIMED = {name: None for name, kind in FIELDS.items() if kind.holds(None)}
COMPILED_FIELDS = {
    "kernel": _NAME,
    "case": _TEXT,
    "arch": _NAME,
    "registers": _COUNT,
    "spill_bytes": _COUNT,
    "shared_bytes": _COUNT,
    "shared_limit": _POSITIVE,
    "instructions": _values(_COUNT),  # name -> how often it stands in the code
    "environment": _ENVIRONMENT,
}
_TIMED = ("ms", "peer_ms", "ratio", "ratio_p20", "ratio_p80")
_RATES = ("gbps", "copy_share", "matmul_share", "flops_per_byte")


def validate(point: object) -> None:
    """Raises ValueError, naming the field, unless a point is whole and every value makes sense."""
    if not isinstance(point, dict):
        raise ValueError(f"expected a point, a JSON object, got {reprlib.repr(point)}.")
    fields = COMPILED_FIELDS if "kernel" in point else FIELDS
    if set(point) != set(fields):
        odd = sorted(set(point) ^ set(fields))
        raise ValueError(f"expected the fields of a point, got a difference in {odd}.")
    for name, kind in fields.items():
        if not kind.holds(point[name]):
            came = reprlib.repr(point[name])
            raise ValueError(f"expected {name} to be {kind.what}, got {came}.")
    if "kernel" not in point:
        _check_together(point)


def _check_together(point: dict) -> None:
    """Raises ValueError for fields that are right one by one and not together."""
    right = point["wrong"] is None
    for name in _TIMED:
        if (point[name] is not None) != right:
            what = "a value, as nothing is wrong" if right else "null, as `wrong` is given"
            raise ValueError(f"expected {name} to be {what}, got {reprlib.repr(point[name])}.")
    if right and any(None in (e["maximum"], e["rms"]) for e in point["errors"].values()):
        raise ValueError("expected errors to be numbers, as nothing is wrong, got null.")
    there = [name for name in _RATES if point[name] is not None]
    if there and len(there) < len(_RATES):
        raise ValueError(f"expected all of {', '.join(_RATES)} or none, got {', '.join(there)}.")
    if there and (not point["limits"] or point["tflops"] is None):
        raise ValueError("expected limits and tflops of a point with rates, got none.")
