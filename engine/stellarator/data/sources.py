"""Documents out of folders, git checkouts, single files and data sets, in a fixed order.

defines: read_sources, SourceError

A folder is walked in the order of names. Read are regular files whose name says a known language.
Symbolic links inside it are never followed, neither to folders nor to files, so there are no loops
and nothing outside is read; a link given as a source itself is followed. Not entered are hidden
folders and those of installed packages (`site-packages`, `node_modules` ...).

What "repository" means, because a held-out set is chosen by it:
    a git checkout   `owner/name` of its remote, else its folder's name. Tracked files only, if
                     git is there to ask. Also when it lies inside a folder that is walked.
    any other folder each top-level folder or file of it, as `folder/part`: for Python's standard
                     library `python3.11/asyncio`, and `python3.11/argparse` for argparse.py.
    a data set       what its rows say, else the file's name.

JSON lines and Parquet inside a folder are read as data sets, inside a git checkout they are not.
"""

import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from stellarator.data.containers import checked_text, is_container, read_container
from stellarator.data.documents import Document, Limits, Report, language_of, printable

FOREIGN_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "node_modules", "bower_components"}
)

# https://host/.../owner/name(.git) and user@host:owner/name(.git), but no path of this machine
_REMOTE = re.compile(r"(?:://[^/]+/|^[^/:]+:(?!/))(?:.*/)?([^/:]+/[^/]+?)(?:\.git)?/?$")


class SourceError(ValueError):
    """A source that cannot be read at all, or sources without a single document; one line."""


def read_sources(
    paths: Iterable[str | os.PathLike],
    *,
    report: Report | None = None,
    limits: Limits | None = None,
    deduplicate: bool = True,
    leave_out: str | os.PathLike | None = None,
) -> Iterator[Document]:
    """The documents of all sources, one after another.

    Args:
        paths: folders, git checkouts, files of source code, .jsonl[.gz|.zst], .parquet.
        report: counts every file and row; read it when the iterator has ended.
        limits: sizes; `Limits()` if not given.
        deduplicate: leave out a text that was seen before, by its hash (100 bytes of memory).
        leave_out: a folder that is not entered, such as the one that is written to.
    Raises:
        SourceError: a path that does not exist, or no document in all of them.
    """
    report, limits = report or Report(), limits or Limits()
    leave_out = None if leave_out is None else Path(leave_out).resolve()
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for path in paths:
        if not os.path.exists(path):
            raise SourceError(
                f"sources: expected a folder, .jsonl or .parquet file, got {str(path)!r}, "
                "which does not exist."
            )
    seen: set[bytes] = set()
    found = False
    for path in paths:
        for document in _read(path, report, limits, leave_out):
            if deduplicate:
                data = document.text.encode()
                digest = hashlib.blake2b(data, digest_size=16).digest()
                if digest in seen:
                    report.reject("duplicate", document.source, len(data))
                    continue
                seen.add(digest)
            found = True
            yield document
    if not found:
        names = ", ".join(str(path) for path in paths) or "nothing"
        raise SourceError(f"sources: no documents found in {names}: {report.summary()}.")


def _read(path: Path, report: Report, limits: Limits, leave_out: Path | None) -> Iterator[Document]:
    """The documents of one source."""
    path = path.resolve()
    if path.is_dir():
        reader = _Folder(report, limits, leave_out)
        yield from reader.checkout(path) if _is_checkout(path) else reader.plain(path)
    elif is_container(path.name) and path.is_file():
        yield from read_container(path, report, limits)
    else:
        repository = path.parent.name
        yield from _Folder(report, limits).file(path, path.name, repository)


class _Folder:
    """Walks folders; see the top of this file for the rules."""

    def __init__(self, report: Report, limits: Limits, leave_out: Path | None = None):
        self.report, self.limits, self.leave_out = report, limits, leave_out

    def plain(self, root: Path) -> Iterator[Document]:
        """A folder that is no git checkout: its top-level parts are the repositories."""
        for path, relative, is_checkout in self.walk(root):
            if is_checkout:
                yield from self.checkout(path)
            elif is_container(relative) and stat.S_ISREG(_mode(path)):
                yield from read_container(path, self.report, self.limits)
            else:
                first, slash, _ = relative.partition("/")
                part = first if slash else first.partition(".")[0] or first
                yield from self.file(path, relative, f"{root.name or 'root'}/{part}")

    def checkout(self, root: Path) -> Iterator[Document]:
        """A git checkout: the tracked files, or all files where git does not tell."""
        repository = _repository_name(root)
        tracked = _tracked_files(root)
        if tracked is None:
            self.report.note(f"{root}: git did not list its files, so all of them are read")
            for path, relative, is_checkout in self.walk(root):
                if is_checkout:
                    yield from self.checkout(path)
                else:
                    yield from self.file(path, relative, repository)
            return
        inside = os.path.realpath(root)
        for relative in tracked:
            path = root / relative
            folder = os.path.join(inside, os.path.dirname(relative)).rstrip("/")
            if stat.S_ISDIR(_mode(path)):
                if _is_checkout(path):
                    yield from self.checkout(path)
                else:
                    self.report.skip_folder("submodule that is not checked out", str(path))
            elif os.path.realpath(folder) != folder:
                self._skip("symbolic link", path)
            elif any(_is_foreign(part) for part in relative.split("/")):
                self._skip("hidden or foreign", path)
            else:
                yield from self.file(path, relative, repository)

    def walk(self, root: Path) -> Iterator[tuple[Path, str, bool]]:
        """(path, path from `root`, is it a git checkout) of files and of folders with `.git`."""
        waiting = [(root, "")]
        while waiting:
            folder, relative = waiting.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                self.report.skip_folder("unreadable", f"{folder}: {error.strerror}")
                continue
            folders = []
            for entry in entries:
                path, name = folder / entry.name, relative + entry.name
                if not entry.is_dir(follow_symlinks=False):
                    yield path, name, False
                elif path == self.leave_out:
                    self.report.skip_folder("left out", str(path))
                elif _is_foreign(entry.name) or os.path.exists(path / "pyvenv.cfg"):
                    self.report.skip_folder("hidden or foreign", str(path))
                elif _is_checkout(path):
                    yield path, name, True
                else:
                    folders.append((path, name + "/"))
            waiting += reversed(folders)

    def file(self, path: Path, relative: str, repository: str) -> Iterator[Document]:
        """The document of one file, if it is one."""
        name = path.name
        if name.startswith("."):
            return self._skip("hidden or foreign", path)
        language = language_of(name)
        if language is None and stat.S_ISREG(_mode(path)):
            return self._skip("unknown language", path)
        data, reason = _read_file(path, self.limits.max_file_bytes)
        if reason:
            return self._skip(reason, path)
        text, num_bytes, reason = checked_text(data, self.limits, self.report)
        if reason:
            return self._skip(reason, path)
        self.report.see()
        self.report.keep(num_bytes)
        yield Document(
            text=text,
            repository=printable(_utf8(repository)),
            path=printable(_utf8(relative)),
            language=language,
            source=printable(str(path)),
        )

    def _skip(self, reason: str, path: Path) -> None:
        self.report.see()
        self.report.skip(reason, _utf8(str(path)))


def _is_checkout(folder: Path) -> bool:
    return os.path.exists(folder / ".git")  # a folder, or a file in a work tree or submodule


def _is_foreign(name: str) -> bool:
    """Whether a folder of this name is hidden or holds what others wrote."""
    return name.startswith(".") or name in FOREIGN_FOLDERS


def _utf8(name: str) -> str:
    """A file name with UTF-8 bytes; those that are none become U+FFFD."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def _mode(path: Path) -> int:
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


def _read_file(path: Path, max_bytes: int) -> tuple[bytes, str | None]:
    """(content, None) of a regular file, or why not. The size is looked at before reading."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    mode = _mode(path)
    if mode and not stat.S_ISREG(mode):  # opening a device may have effects
        return b"", "symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
    try:
        handle = os.open(path, flags)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                return b"", "not a regular file"
            if status.st_size > max_bytes:
                return b"", "too large"
            data = file.read(max_bytes + 1)
    except (OSError, ValueError):
        return b"", "unreadable"
    return (data, None) if len(data) <= max_bytes else (b"", "too large")


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git prints, or None. A repository must not choose what runs: no hooks, no monitor."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    overrides = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    try:
        found = subprocess.run(
            ["git", "-C", str(root), *overrides, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout if found.returncode == 0 else None


def _tracked_files(root: Path) -> list[str] | None:
    """Paths that git tracks, sorted; None if git cannot tell or tracks nothing yet."""
    listing = _git(root, "ls-files", "-z", "--cached")
    if not listing:
        return None
    names = sorted(set(listing.split(b"\0")) - {b""})  # a merge conflict lists a path three times
    return [os.fsdecode(name) for name in names]


def _repository_name(root: Path) -> str:
    """`owner/name` of the remote `origin`, or of the first remote; else the folder's name."""
    listing = _git(root, "config", "--local", "--get-regexp", r"^remote\..*\.url$") or b""
    pairs = (line.partition(" ") for line in listing.decode(errors="replace").splitlines())
    urls = {key: url for key, _, url in pairs}
    url = urls.get("remote.origin.url") or next(iter(urls.values()), "")
    # The last two parts only: what stands before may be a password.
    match = _REMOTE.search(url)
    return match[1] if match else root.name or "root"
