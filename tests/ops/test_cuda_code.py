"""The CUDA kernels compiled for sm_80, sm_90a and sm_100, where there is an nvcc.

Gates: no register is spilled and a block's fit the GPU, memory is moved by 16 bytes, nothing is
added by atomics, and AdamW has no contracted a * b + c, on which the equality of its bits rests.
Not covered: that they run (test_cuda.py runs them on a CPU), or how fast.
"""

import re

import pytest

from benchmarks import cuda_builds

pytestmark = pytest.mark.skipif(not cuda_builds.NVCC, reason="no nvcc (NVCC, or on PATH)")
THREADS = {"adamw": 256, "squares": 256, "total": 1024}
THREADS |= {"layer_norm_forward": 768, "layer_norm_backward": 768, "layer_norm_partials": 256}
THREADS |= {"embedding_chunks": 128, "embedding_parts": 256}
CASES = {("adamw", f"{grad}Lb{master}") for grad in "ft" for master in (0, 1)}
CASES |= {("squares", "f"), ("squares", "t"), ("total", "")}
ROWS = [f"{element}Lb{aligned}" for element in "ft" for aligned in (0, 1)]
CASES |= {(f"layer_norm_{phase}", case) for phase in ("forward", "backward") for case in ROWS}
CASES |= {("layer_norm_partials", "f"), ("layer_norm_partials", "t")}
CASES |= {("embedding_chunks", f"{t}Lb{aligned}") for t in ("ff", "tf", "tt") for aligned in (0, 1)}
CASES |= {("embedding_parts", "f"), ("embedding_parts", "t")}


@pytest.fixture(scope="module")
def points():
    return [p for source in cuda_builds.sources() for p in cuda_builds.compile_file(source)]


def test_every_kernel_is_compiled_for_every_gpu(points):
    found = [(p["kernel"], p["case"], p["arch"]) for p in points]
    assert sorted(found) == sorted((*c, a) for c in CASES for a in cuda_builds.ARCHITECTURES)
    assert all(p["ptx"].count(".entry") == 1 for p in points)


def test_no_spills_and_registers_fit(points):
    for p in points:
        assert p["spill_bytes"] == 0, p
        # Several blocks on each multiprocessor, but of the largest.
        blocks = {768: 2 if p["kernel"] == "layer_norm_forward" else 1, 1024: 1}
        blocks = blocks.get(THREADS[p["kernel"]], 4)
        assert 0 < p["registers"] * THREADS[p["kernel"]] * blocks <= 65536, p


def test_instructions(points):
    for p in points:
        ptx, kernel = p["ptx"], p["kernel"]
        assert not re.search(r"\b(atom|red)\.", ptx), p
        loads, stores = (ptx.count(f"{x}.global.v4.f32") for x in ("ld", "st"))
        if kernel == "adamw":
            # Two of each array: m, v, w and the gradient; what is bfloat16 goes by eight bytes.
            has_wide_grad, has_master = p["case"][0] == "f", p["case"].endswith("1")
            assert (loads, stores) == (8 if has_wide_grad else 6, 6), p
            assert "st.global.u32" not in ptx, p
            assert ptx.count("st.global.u16") <= 5 * has_master, p  # of the loop for the ends
            assert "fma.rn.f32" not in ptx and "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx
        if kernel == "embedding_chunks" and p["case"].endswith("1"):  # four rows under way
            assert len(re.findall(r"ld\.global\.(?:nc\.)?v4\.", ptx)) >= 4, p
            assert len(re.findall(r"st\.global\.v4\.", ptx)) >= 3, p
        if kernel.startswith("layer_norm_") and p["case"].endswith("1"):
            # Rows go by 16 bytes: what is read, some of it for the row behind too, and written.
            assert len(re.findall(r"ld\.global\.(?:nc\.)?v4\.", ptx)) >= 4, p
            assert len(re.findall(r"st\.global\.v4\.", ptx)) >= 1, p
        if kernel == "squares":  # several under way, of 16 bytes or, on sm_100, perhaps 32
            assert len(re.findall(r"ld\.global\.(?:nc\.)?v[48]\.", ptx)) >= 4, p


GREEDY = """
__global__ void __launch_bounds__(1024) greedy_kernel(const float* x, float* y) {
    float values[256];
#pragma unroll
    for (int i = 0; i < 256; ++i) values[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 256; ++i) y[i * 1024 + threadIdx.x] = values[i] * values[255 - i];
}
"""


def test_spills_are_seen(tmp_path):
    """256 values in each of 1,024 threads, which have 64 registers."""
    (tmp_path / "greedy.cu").write_text(GREEDY)
    (point,) = cuda_builds.compile_file(tmp_path / "greedy.cu", ("sm_80",))
    assert point["spill_bytes"] > 0 and point["kernel"] == "greedy"
