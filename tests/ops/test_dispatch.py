"""Which implementation is chosen, and the reasons given for the others.

The independent reference is the order written in the documentation, spelled out here as tables.
Choices are asked with `Facts` of machines that are not there; broken installs of Triton and of the
C++ extension are made in processes of their own. Not covered: a real GPU.
"""

import os
import subprocess
import sys
import sysconfig

import pytest
import torch

from stellarator_kernels import available, dispatch, explain, flash_attention
from stellarator_kernels.dispatch import Facts, choose

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BROKEN = "ImportError: no such symbol"


@pytest.mark.parametrize(
    ("op", "given", "expected"),
    [
        ("layer_norm", Facts("cuda", BF16, (9, 0)), "triton"),
        ("layer_norm", Facts("cuda", BF16, (7, 0)), "torch"),
        ("layer_norm", Facts("cuda", FP64, (9, 0)), "torch"),
        ("layer_norm", Facts("cuda", BF16, (9, 0), no_triton=BROKEN), "torch"),
        ("layer_norm", Facts("cuda", BF16, (9, 0), note="too wide"), "torch"),
        ("layer_norm", Facts("cpu", BF16), "torch"),
        ("layer_norm", Facts("cpu", BF16, interpreter=True), "torch"),
        ("adamw_", Facts("cuda", FP32, (8, 0)), "triton"),
        ("adamw_", Facts("cpu", FP32), "cpu"),
        ("adamw_", Facts("cpu", FP64), "torch"),
        ("adamw_", Facts("cpu", FP32, no_extension=BROKEN), "torch"),
        # Interpreted, a step of a model takes hours; on a GPU's tensors just as on a CPU's.
        ("adamw_", Facts("cuda", FP32, (9, 0), interpreter=True), "torch"),
        ("layer_norm", Facts("cuda", BF16, (9, 0), interpreter=True), "torch"),
        ("decode_attention", Facts("cuda", BF16, (9, 0)), "torch"),
    ],
)
def test_auto(op, given, expected):
    assert choose(op, "auto", given) == expected
    assert f"-> {op}: {expected}" in explain(op, given).splitlines()


@pytest.mark.parametrize(
    ("op", "impl", "given", "reason"),
    [
        ("rope", "cpu", Facts("cpu", FP32), "there is no cpu implementation of rope"),
        ("rope", "triton", Facts("cpu", FP32), "on the CPU and TRITON_INTERPRET is not 1"),
        ("rope", "triton", Facts("cuda", FP64, (9, 0)), "16 and 32-bit floats, not torch.float64"),
        ("rope", "triton", Facts("cuda", FP32, (7, 5)), r"capability \(7, 5\), 8.0 is needed"),
        ("rope", "triton", Facts("xpu", FP32), "the tensors are on xpu"),
        ("rope", "triton", Facts("cuda", FP32, (9, 0), no_triton=BROKEN), BROKEN),
        ("adamw_", "cpu", Facts("cpu", FP32, no_extension=BROKEN), BROKEN),
        ("adamw_", "cpu", Facts("cuda", FP32, (9, 0)), "the tensors are on cuda"),
        ("adamw_", "cpu", Facts("cpu", FP64), "written for float32 and bfloat16"),
    ],
)
def test_an_explicit_choice_that_cannot_run_raises_with_the_reason(op, impl, given, reason):
    with pytest.raises(RuntimeError, match=f"^{op}: impl='{impl}' cannot run: .*{reason}"):
        choose(op, impl, given)
    assert any(
        line.startswith(f"   {op}: {impl}: ") or impl not in dispatch._OPS[op]
        for line in explain(op, given).splitlines()
    )


def test_the_interpreter_runs_only_when_asked_for():
    for given in (Facts("cpu", FP32, interpreter=True), Facts("cuda", FP32, (9, 0), None, True)):
        assert choose("rope", "triton", given) == "triton"
        assert "rope: triton: TRITON_INTERPRET is 1" in explain("rope", given)
        assert "-> rope: triton" in explain("rope", given, impl="triton")


def test_unknown_names():
    with pytest.raises(ValueError, match="^rope: expected impl in .*got 'cuda'"):
        choose("rope", "cuda", Facts("cpu", FP32))
    with pytest.raises(ValueError, match="^explain: expected an op of .*got 'softmax'"):
        explain("softmax", Facts("cpu", FP32))


@pytest.mark.parametrize(
    ("op", "shape", "reason"),
    [
        ("flash_attention", (1, 4, 2, 8), "the head width is 8, not a multiple of 8 from 16 to"),
        ("flash_attention", (1, 4, 2, 20), "the head width is 20, not a multiple"),
        ("flash_attention", (1, 4, 2, 264), "the head width is 264, not a multiple"),
        ("layer_norm", (2, 8193), "the kernels take rows of at most 8192 elements, not 8193"),
    ],
)
def test_explain_knows_the_limits_of_the_kernels(op, shape, reason):
    lines = explain(op, torch.empty(shape)).splitlines()
    assert f"-> {op}: torch" in lines
    assert any(line.startswith(f"   {op}: triton: {reason}") for line in lines)


@pytest.mark.interpret
@pytest.mark.parametrize("D", [8, 16, 20, 256, 264])
def test_explain_and_the_op_agree(D):
    """What `explain` refuses the op refuses, with the same words."""
    q = torch.zeros(1, 2, 1, D)
    line = next(x for x in explain("flash_attention", q).splitlines() if ": triton: " in x)
    reason = line.split(": triton: ")[1]
    if D in (16, 256):
        assert reason.startswith("TRITON_INTERPRET is 1")
        assert torch.equal(flash_attention(q, q, q, impl="triton"), q)
    else:
        with pytest.raises(RuntimeError) as caught:
            flash_attention(q, q, q, impl="triton")
        assert reason in str(caught.value)


def run(code, **environment):
    """Standard output of Python code in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_extension_that_does_not_load_is_left_out(tmp_path):
    """A file is there, cut short as by a full disk: `auto` runs on torch, `cpu` says why not."""
    (tmp_path / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"\x7fELF")
    out = run(f"""
import torch, stellarator_kernels as kernels
kernels.__path__.insert(0, {str(tmp_path)!r})
print("available", kernels.available()["extension"])
print(kernels.grad_norm([torch.full((4,), 2.0)]).item())
print(kernels.explain("grad_norm", torch.ones(4)))
try:
    kernels.grad_norm([torch.ones(4)], impl="cpu")
except RuntimeError as error:
    print("refused", error)
""")
    lines = out.splitlines()
    assert lines[:2] == ["available False", "4.0"]
    assert "-> grad_norm: torch" in lines
    assert str(tmp_path) in lines[-1], "the reason is the loader's"
    assert lines[-1].startswith("refused grad_norm: impl='cpu' cannot run: the C++ extension does")


@pytest.mark.parametrize("error", ["ImportError('no libtriton')", "OSError('wrong libc')"])
def test_a_triton_that_does_not_import_is_left_out(tmp_path, error):
    folder = tmp_path / "triton"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"raise {error}\n")
    out = run(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, stellarator_kernels as kernels
from stellarator_kernels.dispatch import facts
print(kernels.available()["triton"], facts("rope", torch.ones(1)).no_triton)
if {error.startswith("ImportError")}:  # with the other one torch's own operators do not run
    assert kernels.layer_norm(torch.ones(1, 4), torch.ones(4), None).tolist() == [[0.0] * 4]
""")
    name, words = error[:-2].split("('")
    assert out.splitlines() == [f"False {name}: {words}"]


def test_available_says_what_can_be_used():
    have = available()
    assert set(have) == {"triton", "interpreter", "extension", "cuda"}
    assert have["cuda"] == torch.cuda.is_available()
    assert have["interpreter"] == (os.environ["TRITON_INTERPRET"] == "1")
