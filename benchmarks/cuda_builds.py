"""The kernels of csrc/cuda compiled for GPUs that are not here, and what the compiler says of them.

defines: ARCHITECTURES, NVCC, sources, kernels, compile_file
"""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
_FLAGS = ["-std=c++17", "-O3", "-fmad=false", f"-I{CUDA}"]  # as setup.py's
_DEFINED = re.compile(r"(\w+)_kernel\(")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill")


def _find_nvcc() -> list[str]:
    """As setup.py finds it: a command, empty if there is none."""
    if "NVCC" in os.environ:
        return shlex.split(os.environ["NVCC"])
    home = os.environ.get("CUDA_HOME")
    folders = [str(Path(home, "bin")), None] if home else [None]
    return [path for f in folders if (path := shutil.which("nvcc", path=f))][:1]


NVCC = _find_nvcc()


def sources() -> list[Path]:
    """The files with kernels."""
    return sorted(CUDA.glob("*.cu"))


def kernels(source: Path) -> list[str]:
    """Names of the kernels of a file, without compiling it."""
    return _DEFINED.findall(source.read_text())


def compile_file(source: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> list[dict]:
    """[{kernel, case, arch, registers, spill_bytes, shared_bytes, ptx}] of each kernel of a file.

    The case holds the arguments of a template, as they are mangled: f is float, t bfloat16.

    Raises:
        OSError, RuntimeError: nvcc cannot be run, or does not know an architecture.
    """
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures]
    with tempfile.TemporaryDirectory() as folder:
        keep = ["--keep", "--keep-dir", folder, "-o", f"{folder}/out.fatbin"]
        command = [*NVCC, *_FLAGS, *targets, "-Xptxas=-v", *keep, "-fatbin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip()[:500] or f"exit code {done.returncode}"
            raise RuntimeError(f"{' '.join(NVCC)} does not compile it: {said}")
        texts = {a: _ptx(Path(folder), source.stem, a) for a in architectures}
    # [what precedes, name, architecture, its lines, name, ...]
    pieces = _ENTRY.split(done.stdout + done.stderr)[1:]
    points = []
    for name, arch, lines in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        kernel, case = re.search(r"\d([a-z_]+)_kernel(?:I(\w+?)EE)?", name).groups()
        shared = re.search(r"(\d+) bytes smem", lines)
        points.append({
            "kernel": kernel,
            "case": case or "",
            "arch": arch,
            "registers": int(re.search(r"Used (\d+) registers", lines).group(1)),
            "spill_bytes": sum(map(int, _SPILLS.findall(lines))),
            "shared_bytes": int(shared.group(1)) if shared else 0,
            "ptx": re.search(rf"\.entry {name}\(.*?^}}", texts[arch], re.S | re.M).group(),
        })  # fmt: skip
    return points


def _ptx(folder: Path, stem: str, arch: str) -> str:
    """The text that nvcc keeps for one architecture."""
    alone = folder / f"{stem}.ptx"
    among = folder / f"{stem}.{arch.replace('sm', 'compute')}.ptx"
    return (alone if alone.exists() else among).read_text()
