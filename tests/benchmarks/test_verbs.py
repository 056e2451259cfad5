"""The verbs run in small, as a user types them. Timings are not looked at."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_helpers import called, point, run

from benchmarks import cuda_builds, results


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
    command = f"python -m benchmarks run {words} {output}"
    assert {p["environment"]["command"] for p in points} == {command}
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| rope", "| grad_norm"))]
    assert len(rows) == len(points)
    assert re.search(r"copy [\d.]+ GB/s, matrix product [\d.]+ TFLOP/s", done.stdout)


def test_the_gpu_verb_without_a_gpu(tmp_path):
    output = tmp_path / "gpu.json"
    ops = {
        "flash_attention", "decode_attention", "rope", "layer_norm", "bias_gelu", "cross_entropy",
        "linear_cross_entropy", "adamw_", "grad_norm",
    }  # fmt: skip
    words = ["gpu", "--dry", "--op", ",".join(ops), "--output", str(output)]
    done = run(*words, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    points = results.read(str(output))
    assert {p["op"] for p in points if p["impl"] == "triton"} == ops
    assert all(set(p["environment"]["clocks"]) == {"before", "after"} for p in points)
    page = (tmp_path / "gpu.md").read_text()
    assert done.stdout == f"{page}\n{output} {tmp_path / 'gpu.md'}\n"
    assert {line.split()[1] for line in page.splitlines() if line.startswith("## ")} == {
        *(f"{op}:" for op in ops),
        "Wrong,",
    }
    assert "dry run" in page and "WRONG" not in page and "wrong: 0; without their turn: 0." in page


def test_the_gpu_verb_in_no_time(tmp_path):
    words = ["gpu", "--dry", "--op", "rope,grad_norm", "--seconds-total", "0.001"]
    done = run(*words, "--output", str(tmp_path / "gpu"), TRITON_INTERPRET="1")
    assert done.returncode == 1 and results.read(str(tmp_path / "gpu.json")) == []
    page = (tmp_path / "gpu.md").read_text()
    for name in ("rope, tiny, B 2 T 97 H 4 G 2 D 16", "grad_norm, tiny, n 10007"):
        assert f"- not measured: out of time: {name}\n" in page


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


@pytest.mark.skipif(not cuda_builds.NVCC, reason="no nvcc (NVCC, or on PATH)")
def test_the_compile_verb_lists_cuda_kernels(tmp_path):
    output = tmp_path / "compile.json"
    words = ["--kernel", "cuda squares", "--arch", "sm_90a", "--output", str(output)]
    done = run("compile", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    points = results.read(str(output))
    assert [(p["kernel"], p["case"], p["arch"]) for p in points] == [
        ("cuda squares", element, "sm_90a") for element in "ft"
    ]
    assert all(p["instructions"]["ld.global.v4"] >= 4 for p in points)


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
        ("train --width 65 --heads 2", 2, "width: expected a multiple of 2 heads"),
        ("train --heads 3 --kv-heads 2", 2, "num_kv_heads: expected a divisor"),
        ("train --output /nonexistent/a.json", 2, "/nonexistent/a.json"),
        ("data --vocab 10 --megabytes 0.1", 2, "expected vocab_size in"),
        ("data --length 1 --megabytes 0.1 --vocab 400", 2, "expected seq_length >= 16"),
        ("run --op= --small", 2, "--op: expected some of"),
        ("run --op rope --small --window 4", 2, "--small: expected no --tokens, --rows or"),
        ("gpu --dry --tokens 8", 2, "--small: expected no --tokens, --rows or"),
        ("gpu --dry --dtype bfloat16", 2, "--dry: expected no --device, --dtype or --model"),
        ("gpu --dry --op rope --output /proc/points", 2, "--output: expected files that can be"),
        ("plot FILE --folder /proc/page", 2, "--folder: expected one that can be written"),
        ("plot FILE --folder FILE", 2, "--folder: expected one that can be written"),
        ("plot FILE --folder FILE/page", 2, "--folder: expected one that can be written"),
        ("collectives --ranks 1", 2, "--ranks: expected at least 2"),
        ("overlap --case tp", 2, "--case: expected some of"),
        ("overlap --trace /nonexistent/a.json", 2, "--trace: expected a file that can be"),
        ("walk", 2, "invalid choice: 'walk'"),
        ("", 2, "required: VERB"),
    ],
)
def test_mistakes_of_use(tmp_path, monkeypatch, words, code, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "points.json"
    path.write_text(json.dumps(point([1], [1])) + "\n")
    done = called(*words.replace("FILE", str(path)).split())
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
    if "VERB" not in done.stderr:  # argparse adds the usage
        assert "usage: " in done.stderr or done.stderr.count("\n") == 1, done.stderr


def test_mistakes_of_use_in_a_process_of_its_own():
    """The verb `compile` takes the interpreter away before it imports Triton."""
    done = run("compile", "--kernel", "zzz")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--kernel: expected the beginning of adamw_," in done.stderr


@pytest.mark.parametrize("verb", ["run --op rope --small", "train --rows 1 --length 16"])
def test_an_instruction_set_that_is_none(verb):
    done = run(*verb.split(), STELLARATOR_ISA="foo")
    assert done.returncode == 2 and "expected STELLARATOR_ISA in" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_that_measured_nothing_fails():
    words = "run --op rope --model tiny --small --impl triton --repeats 1"
    done = run(*words.split(), TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "Nothing was measured" in done.stdout


@pytest.mark.parametrize("verb", ["run", "compare", "gate"])
def test_an_output_that_takes_nothing(tmp_path, verb):
    """`| true`, and a disk that is full: one line at most, and no traceback."""
    path = tmp_path / "points.json"
    path.write_text(json.dumps(point([1], [1])) + "\n")
    words = {
        "run": ["--op", "grad_norm", "--model", "tiny", "--small", "--repeats", "1"],
        "compare": [str(path), str(path)],
        "gate": [str(path)],
    }
    command = [sys.executable, "-m", "benchmarks", verb, *words[verb]]
    closed, pipe = os.pipe()
    os.close(closed)
    for target, most in ((open("/dev/full", "w"), 1), (os.fdopen(pipe, "w"), 0)):
        done = subprocess.run(command, stdout=target, stderr=subprocess.PIPE, text=True, timeout=60)
        lines = [line for line in done.stderr.splitlines() if "100% done" not in line]
        assert done.returncode == 1 and len(lines) <= most, done.stderr
        with contextlib.suppress(OSError):
            target.close()


def heeding_sigint():
    """In a job of a shell's background SIGINT is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_leaves_the_points_that_are_done(tmp_path):
    output = tmp_path / "run.json"
    words = "run --model tiny --small --dtype float32 --repeats 100000 --seconds 3 --output"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *words.split(), str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding_sigint,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    points = results.read(str(output))
    assert points and errors.splitlines()[-3:] == [
        f"{output}: the {len(points)} points so far",
        "",
        "stopped",
    ]


def test_ctrl_c_within_an_exec_of_text_ends_as_elsewhere(tmp_path):
    """Imports are full of such exec: every dataclass is one."""
    (tmp_path / "torch.py").write_text("exec('raise KeyboardInterrupt')\n")
    done = run("run", "--model", "tiny", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


def test_ctrl_c_without_points_promises_none(tmp_path):
    """In the middle of the imports, too: right after torch's library was loaded."""
    for wait in (0.0, 0.7):
        words = ["run", "--model", "starcoder2_3b", "--output", str(tmp_path / "run.json")]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding_sigint,
        )  # fmt: skip
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while "libtorch" not in maps.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130 and errors == "\nstopped\n"
