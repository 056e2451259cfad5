"""Mistakes of use: printed without a traceback, exit code 2.

defines: UsageError, refusals, one_of, count, positive
"""

import argparse
import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UsageError(ValueError):
    """A message for whoever typed the command: what was expected, what came, what to do."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Within this block a ValueError of the engine or the kernels is a mistake of use."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


def one_of(option: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Raises UsageError unless all that was given is among the names."""
    names = list(names)
    for word in given:
        if word not in names:
            near = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{option}: expected some of {', '.join(names)}, got {word!r}.{hint}")


def count(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
