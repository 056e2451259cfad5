"""The package as it is installed: metadata, what a wheel holds, builds with and without a compiler.

Builds run in a copy of the sources, without isolation and without the network. Not covered: the
isolated and the editable install, which `make install` itself does before these tests run.
"""

import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {"stellarator": ROOT / "engine", "stellarator_kernels": ROOT / "kernels"}
NVCC = os.environ.get("NVCC", shutil.which("nvcc") or "")
pytestmark = pytest.mark.timeout(900)  # beside other work the compilers take minutes
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def requirement_name(requirement):
    """Name in front of extras, version and marker."""
    for mark in "[<>=!~; ":
        requirement = requirement.split(mark)[0]
    return requirement.lower()


def all_requirements():
    """Every requirement of the package and of its extras."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    return [*project["dependencies"], *(r for extra in extras for r in extra)]


def pins():
    """{name: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_requirements():
    build = [requirement_name(r) for r in PROJECT["build-system"]["requires"]]
    names = [requirement_name(r) for r in all_requirements()]
    assert "torch" not in build, "an isolated build would download torch"
    assert "apex" not in names + build + list(pins()), "apex on PyPI is a web toolkit"
    assert not [r for r in PROJECT["project"]["dependencies"] if "==" in r.split(";")[0]]
    assert sorted(pins()) == sorted({*names, *build}), "constraints.txt pins what is required"
    assert all(version[0].isdigit() for version in pins().values())


def test_floors_are_versions_that_have_what_is_used():
    """`torch.mm(out_dtype=)` and the interpreter's fixes: older ones install and then fail."""
    floors = [r.split(";")[0].split(">=") for r in PROJECT["project"]["dependencies"]]
    floors = {name: tuple(map(int, version.split("."))) for name, version in floors}
    assert floors["torch"] >= (2, 11) and floors["triton"] >= (3, 6)
    for name, floor in floors.items():
        assert tuple(map(int, pins()[name].split(".")))[: len(floor)] >= floor, name


def test_every_folder_with_code_is_a_package():
    """Discovery takes packages only: a folder without __init__.py would be missing from a wheel."""
    for package, container in SOURCES.items():
        folders = {path.parent for path in (container / package).rglob("*.py")}
        assert [f for f in folders if not (f / "__init__.py").exists()] == []


def test_licence_is_complete():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) > 195


def copy_sources(folder):
    """What git would check out of the files that a build reads."""
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("engine", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").write_text("readme\n")
    return folder


def build(folder, *command, **environment):
    """Run setup.py in `folder`, without nvcc unless it is given; returns its output."""
    done = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=folder,
        env=os.environ | {"NVCC": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def installed(wheel, folder):
    """Unpacks a wheel, which for this package is what installing does."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(site, *command, cwd):
    """Run Python with the unpacked wheel in front of everything else."""
    environment = os.environ | {"PYTHONPATH": str(site), "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True
    )


# An editable install of this checkout would lend its extension to the wheel under test.
UPDATE = """
import sys
editable = [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("__editable__")]
sys.meta_path[:] = [f for f in sys.meta_path if f not in editable]
import torch, stellarator_kernels
p, m, v = torch.ones(3), torch.zeros(3), torch.zeros(3)
stellarator_kernels.adamw_([p], [p.clone()], [m], [v], lr=0.5, beta1=0.9, beta2=0.9, eps=0.0,
                           weight_decay=0.0, step=1)
print(stellarator_kernels.__file__, p.tolist(), stellarator_kernels.available()["extension"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built with the compilers, from a copy of the sources with one tuned table added."""
    folder = copy_sources(tmp_path_factory.mktemp("sources"))
    tables = folder / "kernels" / "stellarator_kernels" / "tables"
    tables.mkdir(exist_ok=True)
    (tables / "added.json").write_text("{}")
    build(folder, "-q", "bdist_wheel", NVCC=NVCC)
    return next((folder / "dist").glob("*.whl"))


@needs_compiler
def test_wheel_holds_everything(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = "stellarator-0.1.0.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    code = {
        path.relative_to(container).as_posix()
        for package, container in SOURCES.items()
        for path in (container / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == code
    assert "stellarator_kernels/tables/added.json" in names
    assert [n for n in names if n.startswith("stellarator_kernels/_cpu.") and n.endswith(".so")]
    assert f"{info}/licenses/LICENSE" in names
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "stellarator = stellarator.cli:main" in scripts


@needs_compiler
def test_installed_wheel_runs_from_any_folder(wheel, tmp_path):
    """The checkout is the hard one: its folder `kernels` must not stand for anything."""
    site = installed(wheel, tmp_path / "site")
    done = run(site, "-c", UPDATE, cwd=ROOT)
    file = str(site / "stellarator_kernels" / "__init__.py")
    assert done.stdout.split() == [file, "[0.5,", "0.5,", "0.5]", "True"], done.stderr
    for cwd in (tmp_path, ROOT):
        done = run(site, "-m", "stellarator", "--help", cwd=cwd)
        assert done.returncode == 0 and "doctor" in done.stdout, done.stderr


LOAD_CUDA = """
from stellarator_kernels import extension
module, empty = extension.load("_cuda"), {"n": 0, "stream": 0}
module.sums_of_squares(x=0, is_bfloat16=True, weight=1.0, sums=0, **empty)  # starts nothing
print(extension.failure("_cuda"), module.__file__)
"""


@needs_compiler
@pytest.mark.skipif(not NVCC, reason="no nvcc")
def test_cuda_kernels_in_the_wheel(wheel, tmp_path):
    """They load where there is no GPU, with machine code of each GPU and text for newer ones."""
    site = installed(wheel, tmp_path / "site")
    done = run(site, "-c", LOAD_CUDA, cwd=tmp_path)
    reason, file = done.stdout.split() if done.stdout else (done.stderr, "")
    assert reason == "None" and Path(file).parent == site / "stellarator_kernels"
    needed = subprocess.run(["ldd", file], capture_output=True, text=True).stdout
    assert "libcudart" not in needed and "not found" not in needed
    (tool,) = Path(sysconfig.get_path("purelib")).glob("triton/backends/nvidia/bin/cuobjdump")
    lists = [
        subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout
        for flag in ("-lelf", "-lptx")
    ]
    cubins, texts = (re.findall(r"\.(sm_\w+)\.", listed) for listed in lists)
    sources = list((ROOT / "csrc" / "cuda").glob("*.cu"))
    assert sorted(cubins) == sorted(["sm_80", "sm_90a", "sm_100"] * len(sources))
    assert texts == ["sm_100"] * len(sources)


def test_nvcc_that_fails_costs_the_cuda_kernels_only(tmp_path):
    """And nothing else: no compiler at all leaves two warnings, one for each extension."""
    folder = copy_sources(tmp_path)
    nothing = {"CXX": "/bin/false", "CC": "/bin/false"}
    output = build(folder, "build_ext", "--inplace", NVCC="/bin/false", **nothing)
    assert output.count("The package works without it") == 2
    assert "_cuda" not in build(folder, "build_ext", "--inplace", **nothing)


ISA = ("portable", "avx2", "avx512_bf16", "avx512", "amx")


@needs_compiler
def test_baseline_code_has_no_wide_instructions(wheel):
    """What runs on any x86-64 is not compiled with AVX: only files named for a level are."""
    objdump = shutil.which("objdump")
    if objdump is None or os.uname().machine != "x86_64":
        pytest.skip("needs objdump on x86-64")
    objects = sorted((wheel.parents[1] / "build").rglob("*.o"))
    names = {f"{kernel}_{level}.o" for kernel in ("adamw", "attention") for level in ISA}
    assert {"adamw.o", "attention.o", *names} <= {path.name for path in objects}
    for path in objects:
        assembly = subprocess.run([objdump, "-d", path], capture_output=True, text=True).stdout
        level = next((x for x in ISA if path.stem.endswith(f"_{x}")), "")
        wide = "%ymm" in assembly or "%zmm" in assembly
        assert wide == (level not in ("", "portable")), path.name
        assert ("%zmm" in assembly) == level.startswith(("avx512", "amx")), path.name
        multiplies = path.stem in ("attention_amx", "weight_gradient_amx")
        assert ("tdpbf16ps" in assembly) == multiplies, path.name
        symbols = subprocess.run([objdump, "-t", path], capture_output=True, text=True).stdout
        # A function that other objects define too: the linker takes any of them for all.
        weak = [x for x in symbols.splitlines() if x[17:18] == "w" and "*UND*" not in x]
        assert not level or not weak, (path.name, weak)


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_a_broken_compiler_does_not_fail_the_build(tmp_path, compiler):
    folder = copy_sources(tmp_path)
    output = build(folder, "build_ext", "--inplace", CXX=compiler, CC=compiler)
    warnings = [line for line in output.splitlines() if "The package works without it" in line]
    assert len(warnings) == 1 and "`stellarator doctor`" in warnings[0], output
    assert not list(folder.rglob("*.so"))


@pytest.mark.parametrize("command", [["bdist_wheel"], ["build_ext", "--inplace"]])
def test_a_failed_build_does_not_pass_off_an_old_library(tmp_path, command):
    """It would be of other sources, and `stellarator doctor` would say that it was built."""
    folder = copy_sources(tmp_path)
    name = f"stellarator_kernels/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    built = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = [folder / "build" / built / name, folder / "kernels" / name]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    build(folder, "-q", *command, CXX="/bin/false", CC="/bin/false")
    assert [path.exists() for path in stale] == [False, "build_ext" not in command]
    for wheel in folder.glob("dist/*.whl"):
        assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_a_wheel_without_the_extension_works(tmp_path):
    folder = copy_sources(tmp_path / "sources")
    build(folder, "-q", "bdist_wheel", CXX="/bin/false", CC="/bin/false")
    site = installed(next((folder / "dist").glob("*.whl")), tmp_path / "site")
    done = run(site, "-c", UPDATE, cwd=tmp_path)
    assert done.stdout.endswith("[0.5, 0.5, 0.5] False\n"), done.stderr


@needs_compiler
def test_without_ninja_the_same_commands_run(tmp_path):
    """Only the plan is compared: compiling everything a second time would take long."""
    code = """
import sys
sys.modules["setuptools"].setup = lambda **options: None
source = open("setup.py").read()
space = {"__name__": "setup"}
exec(compile(source, "setup.py", "exec"), space)
units = space["objects"](space["Path"]("out"), ["-Ipython"])
units += space["cuda_objects"](space["Path"]("out/cuda"), ["-Ipython"])
link = space["link_command"]([u[1] for u in units], space["Path"]("lib.so"))
script = space["ninja_file"](units, link, space["Path"]("lib.so"))
for unit in units:
    command = space["shlex"].join(space["compile_command"](*unit))
    assert script.count(f"  cmd = {command}\\n") == 1, command
assert space["shlex"].join(link) in script
print(len(units))
"""
    done = subprocess.run(
        [sys.executable, "-c", "import setuptools" + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3


def test_make_demo_takes_paths_with_spaces():
    command = ["make", "-n", "--no-print-directory", "demo"]
    command += ["DATA='my code' other", "OUTPUT=runs/my code"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[1:] == ["demo", "my code", "other", "--output", "runs/my code"], done.stdout


def test_make_install_builds_with_the_pinned_versions():
    """The build environment is gone; the version of setuptools is what it left."""
    if Path(sys.prefix).resolve() != ROOT / ".venv":
        pytest.skip("runs in what `make install` made")
    (wheel,) = Path(sysconfig.get_path("purelib")).glob("stellarator-*.dist-info/WHEEL")
    generator = f"Generator: setuptools ({pins()['setuptools']})"
    assert generator in wheel.read_text().splitlines()
