"""The forward for Hopper: its logic in gluon_emulator.py, its code from the compiler, its refusals.

The reference is that of test_flash_attention.py, in float64. The emulator runs the kernel as it
stands, with rows and blocks of 16 so that short sequences have edges and an inside, under orders of
events that a seed chooses; planted bugs show what it sees. What it leaves out is in its docstring.
Compiled for sm_90 in a process without the interpreter: no spills, no products made one after the
other by ptxas, and the softmax where the products of the block before run. Not covered: speed.
"""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from attention_cases import BF16, CASES, FP16, FP32, Case, plain, random_case, run
from gluon_emulator import Deadlock, Emulated
from grid import COMPILED, TRITON

from stellarator_kernels import _gluon
from stellarator_kernels.attention import gluon_forward, gluon_tiles
from stellarator_kernels.testing import (
    assert_close_to_reference,
    poison_empty,
    shared_memory_limit,
)

GLUON = pytest.mark.skipif(_gluon.FAILURE is not None, reason=f"no Gluon: {_gluon.FAILURE}")
HERE = COMPILED and gluon_tiles.refusal(64, BF16, torch.cuda.get_device_capability()) is None
HOPPER = pytest.mark.skipif(not HERE, reason="no GPU of compute capability 9.0")
SMALL = gluon_forward.Plan(step=16, stages=2, turns=True)
KERNEL = gluon_forward._gluon_forward_kernel


def check(case, dtype, plan=None, seed=0):
    """out and lse of `forward` against the float64 reference."""
    tensors = case.inputs(dtype, seed)
    exact, blind64 = run(case, [x.double() for x in tensors], "reference")
    eager = plain(case, tensors)
    q, k, v = (x[None] if case.documents else x for x in tensors[:3])
    scale = case.D**-0.5 if case.scale is None else case.scale
    cu_seqlens = case.options()["cu_seqlens"]
    with poison_empty():
        out, lse = gluon_forward.forward(q, k, v, cu_seqlens, case.causal, case.window, scale, plan)
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
    assert lse.shape == (len(q), case.H, case.T) and lse.dtype == FP32 and lse.is_contiguous()
    out, lse = (out[0], lse[0]) if case.documents else (out, lse)
    assert torch.equal(lse == -math.inf, blind64)
    lse = torch.where(blind64, 0.0, lse)
    for name, found, i in (("out", out, 0), ("lse", lse, 1)):
        assert_close_to_reference(found, exact[i], eager[i], reduction_length=case.keys, name=name)


@pytest.fixture
def emulate(monkeypatch):
    """Puts the emulator in the place of the GPU: emulate(seed, edits, rows of a warpgroup)."""

    def function(seed, edits=None, own=16):
        monkeypatch.setattr(gluon_tiles, "OWN", own)
        kernel = Emulated(KERNEL, seed, edits)
        monkeypatch.setattr(gluon_forward, "_gluon_forward_kernel", kernel)

    return function


@GLUON
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_emulated(case, seed, emulate):
    emulate(seed)
    check(dataclasses.replace(case, D=64), BF16, SMALL)


@GLUON
@pytest.mark.parametrize("seed", range(300, 310))
def test_emulated_random(seed, emulate):
    case = dataclasses.replace(random_case(seed, 80), D=64)
    print(case)
    emulate(seed)
    check(case, FP16, SMALL, seed)


@GLUON
@pytest.mark.parametrize("plan", [(16, 1, True), (16, 3, True), (16, 4, False), (32, 2, False)])
def test_emulated_plans(plan, emulate):
    for seed in range(4):
        emulate(seed)
        check(Case(90, window=40, D=128), BF16, gluon_forward.Plan(*plan))


@GLUON
@pytest.mark.parametrize("D", gluon_forward.PLANS)
def test_emulated_at_full_size(D, emulate):
    emulate(2, own=gluon_tiles.OWN)
    check(Case(700, H=3, D=D, window=300), BF16)


@GLUON
def test_emulated_on_slices_of_one_projection(emulate):
    """Rows of q, k, v are far apart, and the last tile ends in the middle of a block."""
    B, T, H, G, D = 2, 37, 4, 2, 64
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, T, (H + 2 * G) * D, generator=generator).to(BF16)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in qkv.split((H * D, G * D, G * D), dim=-1))
    emulate(2)
    found = gluon_forward.forward(q, k, v, None, True, None, 0.125, SMALL)
    parts = [x.contiguous() for x in (q, k, v)]
    expected = gluon_forward.forward(*parts, None, True, None, 0.125, SMALL)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    everything = Case(T, B=B, H=H, G=G, D=D)
    exact = run(everything, [x.double() for x in (*parts, q, q[..., 0].mT)], "reference")[0]
    assert_close_to_reference(found[0], exact[0], exact[0].to(BF16), reduction_length=T)


# What is written in the kernel: what is wrong instead.
K_DONE = "scores = warpgroup_mma_wait(1, deps=[scores])\n"
K_RELEASE = "        mbarrier.arrive(k_empty.index(stage), count=1)\n"
V_DONE = "        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])\n"
V_RELEASE = "        mbarrier.arrive(v_empty.index(before), count=1)\n"
K_HAS_COME = "mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)"
K_HAS_COME_EARLY = (
    "mbarrier.wait(k_full.index(after), ((i + 1) // STAGES) & 1, pred=i + 1 < blocks)"
)
K_HAS_GONE = "mbarrier.wait(k_empty.index(stage), (i // STAGES + 1) & 1)"
V_HAS_COME = "mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)"
BUGS = {
    "k is given back too early": {K_DONE + K_RELEASE: K_RELEASE.strip() + "\n        " + K_DONE},
    "v is given back too early": {V_DONE + V_RELEASE: V_RELEASE + V_DONE},
    "no wait for k": {K_HAS_COME: "pass", K_HAS_COME_EARLY: "pass"},
    "no wait for v": {V_HAS_COME: "pass"},
    "no wait for q": {"mbarrier.wait(q_full, 0)": "pass"},
    "phase of k": {K_HAS_COME: K_HAS_COME.replace("& 1", "+ 1 & 1")},
    "phase of v": {V_HAS_COME: V_HAS_COME.replace("& 1", "& 0")},
    "phase of the ring": {K_HAS_GONE: K_HAS_GONE.replace(" + 1", "")},
    "no wait for an empty buffer": {K_HAS_GONE: "pass"},
    "one warpgroup gives a buffer back": {"mbarrier.init(v_empty.index(i), count=2)": (
        "mbarrier.init(v_empty.index(i), count=1)"
    )},
    "bytes": {"v_desc.block_type.nbytes": "v_desc.block_type.nbytes // 2"},
    "both warpgroups go second": {"mbarrier.wait(my_turn, (i - SECOND) & 1)": (
        "mbarrier.wait(my_turn, (i - 1) & 1)"
    )},
    "the scores are read too early": {K_DONE: K_DONE.replace("1", "2")},
    "the product is read too early": {V_DONE: V_DONE.replace("0", "1")},
    "the weights are not kept": {V_DONE: "        acc = warpgroup_mma_wait(0, deps=[acc])\n"},
    "no fence": {"    fence_async_shared()\n    tma_store(": "    tma_store("},
    "no wait for the store": {"    tma_store_wait(0)\n": ""},
    "last block": {"gl.cdiv(gl.max(last, 0) - begin, STEP)": "((gl.max(last, 0) - begin) // STEP)"},
    "last block of the products": {"in range(1, blocks)": "in range(1, blocks - 1)"},
    "mask, first": {"if (block < inner) | (block + STEP > inner_end)": (
        "if block + STEP > inner_end"
    )},
    "mask, last": {"if (block < inner) | (block + STEP > inner_end)": "if block < inner"},
    "mask of the first block": {"if (begin < inner) | (begin + STEP > inner_end)": "if False"},
    "a key too many": {"(others[None, :] < last": "(others[None, :] <= last"},
    "correction": {"acc * gl.convert_layout(correction, out_row_layout)[:, None]": "acc"},
    "rows of the second warpgroup": {"batch, head, row + OWN,": "batch, head, row,"},
}  # fmt: skip


@GLUON
@pytest.mark.parametrize("name", BUGS)
def test_the_emulator_finds_planted_bugs(name, emulate):
    case = Case(100, window=40, D=64)
    found = {}
    for seed in range(4):
        emulate(seed, BUGS[name])
        try:
            check(case, BF16, SMALL)
        except (AssertionError, Deadlock) as error:
            found[seed] = str(error).splitlines()[0]
    print(found)
    assert found


PROGRAM = """
import json, re, sys
from stellarator_kernels.attention import gluon_forward
from stellarator_kernels.testing import compile_kernel, disassemble

def describe(D, dtype, packed, causal, window, ones):
    plan = gluon_forward.PLANS[D]
    values = gluon_forward.constants(D, plan)
    values.update(CAUSAL=causal, WINDOW=window, PACKED=packed)
    values.update({name: 1 for name in ones})  # as a launch describes an integer argument of 1
    types = gluon_forward.descriptor_types(D, dtype, plan)
    types.update(lse_ptr="*fp32", bounds_ptr="*i32", scale="fp32")
    types.update({name: "i32" for name in ("T", "S", "H", "group", "window") if name not in ones})
    built = compile_kernel(gluon_forward._gluon_forward_kernel, types, values, (9, 0))
    code = disassemble(built)
    # From where the scores of a block are there to where the product beside them has to be.
    beside = re.findall("DEPBAR.LE gsb0, 0x1(.*?)DEPBAR.LE gsb0, 0x0", code, re.DOTALL)
    return {
        "spills": built.spill_bytes,
        "shared": built.shared_bytes,
        "num_warps": built.num_warps,
        "serialized": re.findall("wgmma.*serialized", built.ptxas_log),
        "products": built.ptx.count("wgmma.mma_async"),
        "loads": built.ptx.count("cp.async.bulk.tensor.4d.shared"),
        "stores": built.ptx.count("cp.async.bulk.tensor.4d.global"),
        "registers": re.findall("setmaxnreg[.]inc[a-z0-9.]*[^0-9]*240", built.ptx),
        "given_back": re.findall("setmaxnreg[.]dec[a-z0-9.]*[^0-9]*24;", built.ptx),
        "synced": re.findall("bar[.]sync[^@]*@%p[0-9]+ mbarrier[.]arrive[.]shared", built.ptx),
        "arrivals": re.findall("mbarrier[.]arrive[.]shared", built.ptx),
        "exponentials_beside": [piece.count("MUFU.EX2") for piece in beside],
    }

print(json.dumps([describe(*build) for build in json.loads(sys.argv[1])]))
"""
BUILDS = [
    (64, "bf16", False, True, False, []),
    (64, "bf16", True, True, True, []),
    (128, "bf16", False, True, True, []),
    (128, "bf16", True, True, False, ["group"]),
    (128, "bf16", False, False, False, ["T"]),
    (128, "fp16", False, True, True, []),
]


@GLUON
def test_code_for_a_gpu_that_is_not_here():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(BUILDS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for build, found in zip(BUILDS, json.loads(done.stdout), strict=True):
        D, step = build[0], gluon_forward.PLANS[build[0]].step
        assert found["spills"] == 0 and not found["serialized"], (build, found)
        assert found["shared"] <= shared_memory_limit((9, 0)), (build, found)
        # Two warpgroups that multiply, with 240 registers a thread, and one that loads, with 24.
        assert found["num_warps"] == 12, (build, found)
        assert found["registers"] and found["given_back"], (build, found)
        # Each has two copies of both products, in steps of 16 terms.
        assert found["products"] == 2 * 2 * (D + step) // 16, (build, found)
        # q of both warpgroups, k and v; out of both.
        assert found["loads"] >= 4 and found["stores"] == 2, (build, found)
        # One thread arrives for its warpgroup, so all of it has to be there before.
        assert len(found["synced"]) == len(found["arrivals"]) > 0, (build, found)
        # 64 rows by STEP keys are STEP / 2 weights a thread; and two corrections.
        assert found["exponentials_beside"] == [step // 2 + 2] * 2, (build, found)


def test_refusals():
    assert gluon_tiles.refusal(128, BF16, (9, 0)) == _gluon.FAILURE
    assert gluon_tiles.refusal(64, FP16, (9, 0), False, False) == _gluon.FAILURE
    if _gluon.FAILURE is None:
        for arguments, words in (
            ((128, BF16, None), "compute capability (9, 0), this is None"),
            ((128, BF16, (8, 0)), "compute capability (9, 0), this is (8, 0)"),
            ((128, BF16, (10, 0)), "compute capability (9, 0), this is (10, 0)"),
            ((128, FP32, (9, 0)), "bfloat16 and float16, this is torch.float32"),
            ((96, BF16, (9, 0)), "heads of 64 and 128, this is 96"),
            ((128, BF16, (9, 0), True, False), "no softcap"),
            ((128, BF16, (9, 0), False, True), "no dropout"),
        ):
            assert words in gluon_tiles.refusal(*arguments)


def test_nothing_is_imported_before_it_is_needed():
    """The package, and the Triton forward, come without Gluon."""
    program = (
        "import sys, stellarator_kernels, stellarator_kernels.attention.forward\n"
        "print([m for m in sys.modules if 'gluon' in m and m.startswith('stellarator')])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


@HOPPER
@TRITON
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_gpu(case, D):
    check(dataclasses.replace(case, D=D), BF16)


@HOPPER
@TRITON
@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("seed", range(400, 420))
def test_on_a_gpu_random(seed, turns):
    case = dataclasses.replace(random_case(seed, 1500), D=random.Random(seed).choice([64, 128]))
    print(case)
    plan = dataclasses.replace(gluon_forward.PLANS[case.D], turns=turns)
    check(case, FP16, plan, seed)
