"""The products in Triton compiled for GPUs that are not here, by both Tritons that are supported.

`python -m benchmarks compile` builds them at widths without a rest; its gates are here too: no
register is spilled, shared memory fits, the matrix instruction of the GPU is there, and operands
come in whole loads that run ahead of the products. Here beside them: widths with a rest, whose
strides are no multiples of 16. Triton 3.6 where STELLARATOR_TRITON_3_6 says, as in
test_triton_3_6.py. Not covered: that they run, or how fast.
"""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from stellarator_kernels import matmul
from stellarator_kernels.testing import compile_kernel, shared_memory_limit

pytest.importorskip("triton")

OLDEST = os.environ.get("STELLARATOR_TRITON_3_6")
CAPABILITIES = ((8, 0), (9, 0), (10, 0))
COPIES = re.compile(r"cp\.async\.c[ag]\S* [^;]*?0x(\w+)")
# phase, capability, the inner width has a rest, descriptors and persistent
BUILDS = [(phase, c, True, False) for phase in matmul.PHASES for c in CAPABILITIES]
BUILDS += [(phase, c, False, True) for phase in matmul.PHASES for c in CAPABILITIES[1:]]
BUILDS += [(phase, (9, 0), False, False) for phase in matmul.PHASES]


def describe(phase: str, capability: tuple[int, int], rest: bool, descriptors: bool) -> dict:
    """What the compiler makes of one build; for a process without the interpreter."""
    names = ("mlp", "weight_gradient")
    mlp, other = (importlib.import_module(f"stellarator_kernels.{name}") for name in names)
    kernel = {
        "up": mlp._up_kernel,
        "down gradient": mlp._down_gradient_kernel,
        "weight gradient": other._weight_gradient_kernel,
    }[phase]
    tiles = matmul.tile_sizes(phase, torch.bfloat16, capability)
    if descriptors:
        tiles = matmul.Tiles(**(vars(tiles) | {"tma": 1, "persistent": 1}))
    values = matmul.constants(torch.bfloat16, tiles.depth + 8 * rest, tiles)
    launch = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    flags = ("HAS_BIAS", "TANH", "STORE_Y", "STORE_PRE")
    values |= {name: True for name in flags if name in kernel.arg_names}
    pointers = {n for n in kernel.arg_names if n.endswith("_ptr")}
    types = {n: "i32" if rest else "i32:16" for n in kernel.arg_names if n not in values}
    types |= {n: "*fp32" if n in ("dbias_ptr", "total_ptr") else "*bf16" for n in pointers}
    built = compile_kernel(kernel, types, values, capability, **launch)
    return {
        "spills": built.spill_bytes,
        "shared": built.shared_bytes,
        "mma": built.ptx.count("mma.sync"),
        "wgmma": built.ptx.count("wgmma.mma_async"),
        "tcgen05": built.ptx.count("tcgen05.mma"),
        "bulk": built.ptx.count("cp.async.bulk.tensor"),
        "copies": sorted({int(size, 16) for size in COPIES.findall(built.ptx)}),
    }


@pytest.mark.parametrize(
    "triton",
    [
        None,
        pytest.param(
            OLDEST,
            marks=pytest.mark.skipif(
                OLDEST is None, reason="STELLARATOR_TRITON_3_6 is not set; `make test` sets it"
            ),
            id="3.6",
        ),
    ],
)
def test_every_build(triton):
    path = os.pathsep.join([*([triton] if triton else []), *sys.path])
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    version, found = json.loads(done.stdout)
    assert triton is None or version.startswith("3.6."), version
    for build, made in zip(BUILDS, found, strict=True):
        _, capability, _, descriptors = build
        assert made["spills"] == 0, (build, made)
        # The tiles of sm_80 serve sm_86 too, which has less.
        limit = shared_memory_limit((8, 6) if capability == (8, 0) else capability)
        assert made["shared"] <= limit, (build, made)
        assert made[{8: "mma", 9: "wgmma", 10: "tcgen05"}[capability[0]]] > 0, (build, made)
        if descriptors:
            assert made["bulk"] > 0 and not made["copies"], (build, made)
        else:
            assert made["copies"] == [16], (build, made)


if __name__ == "__main__":
    import triton

    torch.set_num_threads(1)
    json.dump([triton.__version__, [describe(*build) for build in BUILDS]], sys.stdout)
