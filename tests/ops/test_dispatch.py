"""Which implementation is chosen, and the reasons given for the others.

The independent reference is the order written in the documentation, spelled out here as tables.
Choices are asked with `Facts` of machines that are not there; broken installs of Triton and of the
C++ extension are made in processes of their own. Not covered: a real GPU.
"""

import dataclasses
import os
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

import stellarator_kernels
from stellarator_kernels import available, dispatch, explain, flash_attention, tuned
from stellarator_kernels.dispatch import Facts, choose, describe, facts

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BROKEN = "ImportError: no such symbol"


@pytest.mark.parametrize(
    ("op", "given", "expected"),
    [
        ("layer_norm", Facts("cuda", BF16, (9, 0)), "triton"),
        ("layer_norm", Facts("cuda", BF16, (7, 0)), "torch"),
        ("layer_norm", Facts("cuda", FP64, (9, 0)), "torch"),
        ("layer_norm", Facts("cuda", BF16, (9, 0), no_triton=BROKEN), "torch"),
        ("layer_norm", Facts("cuda", BF16, (9, 0), limits=(("triton", "too wide"),)), "torch"),
        ("layer_norm", Facts("cpu", BF16), "cpu"),
        ("layer_norm", Facts("cpu", BF16, interpreter=True), "cpu"),
        ("adamw_", Facts("cuda", FP32, (8, 0)), "triton"),
        ("adamw_", Facts("cpu", FP32), "cpu"),
        ("adamw_", Facts("cpu", FP64), "torch"),
        ("adamw_", Facts("cpu", FP32, no_extension=BROKEN), "torch"),
        # Interpreted, a step of a model takes hours; on a GPU's tensors just as on a CPU's.
        ("adamw_", Facts("cuda", FP32, (9, 0), interpreter=True), "torch"),
        ("layer_norm", Facts("cuda", BF16, (9, 0), interpreter=True), "torch"),
        ("decode_attention", Facts("cuda", BF16, (9, 0)), "triton"),
        ("decode_attention", Facts("cpu", BF16), "torch"),
    ],
)
def test_auto(op, given, expected):
    assert choose(op, "auto", given) == expected
    assert f"-> {op}: {expected}" in describe(op, given).splitlines()


@pytest.mark.parametrize(
    ("op", "impl", "given", "reason"),
    [
        ("embedding", "cpu", Facts("cpu", FP32), "there is no cpu implementation of embedding"),
        ("rope", "triton", Facts("cpu", FP32), "on the CPU and TRITON_INTERPRET is not 1"),
        ("rope", "triton", Facts("cuda", FP64, (9, 0)), "16 and 32-bit floats, not torch.float64"),
        ("rope", "triton", Facts("cuda", FP32, (7, 5)), r"capability \(7, 5\), 8.0 is needed"),
        ("rope", "triton", Facts("xpu", FP32), "the tensors are on xpu"),
        ("rope", "triton", Facts("cuda", FP32, (9, 0), no_triton=BROKEN), BROKEN),
        ("adamw_", "cpu", Facts("cpu", FP32, no_extension=BROKEN), BROKEN),
        ("adamw_", "cpu", Facts("cuda", FP32, (9, 0)), "the tensors are on cuda"),
        ("adamw_", "cpu", Facts("cpu", FP64), "written for float32 and bfloat16"),
        ("rope", "cuda", Facts("cuda", FP32, (9, 0)), "there is no cuda implementation of rope"),
        ("adamw_", "cuda", Facts("cpu", FP32), "the tensors are on cpu"),
        ("adamw_", "cuda", Facts("cuda", FP64, (9, 0)), "written for float32 and bfloat16"),
        ("grad_norm", "cuda", Facts("cuda", torch.float16, (9, 0)), "not torch.float16"),
        ("grad_norm", "cuda", Facts("cuda", FP32, (7, 5)), r"capability \(7, 5\), 8.0 is needed"),
        (
            "grad_norm",
            "cuda",
            Facts("cuda", FP32, (9, 0), no_cuda_extension=BROKEN),
            f"the CUDA extension does not load: {BROKEN} \\(`stellarator doctor`\\)",
        ),
    ],
)
def test_an_explicit_choice_that_cannot_run_raises_with_the_reason(op, impl, given, reason):
    with pytest.raises(RuntimeError, match=f"^{op}: impl='{impl}' cannot run: .*{reason}"):
        choose(op, impl, given)
    assert any(
        line.startswith(f"   {op}: {impl}: ") or impl not in dispatch._OPS[op]
        for line in describe(op, given).splitlines()
    )


@pytest.mark.parametrize("op", ["flash_attention", "decode_attention"])
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_attention_on_gpus_that_are_too_old(op, capability):
    given = Facts("cuda", torch.float16, capability)
    reason = f"the GPU has compute capability {capability}, 8.0 is needed"
    assert choose(op, "auto", given) == "torch"
    lines = describe(op, given).splitlines()
    assert any(line.startswith(f"   {op}: triton: {reason}") for line in lines), lines
    with pytest.raises(RuntimeError) as caught:
        choose(op, "triton", given)
    assert str(caught.value).startswith(f"{op}: impl='triton' cannot run: {reason}")
    capped = dataclasses.replace(given, limits=(("torch", "softcap is in triton only"),))
    assert choose(op, "auto", capped) == "reference"


@pytest.mark.parametrize("op", ["flash_attention", "decode_attention"])
@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], ids=str
)
def test_attention_on_gpus_that_are_not_here(op, capability):
    for dtype in (BF16, torch.float16, FP32):
        for impl in ("auto", "triton"):
            assert choose(op, impl, Facts("cuda", dtype, capability)) == "triton"


def test_the_interpreter_runs_only_when_asked_for():
    for given in (Facts("cpu", FP32, interpreter=True), Facts("cuda", FP32, (9, 0), None, True)):
        assert choose("rope", "triton", given) == "triton"
        assert "rope: triton: TRITON_INTERPRET is 1" in describe("rope", given)
        assert "-> rope: triton" in describe("rope", given, impl="triton")


@pytest.mark.parametrize("op", ["adamw_", "grad_norm", "layer_norm", "embedding"])
def test_cuda_runs_only_when_asked_for(op):
    """Until it has been measured; even where Triton is missing."""
    for no_triton, chosen in ((None, "triton"), (BROKEN, "torch")):
        given = Facts("cuda", FP32, (9, 0), no_triton)
        assert choose(op, "auto", given) == chosen
        assert choose(op, "cuda", given) == "cuda"
        assert f"   {op}: cuda: it has not been measured yet, so it runs only" in describe(
            op, given
        )
    flat = [torch.ones(4)]
    factors = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run: "):
        if op == "adamw_":
            stellarator_kernels.adamw_(flat, flat, flat, flat, **factors, impl="cuda")
        elif op == "grad_norm":
            stellarator_kernels.grad_norm(flat, impl="cuda")
        elif op == "layer_norm":
            stellarator_kernels.layer_norm(*flat, *flat, None, impl="cuda")
        else:
            stellarator_kernels.embedding(torch.tensor([0]), flat[0][None], impl="cuda")


def test_cuda_has_no_narrow_states():
    reason = "remainders, stochastic rounding and moments of 8 bits are not in C++"
    limits = dispatch.facts("adamw_", torch.ones(4), {"seed": 1}).limits
    with pytest.raises(RuntimeError, match=reason):
        choose("adamw_", "cuda", Facts("cuda", BF16, (9, 0), limits=limits))


def test_products_in_triton_run_where_they_were_raced(monkeypatch):
    given = Facts("cuda", BF16, (9, 0))
    assert choose("mlp", "auto", given) == "triton"
    given = dataclasses.replace(given, raced=False)
    assert choose("mlp", "auto", given) == "torch" and choose("mlp", "triton", given) == "triton"
    # What a machine with such a GPU finds.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuned, "gpu_name", lambda device: "some GPU")
    x = SimpleNamespace(device=torch.device("cuda"), dtype=BF16, shape=(2, 8), dim=lambda: 2)
    for entries, raced in (({}, False), ({"matmul up": {}}, True)):
        with tuned.use(entries):
            assert facts("mlp", x).raced == raced and facts("layer_norm", x).raced


def test_unknown_names():
    with pytest.raises(ValueError, match="^rope: expected impl in .*got 'hip'"):
        choose("rope", "hip", Facts("cpu", FP32))
    with pytest.raises(ValueError, match="^explain: expected an op of .*got 'softmax'"):
        explain("softmax", torch.zeros(4))


def arguments(dtype, width=16):
    """Positional and keyword arguments of one small call of every op."""
    x, heads, flat = (
        torch.ones(*shape, dtype=dtype) for shape in ((2, width), (1, 2, 1, width), (4,))
    )
    ids = torch.zeros(2, dtype=torch.int64)
    wide = torch.float64 if dtype == FP64 else FP32
    states = [flat.to(wide)], [flat.to(wide)], [flat.to(wide)]
    factors = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    return {
        "flash_attention": ((heads, heads, heads), {"window": 512, "softcap": 30.0}),
        "decode_attention": ((heads[:, :1], heads, heads, torch.tensor([2])), {"window": 512}),
        "embedding": ((ids, x), {}),
        "rope": ((heads, heads), {"positions": ids[None], "theta": 1e4}),
        "bias_rope": ((x, x[0], ids, 1e4), {"num_heads": 2, "num_kv_heads": 1}),
        "layer_norm": ((x, x[0], x[0]), {"residual": x}),
        "rms_norm": ((x, None), {"residual": x}),
        "dropout": ((x, 0.5, (ids.int(), torch.zeros(width).int())), {}),
        "bias_gelu": ((), {"x": x, "bias": x[0]}),
        "cross_entropy": ((x, ids), {"z_loss": 0.1}),
        "linear": ((x, x), {"bias": x[:, 0]}),
        "mlp": ((x, x, None), {"down_weight": x.t(), "down_bias": None}),
        "add_weight_gradient_": ((x.t().to(wide) @ x.to(wide), x), {"x": x}),
        "swiglu": ((x,), {"activation": "gelu_tanh"}),
        "linear_cross_entropy": ((x, x, ids, None), {"reduction": "sum"}),
        "cross_entropy_statistics": ((x, ids), {"vocab_start": 0, "vocab_size": width}),
        "linear_cross_entropy_statistics": ((x, x, ids), {"vocab_start": 0, "vocab_size": 2}),
        "adamw_": (
            ([flat], *states),
            factors | ({"master": [flat.to(wide)]} if dtype == BF16 else {}),
        ),
        "grad_norm": (([flat, x.to(wide)],), {}),
    }


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("op", dispatch._OPS)
def test_explain_takes_what_the_op_takes_and_says_what_runs(monkeypatch, op, dtype):
    """The independent witness is the choice that the op itself makes when it is called."""
    args, kwargs = arguments(dtype)[op]
    lines = explain(op, *args, **kwargs).splitlines()
    assert [line[3:].split(": ")[0] for line in lines] == [op] * len(dispatch._OPS[op])
    made = []

    def recorded(name, impl, given, **options):
        made.append((name, choose(name, impl, given, **options)))
        return made[-1][1]

    module = sys.modules[getattr(stellarator_kernels, op).__module__]
    at = dispatch if hasattr(module, "dispatch") else module
    monkeypatch.setattr(at, "choose", recorded)
    getattr(stellarator_kernels, op)(*args, **kwargs)
    assert [line for line in lines if line.startswith("->")] == [f"-> {op}: {made[0][1]}"]
    asked = explain(op, *args, **kwargs, impl="reference")
    assert f"-> {op}: reference" in asked.splitlines()


def test_the_tensor_that_the_fewest_can_take_decides_for_a_list():
    single, double = torch.ones(3), torch.ones(3, dtype=FP64)
    assert "-> grad_norm: torch" in explain("grad_norm", [single, double]).splitlines()
    (_, *states), factors = arguments(FP32)["adamw_"]
    both = explain("adamw_", [single, double], *states, **factors)
    assert "   adamw_: cpu: it is written for float32 and bfloat16, not torch.float64" in both


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "error", "message"),
    [
        (
            "rope",
            (1,),
            {},
            TypeError,
            r"arguments of rope\(q, k, positions, theta, .*missing a req",
        ),
        ("rope", (), {"x": 1}, TypeError, "missing a required argument: 'q'"),
        ("bias_gelu", ("x", None), {}, TypeError, "expected tensors as x of bias_gelu, got str"),
        ("bias_gelu", (1, 2), {"window": 3}, TypeError, "unexpected keyword argument 'window'"),
        ("grad_norm", ([],), {}, ValueError, "at least one tensor in tensors of grad_norm, got no"),
        ("grad_norm", ([torch.ones(1), 2],), {}, TypeError, "as tensors of grad_norm, got int"),
    ],
)
def test_explain_refuses_what_the_op_does_not_take(op, args, kwargs, error, message):
    with pytest.raises(error, match="^explain: .*" + message):
        explain(op, *args, **kwargs)


def test_explain_of_an_impl_that_cannot_run_says_why():
    message = "decode_attention: impl='cpu' cannot run: there is no cpu impl"
    with pytest.raises(RuntimeError, match=message):
        args, kwargs = arguments(FP32)["decode_attention"]
        explain("decode_attention", *args, **kwargs, impl="cpu")


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
    x = torch.empty(shape)
    rest = (x, x) if op == "flash_attention" else (x[0], None)
    lines = explain(op, x, *rest).splitlines()
    assert f"-> {op}: torch" in lines
    assert any(line.startswith(f"   {op}: triton: {reason}") for line in lines)


@pytest.mark.interpret
@pytest.mark.parametrize("D", [8, 16, 20, 256, 264])
def test_explain_and_the_op_agree(D):
    """What `explain` refuses the op refuses, with the same words."""
    q = torch.zeros(1, 2, 1, D)
    line = next(x for x in explain("flash_attention", q, q, q).splitlines() if ": triton: " in x)
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
print(kernels.explain("grad_norm", [torch.ones(4)]))
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
    assert set(have) == {"triton", "interpreter", "extension", "cuda_extension", "cuda"}
    assert have["cuda"] == torch.cuda.is_available()
    assert have["interpreter"] == (os.environ["TRITON_INTERPRET"] == "1")


def test_explain_of_two_ops_in_one_says_both():
    x, w = torch.ones(4, 16), torch.ones(16)
    weight = torch.ones(8, 16)
    lines = explain("layer_norm_linear", x, w, w, weight, None, impl="reference").splitlines()
    assert "-> layer_norm: reference" in lines and "-> linear: reference" in lines
    lines = explain("bias_gelu_linear", x.double(), w, weight, None).splitlines()
    assert "-> bias_gelu: torch" in lines and "-> linear: torch" in lines
    lines = explain("projected_attention", torch.ones(1, 3, 6 * 12), 4, 1, None).splitlines()
    assert "-> flash_attention: torch" in lines
    assert any("the head width is 12, not a multiple" in line for line in lines)
    with pytest.raises(RuntimeError, match="^rope: impl='cpu' cannot run"):
        explain("projected_attention", torch.ones(1, 3, 96).half(), 4, 1, None, impl="cpu")
