"""`stellarator doctor`: machine, versions, what is built, what each op runs, what to do.

defines: report, main

Each section is made on its own: one that fails, say over a broken torch, says so in one line.
Made to be pasted into an issue: no secrets, no paths but those of the interpreter and the package.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pyarrow", "zstandard")
_PACKAGES += ("matplotlib", "tensorboard", "transformers")
_VARIABLES = {
    "STELLARATOR_ISA": "instruction set of the C++ kernels: portable to amx",
    "STELLARATOR_ARENA": "0: large results of a CPU come from torch's own allocator",
    "STELLARATOR_TABLES": "folder of tuned launch configurations, instead of those shipped",
    "STELLARATOR_TRACEBACK": "1 shows the traceback of an error",
    "TRITON_INTERPRET": "1 runs Triton kernels on the CPU, slowly",
    "TRITON_CACHE_DIR": "where compiled Triton kernels are kept",
    "CUDA_VISIBLE_DEVICES": "which GPUs are seen",
    "OMP_NUM_THREADS": "threads of one process on the CPU",
    "PYTORCH_ALLOC_CONF": "allocator of torch",
    "CXX": "C++ compiler of the build",
    "CXXFLAGS": "more flags for it",
    "NVCC": "CUDA's compiler of the build; empty: no CUDA kernels",
    "CUDA_HOME": "folder with bin/nvcc, before the one on PATH",
}
_WIDTH = 128  # of a head, for which ops with limits are asked
_TORCHRUN = (
    "torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --nproc-per-node N "
    "-m stellarator.train ..."
)


def main(argv: Sequence[str] = ()) -> int:
    """Print the report; always 0, because a missing part is no error."""
    print(report())
    return 0


def report() -> str:
    """The whole report as text, one section after another."""
    sections = {
        "Machine": _machine,
        "Packages": _packages,
        "GPU": _gpu,
        "Compilers": _compilers,
        "C++ extension": _extension,
        "CUDA extension": _cuda_extension,
        "What each op runs (-> is chosen by impl='auto')": _implementations,
        "Environment": _environment,
        "NVIDIA apex": _apex,
        "Signals": _signals,
    }
    blocks = [
        "\n".join([title, *(f"  {line}" for line in _lines(section))])
        for title, section in sections.items()
    ]
    return "\n\n".join(blocks)


def _lines(section: Callable[[], list[str]]) -> list[str]:
    """What a section says, or its error: a broken install is what this report is read for."""
    try:
        return section()
    except Exception as error:
        return [f"FAILED: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"]


def _row(label: str, value: object) -> str:
    """Label and value in two columns."""
    return f"{label:<26}{value}"


def _machine() -> list[str]:
    """Processor, cores, memory, system."""
    cores = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    processor = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    memory = [_field("/proc/meminfo", name) for name in ("MemTotal", "MemAvailable")]
    lines = [_row("processor", processor), _row("cores", f"{cores}, {usable} usable")]
    if all(memory):
        total, free = (int(value.split()[0]) / 2**20 for value in memory)
        lines.append(_row("memory", f"{total:.1f} GiB, {free:.1f} GiB available"))
    lines.append(_row("system", f"{platform.system()} {platform.release()} {platform.machine()}"))
    return lines


def _field(path: str, name: str) -> str | None:
    """Value of the first `name: value` line of a file under /proc."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return None
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)


def _version(package: str) -> str | None:
    """Installed version of a distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[str]:
    """Python and the packages that matter."""
    here = _version("stellarator") or "not installed, runs from its source folder"
    lines = [_row("python", f"{platform.python_version()} at {sys.executable}")]
    lines.append(_row("stellarator", f"{here}, at {Path(__file__).parent}"))
    return lines + [_row(name, _version(name) or "not installed") for name in _PACKAGES]


def _gpu() -> list[str]:
    """Each GPU that torch sees, or why it sees none."""
    import torch

    if torch.version.cuda is None:
        return ["none: this torch is a CPU build; pytorch.org/get-started has the CUDA builds"]
    if not torch.cuda.is_available():
        return [f"none: torch is built for CUDA {torch.version.cuda} but finds no working driver"]
    driver = _field("/proc/driver/nvidia/version", "NVRM version") or "unknown"
    lines = [_row("driver", driver), _row("CUDA of torch", torch.version.cuda)]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        if (gpu.major, gpu.minor) < (8, 0):
            text += "; too old, 8.0 is needed"
        lines.append(_row(f"cuda:{index}", text))
    return lines


def _first_line(command: list[str]) -> str | None:
    """First line that a program prints, or None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [""])[0]


def _compilers() -> list[str]:
    """C++, ninja and nvcc."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = _first_line([*compiler, "--version"])
    missing = f"{shlex.join(compiler)} does not run; on Debian and Ubuntu: apt install g++"
    lines = [_row("C++", found or missing)]
    has_ninja = shutil.which("ninja") or importlib.util.find_spec("ninja")
    lines.append(_row("ninja", "found" if has_ninja else "not found; files compile one by one"))
    nvcc = shutil.which("nvcc")
    lines.append(_row("nvcc", nvcc or "not found on PATH; only the CUDA extension needs it"))
    return lines


def _checkout() -> Path | None:
    """The checkout that the kernels run from; None if they are installed."""
    from stellarator_kernels import extension

    root = Path(extension.__file__).resolve().parents[2]
    return root if (root / "setup.py").is_file() else None


def _build_command() -> str:
    """What builds the extensions."""
    python, root = shlex.quote(sys.executable), _checkout()
    if root is not None:
        return f"cd {shlex.quote(str(root))} && {python} setup.py build_ext --inplace"
    words = "-m pip install -v --force-reinstall --no-deps PATH   (PATH: the source folder)"
    return f"{python} {words}"


def _extension() -> list[str]:
    """State of stellarator_kernels._cpu and the command that repairs it."""
    import torch

    from stellarator_kernels import extension
    from stellarator_kernels.widened import widens

    reason = extension.failure()
    if reason is not None:
        return [
            _row("stellarator_kernels._cpu", f"NOT BUILT: {reason}"),
            "The package works without it, on torch alone. To build it, have a C++17 compiler and",
            f"pybind11 (pip install pybind11 ninja), then: {_build_command()}",
        ]
    module = extension.load()
    try:
        isa = extension.isa().name
        wide = widens(torch.bfloat16, torch.device("cpu"))
        products = "in fp32: no instructions for them" if wide else "as they are"
    except (ValueError, RuntimeError) as error:
        isa, products = str(error), "see above"
    lines = [
        _row("stellarator_kernels._cpu", "built"),
        _row("instruction set", f"{isa} (best here: {module.best_isa().name})"),
        _row("products of bf16", products),
        _row("threads", f"of {module.threads_of()}"),
    ]
    return lines + _stale(module, "cpu", "cpu/per_isa", "bindings")


def _cuda_extension() -> list[str]:
    """State of stellarator_kernels._cuda and the command that repairs it."""
    from stellarator_kernels import extension

    reason = extension.failure("_cuda")
    if reason is not None:
        return [
            _row("stellarator_kernels._cuda", f"NOT BUILT: {reason}"),
            "GPUs run Triton's kernels; this is for impl='cuda' alone. To build it, have nvcc",
            f"(NVCC, CUDA_HOME or on PATH) beside what the C++ needs, then: {_build_command()}",
        ]
    lines = [_row("stellarator_kernels._cuda", "built; runs where impl='cuda' asks for it")]
    return lines + _stale(extension.load("_cuda"), "cuda", "bindings/cuda")


def _stale(module, *folders: str) -> list[str]:
    """A line if the extension is older than its sources, which only a checkout has."""
    root = _checkout()
    if root is None or not _is_older(Path(module.__file__), *(root / "csrc" / f for f in folders)):
        return []
    return [f"OLDER than its sources. Build it again: {_build_command()}"]


def _is_older(built: Path, *folders: Path) -> bool:
    """Some source in the folders is newer than the file `built`."""
    sources = (p for f in folders for p in f.glob("*") if p.suffix in (".cpp", ".cu", ".h"))
    return max((p.stat().st_mtime for p in sources), default=0.0) > built.stat().st_mtime


def _implementations() -> list[str]:
    """What `explain` says of every op on the device of a run, for the two training dtypes."""
    import torch

    from stellarator_kernels import dispatch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = []
    for op in sorted(dispatch.ops()):
        answers = {
            str(dtype).removeprefix("torch."): dispatch.describe(
                op, dispatch.facts(op, torch.empty((0, _WIDTH), device=device, dtype=dtype))
            )
            for dtype in (torch.bfloat16, torch.float32)
        }
        if len(set(answers.values())) == 1:
            answers = {" and ".join(answers): next(iter(answers.values()))}
        for dtypes, answer in answers.items():
            lines.append(f"{op} of {dtypes} on {device}")
            lines += [f"  {line.replace(f'{op}: ', '')}" for line in answer.splitlines()]
    return lines


def _environment() -> list[str]:
    """Variables that change what happens, and those of our prefix that nobody reads."""
    lines = [
        _row(name, os.environ[name] if name in os.environ else f"not set ({meaning})")
        for name, meaning in _VARIABLES.items()
    ]
    unknown = [n for n in os.environ if n.startswith("STELLARATOR_") and n not in _VARIABLES]
    return lines + [_row(name, "set, but nothing reads it") for name in sorted(unknown)]


def _apex() -> list[str]:
    """Whether NVIDIA's apex is there (a peer in benchmarks), and the other package of that name."""
    version = _version("apex")
    if importlib.util.find_spec("amp_C") is not None:
        return ["built with its CUDA kernels: benchmarks can compare with it"]
    if version is not None and version.startswith("0.9."):
        return [
            f"WARNING: the package apex {version} of PyPI is a web toolkit, not NVIDIA's.",
            "Remove it: pip uninstall apex. NVIDIA's is built from github.com/NVIDIA/apex.",
        ]
    if version is not None:
        return [f"{version} without its CUDA kernels (amp_C): not used"]
    return ["not installed; it is never needed, only compared with"]


def _signals() -> list[str]:
    """How to start torchrun under a batch system."""
    return [
        "Under torchrun a batch system's SIGUSR1 kills torchrun and leaves its workers behind.",
        f"Start it so: {_TORCHRUN}",
    ]
