"""Checks for embedders to run on their own machine; tests and benchmarks here use them too.

defines: assert_close_to_reference, poison_empty, shared_memory_limit,
    compile_kernel, Compiled, disassemble
"""

import contextlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch


def shared_memory_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may take on a GPU of this compute capability."""
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    return 227 * 1024 if capability[0] in (9, 10, 11) else 99 * 1024


def assert_close_to_reference(
    actual: torch.Tensor,
    reference64: torch.Tensor,
    eager: torch.Tensor | None = None,
    *,
    reduction_length: int = 1,
    name: str = "result",
) -> None:
    """`actual` is at most twice as far from the float64 reference as same-dtype eager code.

    Two rules, both against float64:
    max|actual - ref| <= 2 * max|eager - ref| + floor, and the same for the root mean square, with
    floor = eps(dtype) * sqrt(reduction_length) * max(1, rms(ref)) for the maximum (a quarter of it
    for the root mean square).

    Args:
        actual: the tensor under test, any float dtype.
        reference64: the same shape, float64, from float64 inputs.
        eager: plain eager code in the dtype of `actual`; None: the floor alone is allowed.
        reduction_length: number of terms summed for one element.
        name: for the message.
    Raises:
        AssertionError: a rule is broken or a value is not finite where the reference is.
    Source: the factor-two rule is flash-attention's; the second rule is added so that a small
        systematic error does not hide under one outlier.
    """
    assert actual.shape == reference64.shape, (
        f"{name}: expected shape {tuple(reference64.shape)}, got {tuple(actual.shape)}"
    )
    if actual.numel() == 0:
        return
    actual, reference64 = actual.detach(), reference64.detach().double()
    assert torch.isfinite(actual).all() or not torch.isfinite(reference64).all(), (
        f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    )
    error = (actual.double() - reference64).abs()
    eager_error = torch.zeros_like(error)
    if eager is not None:
        eager_error = (eager.detach().double() - reference64).abs()
    scale = max(1.0, float(reference64.square().mean().sqrt()))
    floor = torch.finfo(actual.dtype).eps * reduction_length**0.5 * scale
    rms, eager_rms = (float(e.square().mean().sqrt()) for e in (error, eager_error))
    maximum, eager_maximum = float(error.max()), float(eager_error.max())
    assert maximum <= 2 * eager_maximum + floor, (
        f"{name}: largest error {maximum:.3e}, allowed 2 * {eager_maximum:.3e} + {floor:.3e}"
    )
    assert rms <= 2 * eager_rms + floor / 4, (
        f"{name}: root mean square error {rms:.3e}, allowed 2 * {eager_rms:.3e} + {floor / 4:.3e}"
    )


@contextlib.contextmanager
def poison_empty():
    """Within this block `torch.empty` and its kin are filled with NaN (or the largest integer).

    A kernel that reads what it did not write, or leaves a hole in its output, then shows it.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@dataclass(frozen=True)
class Compiled:
    """One Triton kernel as the compiler leaves it."""

    ttir: str  # Triton's own form, in the order of the source; Gluon's, with layouts, is lower
    ptx: str
    shared_bytes: int  # of one block; compilation does not fail when it is too much for the GPU
    registers: int  # of one thread
    spill_bytes: int  # stores plus loads of registers that did not fit
    num_warps: int  # larger than asked for when the compiler specialised warps
    ptxas_log: str


def compile_kernel(
    kernel,
    signature: dict[str, str],
    constexprs: dict[str, object],
    capability: tuple[int, int],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile a Triton or Gluon kernel for a GPU that need not be there.

    Args:
        kernel: a `triton.jit` function, decorated while TRITON_INTERPRET was not 1.
        signature: type of each argument but the constexprs: "*bf16", "*fp32", "*i64",
            "i32", "fp32". Pointers are taken as 16-byte aligned, as torch allocates them. "i32:16"
            is a multiple of 16, which a launch tells the compiler of each integer that is one. A
            descriptor of Gluon is "tensordesc<bf16[rows, columns],LAYOUT>".
        constexprs: value of each constexpr argument.
        capability: compute capability, for example (9, 0); 8.0 or newer.
    Raises:
        ValueError: the kernel was made for the interpreter, or an argument has no type and no
            value.
        RuntimeError: the compiler's own errors, unchanged.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if not isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"compile_kernel: expected a compiled kernel, got {type(kernel).__name__}. "
            "Import its module in a process with TRITON_INTERPRET=0."
        )
    missing = [n for n in kernel.arg_names if n not in signature and n not in constexprs]
    unknown = [n for n in (*signature, *constexprs) if n not in kernel.arg_names]
    if missing or unknown:
        raise ValueError(
            f"compile_kernel: expected the arguments {kernel.arg_names} of {kernel.__name__}, "
            f"got none for {missing} and unknown ones {unknown}. Give each a type or a value."
        )
    arch = capability[0] * 10 + capability[1]
    given = {n: "constexpr" if n in constexprs else signature[n] for n in kernel.arg_names}
    types = {name: kind.removesuffix(":16") for name, kind in given.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(given.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    built = triton.compile(
        Source(kernel, types, constexprs=constexprs, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        # Pinned, because Triton 3.10 changes the default.
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    ptx = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        _, log = _assemble(ptx, folder)
    return Compiled(
        built.asm["ttgir" if kernel.is_gluon() else "ttir"],
        ptx,
        built.metadata.shared,
        int(re.search(r"Used (\d+) registers", log).group(1)),
        sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        built.metadata.num_warps,
        log,
    )


def disassemble(built: Compiled) -> str:
    """The machine code of a kernel, in the order that the GPU meets it."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary, _ = _assemble(built.ptx, folder)
        command = [knobs.nvidia.cuobjdump.path, "-sass", binary]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _assemble(ptx: str, folder: str) -> tuple[str, str]:
    """The path of the machine code, and what ptxas says, which Triton drops."""
    from triton.backends.nvidia import compiler as backend

    source, binary = (os.path.join(folder, f"kernel.{suffix}") for suffix in ("ptx", "cubin"))
    with open(source, "w") as file:
        file.write(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    ptxas = backend.get_ptxas(int(re.search(r"\d+", target).group())).path
    command = [ptxas, "-v", f"--gpu-name={target}", source, "-o", binary]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return binary, done.stdout + done.stderr
