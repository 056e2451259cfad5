"""A document, the language of a file name, and the account of what was kept and what was not.

defines: Document, Limits, Report, account, language_of, printable, LANGUAGES
"""

import collections
import re
from dataclasses import dataclass

MAX_EXAMPLES = 3  # per reason


@dataclass(frozen=True)
class Document:
    """One file of source code, or one row of a data set. `text` always has UTF-8 bytes.

    `repository` is what a held-out split keeps together; `path` is relative to it. Both may be ""
    where a data set does not say. `source` is where it was read from, for messages.
    """

    text: str
    repository: str
    path: str
    language: str | None = None
    licence: str | None = None
    stars: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Limits:
    """What one input may cost. Checked before or while reading, never after."""

    max_file_bytes: int = 1 << 20  # of one document
    max_unpacked_bytes: int = 1 << 38  # of one compressed or Parquet file
    max_ratio: int = 200  # of unpacked to packed bytes; code has 3 to 20
    ratio_from_bytes: int = 64 << 20  # unpacked bytes below which the ratio is not looked at


class Report:
    """Counts every candidate once: kept, or skipped for a reason with a few examples.

    `seen` is counted where a candidate is found and the others where its fate is decided, so
    `check()` can find one that was lost.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.kept = 0
        self.kept_bytes = 0
        self.skipped: collections.Counter[str] = collections.Counter()
        self.folders_skipped: collections.Counter[str] = collections.Counter()
        self.changed: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def see(self) -> None:
        """A candidate was found."""
        self.seen += 1

    def keep(self, num_bytes: int) -> None:
        """The candidate is a document."""
        self.kept += 1
        self.kept_bytes += num_bytes

    def skip(self, reason: str, where: str, detail: str = "") -> None:
        """The candidate is left out; `detail` goes into the example only."""
        self.skipped[reason] += 1
        self._example(reason, f"{where}: {detail}" if detail else where)

    def reject(self, reason: str, where: str, num_bytes: int) -> None:
        """A document that was kept is left out by a later step."""
        self.kept -= 1
        self.kept_bytes -= num_bytes
        self.skip(reason, where)

    def skip_folder(self, reason: str, where: str) -> None:
        """A folder was not entered, so what it holds was never seen."""
        self.folders_skipped[reason] += 1
        self._example(reason, where)

    def note(self, text: str) -> None:
        """Something was done in another way than usual; at most 20 are kept."""
        if len(self.notes) < 20:
            self.notes.append(printable(text))

    def check(self) -> None:
        """Raises AssertionError if a candidate was lost or counted twice."""
        total = self.kept + sum(self.skipped.values())
        assert self.seen == total, f"{self.seen} candidates, but {total} kept or skipped"

    def summary(self) -> str:
        """One line: how many, and why not."""
        parts = [f"{self.seen} files or rows seen, {self.kept} kept"]
        return "; ".join(parts + account(self.to_json()))

    def to_json(self) -> dict:
        """Plain values, in an order that depends on nothing else."""
        return {
            "seen": self.seen,
            "kept": self.kept,
            "kept_bytes": self.kept_bytes,
            "skipped": dict(sorted(self.skipped.items())),
            "folders_skipped": dict(sorted(self.folders_skipped.items())),
            "changed": dict(sorted(self.changed.items())),
            "examples": dict(sorted(self.examples.items())),
            "notes": self.notes,
        }

    def _example(self, reason: str, text: str) -> None:
        found = self.examples.setdefault(reason, [])
        if len(found) < MAX_EXAMPLES:
            found.append(printable(text)[:300])


def account(report: dict) -> list[str]:
    """What a report, as `Report.to_json` gives it, says for people besides the sums."""
    titles = {
        "skipped": "skipped",
        "folders_skipped": "folders not entered",
        "changed": "texts changed",
    }
    lines = []
    for key, title in titles.items():
        counts = ", ".join(f"{count:,} {reason}" for reason, count in report[key].items())
        lines += [f"{title}: {counts}"] * bool(counts)
    return lines


def printable(text: str) -> str:
    """`text` on one line and with UTF-8 bytes: control characters and lone surrogates replaced."""
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def language_of(path: str) -> str | None:
    """The language of a file by its name, or None.

    Where an extension belongs to several languages (`.h`, `.m`, `.v`) the most common one on
    GitHub is taken. `.txt` is "Text" for the few names that StarCoder2 kept, such as readme and
    notes.
    """
    name = path.rpartition("/")[2].lower()
    if name in _BY_NAME:
        return _BY_NAME[name]
    stem, dot, extension = name.rpartition(".")
    if not dot or not stem:
        return "Text" if _TEXT_NAME.fullmatch(name) else None
    if extension in ("txt", "text"):
        return "Text" if _TEXT_NAME.fullmatch(stem) else None
    return _BY_EXTENSION.get(extension)


_TEXT_NAME = re.compile(r".*requirement.*|readme.*|notes|todo|description|cmakelists")

# Language: extensions. Those of StarCoder's training set, then what StarCoder2 added.
LANGUAGES = {
    "Ada": "adb ads ada", "Agda": "agda", "Alloy": "als", "ANTLR": "g4",
    "AppleScript": "applescript", "Assembly": "asm s nasm", "Augeas": "aug", "AWK": "awk gawk mawk",
    "Batchfile": "bat cmd", "Bluespec": "bsv", "C": "c h", "C#": "cs csx cake",
    "C++": "cpp cc cxx hpp hh hxx ipp tpp inl",
    "Clojure": "clj cljs cljc edn boot", "CMake": "cmake", "CoffeeScript": "coffee cson iced",
    "Common Lisp": "lisp lsp asd", "CSS": "css", "CUDA": "cu cuh", "Dart": "dart",
    "Dockerfile": "dockerfile", "Elixir": "ex exs", "Elm": "elm", "Emacs Lisp": "el",
    "Erlang": "erl hrl escript", "F#": "fs fsi fsx", "Fortran": "f f77 f90 f95 f03 f08 for",
    "GLSL": "glsl vert frag geom comp", "Go": "go", "Groovy": "groovy gradle gvy",
    "Haskell": "hs hsc", "HTML": "html htm xhtml", "Idris": "idr", "Isabelle": "thy",
    "Java": "java",
    "Java Server Pages": "jsp", "JavaScript": "js jsx mjs cjs es6", "JSON": "json", "Julia": "jl",
    "Kotlin": "kt kts ktm", "Lean": "lean", "Literate Agda": "lagda",
    "Literate CoffeeScript": "litcoffee", "Literate Haskell": "lhs", "Lua": "lua",
    "Makefile": "mk mak make", "Maple": "mpl", "Markdown": "md markdown mkd",
    "Mathematica": "nb wl wls", "MATLAB": "m", "OCaml": "ml mli mll mly",
    "Pascal": "pas dpr lpr", "Perl": "pl pm t perl",
    "PHP": "php phtml php5", "PowerShell": "ps1 psm1 psd1", "Prolog": "prolog pro",
    "Protocol Buffer": "proto", "Python": "py pyi pyw pyx pxd", "R": "r", "Racket": "rkt",
    "reStructuredText": "rst rest", "RMarkdown": "rmd", "Ruby": "rb rake gemspec ru", "Rust": "rs",
    "SAS": "sas", "Scala": "scala sbt", "Scheme": "scm ss sld", "Shell": "sh bash zsh ksh",
    "Smalltalk": "st", "Solidity": "sol", "SPARQL": "sparql rq", "SQL": "sql ddl", "Stan": "stan",
    "Standard ML": "sml fun sig", "Stata": "do ado", "SystemVerilog": "sv svh",
    "Tcl": "tcl tm", "Tcsh": "tcsh csh", "TeX": "tex sty cls bib", "Thrift": "thrift",
    "TypeScript": "ts tsx mts cts", "Verilog": "v vh", "VHDL": "vhd vhdl",
    "Visual Basic": "vb bas vbs", "XSLT": "xsl xslt", "Yacc": "y yy", "YAML": "yaml yml",
    "Zig": "zig",
    "AsciiDoc": "adoc asciidoc", "INI": "ini cfg", "RDoc": "rdoc", "Swift": "swift", "TOML": "toml",
    "Vue": "vue", "XML": "xml",
}  # fmt: skip
_BY_EXTENSION = {
    extension: language for language, text in LANGUAGES.items() for extension in text.split()
}
_BY_NAME = {
    "makefile": "Makefile", "gnumakefile": "Makefile", "cmakelists.txt": "CMake",
    "dockerfile": "Dockerfile", "containerfile": "Dockerfile", "rakefile": "Ruby",
    "gemfile": "Ruby", "jenkinsfile": "Groovy", "sconstruct": "Python", "sconscript": "Python",
}  # fmt: skip
