"""AdamW over flat tensors: one pass over memory, the clip coefficient folded in.

g = clip * grad
m = m + (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
w = (1 - lr * weight_decay) * w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
param = round_to_nearest_even(w) where there is a float32 master w

Narrower storage, in any combination (adamw_states.py): bf16 parameters with 16-bit remainders, or
rounded stochastically without any master, and moments of 8 bits.

Moved: 24 bytes of float32 states per element (m, v, w, each read and written), the gradient read
and, with a master, the parameter written: 30 bytes for bfloat16 parameters and float32 gradients;
28 with remainders, 24 rounded stochastically, 12 with moments of 8 bits besides.
Saved: nothing; this op has no gradient. All arithmetic is float32, the factors that depend on the
step are computed in float64 first. `triton`, `cuda` and `cpu` make one pass, `torch` about ten.
Source: Loshchilov & Hutter 2019, arXiv:1711.05101; order of operations as torch.optim.AdamW;
clip folded in as in llm.c.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from stellarator_kernels.adamw_kernels import UPDATES, factors_of_step
from stellarator_kernels.adamw_states import Storage, num_groups, random_key
from stellarator_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape
from stellarator_kernels.dispatch import choose, narrowest


@torch.library.custom_op(
    "stellarator::adamw",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "masters", "remainders", "scales"),
)
def _adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    remainders: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    lr: torch.Tensor,
    step: torch.Tensor,
    clip: torch.Tensor | None,
    seed: torch.Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Sequence[float],
    first_indices: Sequence[int],
    index_rows: Sequence[int],
    impl: str,
) -> None:
    """scales: those of all exp_avgs, then those of all exp_avg_sqs, or none.

    index_rows: three numbers for each tensor, 0 where its indices follow each other; or none.
    """
    narrow = bool(len(remainders) or len(scales)) or seed is not None
    update = UPDATES[choose("adamw_", impl, narrowest(params), narrow=narrow)]
    # On a GPU a tensor is not read by the host: the arithmetic is done there, in float64.
    lr, step = (x if x.device.type != "cpu" else x.item() for x in (lr, step))
    key = None if seed is None else random_key(seed, step, params[0].device)
    weights = masters if len(masters) else params
    nothing = [None] * len(params)
    remainders = remainders if len(remainders) else nothing
    averages, squares = (scales[: len(params)], scales[len(params) :]) if scales else (nothing,) * 2
    tensors = zip(params, weights, grads, exp_avgs, exp_avg_sqs, weight_decay, strict=True)
    rows = [tuple(index_rows[i : i + 3]) for i in range(0, len(index_rows), 3)] or nothing
    stored = zip(remainders, averages, squares, first_indices, rows, strict=True)
    for (param, weight, grad, exp_avg, exp_avg_sq, decay), (*narrow, first, row) in zip(
        tensors, stored, strict=True
    ):
        factors = factors_of_step(lr, step, beta1, beta2, decay)
        storage = Storage(*narrow, key, first, row if row and row[1] else None)
        update(param, weight, grad, exp_avg, exp_avg_sq, clip, factors, beta1, beta2, eps, storage)


@_adamw.register_fake
def _fake_adamw(*arguments):
    return None


def _scalar(op: str, name: str, value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`value` as a 0-d tensor; a number stays on the host."""
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    expect_shape(op, name, value, "()", (), "Pass a number or a 0-d tensor")
    if value.device.type != "cpu":
        expect_same_device(op, param=torch.empty(0, device=device), **{name: value})
    return value


def _check(params, lists, clip, seed):
    """Shapes, dtypes, strides and devices of the lists, by name; those not given are empty."""
    op, device = "adamw_", params[0].device
    masters, remainders = lists["master"], lists["remainder"]
    for i, param in enumerate(params):
        dtype = param.dtype
        names = f"params[{i}]"
        expect_dtype(
            op, names, param, (torch.bfloat16, torch.float32, torch.float64), "Cast the parameters"
        )
        is_narrow = dtype == torch.bfloat16
        expect(
            (bool(masters) != bool(remainders) or (seed is not None and not masters + remainders))
            if is_narrow
            else not masters + remainders,
            op,
            "a float32 master for bfloat16 params (or a remainder, or a seed) and none for others",
            f"{names} {dtype} with {len(masters)} masters and {len(remainders)} remainders",
            "Pass one of them, for each parameter, exactly when the parameters are bfloat16",
        )
        state = torch.float64 if dtype == torch.float64 else torch.float32
        if lists["exp_avg_scales"] and dtype == torch.float64:
            expect(False, op, "no moments of 8 bits beside float64", names, "Pass float64 moments")
        moments = torch.uint8 if lists["exp_avg_scales"] else state
        dtypes = {
            "grads": (dtype, torch.float32, torch.bfloat16),
            "exp_avgs": (moments,),
            "exp_avg_sqs": (moments,),
            "master": (state,),
            "remainder": (torch.int16,),
            "exp_avg_scales": (torch.float32,),
            "exp_avg_sq_scales": (torch.float32,),
        }
        for name, tensors in {"params": params, **lists}.items():
            if not len(tensors):
                continue
            tensor, of = tensors[i], f"{name}[{i}]"
            if tensor.ndim != 1 or (tensor.numel() > 1 and tensor.stride(0) != 1):
                got = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
                expect(False, op, f"{of} flat, (n,) with stride 1", got, "Pass flat buffers")
            n, form = param.numel(), "(n,)"
            if name.endswith("_scales"):
                n, form = num_groups(n), "(ceil(n / 256),)"
            expect_shape(op, of, tensor, form, (n,), f"Match {names}")
            if tensor.device != device:
                expect_same_device(op, **{"params[0]": params[0], of: tensor})
            if name == "grads":
                expect_dtype(op, of, tensor, dtypes[name], "Cast the gradient")
            elif name != "params":
                expect_dtype(op, of, tensor, dtypes[name], "Keep the states in that dtype")
    is_exact = params[0].dtype != torch.bfloat16 or len(masters + remainders) > 0
    if seed is not None and is_exact and not lists["exp_avg_scales"]:
        got = "a seed beside exact weights and moments"
        expect(False, op, "a seed only where something is rounded with it", got, "Pass none")
    if clip is not None:
        expect_shape(op, "clip_coefficient", clip, "()", (), "Pass a 0-d tensor")
        is_wide = narrowest(params).dtype == torch.float64
        allowed = (torch.float32, torch.float64) if is_wide else (torch.float32,)
        expect_dtype(op, "clip_coefficient", clip, allowed, "Pass the dtype of the states")
        expect_same_device(op, params=params[0], clip_coefficient=clip)


def _seed(seed: int | torch.Tensor | None) -> torch.Tensor | None:
    """As () int64; a number stays on the host, and a negative one stands for its 64 bits."""
    if seed is None:
        return None
    if not isinstance(seed, torch.Tensor):
        wrapped = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
        return torch.tensor(wrapped, dtype=torch.int64, device="cpu")
    expect_shape("adamw_", "seed", seed, "()", (), "Pass a number or a 0-d tensor")
    expect_dtype("adamw_", "seed", seed, (torch.int64,), "Pass seed.long()")
    return seed


@torch.no_grad()
def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Sequence[float],
    step: int | torch.Tensor,
    master: Sequence[torch.Tensor] | None = None,
    remainder: Sequence[torch.Tensor] | None = None,
    exp_avg_scales: Sequence[torch.Tensor] | None = None,
    exp_avg_sq_scales: Sequence[torch.Tensor] | None = None,
    seed: int | torch.Tensor | None = None,
    first_indices: Sequence[int] | None = None,
    index_rows: Sequence[tuple[int, int, int] | None] | None = None,
    clip_coefficient: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One AdamW step on lists of flat tensors, in place.

    g = clip * grad;  m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    w = (1 - lr * weight_decay) * w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: (n,) each, contiguous; bfloat16 with `master`, `remainder` or, for stochastic
            rounding, `seed` alone; or float32 (float64) without. Usually one per group of equal
            weight decay; slices of a larger buffer are fine.
        grads: (n,) each, float32 or bfloat16. Not changed.
        exp_avgs, exp_avg_sqs: (n,) each, float32 (float64 beside float64); the states m and v. Or
            uint8 with scales; zeros to begin with.
        lr: learning rate, a number or a 0-d tensor on the same device (for CUDA graphs).
        weight_decay: one number, or one per tensor.
        step: t, counted from 1; a number or a 0-d tensor on the same device.
        master: (n,) each, float32; the weights w that are updated. Then params = w, rounded to the
            nearest, ties to even.
        remainder: (n,) each, int16, instead of masters: lower halves of the weights, whose other
            bits the parameters hold, rounded to nearest, ties away from zero (`split_master`).
        exp_avg_scales, exp_avg_sq_scales: (ceil(n / 256),) each, float32: moments of 8 bits. They
            need a seed.
        seed: of the random bits with which they, and parameters without more, are rounded: any 64
            bits, or a () int64 tensor on the same device. The bits change with the step.
        first_indices: global index of element 0 of each tensor, by which its random bits are found;
            None: the tensors lie one behind the other from 0 on. Ranks that hold parts of one
            buffer pass where these begin.
        index_rows: (offset, width, stride) each, or None, of tensors that hold some columns of a
            larger matrix: element i has the global index first_index
            + (i + offset) // width * stride + (i + offset) % width.
        clip_coefficient: 0-d float32 tensor (float64 beside float64 params) on the same device,
            multiplied into the gradients; the host does not wait for it.
    Raises:
        ValueError: shapes, dtypes, strides, devices or lengths disagree; `step` below 1.
        RuntimeError: `impl` cannot run here.
    Cost: `cost.adamw`.
    Source: arXiv:1711.05101.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    options = {
        "master": master,
        "remainder": remainder,
        "exp_avg_scales": exp_avg_scales,
        "exp_avg_sq_scales": exp_avg_sq_scales,
        "first_indices": first_indices,
        "index_rows": index_rows,
    }
    for name, tensors in (lists | {k: v for k, v in options.items() if v is not None}).items():
        expect(
            len(tensors) == len(params),
            "adamw_",
            f"as many {name} as params, {len(params)}",
            len(tensors),
            "Pass lists of equal length",
        )
    if isinstance(weight_decay, (int, float)):
        weight_decay = [weight_decay] * len(params)
    expect(
        len(weight_decay) == len(params),
        "adamw_",
        f"one weight_decay, or one per tensor, {len(params)}",
        len(weight_decay),
        "Pass a number to use it for all",
    )
    expect(
        isinstance(step, torch.Tensor) or step >= 1,
        "adamw_",
        "step >= 1",
        step,
        "Count the first update as step 1",
    )
    expect(
        (exp_avg_scales is None) == (exp_avg_sq_scales is None)
        and (exp_avg_scales is None or seed is not None),
        "adamw_",
        "exp_avg_scales, exp_avg_sq_scales and a seed together",
        "some of them",
        "Moments of 8 bits take all three",
    )
    if len(params) == 0:
        return
    if first_indices is None:
        first_indices = list(accumulate((x.numel() for x in params[:-1]), initial=0))
    for rows in index_rows or ():
        expect(
            rows is None or (0 <= rows[0] < rows[1] and rows[2] >= rows[1]),
            "adamw_",
            "index_rows of (offset, width, stride), 0 <= offset < width <= stride",
            rows,
            "Pass the columns that are here, and those of the whole",
        )
    indices = ("first_indices", "index_rows")
    lists |= {k: list(v or []) for k, v in options.items() if k not in indices}
    _check(params, lists, clip_coefficient, seed)
    device = params[0].device
    _adamw(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        lists["master"],
        lists["remainder"],
        lists["exp_avg_scales"] + lists["exp_avg_sq_scales"],
        _scalar("adamw_", "lr", lr, device),
        _scalar("adamw_", "step", step, device),
        clip_coefficient,
        _seed(seed),
        beta1,
        beta2,
        eps,
        [float(x) for x in weight_decay],
        list(first_indices),
        [x for rows in index_rows or () for x in rows or (0, 0, 0)],
        impl,
    )
