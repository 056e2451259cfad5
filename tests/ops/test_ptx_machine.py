"""The machine that runs PTX, and what runs on it: a part of the tests of the ops, compiled.

Small kernels in PTX have results that are known; mistakes in them are refused. In compiled kernels
of this package lines are changed that the results hang on, and the machine has to see it. The whole
of the tests runs on it by `make emulate`. Not covered: see ptx_machine/device.py.
"""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ptx_machine import machine, reader
from ptx_machine.machine import EmulationError

from stellarator_kernels import _triton

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(machine.COMPILER is None, reason="no C++ compiler")
HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
REGISTERS = "{\n.reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<40>;\n.reg .b64 %d<9>;\n"
OUT_OF_LANE = """
    ld.param.b64 %d1, [out];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %d2, %r1, 4;
    add.s64 %d3, %d1, %d2;
"""  # %d3: the word of this thread


def run(body, threads=32, shared_bytes=1024, seed=0, words=64, **options):
    """The words that a kernel leaves in `out`, before: 0, 1, 2..."""
    text = (
        f"{HEAD}.visible .entry small(.param .u64 out)\n.reqntid {threads}\n{REGISTERS}{body}\n}}"
    )
    out = np.arange(words, dtype=np.uint32)
    ends = [(out.ctypes.data, out.ctypes.data + out.nbytes)]
    params = struct.pack("<Q", out.ctypes.data)
    kernel = reader.parse(text)
    machine.run(kernel, (1, 1, 1), params, shared_bytes, threads, ends, seed, **options)
    return out


def test_numbers():
    """One instruction a line, each with the result that the ISA gives, by hand."""
    lines = {
        "shr.s32 %r9, -5, 1;": 0xFFFFFFFD,
        "shl.b32 %r9, 1, 40;": 0,
        "bfe.s32 %r9, 0xf0, 4, 4;": 0xFFFFFFFF,
        "bfe.u32 %r9, 0xf0, 4, 4;": 15,
        "prmt.b32 %r9, 0x33221100, 0x77665544, 0x7531;": 0x77553311,
        "mul.hi.u32 %r9, 0x80000000, 6;": 3,
        "div.s32 %r9, -7, 2;": 0xFFFFFFFD,
        "rem.s32 %r9, -7, 2;": 0xFFFFFFFF,
        "fma.rn.f32 %r9, 0f3F800001, 0f3F800001, 0fBF800002;": 0x28800000,
        "max.f32 %r9, 0f7FC00000, 0f40000000;": 0x40000000,
        "mul.ftz.f32 %r9, 0f00800000, 0f3F000000;": 0,
        "cvt.rzi.s32.f32 %r9, 0fC0200000;": 0xFFFFFFFE,
        "cvt.rn.bf16x2.f32 %r9, 0f3F808000, 0f3F818000;": 0x3F803F82,
        "cvt.rn.f16x2.f32 %r9, 0f3F800000, 0fC0000000;": 0x3C00C000,
        "setp.gtu.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r9, 7, 8, %p1;": 7,
        "setp.gt.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r9, 7, 8, %p1;": 8,
        "mov.b16 %h1, 3; mov.b16 %h2, 4; mov.b32 %r9, {%h1, %h2};": 0x40003,
    }
    for line, expected in lines.items():
        found = run(OUT_OF_LANE + line + "st.global.b32 [%d3], %r9; ret;")
        assert (found[:32] == expected).all(), (line, hex(found[0]))


def test_lanes_part_and_meet():
    """Each lane counts down from its number; the shuffle behind the loop takes all of them."""
    found = run(
        OUT_OF_LANE
        + """
        mov.b32 %r2, %r1;  mov.b32 %r3, 0;
    again:
        setp.eq.b32 %p1, %r2, 0;
        @%p1 bra done;
        add.s32 %r3, %r3, %r2;  sub.s32 %r2, %r2, 1;
        bra again;
    done:
        shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
        st.global.b32 [%d3], %r4;  ret;
    """
    )
    n = np.arange(32) ^ 1
    assert (found[:32] == n * (n + 1) // 2).all()


# A warp tells another one, which copies what it wrote.
HAND_OVER = (
    OUT_OF_LANE
    + """
    mov.b32 %r5, smem;
    setp.ge.u32 %p1, %r1, 32;
    @%p1 bra second;
    shl.b32 %r6, %r1, 2;  add.s32 %r6, %r6, %r5;
    mul.lo.s32 %r7, %r1, %r1;
    st.shared.b32 [%r6+64], %r7;
    FIRST
    ret;
second:
    SECOND
    shl.b32 %r6, %r1, 2;  add.s32 %r6, %r6, %r5;
    ld.shared.b32 %r7, [%r6+-64];
    st.global.b32 [%d3], %r7;  ret;
"""
)


@pytest.mark.parametrize("seed", range(8))
def test_warps_meet_at_a_barrier(seed):
    text = HAND_OVER.replace("FIRST", "bar.sync 1, 64;").replace("SECOND", "bar.sync 1, 64;")
    assert (run(text, 64, seed=seed)[32:] == np.arange(32) ** 2).all()


@pytest.mark.parametrize("seed", range(8))
def test_warps_meet_at_an_mbarrier(seed):
    wait = """
        setp.eq.b32 %p2, %r1, 32;
        @%p2 mbarrier.init.shared::cta.b64 [%r5], 32;
        bar.sync 1, 64;
    again:
        mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r5], 0;
        @!%p3 bra again;
    """
    first = "bar.sync 1, 64; mbarrier.arrive.shared::cta.b64 _, [%r5];"
    text = HAND_OVER.replace("FIRST", first).replace("SECOND", wait)
    assert (run(text, 64, seed=seed)[32:] == np.arange(32) ** 2).all()
    late = "setp.ne.b32 %p4, %r1, 0; bar.sync 1, 64; @%p4 mbarrier.arrive.shared::cta.b64 _, [%r5];"
    with pytest.raises(EmulationError, match="deadlock"):
        run(text.replace(first, late), 64, seed=seed)
    more = first.replace("[%r5]", "[%r5], 33")
    with pytest.raises(EmulationError, match="33 arrivals at an mbarrier that waits for 32 of 32"):
        run(text.replace(first, more), 64, seed=seed)


MISTAKES = {
    "a store of 4 bytes outside of every tensor": "st.global.b32 [%d3+256], %r1;",
    "a load of 8 bytes at .* not aligned": "ld.global.b64 %d4, [%d3+4];",
    "a load of 4 bytes at 1024 of 1024 bytes of shared memory": "ld.shared.b32 %r2, [smem+1024];",
    "a shuffle by some lanes": "shfl.sync.idx.b32 %r2, %r1, 1, 31, 1;",
    "lanes of a warp that wait for each other": (
        "setp.eq.b32 %p1, %r1, 0; @%p1 bra on; bar.warp.sync -1; bra off; on: bar.sync 0; off:"
    ),
    "1000 instructions": "again: bra again;",
    "32 threads at barrier 1 for 16": "bar.sync 1, 16;",
    "without a fence.proxy.async": "STAGE",
    "was written by warp 0 while an asynchronous operation reads it": "OVERTAKEN",
    "the end of a warp whose products": "UNFINISHED",
    "which warp 0 wrote, without": "FENCED TOO LATE",
    "written by warp 0 while": "COPIED TOO LATE",
    "is not known": "add.rz.f32 %r2, %r1, %r1;",
    "16 bytes at 1020 of 1024|not aligned": "cp.async.cg.shared.global [smem+1020], [%d1], 16;",
}
PRODUCT = """
    mov.b64 %d4, 0x0000000800000000;
    WRITE
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10, %r11, %r12, %r13}, %d4, %d4, 0, 1, 1,
        0, 0;
    wgmma.commit_group.sync.aligned;
    AFTER
"""
WAIT = "wgmma.wait_group.sync.aligned 0;"
WRITTEN = "st.shared.b32 [smem], %r1;"


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_refused(message):
    body = MISTAKES[message]
    copy = "cp.async.cg.shared.global [smem], [%d1], 16; cp.async.commit_group;"
    arrived = "cp.async.wait_group 0;"
    fence = "fence.proxy.async.shared::cta;"
    products = {  # what stands before the product and after it
        "STAGE": (WRITTEN, WAIT),
        "OVERTAKEN": ("", WRITTEN + WAIT),
        "UNFINISHED": ("", ""),
        "FENCED TOO LATE": (WRITTEN, fence + WAIT),
        "COPIED TOO LATE": (copy, arrived + WAIT),
    }
    if body in products:
        before, after = products[body]
        body = PRODUCT.replace("WRITE", before).replace("AFTER", after)
    with pytest.raises((EmulationError, NotImplementedError), match=message):
        run(OUT_OF_LANE + body + "ret;", limit=1000)


def test_a_fence_lets_the_product_read():
    fenced = WRITTEN + "fence.proxy.async.shared::cta;"
    run(OUT_OF_LANE + PRODUCT.replace("WRITE", fenced).replace("AFTER", WAIT) + "ret;")


def test_what_is_not_known_is_refused():
    with pytest.raises(NotImplementedError, match=r"PTX 'tcgen05.alloc"):
        run("tcgen05.alloc.cta_group::1.sync.aligned.b32 [smem], 32; ret;")


def in_a_process(words, **environment):
    """Output of a process without the interpreter; its last line is JSON."""
    path = os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# By the design of attention's forward and the bug of programs.PLANTED: what comes of it.
PLANTED = {
    "forward": {
        "wait for the copies": "wrong|while an asynchronous operation reads it",
        "wait for the products": "the end of a warp|while an asynchronous|wrong",
        "fence": "without a fence.proxy.async",
        "barrier": "wrong|while an asynchronous operation reads it",
    },
    "gluon": {
        "wait for the products": "the end of a warp|while an asynchronous|wrong",
        "arrival": "a deadlock|more than",
        "bytes": "wrong|while an asynchronous|TMA|deadlock",
        "fence": "without a fence.proxy.async",
        "wait for the store": "TMA stores were not waited for",
        "wait at a barrier": "wrong|while an asynchronous|mbarrier",
    },
}


def program(name, *arguments):
    """What a function of ptx_machine/programs.py gives."""
    code = f"from ptx_machine import programs; programs.{name}(*{arguments!r})"
    return json.loads(in_a_process(["-c", code]).splitlines()[-1])


COMPILED = pytest.mark.skipif(_triton.FAILURE is not None, reason=f"no Triton: {_triton.FAILURE}")


@COMPILED
def test_planted_bugs_are_found():
    """By the machine, or by the results."""
    found = program("planted")
    for kernel, expected in PLANTED.items():
        assert found[kernel].pop("nothing") is None
        assert found[kernel].keys() == expected.keys()
        for bug, words in expected.items():
            assert re.search(words, found[kernel][bug] or "right"), (
                kernel,
                bug,
                found[kernel][bug],
            )


@COMPILED
def test_a_training_step():
    """Of a small model, packed, with a window: 14 kernels, against the same model in C++ and ATen.

    An error is the distance from the gradient in fp32, of all weights together.
    """
    emulated, cpu = program("training_step", "sm_90"), program("training_step")
    assert len(emulated["launches"]) == 14 and not cpu["launches"]
    assert abs(emulated["loss"] - emulated["exact_loss"]) < 1e-3
    assert emulated["error"] < 1.5 * cpu["error"], (emulated, cpu)


@COMPILED
@pytest.mark.parametrize(("arch", "share"), [("sm_80", 40), ("sm_90", 60)])
def test_a_part_of_the_ops(arch, share):
    """Every so many of the tests that run on a GPU; `make emulate` runs all."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    chosen = {"STELLARATOR_EMULATED_GPU": arch, "STELLARATOR_EMULATED_SHARE": str(share)}
    out = in_a_process(words, **chosen)
    assert int(re.search(r"(\d+) passed", out)[1]) >= 15, out[-2000:]


def test_a_gpu_is_seen_before_triton_is_imported():
    """Else the tests of the ops would be interpreted there."""
    code = """if True:
        import torch
        torch.cuda.is_available = lambda: True
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        import grid
        from stellarator_kernels import _triton
        assert grid.NATIVE and not _triton.INTERPRETED, (grid.NATIVE, _triton.INTERPRETED)
    """
    in_a_process(["-c", code], TRITON_INTERPRET="1")
