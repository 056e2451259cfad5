"""Builds the C++ extension; everything else about the package is in pyproject.toml.

`stellarator_kernels._cpu` is compiled with pybind11's headers and no torch headers. The files in
`csrc/cpu/per_isa/` are compiled once per instruction set and the fastest one is chosen at run time,
so a built wheel runs on any machine of the architecture. Ninja is used where it is found, for
parallel compilation and for recompiling only what changed; without it the same commands run one
after another. The extension is optional: without a working compiler the package installs and runs
on torch alone, and `stellarator doctor` says so.

Environment: CXX (default c++), CXXFLAGS, LDFLAGS.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
# No fast-math.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Icsrc/cpu",
]
# Memory-bound kernels whose results have the same bits on every instruction set: no contraction of
# a * b + c there. The others are faster and nearer to the exact result with it.
SAME_BITS = ("adamw", "grad_norm")
ISA_FLAGS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
        "-Wno-uninitialized",  # GCC 12 warns of its own headers (its bug 105593)
    ]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]


def objects(folder: Path, python_includes: list[str]) -> list[tuple[Path, Path, list[str]]]:
    """(source, object, flags) of every translation unit."""
    units = []
    for source in sorted(CSRC.glob("cpu/*.cpp")):
        units.append((source, folder / f"{source.stem}.o", FLAGS))
    for source in sorted(CSRC.glob("bindings/*.cpp")):
        units.append((source, folder / f"bindings_{source.stem}.o", FLAGS + python_includes))
    for source in sorted(CSRC.glob("cpu/per_isa/*.cpp")):
        for isa, isa_flags in ISA_FLAGS.items():
            contract = "off" if source.stem in SAME_BITS else "fast"
            flags = [*FLAGS, f"-ffp-contract={contract}", f"-DSTELLARATOR_ISA={isa}", *isa_flags]
            units.append((source, folder / f"{source.stem}_{isa}.o", flags))
    return units


def compile_command(source: Path, output: Path, flags: list[str]) -> list[str]:
    """The compiler call for one translation unit; also writes the list of headers it read."""
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    dependencies = ["-MMD", "-MF", f"{output}.d"]
    return [*compiler(), *flags, *extra, *dependencies, "-c", str(source), "-o", str(output)]


def link_command(inputs: list[Path], output: Path) -> list[str]:
    """The linker call."""
    shared = ["-shared"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    extra = shlex.split(os.environ.get("LDFLAGS", ""))
    libraries = ["-ldl", "-lpthread"] if sys.platform == "linux" else []
    return [*compiler(), *shared, *map(str, inputs), *extra, *libraries, "-o", str(output)]


def compiler() -> list[str]:
    """The C++ compiler as a command."""
    return shlex.split(os.environ.get("CXX", "c++"))


def find_ninja() -> str | None:
    """Path of ninja: the build requirement's own, else the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    return str(Path(BIN_DIR) / "ninja") if BIN_DIR else shutil.which("ninja")


def ninja_file(units: list, library: Path) -> str:
    """build.ninja for all translation units and the link."""

    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def quote(command: list[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    # Ninja keeps its logs in builddir; without one they would lie in the checkout.
    lines = [f"builddir = {escape(units[0][1].parent)}"]
    lines += ["rule compile", "  command = $cmd", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $cmd"]
    for source, output, flags in units:
        lines += [
            f"build {escape(output)}: compile {escape(source)}",
            f"  cmd = {quote(compile_command(source, output, flags))}",
        ]
    outputs = [output for _, output, _ in units]
    lines += [
        f"build {escape(library)}: link {' '.join(map(escape, outputs))}",
        f"  cmd = {quote(link_command(outputs, library))}",
    ]
    return "\n".join(lines) + "\n"


class BuildExtension(build_ext):
    """Compiles csrc/ with one set of flags per file."""

    def run(self) -> None:
        self._forget()
        super().run()

    def _forget(self) -> None:
        """Remove libraries of earlier builds: a build that fails must not pass off an old one."""
        inplace = self.inplace
        for ext in self.extensions:
            for self.inplace in (False, inplace):  # in build/, and beside the sources
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            # setuptools prints this as one warning, because the extension is optional.
            raise CompileError(
                f"{error}. The package works without it, on torch alone; `stellarator doctor` says "
                "how to build it."
            ) from error

    def _build(self, library: Path) -> None:
        """Compile and link `library`."""
        import pybind11

        folder = Path(self.build_temp) / "cpu"
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-isystem{pybind11.get_include()}"]
        includes.append(f"-isystem{sysconfig.get_path('include')}")
        units = objects(folder, includes)
        ninja = find_ninja()
        if ninja is not None:
            script = folder / "build.ninja"
            script.write_text(ninja_file(units, library))
            subprocess.run([ninja, "-f", str(script), "--quiet"], check=True)
            return
        for source, output, flags in units:
            subprocess.run(compile_command(source, output, flags), check=True)
        subprocess.run(link_command([output for _, output, _ in units], library), check=True)


setup(
    # The sources are listed so that an sdist carries them; BuildExtension finds them by folder.
    ext_modules=[
        Extension(
            "stellarator_kernels._cpu",
            sources=[path.as_posix() for path in sorted(CSRC.glob("**/*.cpp"))],
            depends=[path.as_posix() for path in sorted(CSRC.glob("**/*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
