"""`stellarator doctor` on this machine, without the extension, and beside faked other machines.

The independent check is what torch, the process and the files say. Not covered: a real GPU.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from stellarator import doctor
from stellarator_kernels import extension

CONTAINERS = [str(Path(__file__).resolve().parents[1] / name) for name in ("engine", "kernels")]
OPS = ("adamw_", "bias_gelu", "cross_entropy", "decode_attention", "flash_attention", "grad_norm")
OPS += ("add_weight_gradient_", "embedding", "layer_norm", "linear", "linear_cross_entropy", "mlp")
OPS += ("rope", "swiglu", "cross_entropy_statistics", "linear_cross_entropy_statistics")
OPS += ("bias_rope", "rms_norm", "dropout")
KERNELS = {"C++ extension", "CUDA extension", "What each op"}  # sections
without = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def section(text, title):
    """Lines below a title."""
    body = text.split(f"{title}", 1)[1].split("\n\n")[0]
    return body.strip("\n")


def chosen(text):
    """{op: implementation} of the lines with an arrow, for bfloat16."""
    return dict(
        re.findall(
            r"^  (\w+) of bfloat16.*?\n(?:    +\w+: [^\n]*\n|     [^\n]*\n)*?"
            r"    -> (\w+)$",
            text,
            re.MULTILINE,
        )
    )


@pytest.fixture(scope="module")
def text():
    return doctor.report()


def test_report_names_machine_and_versions(text):
    assert re.search(rf"^  cores +{os.cpu_count()}, \d+ usable$", text, re.MULTILINE)
    assert f"{torch.__version__}" in section(text, "Packages")
    assert sys.executable in text
    for name in ("numpy", "safetensors", "pyarrow"):
        version = re.escape(importlib.metadata.version(name))
        assert re.search(rf"^  {name} +{version}$", text, re.MULTILINE)


def test_main_prints_the_report(capsys):
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.startswith("Machine\n")


def test_every_op_is_explained(text):
    """On this device the C++ kernels are chosen if they are built."""
    choices = chosen(text)
    assert sorted(choices) == sorted(OPS)
    if not torch.cuda.is_available():
        expected = "cpu" if extension.failure() is None else "torch"
        assert choices["adamw_"] == choices["grad_norm"] == expected
        assert choices["layer_norm"] == expected and choices["embedding"] == "torch"


@pytest.mark.skipif(extension.failure() is not None, reason="no C++ extension")
def test_with_the_extension(text, monkeypatch):
    lines = section(text, "C++ extension")
    best = extension.load().best_isa().name
    assert "NOT BUILT" not in lines
    assert re.search(rf"instruction set +{extension.isa().name} \(best here: {best}\)", lines)
    monkeypatch.setenv("STELLARATOR_ISA", "portable")
    assert f"portable (best here: {best})" in doctor.report()
    monkeypatch.setenv("STELLARATOR_ISA", "nonsense")
    assert "expected STELLARATOR_ISA in" in doctor.report()


def test_cuda_extension(tmp_path, monkeypatch):
    """Whether it is built depends on the machine, so both are made."""
    missing = "No module named 'stellarator_kernels._cuda'"
    monkeypatch.setattr(extension, "failure", lambda name="_cpu": missing)
    lines = doctor._cuda_extension()
    assert lines[0].endswith(f"NOT BUILT: {missing}")
    assert lines[-1].endswith(f"{sys.executable} setup.py build_ext --inplace")
    (tmp_path / "_cuda.so").touch()
    module = types.SimpleNamespace(__file__=str(tmp_path / "_cuda.so"))
    monkeypatch.setattr(extension, "failure", lambda name="_cpu": None)
    monkeypatch.setattr(extension, "load", lambda name: module)
    assert [line.split()[1] for line in doctor._cuda_extension()] == ["built;"]
    os.utime(module.__file__, (500, 500))
    assert doctor._cuda_extension()[1].startswith("OLDER than its sources.")


def test_without_the_extension():
    """In a process where the module cannot be imported: it is said, and the ops still run."""
    code = """
import sys
sys.modules["stellarator_kernels._cpu"] = None
from stellarator import doctor
print(doctor.report())
import stellarator_kernels, torch
p, m, v = torch.ones(3), torch.zeros(3), torch.zeros(3)
stellarator_kernels.adamw_([p], [p.clone()], [m], [v], lr=0.5, beta1=0.9, beta2=0.9, eps=0.0,
                           weight_decay=0.0, step=1)
print("updated", p.tolist())
try:
    stellarator_kernels.grad_norm([p], impl="cpu")
except RuntimeError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(CONTAINERS), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = section(done.stdout, "C++ extension")
    assert "NOT BUILT: " in lines
    assert f"{sys.executable} setup.py build_ext --inplace" in lines
    if not torch.cuda.is_available():
        assert chosen(done.stdout)["adamw_"] == "torch"
        assert "the C++ extension does not load: import of stellarator_kernels._cpu" in done.stdout
    assert "updated [0.5, 0.5, 0.5]" in done.stdout
    assert "grad_norm: impl='cpu' cannot run: the C++ extension does not load" in done.stdout


@pytest.mark.parametrize(
    ("module", "error", "sections"),
    [
        (
            "torch",
            "OSError: libcudart.so: cannot open",
            {"GPU", *KERNELS},
        ),
        ("triton", "RuntimeError: two lines", set()),  # everything but its kernels still runs
        (
            "stellarator_kernels",
            "NameError: x",
            KERNELS,
        ),
    ],
)
def test_a_broken_package_costs_its_sections_one_line_each(tmp_path, module, error, sections):
    """The report is read when an install is broken: the sound sections must still be there."""
    folder = tmp_path / module
    folder.mkdir()
    name, words = error.split(": ", 1)
    (folder / "__init__.py").write_text(f"raise {name}({words!r} + chr(10) + 'and more')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *CONTAINERS])}
    done = subprocess.run(
        [sys.executable, "-c", "from stellarator import doctor; doctor.main()"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    blocks = [block.splitlines() for block in done.stdout.split("\n\n")]
    assert len(blocks) == 10
    for title, *lines in blocks:
        if any(title.startswith(known) for known in sections):
            assert lines == [f"  FAILED: {error} and more"]
        else:
            assert lines and not any("FAILED" in line for line in lines)
    if module == "triton":
        assert f"triton cannot be imported: {error}" in done.stdout


def test_stale_extension(tmp_path):
    """A source newer than the library is noticed."""
    library, source = tmp_path / "_cpu.so", tmp_path / "adamw.cpp"
    for path in (library, source):
        path.touch()
    os.utime(source, (1000, 1000))
    assert not doctor._is_older(library, tmp_path)
    os.utime(library, (500, 500))
    assert doctor._is_older(library, tmp_path)


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    text = doctor.report()
    assert "/no/such/compiler does not run; on Debian and Ubuntu: apt install g++" in text


@without
def test_gpu_section_gives_the_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is a CPU build" in section(doctor.report(), "GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0 but finds no working driver" in section(doctor.report(), "GPU")


def test_gpu_section_lists_gpus(monkeypatch):
    gpu = types.SimpleNamespace(name="Tesla V100", major=7, minor=0, total_memory=32 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert "Tesla V100, capability 7.0, 32 GiB; too old, 8.0 is needed" in "\n".join(doctor._gpu())


@pytest.mark.parametrize(
    "version, built, expected",
    [
        (None, False, "not installed; it is never needed"),
        ("0.9.10.dev0", False, "WARNING: the package apex 0.9.10.dev0 of PyPI is a web toolkit"),
        ("0.1", False, "0.1 without its CUDA kernels"),
        ("0.1", True, "built with its CUDA kernels"),
    ],
)
def test_apex(monkeypatch, version, built, expected):
    find = importlib.util.find_spec
    spec = importlib.util.spec_from_loader("amp_C", loader=None) if built else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "amp_C" else find(name)
    )
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "apex" else None)
    assert expected in "\n".join(doctor._apex())


def test_environment(monkeypatch):
    monkeypatch.setenv("STELLARATOR_ISA", "avx2")
    monkeypatch.setenv("STELLARATOR_IAS", "avx2")
    monkeypatch.delenv("CXX", raising=False)
    lines = "\n".join(doctor._environment())
    assert re.search("^STELLARATOR_ISA +avx2$", lines, re.MULTILINE)
    assert re.search("^STELLARATOR_IAS +set, but nothing reads it$", lines, re.MULTILINE)
    assert re.search("^CXX +not set", lines, re.MULTILINE)


def test_torchrun_knows_the_option():
    """The line for batch systems is one that this torch accepts."""
    from torch.distributed.run import get_args_parser

    assert "--signals-to-handle" in get_args_parser().format_help()
    assert "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in doctor.report()
