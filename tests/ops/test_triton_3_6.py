"""The kernels compile with Triton 3.6 too, the oldest that is supported.

`make test` installs it beside the environment, without its dependencies, and says where by
STELLARATOR_TRITON_3_6; with that set, nothing here is skipped. Attention: a part of the builds of
test_flash_attention_code.py, held to the same gates. The others, but for the products of the MLP
(test_matmul_code.py): builds of `python -m benchmarks compile`, held to its gates. Run as a
program, in a process without the interpreter, it prints what came out of them. Not covered: Triton
3.6's interpreter, which needs an older NumPy; the other builds (`python -m benchmarks compile` with
that folder first on PYTHONPATH).
"""

import json
import os
import subprocess
import sys

import pytest
from attention_builds import RACED, check, compile_all

FOLDER = os.environ.get("STELLARATOR_TRITON_3_6")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="STELLARATOR_TRITON_3_6 is not set; `make test` installs it and sets it"
)
BUILDS = [
    ("forward", 128, (8, 0), True, 2),
    ("dq", 128, (8, 0), False, 2),
    ("dkdv", 64, (8, 0), True, 2),
    *((phase, 128, (9, 0), True, 2) for phase in ("forward", "dq", "dkdv")),
    ("dkdv", 128, (9, 0), False, 1),  # StarCoder's one key/value head
    ("forward", 72, (9, 0), False, 2),  # filled up, strides that are not multiples of 16
    ("forward", 128, (9, 0), False, 2, True, False),  # softcap
    ("dq", 128, (9, 0), False, 2, False, True),  # dropout
    *((phase, 128, (10, 0), False, 2) for phase in ("forward", "ordered", "atomic")),
    ("ordered", 128, (8, 0), False, 2),
    ("ordered", 128, (9, 0), False, 2),
    *RACED,
]
ELSEWHERE = {  # kernels that other tests compile with this Triton
    "_dkdv_kernel", "_dq_kernel", "_forward_kernel",
    "_up_kernel", "_down_gradient_kernel", "_weight_gradient_kernel",
}  # fmt: skip
ON_ALL = ("decode_attention", "layer_norm backward")  # the others on sm_90a only, to save time
# Of decode attention all are compiled, of the others the case with the most registers.
LEFT_OUT = ("starcoder2_3b", "starcoder2_15b", "head 64, window", "head 128, window")


def test_flash_attention():
    version, found = compile_all(BUILDS, triton=FOLDER)
    assert version.startswith("3.6."), f"{FOLDER} has Triton {version}"
    for build, one in zip(BUILDS, found, strict=True):
        check(build, one)


def test_every_other_kernel():
    from benchmarks import gates

    path = os.pathsep.join([FOLDER, *sys.path])
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    version, forgotten, points = json.loads(done.stdout)
    assert version.startswith("3.6."), f"{FOLDER} has Triton {version}"
    assert {name.rpartition(".")[2] for name in forgotten} == ELSEWHERE
    assert {p["arch"] for p in points} == {"sm_80", "sm_90a", "sm_100"}
    for p in points:
        assert p["spill_bytes"] == 0 and p["shared_bytes"] <= p["shared_limit"], p
    verdicts = gates.judge(gates.load()["compile"], points)
    assert [v for v in verdicts if not v.passed and v.found != "no such point"] == []
    assert sum(v.passed for v in verdicts) > len({p["kernel"] for p in points})


def builds() -> list:
    """(architecture, build): all kernels but those of ELSEWHERE."""
    from benchmarks import bench_compile

    found = []
    for arch, capability in bench_compile.ARCHITECTURES.items():
        for build in bench_compile.builds(capability):
            decode = build.kernel.startswith("decode_attention")
            kept = decode or build.case.removesuffix(", dropout") not in LEFT_OUT
            wanted = arch == "sm_90a" or build.kernel.startswith(ON_ALL)
            if build.function.fn.__name__ not in ELSEWHERE and kept and wanted:
                found.append((arch, build))
    return found


if __name__ == "__main__":
    import triton

    from benchmarks import bench_compile

    todo = builds()
    points = [bench_compile.compile_build(build, arch, {}) for arch, build in todo]
    missing = bench_compile.forgotten([build for _, build in todo])
    json.dump([triton.__version__, missing, points], sys.stdout)
