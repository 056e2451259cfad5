"""The verbs run in small, as a user types them. Timings are not looked at."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from benchmark_helpers import run

from benchmarks import results


def test_training_step_beside_transformers(tmp_path):
    sizes = "--layers 1 --width 64 --heads 2 --kv-heads 1 --vocab 300 --rows 2 --length 32"
    output = tmp_path / "train.json"
    done = run("train", *sizes.split(), "--repeats", "1", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| stellarator " in done.stdout and "| transformers eager " in done.stdout
    (point,) = results.read(str(output))
    assert point["op"] == "training_step" and point["peer"] == "transformers eager"
    assert point["memory_ratio"] > 0 and point["ratio"] > 0


def test_a_run_writes_the_points_that_it_prints(tmp_path):
    output = tmp_path / "run.json"
    words = "--op rope,grad_norm --model tiny --dtype float32 --repeats 2 --small --output"
    done = run("run", *words.split(), str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    points = results.read(str(output))
    assert {p["op"] for p in points} == {"rope", "grad_norm"}
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| rope", "| grad_norm"))]
    assert len(rows) == len(points)
    assert re.search(r"copy [\d.]+ GB/s, matrix product [\d.]+ TFLOP/s", done.stdout)


def test_the_gpu_verb_without_a_gpu(tmp_path):
    output = tmp_path / "gpu.json"
    done = run("gpu", "--dry", "--output", str(output), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    points = results.read(str(output))
    assert {p["op"] for p in points if p["impl"] == "triton"} >= {
        "flash_attention", "rope", "layer_norm", "bias_gelu", "cross_entropy",
        "linear_cross_entropy", "adamw_", "grad_norm",
    }  # fmt: skip


def test_the_data_path_beside_plain_code(tmp_path):
    output = tmp_path / "data.json"
    words = "--megabytes 0.3 --vocab 400 --length 128 --repeats 1 --output"
    done = run("data", *words.split(), str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    points = results.read(str(output))
    assert len(points) == 7 and all(p["ratio"] > 0 for p in points)


def test_the_compile_verb_and_its_gates(tmp_path):
    output = tmp_path / "compile.json"
    done = run("compile", "--kernel", "rope", "--output", str(output), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    points = results.read(str(output))
    assert {(p["kernel"], p["arch"]) for p in points} == {
        ("rope", arch) for arch in ("sm_80", "sm_90a", "sm_100")
    }
    assert all(p["registers"] > 8 and p["instructions"]["ld.global.v4"] for p in points)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("run --op rope_", 2, "--op: expected some of"),
        ("run --model starcodr2_3b", 2, "Did you mean 'starcoder2_3b'"),
        ("run --device cuda", 2, "expected a GPU"),
        ("run --op rope --impl fast", 2, "--impl: expected some of"),
        ("run --op rope --peers nobody", 2, "--peers: expected some of"),
        ("run --tokens 0", 2, "--tokens: expected a whole number"),
        ("run --repeats 0", 2, "--repeats: expected a whole number"),
        ("run --op rope --output /nonexistent/a.json", 2, "/nonexistent/a.json"),
        ("train --peers fast", 2, "--peers: expected some of"),
        ("compile --arch sm_75", 2, "--arch: expected some of"),
        ("gate --set nobody", 2, "--set: expected some of"),
        ("walk", 2, "invalid choice: 'walk'"),
        ("", 2, "required: VERB"),
    ],
)
def test_mistakes_of_use(words, code, message):
    done = run(*words.split(), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_leaves_the_points_that_are_done(tmp_path):
    output = tmp_path / "run.json"
    words = "run --model tiny --small --dtype float32 --repeats 100000 --seconds 3 --output"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *words.split(), str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert [json.loads(line)["op"] for line in output.read_text().splitlines()]
