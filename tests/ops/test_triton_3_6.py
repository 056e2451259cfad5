"""The attention kernels compile with Triton 3.6 too, the oldest that is supported.

`make test` installs it beside the environment, without its dependencies, and says where by
STELLARATOR_TRITON_3_6; with that set, nothing here is skipped. A part of the builds of
test_flash_attention_code.py and all decode kernels, held to the same gates. Not covered: Triton
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


def test_flash_attention():
    version, found = compile_all(BUILDS, triton=FOLDER)
    assert version.startswith("3.6."), f"{FOLDER} has Triton {version}"
    for build, one in zip(BUILDS, found, strict=True):
        check(build, one)


def test_decode_attention(tmp_path):
    output = tmp_path / "points.json"
    words = ["compile", "--kernel", "decode_attention", "--output", str(output)]
    path = os.pathsep.join([FOLDER, *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    points = [json.loads(line) for line in output.read_text().splitlines()]
    assert {p["arch"] for p in points} == {"sm_80", "sm_90a", "sm_100"}
    for p in points:
        assert p["environment"]["triton"].startswith("3.6."), p
        assert p["spill_bytes"] == 0 and p["shared_bytes"] <= p["shared_limit"], p
