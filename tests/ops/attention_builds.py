"""The attention kernels compiled for GPUs that are not here, by the Triton that is asked for.

Run as a program, in a process without the interpreter, it prints the Triton that compiled and what
came out of each build that its input asks for.

defines: BUILDS, compile_all, check
"""

import itertools
import json
import os
import re
import subprocess
import sys

import torch

from stellarator_kernels.testing import compile_kernel, shared_memory_limit

FLOATS = ("lse", "dlse", "delta")
INTS = ("bounds", "row_key", "column_key", "turn")
NUMBERS = ("scale", "softcap", "keep_scale")
H = 24

# phase, head width, compute capability, packed, key/value heads; softcap, dropout, tiles
BUILDS = [
    (phase, D, capability, phase == "dkdv" and D == 64, 2)
    for capability in ((8, 0), (9, 0))
    for D in (64, 128, 256)
    if (D, capability) != (256, (9, 0))  # to save time: as sm_80, by hand
    for phase in ("forward", "dq", "dkdv")
]
# Widths that are filled up: odd multiples of 8, whose strides are not multiples of 16, and others.
BUILDS += [(phase, 72, (9, 0), False, 2) for phase in ("forward", "dq", "dkdv")]
BUILDS += [("forward", 136, (9, 0), False, 2), ("dkdv", 96, (9, 0), False, 2)]
BUILDS += [
    ("dkdv", 48, (8, 0), False, 2),
    ("dkdv", 80, (8, 0), False, 2),
    ("dq", 48, (8, 0), False, 2),
]
# StarCoder's one key/value head; and one for each query head.
BUILDS += [(phase, 128, (9, 0), False, G) for G in (1, 24) for phase in ("forward", "dq", "dkdv")]
# Five products.
BUILDS += [
    (phase, D, capability, False, 2)
    for capability in ((8, 0), (9, 0), (10, 0))
    for D in (64, 128)
    for phase in ("ordered", "atomic")
]
# Softcap and dropout.
BUILDS += [
    (phase, 128, capability, False, 2, *flags)
    for capability in ((8, 0), (9, 0))
    for flags in ((True, False), (False, True))
    for phase in ("forward", "dq", "dkdv")
]
# What `stellarator tune` races on sm_90: descriptors, and warps of their own for loads.
RACED = [
    (phase, D, (9, 0), packed, 2, False, False, launch)
    for phase, D, packed, launch in (
        ("forward", 64, False, (128, 128, 4, 2, 1, 1)),
        ("forward", 128, False, (128, 128, 4, 2, 1, 1)),
        ("forward", 256, False, (128, 32, 4, 2, 1, 1)),
        ("forward", 128, True, (128, 128, 8, 2, 1, 0)),
        ("dq", 64, False, (64, 64, 4, 2, 1, 1)),
        ("dq", 128, True, (64, 64, 4, 2, 1, 1)),
        ("dq", 128, False, (128, 64, 8, 2, 1, 0)),
        ("dkdv", 128, False, (64, 64, 8, 2, 1, 0)),
        ("ordered", 128, True, (64, 32, 8, 2, 1, 0)),
    )
]
BUILDS += RACED


def compile_all(builds: list[tuple], triton: str | None = None) -> tuple[str, list[dict]]:
    """The version of Triton, and what came out of each build, from a process of its own.

    Args:
        triton: folder of the Triton to compile with; None: the installed one.
    """
    path = [*([triton] if triton else []), *sys.path]
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(builds),
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    version, found = json.loads(done.stdout)
    assert len(found) == len(builds)
    return version, found


def check(build: tuple, found: dict) -> None:
    """It spills no register, fits in shared memory, and uses the instructions of its GPU."""
    phase, D, capability, *rest = build
    assert found["spills"] == 0, (build, found)
    # The tiles of sm_80 serve sm_86 too, which has less.
    limit = shared_memory_limit((8, 6) if capability == (8, 0) else capability)
    assert found["shared"] <= limit, (build, found)
    if D < 256:  # at 256, 99 KB hold one stage only
        assert found["async"] > 0, (build, found)  # loads run ahead of the products
    if capability < (10, 0):
        assert found["wgmma" if capability == (9, 0) else "mma"] > 0, (build, found)
    if phase == "ordered":  # waits, then reads the sums, then says that they are written
        turns = [name for name, _ in itertools.groupby(found["turns"])]
        once = ["ld.acquire", "ld.global.cg", "red.release"]
        assert turns and turns == once * (len(turns) // 3), (build, turns)
    if len(rest) == 5:
        specialized = rest[-1][-1]
        assert found["bulk"] > 0, (build, found)
        # Four warps load, twice four compute; without it the launch stays as it is.
        assert found["warps"] == (12 if specialized else rest[-1][2]), (build, found)
        assert (found["setmaxnreg"] > 0) == bool(specialized), (build, found)


def describe(
    phase: str,
    D: int,
    capability: tuple[int, int],
    packed: bool,
    G: int,
    softcap: bool = False,
    dropout: bool = False,
    launch: tuple[int, ...] | None = None,
) -> dict:
    """What the compiler makes of one build; for a process without the interpreter."""
    from stellarator_kernels.attention import backward, forward, tiles

    kernels = {"forward": forward._forward_kernel, "dq": backward._dq_kernel}
    kernel = kernels.get(phase, backward._dkdv_kernel)
    five = phase in ("ordered", "atomic")  # products instead of seven
    chosen = tiles.tile_sizes(
        "dqdkdv" if five else phase, D, torch.bfloat16, capability, softcap, dropout
    )
    if launch is not None:
        chosen = tiles.Tiles(*launch)
    values = tiles.constants(D, torch.bfloat16, chosen)
    options = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    values.update(CAUSAL=True, WINDOW=True, PACKED=packed, SOFTCAP=softcap, DROPOUT=dropout)
    if kernel is backward._dkdv_kernel:
        values.update(DESIGN=backward.DESIGNS[phase if five else "split"], INTERPRETED=False)
        values["TURNED"] = tiles.turns_dq(chosen.step, capability)
    if H == G:
        values["group"] = 1  # a launch compiles an integer argument of 1 as a constant
    types = {}
    for name in kernel.arg_names:
        stem = name.removesuffix("_ptr")
        if name == "HAS_DLSE":
            values[name] = False
        elif name.endswith("_ptr"):
            fp32 = stem in FLOATS or (stem == "dq" and five)
            types[name] = "*i32" if stem in INTS else "*fp32" if fp32 else "*bf16"
        elif "_stride_" in name:  # as a launch describes those of q, k, v out of one projection
            kind = name.split("_")[-1]
            stride = ({"batch": 4096, "row": 1, "head": 0}[kind] * (H + 2 * G) * D or D) // 8
            types[name] = "i32:16" if stride % 16 == 0 else "i32"
        elif name not in values:
            types[name] = "fp32" if name in NUMBERS else "i32"
    built = compile_kernel(kernel, types, values, capability, **options)
    return {
        "shared": built.shared_bytes,
        "spills": built.spill_bytes,
        "wgmma": built.ptx.count("wgmma.mma_async"),
        "mma": built.ptx.count("mma.sync"),
        "bulk": built.ptx.count("cp.async.bulk.tensor"),
        "setmaxnreg": built.ptx.count("setmaxnreg"),
        "warps": built.num_warps,
        "async": built.ptx.count("cp.async"),
        "turns": re.findall(r"ld[.]acquire|ld[.]global[.]cg|red[.]release", built.ptx),
    }


if __name__ == "__main__":
    import triton

    results = [describe(phase, D, tuple(c), *rest) for phase, D, c, *rest in json.load(sys.stdin)]
    json.dump([triton.__version__, results], sys.stdout)
