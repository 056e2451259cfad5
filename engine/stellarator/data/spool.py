"""Documents set aside on disk and grouped by repository, and the choice of those held out.

defines: Spool, hold_out, units_of, seed_of

Formats need whole repositories and sources give files in any order, so documents wait in one file.
Memory holds 24 bytes per document and the names of the repositories.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable

from stellarator.data.documents import Document


class Spool:
    """Written with `add`, then read by number in any order; `close` removes the file."""

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "w+b")
        self._path = os.fspath(path)
        self._starts = array("q", [0])
        self._sizes = array("q")  # of the texts alone, in UTF-8
        self._of_repository: dict[str, array] = {}

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, document: Document) -> None:
        """Append one document."""
        text = document.text.encode()
        fields = [getattr(document, name) for name in _FIELDS]
        head = json.dumps(fields).encode() + b"\n"
        self._file.write(head + text)
        self._starts.append(self._starts[-1] + len(head) + len(text))
        self._of_repository.setdefault(document.repository, array("q")).append(len(self))
        self._sizes.append(len(text))

    def __getitem__(self, number: int) -> Document:
        start, end = self._starts[number], self._starts[number + 1]
        self._file.seek(start)
        head, _, text = self._file.read(end - start).partition(b"\n")
        return Document(text=text.decode(), **dict(zip(_FIELDS, json.loads(head), strict=True)))

    def repositories(self) -> list[str]:
        """Names, sorted."""
        return sorted(self._of_repository)

    def numbers(self, repository: str) -> list[int]:
        """The documents of a repository, by path, those of one path as they came."""
        numbers = self._of_repository[repository]
        return sorted(numbers, key=self.path)

    def path(self, number: int) -> str:
        """The path of a document, without reading its text."""
        self._file.seek(self._starts[number])
        return json.loads(self._file.readline())[_FIELDS.index("path")]

    def num_bytes(self, numbers: Iterable[int]) -> int:
        """Bytes of the texts of these documents."""
        return sum(self._sizes[number] for number in numbers)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        os.remove(self._path)


_FIELDS = ("repository", "path", "language", "licence", "stars", "source")


def hold_out(sizes: dict[str, int], fraction: float, seed: int) -> set[str]:
    """The repositories to hold out: at most `fraction` of the bytes, and mostly close to it.

    They are taken in the order of a hash of (seed, name). One that does not fit any more is
    passed over, so a huge repository stays on the training side. If none fits at all, the
    smallest is taken, which is then more than `fraction`.

    Args:
        sizes: bytes of each repository.
        fraction: in [0, 0.5]; 0 holds out nothing.
    Raises:
        ValueError: a fraction out of range, or fewer than two repositories to choose from.
    """
    if not 0.0 <= fraction <= 0.5:
        raise ValueError(f"hold_out: expected a fraction in [0, 0.5], got {fraction}.")
    if fraction == 0.0:
        return set()
    if len(sizes) < 2:
        raise ValueError(
            f"hold_out: expected at least 2 repositories, so that one can be held out, got "
            f"{sorted(sizes)}. Give more sources, or hold out nothing: --validation-fraction 0."
        )
    order = sorted(sizes, key=lambda name: (_digest(seed, name), name))
    budget = fraction * sum(sizes.values())
    chosen, left = set(), budget
    for name in order:
        if sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
        if left < 0.05 * budget:
            break
    return chosen or {min(order, key=sizes.__getitem__)}


def units_of(spool: Spool) -> tuple[dict[str, list[int]], int]:
    """What the split keeps together: (documents of each unit, parts of the path in its name).

    A unit is a repository. Where there is only one, it is a top-level folder or file of it, or if
    there is only one of those, of the first level that has several: then the second value is the
    level. Code of one repository on both sides is a weaker test, so the caller says it.
    """
    names = spool.repositories()
    if len(names) != 1:
        return {name: spool.numbers(name) for name in names}, 0
    numbers = spool.numbers(names[0])
    paths = {number: spool.path(number).split("/") for number in numbers}
    deepest = max((len(path) for path in paths.values()), default=0)
    for level in range(1, deepest + 1):
        units: dict[str, list[int]] = {}
        for number in numbers:
            units.setdefault("/".join([names[0], *paths[number][:level]]), []).append(number)
        if len(units) > 1:
            return units, level
    return {names[0]: numbers}, 0


def _digest(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()


def seed_of(seed: int, name: str) -> list[int]:
    """Entropy for a generator that depends on (seed, name) and nothing else."""
    return [seed, int.from_bytes(_digest(seed, name), "little")]
