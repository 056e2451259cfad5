"""`python -m benchmarks compile`: every kernel for GPUs compiled for some that are not here.

For each kernel at the widths of StarCoder2 and for each architecture: registers of a thread, bytes
of spilled registers, shared memory of a block beside what the GPU has, and how often the matrix and
copy instructions stand in the code. What a launch would pass is described by the table below; a
kernel of stellarator_kernels that is not in it is an error, so that none is forgotten. Those of
csrc/cuda, named `cuda ...`, are in the list where there is an nvcc.
"""

import argparse
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import cuda_builds, results, shapes
from benchmarks.harness import environment
from benchmarks.usage import UsageError, one_of
from stellarator.progress import Progress

ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100": (10, 0)}
INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05.mma": r"\btcgen05\.mma",
    "cp.async": r"\bcp\.async\.(ca|cg)",
    "cp.async.bulk": r"\bcp\.async\.bulk",
    "ld.global.v4": r"\bld\.global\S*\.v4",
    "st.global.v4": r"\bst\.global\S*\.v4",
}
_MODELS = ("starcoder2_3b", "starcoder2_7b", "starcoder2_15b")
# Arguments by name; every other pointer is bf16.
_FP32 = {
    "mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr", "cos_ptr", "sin_ptr", "dloss_ptr",
    "loss_ptr", "lse_ptr", "dlse_ptr", "delta_ptr", "weight_ptr:adamw", "grad_ptr", "exp_avg_ptr",
    "exp_avg_sq_ptr", "clip_ptr", "factors_ptr", "part_ptr", "out_ptr:decode",
    "largest_ptr", "total_ptr", "picked_ptr", "exp_avg_scale_ptr", "exp_avg_sq_scale_ptr",
}  # fmt: skip
_OTHERS = {
    "targets_ptr": "*i64", "bounds_ptr": "*i32", "row_key_ptr": "*i32", "column_key_ptr": "*i32",
    "turn_ptr": "*i32",
    "lengths_ptr": "*i64", "ids_ptr": "*i64", "positions_ptr": "*i64", "order_ptr": "*i64",
    "starts_ptr": "*i64", "ends_ptr": "*i64",
    "key_ptr": "*i64", "first_index": "i64", "remainder_ptr": "*i16",
    "sums_ptr:norm": "*fp64", "x_ptr:norm": "*fp32",
}  # fmt: skip
_FLOAT_NUMBERS = {
    "eps", "z_loss", "scale", "decay", "step_size", "root_correction", "beta1_rest", "beta2",
    "beta2_rest", "softcap", "keep_scale", "scale_log2",
}  # fmt: skip
_SIZES = {"N", "T", "S", "C", "V", "F", "n", "C_units", "F_units", "M_units", "K_units"}


@dataclass(frozen=True)
class Build:
    """One kernel with everything that is constant at compile time."""

    kernel: str
    case: str
    function: object
    values: dict
    launch: dict
    types: dict = field(default_factory=dict)  # those that the names do not tell


def _module(name: str):
    """A module of the kernels; functions of the same name hide some of them."""
    __import__(f"stellarator_kernels.{name}")
    return sys.modules[f"stellarator_kernels.{name}"]


def type_of(name: str, kernel: str) -> str:
    """Triton's type of an argument, from its name.

    Sizes and strides are multiples of 16, as those of the models are, and a launch tells Triton.
    """
    marked = f"{name}:{kernel.split()[0].removesuffix('_').removeprefix('grad_')}"
    if marked in _OTHERS or name in _OTHERS:
        return _OTHERS.get(marked) or _OTHERS[name]
    if marked in _FP32 or name in _FP32:
        return "*fp32"
    if name.endswith("_ptr"):
        return "*bf16"
    if name in _FLOAT_NUMBERS:
        return "fp32"
    return "i32:16" if name in _SIZES or "_stride_" in name else "i32"


def builds(capability: tuple[int, int]) -> Iterator[Build]:
    """Everything that is compiled for one GPU."""
    for model in _MODELS:
        yield from _per_token(model, shapes.get(model))
    yield from _attention(capability)
    if capability == (9, 0):
        yield from _hopper_attention()
    yield from _products(capability)
    yield from _delta()
    yield from _decode()
    losses = _module("cross_entropy")
    BLOCK, num_warps = losses.tiles(49152)
    launch = {"num_warps": num_warps}
    for gradient in (False, True):
        case = "with the gradient" if gradient else "loss"
        values = {"GRADIENT": gradient, "BLOCK": BLOCK}
        yield Build("cross_entropy forward", case, losses._cross_entropy_fwd_kernel, values, launch)
    values = {"BLOCK": BLOCK}
    yield Build("cross_entropy backward", "", losses._cross_entropy_bwd_kernel, values, launch)
    shard = _module("cross_entropy_shard")
    values = values | {"IGNORED": shard.IGNORED, "NO_CLASS": shard.NO_CLASS}
    yield Build("cross_entropy statistics", "", shard._statistics_kernel, values, launch)
    dropout = _module("dropout")
    yield Build("dropout", "", dropout._dropout_kernel, {"BLOCK": dropout._BLOCK}, {})
    yield from _embedding()
    adamw, norm = _module("adamw_kernels"), _module("grad_norm")
    yield from _adamw(adamw)
    values = {"BLOCK": norm._BLOCK, "BLOCKS": norm._BLOCKS_PER_PROGRAM}
    yield Build("grad_norm squares", "fp32", norm._squares_kernel, values, {})
    total = norm._total_kernel
    types = {"total_ptr": "*fp64"}
    yield Build("grad_norm total", "", total, {"BLOCK": norm._BLOCK}, {}, types)


def _adamw(module) -> Iterator[Build]:
    """bf16 with each way to keep the rest of the weight, and with moments of 8 bits."""
    given = {"HAS_CLIP": True, "HAS_FACTORS": True, "HAS_ROWS": True}
    given |= {"BLOCK": module._BLOCK, "GROUP": module.GROUP}
    kinds = ("HAS_MASTER", "HAS_REMAINDER", "STOCHASTIC")
    bf16, eight = {"weight_ptr": "*bf16"}, {"exp_avg_ptr": "*u8", "exp_avg_sq_ptr": "*u8"}
    for case, kind, is_eight in (
        ("bf16, master, clip", "HAS_MASTER", False),
        ("bf16, remainder, clip", "HAS_REMAINDER", False),
        ("bf16, stochastic, clip", "STOCHASTIC", False),
        ("bf16, master, clip", "HAS_MASTER", True),
        ("bf16, remainder, clip", "HAS_REMAINDER", True),
        ("bf16, stochastic, clip", "STOCHASTIC", True),
    ):
        values = given | {name: name == kind for name in kinds} | {"EIGHT_BITS": is_eight}
        types = ({} if kind == "HAS_MASTER" else bf16) | (eight if is_eight else {})
        launch = {"num_warps": module.warps(is_eight)}
        name = "adamw_ 8 bits" if is_eight else "adamw_"
        yield Build(name, case, module._adamw_kernel, values, launch, types)


def _embedding() -> Iterator[Build]:
    """With learned positions; the backward into an fp32 buffer and into bf16."""
    module = _module("embedding")
    values = {"HAS_POSITIONS": True, "BLOCK": module._BLOCK}
    yield Build("embedding forward", "positions", module._embedding_fwd_kernel, values, {})
    for add in (False, True):
        case, types = ("fp32 buffer", {"sums_ptr": "*fp32"}) if add else ("bf16", {})
        values = {"ADD": add, "UNIT": module._UNIT, "BLOCK": module._SUM_BLOCK}
        units = values | {"ROWS": module._ROWS}
        kernel = module._embedding_units_kernel
        yield Build("embedding backward units", case, kernel, units, {}, types)
        kernel = module._embedding_parts_kernel
        yield Build("embedding backward parts", case, kernel, values, {}, types)


def _per_token(model: str, shape: shapes.Shape) -> Iterator[Build]:
    """Norms, bias_gelu and RoPE at the widths of a model, with everything switched on."""
    gelu, rope = _module("bias_gelu"), _module("rope")
    yield from _norms(model, shape.C)
    BLOCK_N, BLOCK_C, num_warps = gelu.tiles(shape.F)
    values = {"HAS_BIAS": True, "TANH": True, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C}
    launch = {"num_warps": num_warps}
    yield Build("bias_gelu forward", model, gelu._bias_gelu_fwd_kernel, values, launch)
    yield Build("bias_gelu backward", model, gelu._bias_gelu_bwd_kernel, values, launch)
    gated = _module("swiglu")
    values = {"ACTIVATION": 0, "BLOCK_N": BLOCK_N, "BLOCK_F": BLOCK_C}
    yield Build("swiglu forward", model, gated._swiglu_fwd_kernel, values, launch)
    yield Build("swiglu backward", model, gated._swiglu_bwd_kernel, values, launch)
    BLOCK_H, BLOCK_D, num_warps = rope.tiles(shape.H, shape.D)
    values = {"D": shape.D, "CONJUGATE": True, "BLOCK_H": BLOCK_H, "BLOCK_D": BLOCK_D}
    yield Build("rope", model, rope._rope_kernel, values, {"num_warps": num_warps})
    yield from _bias_rope(model, shape)


def _norms(model: str, C: int) -> Iterator[Build]:
    """layer_norm and rms_norm, and the former with dropout."""
    norm = _module("norm_kernels")
    BLOCK, CHUNKS, num_warps = norm.tiles(C)
    values = {"C": C, "BLOCK": BLOCK, "CHUNKS": CHUNKS, "HAS_WEIGHT": True}
    phases = (
        ("forward", norm._norm_fwd_kernel, {"HAS_RESIDUAL": True}),
        ("backward", norm._norm_bwd_kernel, {"HAS_DSUMMED": True, "NEED_PARAMS": True}),
    )
    for op, dropout in (("layer_norm", False), ("layer_norm", True), ("rms_norm", False)):
        centred = op == "layer_norm"
        options = {"CENTRED": centred, "HAS_BIAS": centred, "DROPOUT": dropout}
        case = f"{model}, dropout" if dropout else model
        for phase, kernel, more in phases:
            launch = {"num_warps": num_warps}
            yield Build(f"{op} {phase}", case, kernel, values | options | more, launch)


def _bias_rope(model: str, shape: shapes.Shape) -> Iterator[Build]:
    """Forward and backward with the bias."""
    module = _module("bias_rope")
    BLOCK_T, BLOCK_H, BLOCK_D, num_warps = module.tiles(shape.D)
    values = {"D": shape.D, "ROTATED": True}
    values |= {"BLOCK_T": BLOCK_T, "BLOCK_H": BLOCK_H, "BLOCK_D": BLOCK_D}
    for phase, kernel, bias in (
        ("forward", module._bias_rope_fwd_kernel, {"HAS_BIAS": True}),
        ("backward", module._bias_rope_bwd_kernel, {"NEED_BIAS": True}),
    ):
        launch = {"num_warps": num_warps}
        yield Build(f"bias_rope {phase}", model, kernel, values | bias, launch)


def _attention(capability: tuple[int, int]) -> Iterator[Build]:
    """Heads of 64 and 128 with a window; at 128 also packed documents, softcap and dropout."""
    import torch

    tiles = _module("attention.tiles")
    backward = _module("attention.backward")
    kernels = {
        "forward": _module("attention.forward")._forward_kernel,
        "dq": backward._dq_kernel,
        "dkdv": backward._dkdv_kernel,
        "dqdkdv ordered": backward._dkdv_kernel,
        "dqdkdv atomic": backward._dkdv_kernel,
    }
    for phase, kernel in kernels.items():
        for D, *flags in (
            *((64, False, False, False), (128, False, False, False)),
            *((128, True, False, False), (128, False, True, False), (128, False, False, True)),
        ):
            packed, softcap, dropout = flags
            chosen = tiles.tile_sizes(
                phase.split()[0], D, torch.bfloat16, capability, softcap, dropout
            )
            values = tiles.constants(D, torch.bfloat16, chosen)
            launch = {name: values.pop(name) for name in ("num_warps", "num_stages")}
            values |= {"CAUSAL": True, "WINDOW": True, "PACKED": packed}
            values |= {"SOFTCAP": softcap, "DROPOUT": dropout}
            if kernel is backward._dkdv_kernel:
                values["INTERPRETED"] = False
                values["TURNED"] = tiles.turns_dq(chosen.step, capability)
                values["DESIGN"] = backward.DESIGNS[phase.partition(" ")[2] or "split"]
            if "HAS_DLSE" in kernel.arg_names:
                values["HAS_DLSE"] = False
            options = zip(("packed", "softcap", "dropout"), flags, strict=True)
            case = ", ".join([f"head {D}, window", *(name for name, on in options if on)])
            types = {"dq_ptr": "*fp32"} if phase.startswith("dqdkdv") else {}
            yield Build(f"flash_attention {phase}", case, kernel, values, launch, types)


def _products(capability: tuple[int, int]) -> Iterator[Build]:
    """The products of the MLP; by descriptors too where there is a copy engine.

    Of widths only the multiples matter: those of all models have no rest.
    """
    import torch

    matmul, mlp = _module("matmul"), _module("mlp")
    kernels = {
        "up": ("mlp up", mlp._up_kernel),
        "down gradient": ("mlp down gradient", mlp._down_gradient_kernel),
        "weight gradient": ("weight gradient", _module("weight_gradient")._weight_gradient_kernel),
    }
    for phase, (name, kernel) in kernels.items():
        tiles = matmul.tile_sizes(phase, torch.bfloat16, capability)
        for design in ("pointers", "descriptors, persistent"):
            if design != "pointers":
                if capability < (9, 0):
                    continue
                tiles = replace(tiles, tma=1, persistent=1)
            for form in ("",) if phase == "weight gradient" else ("tanh", "erf"):
                values = matmul.constants(torch.bfloat16, tiles.depth, tiles)
                launch = {option: values.pop(option) for option in ("num_warps", "num_stages")}
                if phase != "weight gradient":
                    values |= {"HAS_BIAS": True, "TANH": form == "tanh", "STORE_Y": True}
                if phase == "up":
                    values["STORE_PRE"] = True
                case = ", ".join(filter(None, (form, design)))
                yield Build(name, case, kernel, values, launch)


def _hopper_attention() -> Iterator[Build]:
    """The kernels in Gluon: heads of 64 and 128 with a window, and packed documents."""
    module = _module("attention.gluon_forward")
    backward = _module("attention.gluon_backward")
    kernels = {"dq": backward.dq_kernel, "dkdv": backward.dkdv_kernel}
    for D, packed in ((64, False), (128, False), (128, True)):
        plan, flags = module.PLANS[D], {"CAUSAL": True, "WINDOW": True, "PACKED": packed}
        values = module.constants(D, plan) | flags
        case = f"head {D}, window{', packed' if packed else ''}"
        types = module.descriptor_types(D, "bf16", plan)
        kernel = module._gluon_forward_kernel
        yield Build("flash_attention forward, Gluon", case, kernel, values, {}, types)
        plan = backward.PLANS[D]
        for phase, kernel in kernels.items():
            values = backward.constants(phase, D, plan) | flags
            types = backward.descriptor_types(phase, D, "bf16", plan)
            yield Build(f"flash_attention {phase}, Gluon", case, kernel, values, {}, types)


def _delta() -> Iterator[Build]:
    """What the backward in five products computes first."""
    backward = _module("attention.backward")
    values = {"HAS_DLSE": False, "D": 128, "BLOCK_D": 128, "ROWS": backward.DELTA_ROWS}
    yield Build("flash_attention delta", "head 128", backward._delta_kernel, values, {})


def _decode() -> Iterator[Build]:
    """Decode attention of one token: MQA and GQA at heads of 128."""
    decode, constants = _module("attention.decode_kernel"), {"D": 128, "BLOCK_D": 128}
    for model in ("starcoder", *_MODELS):
        shape = shapes.get(model)
        ROWS = decode.plan(64, 1, 8192, shape.H, shape.G, 4096, 132)["ROWS"]
        launch = decode.step(128, ROWS)
        values = constants | {"WINDOW": True, "ROWS": ROWS, "UPCAST": False}
        values |= {"STEP": launch.pop("STEP")}
        yield Build("decode_attention parts", model, decode._parts_kernel, values, launch)
    values = constants | {"SPLITS": 16}
    yield Build("decode_attention merge", "", decode._merge_kernel, values, {})


def _types(build: Build) -> dict[str, str]:
    """Types of the arguments that are not constants."""
    names = [name for name in build.function.arg_names if name not in build.values]
    return {name: type_of(name, build.kernel) for name in names} | build.types


def forgotten(known: list[Build]) -> list[str]:
    """Kernels of the package that no build compiles."""
    import stellarator_kernels
    from stellarator_kernels._triton import triton

    found, compiled = set(), {id(build.function) for build in known}
    for module in pkgutil.walk_packages(stellarator_kernels.__path__, "stellarator_kernels."):
        if module.name.rsplit(".", 1)[-1].startswith(("_cpu", "_cuda")):
            continue
        __import__(module.name)
        for name, value in vars(sys.modules[module.name]).items():
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                found |= set() if id(value) in compiled else {f"{module.name}.{name}"}
    return sorted(found)


def compile_build(build: Build, arch: str, where: dict) -> dict:
    """The point of one kernel on one architecture."""
    from stellarator_kernels.testing import compile_kernel, shared_memory_limit

    capability = ARCHITECTURES[arch]
    built = compile_kernel(build.function, _types(build), build.values, capability, **build.launch)
    return {
        "kernel": build.kernel,
        "case": build.case,
        "arch": arch,
        "registers": built.registers,
        "spill_bytes": built.spill_bytes,
        "shared_bytes": built.shared_bytes,
        "shared_limit": shared_memory_limit(capability),
        "instructions": _instructions(built.ptx),
        "environment": where,
    }


def compile_cuda(source: Path, names: list[str], where: dict) -> Iterator[dict]:
    """The points of a file of csrc/cuda on these architectures."""
    from stellarator_kernels.testing import shared_memory_limit

    for found in cuda_builds.compile_file(source, tuple(names)):
        ptx, kernel = found.pop("ptx"), f"cuda {found['kernel']}"
        limit = shared_memory_limit(ARCHITECTURES[found["arch"]])
        counts = {"shared_limit": limit, "instructions": _instructions(ptx)}
        yield found | counts | {"kernel": kernel, "environment": where}


def _instructions(ptx: str) -> dict[str, int]:
    return {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `compile`."""
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="with commas between")
    parser.add_argument("--kernel", default="", help="kernels whose name begins so")
    parser.add_argument("--output", metavar="FILE.json", help="one JSON line a kernel")


def main(given: argparse.Namespace) -> int:
    """Compile, print the table; 1 if a kernel is not in the list above, or not compiled."""
    names = given.arch.split(",")
    one_of("--arch", names, ARCHITECTURES)
    # Read by Triton when it decorates a kernel, so before the kernels are imported.
    os.environ["TRITON_INTERPRET"] = "0"
    todo = [(n, b) for n in names for b in builds(ARCHITECTURES[n])]
    # Some kernels are for one architecture only.
    missing = forgotten([build for arch in ARCHITECTURES.values() for build in builds(arch)])
    files = cuda_builds.sources() if cuda_builds.NVCC else []
    files = {file: [f"cuda {name}" for name in cuda_builds.kernels(file)] for file in files}
    kernels = sorted({build.kernel for _, build in todo}.union(*files.values()))
    todo = [(n, b) for n, b in todo if b.kernel.startswith(given.kernel)]
    files = [f for f, own in files.items() if any(x.startswith(given.kernel) for x in own)]
    if not todo and not files:
        raise UsageError(
            f"--kernel: expected the beginning of {', '.join(kernels)}, got {given.kernel!r}."
        )
    where, count = environment(), len(todo) + len(files)
    with results.Writer(given.output) as write, Progress("compile") as show:
        for number, (name, build) in enumerate(todo):
            show(number / count, f"{build.kernel} {name}")
            write(compile_build(build, name, where))
        failures = []
        for number, file in enumerate(files, start=len(todo)):
            show(number / count, file.name)
            try:
                points = list(compile_cuda(file, names, where))
            except (OSError, RuntimeError) as error:  # an nvcc that is older than a GPU
                failures.append(f"NOT COMPILED: csrc/cuda/{file.name}: {error}")
                continue
            for point in (p for p in points if p["kernel"].startswith(given.kernel)):
                write(point)
    print(markdown(write.points), *failures, sep="\n")
    if not cuda_builds.NVCC:
        print("csrc/cuda: not compiled, as there is no nvcc (NVCC, or on PATH)")
    for name in missing:
        print(f"NOT COMPILED: {name} has no entry in benchmarks/bench_compile.py")
    return 1 if missing or failures else 0


def markdown(points: list[dict]) -> str:
    """One row a kernel and architecture; instructions that occur."""
    header = ["kernel", "case", "arch", "registers", "spills B", "shared KiB", "instructions"]
    rows = []
    for p in points:
        found = ", ".join(f"{n} {count}" for n, count in p["instructions"].items() if count)
        share = f"{p['shared_bytes'] / 1024:.0f} of {p['shared_limit'] / 1024:.0f}"
        rows.append([p["kernel"], p["case"], p["arch"], str(p["registers"]),
                     str(p["spill_bytes"]), share, found])  # fmt: skip
    return results.table(rows, header)
