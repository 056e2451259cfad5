"""Made-up points of a result file, and the verbs in a process of their own."""

import contextlib
import io
import os
import subprocess
import sys

from benchmarks import __main__, results
from benchmarks.points import UNTIMED

ENVIRONMENT = {
    "cpu": "a processor", "threads": 2, "isa": "avx2", "gpu": None, "cuda": None, "python": "3.11",
    "torch": "2.13.0", "triton": None, "numpy": "2", "commit": "abc1234", "dirty": False,
    "command": "python -m benchmarks run --op layer_norm", "date": "2026-11-21T00:00:00+00:00",
}  # fmt: skip
BUILT = {
    "kernel": "rope", "case": "starcoder2_3b", "arch": "sm_80", "registers": 40,
    "spill_bytes": 0, "shared_bytes": 100, "shared_limit": 1000,
    "instructions": {"ld.global.v4": 3}, "environment": ENVIRONMENT,
}  # fmt: skip


def point(ours_ms: list[float], peer_ms: list[float], **fields) -> dict:
    """A valid point whose times are these, one a turn."""
    found = UNTIMED | {
        "op": "layer_norm", "variant": "residual", "model": "tiny", "sizes": {"N": 64, "C": 32},
        "dtype": "bfloat16", "device": "cpu", "phase": "both", "impl": "cpu", "peer": "eager",
        "gbps": 2.0, "tflops": 0.01, "copy_share": 0.2, "matmul_share": 0.02,
        "flops_per_byte": 5.0, "peak_bytes": 2**20, "peer_peak_bytes": 2**22, "memory_ratio": 0.25,
        "errors": {"small": {"maximum": 1.1, "rms": 0.9, "where": "result 0", "limit": 2.0}},
        "clock": "wall", "limits": {"copy_gbps": 10.0, "matmul_tflops": 0.5},
        "quiet": {"quiet": True, "others": 0.0, "drift": 0.0}, "environment": ENVIRONMENT,
    } | results.timed(ours_ms, peer_ms)  # fmt: skip
    return found | fields


def called(*words: str) -> subprocess.CompletedProcess:
    """`python -m benchmarks ...` in this process, which has imported torch."""
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        try:
            code = __main__.main(list(words))
        except SystemExit as leaving:  # argparse
            code = leaving.code
    return subprocess.CompletedProcess(words, code, printed.getvalue(), told.getvalue())


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m benchmarks ...`."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        capture_output=True, text=True, timeout=280, env=os.environ | environment,
    )  # fmt: skip
