"""A GPU that is not there: kernels are compiled as a launch on it compiles them, and run.

`install` puts a driver for Triton in place whose launches go to machine.py: arguments are
specialised, kernels compiled and cached, and their PTX runs on tensors of the CPU, which the ops
take for tensors of the GPU meanwhile. Memory outside of the tensors of a launch is out of bounds.

Not covered: streams, what ptxas makes of the PTX, and all that torch itself runs on a GPU. Warps
that race for shared memory are seen by the results only, under the orders of events that the seed
chooses. wgmma.fence, bar.warp.sync and the fence behind mbarrier.init are taken for granted. A
fence of one lane counts for its warp. Approximations (ex2, div.full) and the sums of products are
better than the hardware's. Memory outside of a tensor but inside of its storage is not refused.

defines: CAPABILITIES, install
"""

import contextlib
import dataclasses
import functools
import importlib
import pkgutil
import struct
import sys
from collections.abc import Callable

import torch
from ptx_machine import machine, reader

CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0)}
_CHIPS = {(8, 0): (108, 40 << 20), (9, 0): (132, 50 << 20)}  # multiprocessors, bytes of cache
_ELEMENT_KINDS = {1: 0, 2: 1, 4: 2, 8: 4}  # of a tensor map, by bytes: only these count


def _tensor_map(descriptor, how: dict) -> bytes:
    """What TMA is told of a tensor, as `Map` of warp.h has it."""
    shape, strides, box = (
        list(reversed(x)) for x in (descriptor.shape, descriptor.strides, how["block_size"])
    )
    size, rank = how["elem_size"], len(descriptor.shape)

    def filled(values, length):
        return [*values, *[0] * (length - len(values))]

    return struct.pack(
        "<Q4Q10I3B",
        descriptor.base.data_ptr(),
        *filled([s * size for s in strides[1:]], 4),
        *filled(shape, 5),
        *filled(box, 5),
        *(rank, _ELEMENT_KINDS[size], how["swizzle"]),
    ).ljust(128, b"\0")


class _Arguments:
    """Values of a kernel's parameters, and the memory they give access to."""

    def __init__(self):
        self.values, self.ranges = [], set()

    def tensor(self, x: torch.Tensor) -> int:
        storage = x.untyped_storage()
        if storage.nbytes():
            self.ranges.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return x.data_ptr()

    def add(self, kind, value, maps) -> None:
        """One argument of Triton's type `kind`; maps: how the next descriptors lie."""
        if kind == "constexpr":
            return
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            self.tensor(value.base)
            shape_and_strides = (*value.shape, *value.strides)
            self.values += [_tensor_map(value, next(maps)), *shape_and_strides]
        else:
            self.values.append(self.tensor(value) if hasattr(value, "data_ptr") else value)

    def packed(self, params: list[tuple[int, int, str]]) -> bytes:
        """The values as they lie in the parameter space."""
        out = bytearray()
        assert len(self.values) == len(params), (len(self.values), params)
        for (offset, size, kind), value in zip(params, self.values, strict=True):
            out += b"\0" * (offset - len(out))
            if isinstance(value, bytes):
                out += value
            elif kind in ("f32", "f64"):
                out += struct.pack("<f" if kind == "f32" else "<d", value)
            else:
                out += (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        return bytes(out)


class _Launcher:
    """Runs one compiled kernel."""

    def __init__(self, built, run):
        self.built, self.run = built, run
        self.kernel = reader.parse(built.asm["ptx"])

    def __call__(self, x, y, z, stream, function, *rest):
        from triton.runtime import _allocation

        about, signature = self.built.metadata, self.built.src.signature
        given = _Arguments()
        maps = iter(getattr(about, "tensordesc_meta", None) or ())
        for kind, value in zip(signature.values(), rest[-len(signature) :], strict=True):
            given.add(kind, value, maps)
        scratch = None
        if about.global_scratch_size:
            size = x * y * z * about.global_scratch_size
            scratch = _allocation._allocator.get()(size, about.global_scratch_align, stream)
        given.values += [0 if scratch is None else given.tensor(scratch), 0]
        for count, most in zip((x, y, z), (2**31 - 1, 65535, 65535), strict=True):
            assert 0 < count <= most, f"a grid of {(x, y, z)}"
        params = given.packed(self.kernel.params)
        threads = self.kernel.threads or 32 * about.num_warps
        ranges = sorted(given.ranges)
        self.run(self.kernel, (x, y, z), params, about.shared, threads, ranges)


class _Driver:
    """What Triton asks a driver for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return self.capability

    def get_active_torch_device(self):
        return torch.device("cpu")


def _replace_launches(shared_limit: int, run) -> None:
    """Compiled kernels go to `run`; too much shared memory is refused as on a GPU."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.errors import OutOfResources

    def load(self):
        if self.module is not None:
            return
        if self.metadata.shared > shared_limit:
            raise OutOfResources(self.metadata.shared, shared_limit, "shared memory")
        self.module, self.function = self, self
        self._run = _Launcher(self, run)

    CompiledKernel._init_handles = load


def _pretend(capability) -> None:
    """Tensors of the CPU are taken for tensors of the GPU, and the GPU's facts told."""

    class Properties:
        multi_processor_count, L2_cache_size = _CHIPS[capability]

    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: Properties
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    torch.Tensor.is_cuda = property(lambda self: True)

    import stellarator_kernels
    from stellarator_kernels import dispatch
    from stellarator_kernels.attention import tiles

    for found in pkgutil.walk_packages(stellarator_kernels.__path__, "stellarator_kernels."):
        if found.name.rsplit(".", 1)[-1] not in ("_cpu", "_cuda"):
            importlib.import_module(found.name)
    told = dispatch.facts

    @functools.wraps(told)
    def facts(op, tensor, options=None):
        given = told(op, tensor, options)
        return dataclasses.replace(given, device="cuda", capability=capability)

    dispatch.facts = facts
    answers = {
        "multiprocessors": lambda device: _CHIPS[capability][0],
        "chip": lambda device: tiles.Chip(*_CHIPS[capability]),
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("stellarator_kernels"):
            for what in answers.keys() & vars(module).keys():
                setattr(module, what, answers[what])


def install(arch: str, run: Callable = machine.run) -> None:
    """Put a GPU in place, for the rest of the process.

    Args:
        arch: of CAPABILITIES.
        run: what each launch is given to, as `machine.run` has it.
    Raises:
        ValueError: there is no such architecture.
        RuntimeError: Triton was imported for its interpreter.
    """
    if arch not in CAPABILITIES:
        raise ValueError(f"ptx_machine: expected one of {list(CAPABILITIES)}, got {arch!r}.")
    import triton

    from stellarator_kernels import _triton
    from stellarator_kernels.testing import shared_memory_limit

    if _triton.INTERPRETED:
        raise RuntimeError(
            "ptx_machine: expected TRITON_INTERPRET=0, got 1. Set it before Triton is imported."
        )
    capability = CAPABILITIES[arch]
    triton.runtime.driver.set_active(_Driver(capability))
    _replace_launches(shared_memory_limit(capability), run)
    _pretend(capability)
