"""The backward for Hopper: its logic in gluon_emulator.py, its code from the compiler.

The reference is that of test_flash_attention.py, in float64, through autograd. The emulator runs
both kernels as they stand, with tiles and blocks of 16, under orders of events that a seed chooses;
planted bugs show what it sees. What it leaves out is in its docstring. Compiled for sm_90: no
spills, no products made one after the other by ptxas, and P made where a product runs. Not covered:
speed; the refusals, which are those of the forward.
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
from attention_cases import BF16, CASES, FP16, Case, plain, random_case, run
from gluon_emulator import Deadlock, Emulated
from grid import COMPILED, TRITON

from stellarator_kernels import _gluon
from stellarator_kernels.attention import gluon_backward, gluon_dkdv, gluon_dq, gluon_tiles
from stellarator_kernels.testing import (
    assert_close_to_reference,
    poison_empty,
    shared_memory_limit,
)

GLUON = pytest.mark.skipif(_gluon.FAILURE is not None, reason=f"no Gluon: {_gluon.FAILURE}")
HERE = COMPILED and gluon_tiles.refusal(64, BF16, torch.cuda.get_device_capability()) is None
HOPPER = pytest.mark.skipif(not HERE, reason="no GPU of compute capability 9.0")
SMALL = gluon_backward.Plan(step=16, stages=2, dq_step=16, dq_stages=2)
KERNELS = {"dq": gluon_dq.dq_kernel, "dkdv": gluon_dkdv.dkdv_kernel}


def check(case, dtype, plan=None, seed=0):
    """dq, dk and dv of `backward` against the float64 reference; returns them."""
    tensors = case.inputs(dtype, seed)
    exact, blind = run(case, [x.double() for x in tensors], "reference")
    eager = plain(case, tensors)
    lse = torch.where(blind, -math.inf, exact[1]).float()
    parts = [*tensors[3:], *tensors[:3], exact[0].to(dtype), lse]  # dout, dlse, q, k, v, out, lse
    parts = [x[None] if case.documents else x for x in parts]
    scale = case.D**-0.5 if case.scale is None else case.scale
    options = case.options()["cu_seqlens"], case.causal, case.window, scale
    with poison_empty():
        found = gluon_backward.backward(*parts, *options, plan)
    terms = case.keys, case.T * case.H // case.G, case.T * case.H // case.G
    for name, x, like, a, e, n in zip(
        ("dq", "dk", "dv"), found, parts[2:5], exact[2:], eager[2:], terms, strict=True
    ):
        assert x.shape == like.shape and x.dtype == dtype and x.is_contiguous(), name
        x = x[0] if case.documents else x
        assert_close_to_reference(x, a, e, reduction_length=n, name=name)
    return found


@pytest.fixture
def emulate(monkeypatch):
    """Puts the emulator in the place of the GPU: emulate(seed, edits of kernels, rows)."""

    def function(seed, edits=None, own=16):
        monkeypatch.setattr(gluon_tiles, "OWN", own)
        for name, kernel in KERNELS.items():
            emulated = Emulated(kernel, seed, (edits or {}).get(name))
            monkeypatch.setattr(gluon_backward, f"{name}_kernel", emulated)

    return function


@GLUON
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_emulated(case, emulate):
    emulate(3 + case.T % 5)  # any order of events
    check(dataclasses.replace(case, D=64), BF16, SMALL)


@GLUON
@pytest.mark.parametrize("seed", range(300, 304))
def test_emulated_random(seed, emulate):
    case = dataclasses.replace(random_case(seed, 70), D=64)
    print(case)
    emulate(seed)
    check(case, FP16, SMALL, seed)


@GLUON
def test_emulated_plans_and_orders_of_events(emulate):
    """Seed 0: all as late as can be; 1: all at once. The same bits in any order."""
    for plan in ((16, 1, 16, 2), (16, 3, 32, 3), (32, 2, 16, 4)):
        results = []
        for seed in (0, 1, 7):
            emulate(seed)
            results.append(check(Case(70, window=40, D=128), BF16, gluon_backward.Plan(*plan)))
        for found in results[1:]:
            for a, b in zip(found, results[0], strict=True):
                assert torch.equal(a, b)


@GLUON
@pytest.mark.parametrize("D", gluon_backward.PLANS)
def test_emulated_at_full_size(D, emulate):
    emulate(2, own=gluon_tiles.OWN)
    check(Case(300, H=3, D=D, window=130), BF16)


# What is written in the kernels: what is wrong instead.
DQ_DONE = "        dq, dscores = warpgroup_mma_wait(0, deps=[dq, dscores])\n"
K_RELEASE = "        mbarrier.arrive(k_empty.index(before), count=1)\n"
DV_DONE = "        dv, rounded = warpgroup_mma_wait(1, deps=[dv, rounded])\n"
DOUT_RELEASE = "        mbarrier.arrive(dout_empty.index(stage), count=1)\n"
DK_DONE = "        dk, dscores = warpgroup_mma_wait(0, deps=[dk, dscores])\n"
Q_RELEASE = "        mbarrier.arrive(q_empty.index(stage), count=1)\n"
S_DONE = "        scores = warpgroup_mma_wait(1, deps=[scores])\n"
MASKED = "if (block < inner) | (block + STEP > inner_end)"
BUGS = {
    "dq": {
        "k is given back too early": {DQ_DONE + K_RELEASE: K_RELEASE + DQ_DONE},
        "dS is not kept": {DQ_DONE: "        dq = warpgroup_mma_wait(0, deps=[dq])\n"},
        "no wait for q and dout": {"mbarrier.wait(rows_full, 0)": "pass"},
        "the scores are read too early": {"mma_wait(2, deps=": "mma_wait(3, deps="},
        "phase of the rings": {"(i // STAGES + 1) & 1": "(i // STAGES) & 1"},
        "bytes": {"v_desc.block_type.nbytes": "v_desc.block_type.nbytes // 2"},
        "last block": {"gl.cdiv(end - begin, STEP), 1": "(end - begin) // STEP, 1"},
        "mask, first": {"(block < inner) | ": ""},
        "mask, last": {" | (block + columns.shape[0] > inner_end)": ""},
        "delta": {"new_dscores = weights * (dweights - delta[:, None])": (
            "new_dscores = weights * dweights"
        )},
        "scale": {"(dq * scale).to": "dq.to"},
        "rows of the second warpgroup": {"batch, head, row + OWN,": "batch, head, row,"},
        "no fence": {"    fence_async_shared()\n    tma_store(": "    tma_store("},
    },
    "dkdv": {
        "dout is given back too early": {DV_DONE + DOUT_RELEASE: DOUT_RELEASE + DV_DONE},
        "q is given back too early": {DK_DONE + Q_RELEASE: Q_RELEASE + DK_DONE},
        "no wait for q": {"mbarrier.wait(q_full.index(stage), parity)": "pass"},
        "P is not kept": {DV_DONE: "        dv = warpgroup_mma_wait(1, deps=[dv])\n"},
        "no wait for k and v": {"mbarrier.wait(kv_full, 0)": "pass"},
        "no wait for dout": {"mbarrier.wait(dout_full.index(stage), parity)": "pass"},
        "phase of the rings": {"(i // STAGES + 1) & 1": "(i // STAGES) & 1"},
        "the scores are read too early": {S_DONE: S_DONE.replace("1", "2")},
        "lse of another head": {"lse_desc, row_place": "lse_desc, [batch * H, row]"},
        "delta of other rows": {"delta_desc, row_place": "delta_desc, [batch * H + head, begin]"},
        "one head too few": {"part * part_heads) * blocks": "part * part_heads - 1) * blocks"},
        "first head of a part": {"first_head = kv_head * group + part * part_heads": (
            "first_head = kv_head * group"
        )},
        "place of a part": {"gl.cast(part * gl.num_programs(2) + batch": "gl.cast(batch"},
        "rows of the next head": {"gl.where(block < end, block, begin)": "block"},
        "last block": {"gl.cdiv(end - begin, STEP), 0": "(end - begin) // STEP, 0"},
        "mask, first": {MASKED: MASKED.replace("(block < inner) | ", "")},
        "mask, last": {MASKED: "if block < inner"},
        "rows past the end": {"(rows < S)[:, None]": "(rows < S + 1)[:, None]"},
        "scale": {"(dk * scale).to": "dk.to"},
    },
}  # fmt: skip


@GLUON
@pytest.mark.parametrize(
    ("kernel", "name"), [(k, name) for k, bugs in BUGS.items() for name in bugs]
)
def test_the_emulator_finds_planted_bugs(kernel, name, emulate, monkeypatch):
    """One key/value head of two query heads, which go to two parts, or of three, which do not."""
    for H, seed in ((2, 0), (3, 1), (2, 4), (3, 5), (2, 6), (3, 7)):
        parts = 2 if H == 2 else 1
        monkeypatch.setattr(gluon_backward.shared, "group_splits", lambda *_, n=parts: n)
        emulate(seed, {kernel: BUGS[kernel][name]})
        try:
            check(Case(67, H=H, window=20, D=64), BF16, SMALL)
        except (AssertionError, Deadlock, IndexError) as error:
            print(seed, str(error).splitlines()[0])
            return
    pytest.fail("no seed shows it")


PROGRAM = """
import json, re, sys, triton
from stellarator_kernels.attention import gluon_backward
from stellarator_kernels.testing import compile_kernel, disassemble

def describe(phase, D, dtype, packed, causal, window, ones):
    plan = gluon_backward.PLANS[D]
    values = gluon_backward.constants(phase, D, plan)
    values.update(CAUSAL=causal, WINDOW=window, PACKED=packed)
    values.update({name: 1 for name in ones})  # as a launch describes an integer argument of 1
    types = gluon_backward.descriptor_types(phase, D, dtype, plan)
    types.update(bounds_ptr="*i32", scale="fp32")
    types.update({name: "i32" for name in ("T", "S", "H", "group", "window") if name not in ones})
    if phase == "dq":
        kernel = gluon_backward.dq_kernel
        types.update(lse_ptr="*fp32", delta_ptr="*fp32")
    else:
        kernel = gluon_backward.dkdv_kernel
        sums = "*fp32" if packed else "*" + dtype  # of parts, or of a whole group
        types.update(dk_ptr=sums, dv_ptr=sums, part_heads="i32")
    built = compile_kernel(kernel, types, values, (9, 0))
    # Between the waits: how many products may still run, and how many exponentials are made.
    pieces = re.findall("DEPBAR.LE gsb0, 0x([0-9])(.*?)(?=DEPBAR.LE gsb0|$)", disassemble(built),
                        re.DOTALL)
    return {
        "triton": triton.__version__,
        "step": values["STEP"],
        "spills": built.spill_bytes,
        "shared": built.shared_bytes,
        "num_warps": built.num_warps,
        "serialized": re.findall("wgmma.*serialized", built.ptxas_log),
        "products": built.ptx.count("wgmma.mma_async"),
        "old_products": built.ptx.count("mma.sync"),
        "loads": built.ptx.count("cp.async.bulk.tensor.4d.shared"),
        "row_loads": built.ptx.count("cp.async.bulk.tensor.2d.shared"),
        "registers": re.findall("setmaxnreg[.]inc[a-z0-9.]*[^0-9]*240", built.ptx),
        "given_back": re.findall("setmaxnreg[.]dec[a-z0-9.]*[^0-9]*24;", built.ptx),
        "synced": re.findall("bar[.]sync[^@]*@%p[0-9]+ mbarrier[.]arrive[.]shared", built.ptx),
        "arrivals": re.findall("mbarrier[.]arrive[.]shared", built.ptx),
        "beside": sorted([int(n), piece.count("MUFU.EX2")] for n, piece in pieces
                         if "MUFU.EX2" in piece),
    }

print(json.dumps([describe(*build) for build in json.loads(sys.argv[1])]))
"""
BUILDS = [
    ("dq", 64, "bf16", True, True, True, []),
    ("dq", 128, "fp16", False, True, True, []),
    ("dkdv", 64, "fp16", False, False, False, ["group"]),
    ("dkdv", 128, "bf16", True, True, True, []),
]


def compiled(builds, triton=None):
    """What PROGRAM says of the builds, with the Triton of a folder or the installed one."""
    path = os.pathsep.join([triton, *sys.path] if triton else sys.path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(builds)],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def gate(build, found):
    phase, D, _, _, _, _, _ = build
    step = found["step"]
    assert found["spills"] == 0 and not found["serialized"], (build, found)
    assert found["shared"] <= shared_memory_limit((9, 0)), (build, found)
    # Two warpgroups that multiply, with 240 registers a thread, and one that loads, with 24.
    assert found["num_warps"] == 12, (build, found)
    assert found["registers"] and found["given_back"], (build, found)
    # In steps of 16 terms: for dq a first block, the loop and a last product.
    scores, sums = 2 * D // 16, step // 16
    products = 2 * scores + 2 * sums if phase == "dq" else scores + 2 * sums
    assert found["products"] == 2 * products and not found["old_products"], (build, found)
    # Two tiles of both warpgroups, two rings; lse and delta.
    assert found["loads"] >= 6, (build, found)
    assert phase == "dq" or found["row_loads"] >= 2, (build, found)
    # One thread arrives for its warpgroup, so all of it has to be there before.
    assert len(found["synced"]) == len(found["arrivals"]) > 0, (build, found)
    # 64 rows by STEP columns are STEP / 2 weights a thread, made beside v dout^T, or in the loop of
    # dq beside dout v^T and the product of the block before.
    beside = [2 if phase == "dq" else 1, step // 2]
    assert found["beside"].count(beside) == 2, (build, found)


@GLUON
def test_code_for_a_gpu_that_is_not_here():
    for build, found in zip(BUILDS, compiled(BUILDS), strict=True):
        gate(build, found)


@GLUON
@pytest.mark.skipif(
    "STELLARATOR_TRITON_3_6" not in os.environ,
    reason="STELLARATOR_TRITON_3_6 is not set; `make test` installs Triton 3.6 and sets it",
)
def test_code_of_triton_3_6():
    builds = [BUILDS[1], BUILDS[3]]
    for build, found in zip(
        builds, compiled(builds, os.environ["STELLARATOR_TRITON_3_6"]), strict=True
    ):
        assert found["triton"].startswith("3.6."), found
        gate(build, found)


@HOPPER
@TRITON
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_gpu(case, D):
    check(dataclasses.replace(case, D=D), BF16)


@HOPPER
@TRITON
@pytest.mark.parametrize("seed", range(400, 420))
def test_on_a_gpu_random(seed):
    case = dataclasses.replace(random_case(seed, 1500), D=random.Random(seed).choice([64, 128]))
    print(case)
    check(case, FP16, None, seed)
