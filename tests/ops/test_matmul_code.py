"""The products in Triton compiled for GPUs that are not here, by both Tritons that are supported.

`python -m benchmarks compile` builds them at widths without a rest; its gates are here too: no
register is spilled, shared memory fits, the matrix instruction of the GPU is there, and operands
come in whole loads that run ahead of the products. Here beside them: widths with a rest, whose
strides are no multiples of 16. Triton 3.6 where STELLARATOR_TRITON_3_6 says, as in
test_triton_3_6.py. Not covered: that they run, or how fast.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from stellarator_kernels import matmul
from stellarator_kernels.testing import shared_memory_limit

pytest.importorskip("triton")

OLDEST = os.environ.get("STELLARATOR_TRITON_3_6")
CAPABILITIES = ((8, 0), (9, 0), (10, 0))
COPIES = re.compile(r"cp\.async\.c[ag]\S* [^;]*?0x(\w+)")
PERSISTENT = {"tma": 1, "persistent": 1}
# phase, capability, the inner width has a rest, what differs from the tiles without a table
BUILDS = [(phase, c, True, {}) for phase in matmul.PHASES for c in CAPABILITIES]
BUILDS += [(phase, c, False, PERSISTENT) for phase in matmul.PHASES for c in CAPABILITIES[1:]]
BUILDS += [(phase, (9, 0), False, PERSISTENT | {"flatten": 1}) for phase in matmul.PHASES]
BUILDS += [(phase, (9, 0), False, {}) for phase in matmul.PHASES]
# What `stellarator tune` says of tiles (rows, cols, depth, num_warps, num_stages, parts), sm_90.
REFUSALS = {
    (128, 256, 64, 8, 4, 1): r"spills \d+ bytes",
    (128, 128, 64, 4, 8, 4): "takes 262144 bytes of shared memory, of 232448",
    (96, 128, 64, 4, 3, 4): "does not compile: CompilationError",
    (128, 256, 64, 8, 4, 8): None,
}


def describe(phase: str, capability: tuple[int, int], rest: bool, other: dict) -> dict:
    """What the compiler makes of one build; for a process without the interpreter."""
    from stellarator_kernels import tuning_matmul

    tiles = matmul.tile_sizes(phase, torch.bfloat16, capability)
    tiles = matmul.Tiles(**(vars(tiles) | other))
    shape = tuning_matmul.Shape(8192 + 8 * rest, 3072 + 8 * rest, 12288 + 8 * rest)
    built = tuning_matmul.compiled(phase, tiles, shape, capability)
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
    version, found, refusals = json.loads(done.stdout)
    assert triton is None or version.startswith("3.6."), version
    for build, made in zip(BUILDS, found, strict=True):
        _, capability, _, other = build
        assert made["spills"] == 0, (build, made)
        # The tiles of sm_80 serve sm_86 too, which has less.
        limit = shared_memory_limit((8, 6) if capability == (8, 0) else capability)
        assert made["shared"] <= limit, (build, made)
        assert made[{8: "mma", 9: "wgmma", 10: "tcgen05"}[capability[0]]] > 0, (build, made)
        if other:
            assert made["bulk"] > 0 and not made["copies"], (build, made)
        else:
            assert made["copies"] == [16], (build, made)
    for expected, said in zip(REFUSALS.values(), refusals, strict=True):
        assert said == expected or re.fullmatch(expected, said), (expected, said)


def refused(tiles: tuple[int, ...]) -> str | None:
    """Of the down gradient; for a process without the interpreter."""
    from stellarator_kernels import tuning_matmul

    shape = tuning_matmul.Shape(8192, 3072, 12288)
    return tuning_matmul.refusal("down gradient", matmul.Tiles(*tiles), shape, (9, 0))


if __name__ == "__main__":
    import triton

    torch.set_num_threads(1)
    made = [describe(*build) for build in BUILDS], [refused(tiles) for tiles in REFUSALS]
    json.dump([triton.__version__, *made], sys.stdout)
