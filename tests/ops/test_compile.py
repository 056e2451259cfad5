"""The kernels of the elementwise and loss ops compile for GPUs that are not here.

One process with TRITON_INTERPRET=0 compiles every kernel for sm_80 and sm_90, in bf16, at the
widths of StarCoder2 (3072, 4608, 6144), and reports what ptxas says. Gates: no register is spilled,
shared memory fits the GPU, and no 64-bit float has crept into the arithmetic.
Not covered: that they run, or how fast. Attention and AdamW have gates of their own.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from stellarator_kernels.testing import compile_kernel, shared_memory_limit

pytest.importorskip("triton")

CAPABILITIES = ((8, 0), (9, 0))
WIDTHS = (3072, 4608, 6144)
TEXTS = ("ttir", "ptx")
SCALAR_LOAD = re.compile(r"tt\.load .* : !tt\.ptr<bf16>")
FP32_POINTERS = {
    "mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr", "cos_ptr", "sin_ptr",
    "dloss_ptr", "loss_ptr", "lse_ptr", "largest_ptr", "total_ptr", "picked_ptr", "part_ptr",
}  # fmt: skip
INT64_POINTERS = {
    "targets_ptr", "ids_ptr", "positions_ptr", "order_ptr", "starts_ptr", "ends_ptr",
}  # fmt: skip


def type_of(name: str) -> str:
    """Triton's type of an argument, from its name; strides as of tensors beyond 2^31 elements."""
    if name in FP32_POINTERS:
        return "*fp32"
    if name.endswith("_key_ptr"):
        return "*i32"
    if name.endswith("_ptr"):
        return "*i64" if name in INT64_POINTERS else "*bf16"
    if name in ("eps", "z_loss", "keep_scale"):
        return "fp32"
    return "i64" if "stride" in name else "i32"


def norm_cases():
    """Forward and backward of both norms, the one that subtracts the mean also with dropout."""
    module = sys.modules["stellarator_kernels.norm_kernels"]
    for C in WIDTHS:
        BLOCK, CHUNKS, num_warps = module.tiles(C)
        values = {"C": C, "HAS_WEIGHT": True, "BLOCK": BLOCK, "CHUNKS": CHUNKS}
        for centred, dropout in ((True, False), (True, True), (False, False)):
            values |= {"CENTRED": centred, "HAS_BIAS": centred, "DROPOUT": dropout}
            case, more = f"{C} {centred} {dropout}", {"HAS_RESIDUAL": True}
            yield f"forward {case}", module._norm_fwd_kernel, values | more, num_warps
            more = {"HAS_DSUMMED": True, "NEED_PARAMS": True}
            yield f"backward {case}", module._norm_bwd_kernel, values | more, num_warps


def dropout_cases():
    """One kernel; the width is no constant of it."""
    module = sys.modules["stellarator_kernels.dropout"]
    yield "dropout", module._dropout_kernel, {"BLOCK": module._BLOCK}, 4


def bias_gelu_cases():
    """Both forms; the width is no constant of these kernels."""
    module = sys.modules["stellarator_kernels.bias_gelu"]
    BLOCK_N, BLOCK_C, num_warps = module.tiles(4 * WIDTHS[0])
    assert all(module.tiles(4 * C) == (BLOCK_N, BLOCK_C, num_warps) for C in WIDTHS)
    for tanh in (True, False):
        values = {"HAS_BIAS": True, "TANH": tanh, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C}
        yield f"forward {tanh}", module._bias_gelu_fwd_kernel, values, num_warps
        yield f"backward {tanh}", module._bias_gelu_bwd_kernel, values, num_warps


def swiglu_cases():
    """Its three activations; the tiles are those of bias_gelu."""
    module = sys.modules["stellarator_kernels.swiglu"]
    BLOCK_N, BLOCK_F, num_warps = module.tiles(4 * WIDTHS[0])
    for number, activation in enumerate(module._ACTIVATIONS):
        values = {"ACTIVATION": number, "BLOCK_N": BLOCK_N, "BLOCK_F": BLOCK_F}
        yield f"forward {activation}", module._swiglu_fwd_kernel, values, num_warps
        yield f"backward {activation}", module._swiglu_bwd_kernel, values, num_warps


def rope_cases():
    """Heads of 128 at each size, and one of 80, whose half is no power of two."""
    module = sys.modules["stellarator_kernels.rope"]
    for H, D in (*((C // 128, 128) for C in WIDTHS), (4, 80)):
        BLOCK_H, BLOCK_D, num_warps = module.tiles(H, D)
        values = {"D": D, "CONJUGATE": True, "BLOCK_H": BLOCK_H, "BLOCK_D": BLOCK_D}
        yield f"{H} heads of {D}", module._rope_kernel, values, num_warps


def bias_rope_cases():
    """Both directions with a bias at each size, and heads of 80."""
    module = sys.modules["stellarator_kernels.bias_rope"]
    for D in (128, 80):
        BLOCK_T, BLOCK_H, BLOCK_D, num_warps = module.tiles(D)
        values = {"D": D, "BLOCK_T": BLOCK_T, "BLOCK_H": BLOCK_H, "BLOCK_D": BLOCK_D}
        for rotated in (True, False):
            forward = values | {"HAS_BIAS": True, "ROTATED": rotated}
            yield f"forward {D} {rotated}", module._bias_rope_fwd_kernel, forward, num_warps
            backward = values | {"NEED_BIAS": True, "ROTATED": rotated}
            yield f"backward {D} {rotated}", module._bias_rope_bwd_kernel, backward, num_warps


def embedding_cases():
    """With learned positions; the backward into an fp32 buffer and into bf16."""
    module = sys.modules["stellarator_kernels.embedding"]
    values = {"HAS_POSITIONS": True, "BLOCK": module._BLOCK}
    yield "forward", module._embedding_fwd_kernel, values, 4
    for add in (False, True):
        values = {"ADD": add, "UNIT": module._UNIT, "BLOCK": module._SUM_BLOCK}
        units = values | {"ROWS": module._ROWS}
        yield f"units {add}", module._embedding_units_kernel, units, 4
        yield f"parts {add}", module._embedding_parts_kernel, values, 4


def cross_entropy_cases():
    """Forward, forward with the gradient in place (linear_cross_entropy), backward, a shard's."""
    module = sys.modules["stellarator_kernels.cross_entropy"]
    BLOCK, num_warps = module.tiles(49152)
    for gradient in (False, True):
        values = {"GRADIENT": gradient, "BLOCK": BLOCK}
        yield f"forward {gradient}", module._cross_entropy_fwd_kernel, values, num_warps
    yield "backward", module._cross_entropy_bwd_kernel, {"BLOCK": BLOCK}, num_warps
    shard = sys.modules["stellarator_kernels.cross_entropy_shard"]
    values = {"IGNORED": shard.IGNORED, "NO_CLASS": shard.NO_CLASS, "BLOCK": BLOCK}
    yield "statistics", shard._statistics_kernel, values, num_warps


OPS = {
    "norms": norm_cases,
    "dropout": dropout_cases,
    "embedding": embedding_cases,
    "bias_gelu": bias_gelu_cases,
    "swiglu": swiglu_cases,
    "rope": rope_cases,
    "bias_rope": bias_rope_cases,
    "cross_entropy": cross_entropy_cases,
}


def compile_all() -> list[dict]:
    """What the compiler says of every case; for a process without the interpreter."""
    found = []
    for op, cases in OPS.items():
        for name, kernel, values, num_warps in cases():
            types = {n: type_of(n) for n in kernel.arg_names if n not in values}
            for capability in CAPABILITIES:
                built = compile_kernel(kernel, types, values, capability, num_warps=num_warps)
                case = {"op": op, "case": name, "capability": capability, "asked": num_warps}
                case |= {"target": f".target sm_{capability[0]}{capability[1]}" in built.ptx}
                case |= {"doubles": built.ptx.count(".f64")}
                before, _, after = built.ttir.partition("scf.for")
                case |= {"scalar_loads": [len(SCALAR_LOAD.findall(x)) for x in (before, after)]}
                found.append(case | {k: v for k, v in vars(built).items() if k not in TEXTS})
    return found


def run_without_interpreter(script) -> str:
    """Standard output of a script in a process whose kernels are compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled():
    """The list of compile_all, from one process."""
    return json.loads(run_without_interpreter(__file__))


@pytest.mark.parametrize("op", OPS)
def test_no_spills_and_shared_memory_fits(compiled, op):
    cases = [case for case in compiled if case["op"] == op]
    assert len(cases) == len(CAPABILITIES) * len(list(OPS[op]()))
    for case in cases:
        assert case["target"], case
        assert case["spill_bytes"] == 0, case
        assert case["shared_bytes"] <= shared_memory_limit(tuple(case["capability"])), case
        assert 0 < case["registers"] * 32 * case["num_warps"] <= 65536, case
        assert case["num_warps"] == case["asked"], case
        assert case["doubles"] == 0, case


def test_the_logit_of_the_target_is_read_before_any_warp_overwrites_it(compiled):
    """The gradient replaces the row, so a load behind the last reduction would race with it.

    No run on a CPU can show the race: the interpreter has one warp.
    """
    cases = [case for case in compiled if case["case"] == "forward True"]
    cases = [case for case in cases if case["op"] == "cross_entropy"]
    assert len(cases) == len(CAPABILITIES)
    for case in cases:
        assert case["scalar_loads"] == [1, 0], case


def test_a_kernel_of_the_interpreter_is_refused():
    kernel = sys.modules["stellarator_kernels.rope"]._rope_kernel
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("kernels are compiled here")
    with pytest.raises(ValueError, match="^compile_kernel: expected a compiled kernel, got Interp"):
        compile_kernel(kernel, {}, {}, (9, 0))


GREEDY = """
import triton
import triton.language as tl

from stellarator_kernels.testing import compile_kernel


@triton.jit
def greedy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    tl.store(y_ptr + cols, x / tl.sum(tl.exp(x), 0))


types = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
print(compile_kernel(greedy, types, {"BLOCK": 16384}, (9, 0), num_warps=1).spill_bytes)
for wrong in ({"x_ptr": "*fp32"}, types | {"z": "i32"}):
    try:
        compile_kernel(greedy, wrong, {"BLOCK": 64}, (9, 0))
    except ValueError as error:
        print(error)
"""


def test_spills_are_seen_and_a_wrong_signature_is_refused(tmp_path):
    # A gate that cannot fail is none: 512 values in each thread do not fit its registers.
    (tmp_path / "greedy.py").write_text(GREEDY)
    lines = run_without_interpreter(tmp_path / "greedy.py").splitlines()
    assert int(lines[0]) > 0
    message = "compile_kernel: expected the arguments ['x_ptr', 'y_ptr', 'BLOCK'] of greedy, got "
    assert lines[1].startswith(message + "none for ['y_ptr'] and unknown ones []. ")
    assert lines[2].startswith(message + "none for [] and unknown ones ['z']. ")


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(compile_all(), sys.stdout)
