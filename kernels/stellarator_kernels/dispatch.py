"""Which implementation runs: a pure function of (op, impl, facts), and its reasons.

defines: Facts, facts, choose, explain, describe, narrowest, available, ops, parts, has,
IMPLEMENTATIONS

There is no silent fallback. `impl="auto"` takes the first implementation of the op's list that can
run, and `explain` prints the reason for which every other one was refused. An explicit `impl` that
cannot run raises `RuntimeError` with that reason.

Implementations: `triton` (GPU kernels, or Triton's interpreter on CPU tensors), `cuda` (CUDA C++ of
this project), `cpu` (its C++ for CPUs), `torch` (ATen's own fused kernels), `reference` (the
formulas in `reference.py`).
"""

import functools
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stellarator_kernels import _triton, extension, tuned
from stellarator_kernels.layout import UNIT

IMPLEMENTATIONS = ("triton", "cuda", "cpu", "torch", "reference")

# What each op has. `torch` is left out where ATen has no kernel of its own to call.
_OPS = {
    "flash_attention": ("triton", "cpu", "torch", "reference"),
    "decode_attention": ("triton", "torch", "reference"),
    "embedding": ("triton", "cuda", "torch", "reference"),
    "rope": ("triton", "cpu", "torch", "reference"),
    "bias_rope": ("triton", "torch", "reference"),
    "layer_norm": ("triton", "cuda", "cpu", "torch", "reference"),
    "rms_norm": ("triton", "reference"),
    "dropout": ("triton", "reference"),
    "bias_gelu": ("triton", "cpu", "torch", "reference"),
    "cross_entropy": ("triton", "cpu", "torch", "reference"),
    "cross_entropy_statistics": ("triton", "torch", "reference"),
    "linear": ("cpu", "torch", "reference"),
    "mlp": ("triton", "cpu", "torch", "reference"),
    "add_weight_gradient_": ("triton", "cpu", "torch", "reference"),
    "swiglu": ("triton", "torch", "reference"),
    "linear_cross_entropy": ("triton", "cpu", "torch", "reference"),
    "linear_cross_entropy_statistics": ("triton", "torch", "reference"),
    "adamw_": ("triton", "cuda", "cpu", "torch", "reference"),
    "grad_norm": ("triton", "cuda", "cpu", "torch", "reference"),
}
# The argument that the choice looks at; of a list the tensor that `narrowest` names.
_DECIDING = {
    "flash_attention": "q",
    "decode_attention": "q",
    "embedding": "weight",
    "rope": "q",
    "bias_rope": "qkv",
    "layer_norm": "x",
    "rms_norm": "x",
    "dropout": "x",
    "bias_gelu": "x",
    "cross_entropy": "logits",
    "cross_entropy_statistics": "logits",
    "linear": "x",
    "mlp": "x",
    "add_weight_gradient_": "dy",
    "swiglu": "gate",
    "linear_cross_entropy": "hidden",
    "linear_cross_entropy_statistics": "hidden",
    "adamw_": "params",
    "grad_norm": "tensors",
}
# Ops that run two others one after the other, and the argument that `_DECIDING` stands for there.
_PAIRS = {
    "layer_norm_linear": ("x", ("layer_norm", "linear")),
    "bias_gelu_linear": ("x", ("bias_gelu", "linear")),
    "layer_norm_mlp": ("x", ("layer_norm", "mlp")),
    "projected_attention": ("qkv", ("rope", "flash_attention")),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Of the norms, whose backward holds a row in registers.
_MAX_WIDTHS = {"triton": 8192, "cuda": 6144, "cpu": 8192}


def _limits_of_attention(q: torch.Tensor, options: dict) -> dict[str, str]:
    """Head widths that the kernels have tiles for, and what only some of them can do."""
    limits = {}
    for name, none in (("softcap", None), ("dropout_p", 0.0)):
        if options.get(name, none) != none:
            limits["cpu"] = limits["torch"] = f"{name} is in triton and in the reference only"
    D = q.shape[-1] if q.dim() else 0
    if D % 8 or not 16 <= D <= 256:
        reason = f"the head width is {D}, not a multiple of 8 from 16 to 256"
        limits |= {"triton": reason, "cpu": reason}
    return limits


def _limits_of_layer_norm(x: torch.Tensor, options: dict) -> dict[str, str]:
    """Rows that fit the registers of one program."""
    C = x.shape[-1] if x.dim() else 0
    return {
        impl: f"the kernels take rows of at most {most} elements, not {C}"
        for impl, most in _MAX_WIDTHS.items()
        if C > most
    }


def _limits_of_linear(x: torch.Tensor, options: dict) -> dict[str, str]:
    """Where the C++ weight gradient was measured to beat ATen's."""
    right = x.dtype == torch.bfloat16 and x.device.type == "cpu" and extension.failure() is None
    fits = right and extension.isa().name == "amx"
    return {} if fits else {"cpu": "the C++ weight gradient is for bfloat16 on AMX"}


def _limits_of_adamw(x: torch.Tensor, options: dict) -> dict[str, str]:
    """The kernels in C++ know fp32 states and masters only."""
    narrow = [x for x in ("remainder", "exp_avg_scales", "seed") if options.get(x) is not None]
    if not narrow and not options.get("narrow"):
        return {}
    reason = "remainders, stochastic rounding and moments of 8 bits are not in C++"
    return {"cuda": reason, "cpu": reason}


def _limits_of_mlp(x: torch.Tensor, options: dict) -> dict[str, str]:
    """Rows that the products in Triton can load whole."""
    up = options.get("up_weight")
    return _whole_rows(x, None if up is None else up.t())


def _limits_of_weight_gradient(dy: torch.Tensor, options: dict) -> dict[str, str]:
    """The same, and where the C++ is taken."""
    return _limits_of_linear(dy, {}) | _whole_rows(dy, options.get("x"))


def _whole_rows(*tensors: torch.Tensor | None) -> dict[str, str]:
    """The limit of kernels that load the rows of these tensors in UNITs."""
    widths = [t.shape[-1] if t.dim() else 0 for t in tensors if t is not None]
    wrong = [width for width in widths if width == 0 or width % UNIT]
    return {"triton": f"the widths are multiples of {UNIT}, not {wrong[0]}"} if wrong else {}


# Limits of an op's own kernels: from its deciding argument and its other ones to the
# implementations that are refused, with the reason.
_LIMITS = {
    "flash_attention": _limits_of_attention,
    "decode_attention": _limits_of_attention,
    "layer_norm": _limits_of_layer_norm,
    "rms_norm": _limits_of_layer_norm,
    "linear": _limits_of_linear,
    "adamw_": _limits_of_adamw,
    "mlp": _limits_of_mlp,
    "add_weight_gradient_": _limits_of_weight_gradient,
}


# Products of Triton's that stand in the place of cuBLAS's: they are taken where they were timed.
_RACED = {"mlp": "matmul up"}


@dataclass(frozen=True)
class Facts:
    """All that the choice depends on."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype
    capability: tuple[int, int] | None = None  # of the GPU
    no_triton: str | None = None  # why Triton cannot be imported; None: it can
    interpreter: bool = False  # TRITON_INTERPRET=1
    no_extension: str | None = None  # why stellarator_kernels._cpu does not load; None: it does
    no_cuda_extension: str | None = None  # the same of stellarator_kernels._cuda
    limits: tuple[tuple[str, str], ...] = ()  # the op's own: (implementation, why it is refused)
    raced: bool = True  # whether tables have the products of this GPU that `_RACED` wants


def ops() -> tuple[str, ...]:
    """Names of the ops that have several implementations."""
    return tuple(_OPS)


def parts(op: str) -> tuple[str, ...]:
    """The ops whose implementations it takes: itself, or two. `linear` in a pair has its own."""
    if op not in _PAIRS:
        return (op,)
    return tuple(name for name in _PAIRS[op][1] if name != "linear")


def has(op: str, impl: str) -> bool:
    """Whether there is such an implementation of the op, on whatever machine."""
    return impl in _OPS[op]


@functools.cache
def available() -> dict[str, bool]:
    """Which back ends this machine has, and whether torch finds a GPU ("cuda")."""
    return {
        "triton": _triton.FAILURE is None,
        "interpreter": _triton.INTERPRETED,
        "extension": extension.failure() is None,
        "cuda_extension": extension.failure("_cuda") is None,
        "cuda": torch.cuda.is_available(),
    }


def facts(op: str, tensor: torch.Tensor, options: dict | None = None) -> Facts:
    """The facts about the deciding argument of `op`, and its other ones, on this machine."""
    capability = None
    if tensor.device.type == "cuda":
        capability = torch.cuda.get_device_capability(tensor.device)
    return Facts(
        tensor.device.type,
        tensor.dtype,
        capability,
        _triton.FAILURE,
        _triton.INTERPRETED,
        extension.failure(),
        extension.failure("_cuda") if "cuda" in _OPS[op] else None,
        tuple(_LIMITS[op](tensor, options or {}).items()) if op in _LIMITS else (),
        capability is None or op not in _RACED or _raced(op, tensor.device),
    )


def _raced(op: str, device: torch.device) -> bool:
    return tuned.lookup(tuned.gpu_name(device), _RACED[op]) is not None


def narrowest(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor whose dtype the fewest implementations take; it decides for the list."""
    return max(tensors, key=lambda x: (x.dtype == torch.float64, x.dtype == torch.float16))


def refusal(op: str, impl: str, given: Facts) -> str | None:
    """Why `impl` cannot run `op` on these facts; None if it can."""
    if not has(op, impl):
        return f"there is no {impl} implementation of {op}"
    if impl == "triton" and (reason := _refuse_triton(given)) is not None:
        return reason
    if impl in ("cuda", "cpu") and (reason := _refuse_extension(impl, given)) is not None:
        return reason
    return dict(given.limits).get(impl)


def _refuse_triton(given: Facts) -> str | None:
    """Why the Triton kernels cannot run."""
    if given.no_triton is not None:
        return f"triton cannot be imported: {given.no_triton}"
    if given.dtype not in _FLOATS:
        return f"the kernels are written for 16 and 32-bit floats, not {given.dtype}"
    if given.device == "cpu" and not given.interpreter:
        return "the tensors are on the CPU and TRITON_INTERPRET is not 1"
    if given.device not in ("cpu", "cuda"):
        return f"the tensors are on {given.device}"
    return _refuse_capability(given)


def _refuse_extension(impl: str, given: Facts) -> str | None:
    """Why the kernels in C++ cannot run."""
    kind, why = ("C++", given.no_extension) if impl == "cpu" else ("CUDA", given.no_cuda_extension)
    if why is not None:
        return f"the {kind} extension does not load: {why} (`stellarator doctor`)"
    if given.device != impl:
        return f"the tensors are on {given.device}"
    if given.dtype not in (torch.float32, torch.bfloat16):
        return f"it is written for float32 and bfloat16, not {given.dtype}"
    return _refuse_capability(given)


def _refuse_capability(given: Facts) -> str | None:
    """Why no kernel of this project runs on the GPU."""
    if given.capability is not None and given.capability < (8, 0):
        return f"the GPU has compute capability {given.capability}, 8.0 is needed"
    return None


def _refusal_of_auto(op: str, impl: str, given: Facts) -> str | None:
    """Why `auto` does not take `impl`; None if it may."""
    if impl == "triton" and given.interpreter and refusal(op, impl, given) is None:
        return "TRITON_INTERPRET is 1, and the interpreter runs only for impl='triton'"
    if impl == "triton" and not given.raced and refusal(op, impl, given) is None:
        return "`stellarator tune` has not raced it on this GPU, so it runs only for impl='triton'"
    if impl == "cuda" and refusal(op, impl, given) is None:
        return "it has not been measured yet, so it runs only for impl='cuda'"
    return refusal(op, impl, given)


def choose(op: str, impl: str, given: torch.Tensor | Facts, **options) -> str:
    """Name of the implementation that runs. Pure for `Facts`.

    Args:
        op: name of a public op.
        impl: "auto" or one of IMPLEMENTATIONS.
        given: the tensor that decides (q, x, logits, hidden, `narrowest` of a list), or `Facts`.
        options: other arguments of the op that rule out some implementations (softcap=30.0).
    Raises:
        ValueError: unknown `impl`.
        RuntimeError: an explicit `impl` cannot run here; the message says why.
    """
    if not isinstance(given, Facts):
        given = facts(op, given, options)
    if impl == "auto":
        return next(name for name in _OPS[op] if _refusal_of_auto(op, name, given) is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: expected impl in {('auto',) + IMPLEMENTATIONS}, got {impl!r}. "
            "Pass impl='auto' to let the dispatcher choose."
        )
    reason = refusal(op, impl, given)
    if reason is not None:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run: {reason}. Pass impl='auto'.")
    return impl


def explain(op: str, *args, **kwargs) -> str:
    """Which implementation of `op` runs for these arguments and why each other one does not.

    explain("flash_attention", q, k, v, window=9) is for flash_attention(q, k, v, window=9). Nothing
    is computed, and shapes are not compared: that the op does when it is called.

    Args:
        op: name of a public op, for example "layer_norm".
        args, kwargs: the arguments of the op; with `impl=` of that choice, else of "auto".
    Returns:
        one line per implementation; the chosen one is marked with `->`. For layer_norm_linear,
        bias_gelu_linear, layer_norm_mlp and projected_attention the lines of the two ops that they
        run.
    Raises:
        ValueError: unknown op or `impl`, or no tensors.
        TypeError: the op does not take these arguments.
        RuntimeError: the `impl` that is asked for cannot run here.
    """
    if op not in _OPS and op not in _PAIRS:
        raise ValueError(
            f"explain: expected an op of {sorted(_OPS | _PAIRS)}, got {op!r}. "
            "Pass the name of an op."
        )
    given, arguments = _deciding(op, args, kwargs)
    impl = arguments.get("impl", "auto")
    if op in _OPS:
        return describe(op, facts(op, given, arguments), impl)
    # `linear` has fewer implementations; the pair leaves the choice to it.
    first, second = _PAIRS[op][1]
    other = impl if second != "linear" or impl in ("torch", "reference") else "auto"
    return "\n".join(
        describe(name, facts(name, given, arguments), chosen)
        for name, chosen in ((first, impl), (second, other))
    )


def _deciding(op: str, args: tuple, kwargs: dict) -> tuple[torch.Tensor, dict]:
    """The tensor that decides among the arguments of `op`, and all of them."""
    # The ops import this module, so they are looked up when asked for.
    signature = inspect.signature(getattr(importlib.import_module(__package__), op))
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        raise TypeError(
            f"explain: expected the arguments of {op}({takes}), got others: {error}. "
            "Pass what the op is called with."
        ) from None
    name = _DECIDING[op] if op in _OPS else _PAIRS[op][0]
    found = arguments[name]
    if isinstance(found, (list, tuple)):
        if not found:
            raise ValueError(
                f"explain: expected at least one tensor in {name} of {op}, got none. "
                "Pass what the op is called with."
            )
        wrong = [x for x in found if not isinstance(x, torch.Tensor)]
        found = wrong[0] if wrong else narrowest(found)
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"explain: expected tensors as {name} of {op}, got {type(found).__name__}. "
            "Pass what the op is called with."
        )
    if op == "projected_attention":  # the limits of attention look at one head
        heads = arguments["num_heads"] + 2 * arguments["num_kv_heads"]
        found = found[..., : found.shape[-1] // heads]
    return found, arguments


def describe(op: str, given: Facts, impl: str = "auto") -> str:
    """The text of `explain` from facts alone, so also about a machine that is not here. Pure."""
    chosen = choose(op, impl, given)
    refuse = _refusal_of_auto if impl == "auto" else refusal
    lines = []
    for name in _OPS[op]:
        reason = refuse(op, name, given)
        if name == chosen:
            lines.append(f"-> {op}: {name}")
        elif reason is None:
            lines.append(f"   {op}: {name}: can run, but comes later in the order or needs asking")
        else:
            lines.append(f"   {op}: {name}: {reason}")
    return "\n".join(lines)
