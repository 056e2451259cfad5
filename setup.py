"""Builds the C++ extensions; everything else about the package is in pyproject.toml.

`stellarator_kernels._cpu` is compiled with pybind11's headers and no torch headers. The files in
`csrc/cpu/per_isa/` are compiled once per instruction set and the fastest one is chosen at run time,
so a built wheel runs on any machine of the architecture. Ninja is used where it is found, for
parallel compilation and for recompiling only what changed; without it the same commands run one
after another. `stellarator_kernels._cuda` is built where nvcc is found, for the GPUs of
CUDA_ARCHITECTURES, with CUDA's runtime inside. Both are optional: without a working compiler the
package installs and runs on torch alone, and `stellarator doctor` says so.

Environment: CXX (default c++), CXXFLAGS, LDFLAGS; NVCC (default that of CUDA_HOME, else the one on
PATH; empty: no CUDA).
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
# Machine code for these, and for newer ones the last as text that the driver compiles.
CUDA_ARCHITECTURES = ("80", "90a", "100")
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",  # as SAME_BITS
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Icsrc/cuda",
    *(f"-gencode=arch=compute_{x},code=sm_{x}" for x in CUDA_ARCHITECTURES),
    "-gencode=arch=compute_{0},code=compute_{0}".format(CUDA_ARCHITECTURES[-1]),
]
Unit = tuple[Path, Path, list[str]]  # source, object, flags


def objects(folder: Path, python_includes: list[str]) -> list[Unit]:
    """Every translation unit of `_cpu`."""
    units, base = [], [*FLAGS, "-Icsrc/cpu"]
    for source in sorted(CSRC.glob("bindings/*.cpp")):  # which take longest, so they begin first
        units.append((source, folder / f"bindings_{source.stem}.o", base + python_includes))
    for source in sorted(CSRC.glob("cpu/*.cpp")):
        units.append((source, folder / f"{source.stem}.o", base))
    for source in sorted(CSRC.glob("cpu/per_isa/*.cpp")):
        for isa, isa_flags in ISA_FLAGS.items():
            contract = "off" if source.stem in SAME_BITS else "fast"
            flags = [*base, f"-ffp-contract={contract}", f"-DSTELLARATOR_ISA={isa}", *isa_flags]
            units.append((source, folder / f"{source.stem}_{isa}.o", flags))
    return units


def cuda_objects(folder: Path, python_includes: list[str]) -> list[Unit]:
    """Every translation unit of `_cuda`."""
    flags, units = [*FLAGS, "-Icsrc/cuda", *python_includes], []
    for source in sorted(CSRC.glob("bindings/cuda/*.cpp")):
        units.append((source, folder / f"bindings_{source.stem}.o", flags))
    for source in sorted(CSRC.glob("cuda/*.cu")):
        units.append((source, folder / f"{source.stem}.o", CUDA_FLAGS))
    return units


def compile_command(source: Path, output: Path, flags: list[str]) -> list[str]:
    """The compiler call for one translation unit; also writes the list of headers it read."""
    command = [*compiler(), *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    if source.suffix == ".cu":
        command = [*find_nvcc(), *flags]
    return [*command, "-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]


def link_command(inputs: list[Path], output: Path, with_cuda: bool = False) -> list[str]:
    """The linker call; nvcc knows where CUDA's libraries are."""
    if with_cuda:
        shared = ["-shared", "-nodlink", "-cudart=static"]
        return [*find_nvcc(), *shared, *map(str, inputs), "-o", str(output)]
    shared = ["-shared"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    extra = shlex.split(os.environ.get("LDFLAGS", ""))
    libraries = ["-ldl", "-lpthread"] if sys.platform == "linux" else []
    return [*compiler(), *shared, *map(str, inputs), *extra, *libraries, "-o", str(output)]


def compiler() -> list[str]:
    """The C++ compiler as a command."""
    return shlex.split(os.environ.get("CXX", "c++"))


def find_nvcc() -> list[str]:
    """nvcc as a command; empty if there is none."""
    if "NVCC" in os.environ:
        return shlex.split(os.environ["NVCC"])
    folders = [str(Path(os.environ["CUDA_HOME"], "bin"))] if os.environ.get("CUDA_HOME") else []
    found = [shutil.which("nvcc", path=folder) for folder in (*folders, None)]
    return [path for path in found if path][:1]


def find_ninja() -> str | None:
    """Path of ninja: the build requirement's own, else the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    return str(Path(BIN_DIR) / "ninja") if BIN_DIR else shutil.which("ninja")


def ninja_file(units: list[Unit], link: list[str], library: Path) -> str:
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
        f"  cmd = {quote(link)}",
    ]
    return "\n".join(lines) + "\n"


class BuildExtension(build_ext):
    """Compiles csrc/ with one set of flags per file."""

    def run(self) -> None:
        self._forget()
        if not find_nvcc():
            self.extensions = [x for x in self.extensions if not x.name.endswith("_cuda")]
        super().run()

    def _forget(self) -> None:
        """Remove libraries of earlier builds: a build that fails must not pass off an old one."""
        inplace = self.inplace
        for ext in self.extensions:
            for self.inplace in (False, inplace):  # in build/, and beside the sources
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext.name.rpartition("_")[2], Path(self.get_ext_fullpath(ext.name)))
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            # setuptools prints this as one warning, because the extension is optional.
            raise CompileError(
                f"{error}. The package works without it, on torch alone; `stellarator doctor` says "
                "how to build it."
            ) from error

    def _build(self, kind: str, library: Path) -> None:
        """Compile and link `library`, of kind "cpu" or "cuda"."""
        import pybind11

        folder = Path(self.build_temp) / kind
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-isystem{pybind11.get_include()}"]
        includes.append(f"-isystem{sysconfig.get_path('include')}")
        units = (cuda_objects if kind == "cuda" else objects)(folder, includes)
        link = link_command([output for _, output, _ in units], library, kind == "cuda")
        ninja = find_ninja()
        if ninja is not None:
            script = folder / "build.ninja"
            script.write_text(ninja_file(units, link, library))
            subprocess.run([ninja, "-f", str(script), "--quiet"], check=True)
            return
        for source, output, flags in units:
            subprocess.run(compile_command(source, output, flags), check=True)
        subprocess.run(link, check=True)


def extension(kind: str, *patterns: str) -> Extension:
    """One of the two. Its files are listed for the sdist; BuildExtension finds them by folder."""
    files = [path for pattern in patterns for path in sorted(CSRC.glob(pattern))]
    sources = [path.as_posix() for path in files if path.suffix in (".cpp", ".cu")]
    headers = [path.as_posix() for path in files if path.suffix == ".h"]
    return Extension(f"stellarator_kernels._{kind}", sources, depends=headers, optional=True)


setup(
    ext_modules=[
        extension("cpu", "cpu/**/*", "bindings/*"),
        extension("cuda", "cuda/*", "bindings/cuda/*", "bindings/pointer.h"),
    ],
    cmdclass={"build_ext": BuildExtension},
)
