"""gates.toml, read and checked.

defines: FILE, SELECT, SELECT_COMPILED, load

Every value is checked before anything is measured: a limit of NaN is never missed, and a misspelt
device would be a gate on nothing.
"""

import itertools
import math
import tomllib
from pathlib import Path

from benchmarks.points import PHASES
from benchmarks.usage import UsageError

FILE = Path(__file__).with_name("gates.toml")
# The fields that say which points a gate is on.
SELECT = ("op", "variant", "model", "tokens", "dtype", "device", "phase", "impl", "peer")
SELECT_COMPILED = ("kernel", "arch")
_LIMITS = ("speed", "memory", "errors")
_LIMITS_COMPILED = ("spill_bytes", "shared", "instructions")
_WORDS = {
    "dtype": ("bfloat16", "float16", "float32"),
    "device": ("cpu", "cuda"),
    "phase": PHASES,
}


def load(path: str | Path = FILE) -> dict[str, list[dict]]:
    """{name of a set: its gates}, defaults filled in and lists taken apart.

    Raises:
        UsageError: the file cannot be read or has no set, or an entry has a key that is no field
            and no limit, no limit at all, no op and peer, or a value that cannot be meant.
    """
    try:
        sets = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    if not sets:
        raise UsageError(f"{path}: expected a set of gates, got an empty file.")
    return {name: _gates(f"{path}: {name}", given) for name, given in sets.items()}


def _gates(where: str, given: object) -> list[dict]:
    """One dict a gate."""
    if not isinstance(given, dict) or not _are_tables(given.get("gates")):
        raise UsageError(f"{where}: expected `gates`, a list of tables, got {given!r}.")
    defaults = given.get("defaults", {})
    if not isinstance(defaults, dict):
        raise UsageError(f"{where}: expected `defaults` to be a table, got {defaults!r}.")
    found = []
    for gate in (defaults | gate for gate in given["gates"]):
        select = SELECT_COMPILED if "kernel" in gate else SELECT
        lists = {name: gate[name] for name in select if isinstance(gate.get(name), list)}
        for values in itertools.product(*lists.values()):
            found.append(gate | dict(zip(lists, values, strict=True)))
            _check(where, found[-1])
        if [] in lists.values():
            raise UsageError(f"{where}: expected lists of one value at least, got {gate}.")
    return found


def _are_tables(gates: object) -> bool:
    return isinstance(gates, list) and gates != [] and all(isinstance(g, dict) for g in gates)


def _check(where: str, gate: dict) -> None:
    """Raises UsageError unless a gate, its lists taken apart, can be judged."""
    compiled = "kernel" in gate
    select, limits = (SELECT_COMPILED, _LIMITS_COMPILED) if compiled else (SELECT, _LIMITS)
    if unknown := set(gate) - {*select, *limits, "aim"}:
        raise UsageError(f"{where}: expected keys of {select + limits}, got {unknown}.")
    if not set(gate) & set(limits):
        raise UsageError(f"{where}: expected one of {limits}, got {gate}.")
    if not compiled and not {"op", "peer"} <= set(gate):
        raise UsageError(f"{where}: expected an op and a peer, got {gate}.")
    for name, value in gate.items():
        if wanted := _objection(name, value):
            raise UsageError(f"{where}: expected {name} to be {wanted}, got {value!r}.")


def _objection(name: str, value: object) -> str:
    """What a value should have been; empty if it is that."""
    if name in _WORDS:
        return "" if value in _WORDS[name] else f"one of {', '.join(_WORDS[name])}"
    if name == "variant":
        fine = isinstance(value, str) and _is_variant(value.split(" "))
        return "" if fine else "one word, or `window` and a number of keys"
    if name == "tokens":
        return "" if _is_count(value) and value > 0 else "a whole number of at least 1"
    if name == "spill_bytes":
        return "" if _is_count(value) else "a whole number of at least 0"
    if name == "instructions":
        fine = isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)
        return "" if fine else "a list of names"
    if name in (*SELECT, *SELECT_COMPILED):
        return "" if isinstance(value, str) and value else "a string that is not empty"
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if numeric and 0 < value < math.inf else "a number above 0"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_variant(words: list[str]) -> bool:
    """Variants are one word, but for the window, whose size may stand with it."""
    if len(words) == 2:
        return words[0] == "window" and words[1].isdecimal() and int(words[1]) > 0
    return len(words) == 1
