"""adamw_ on one flat buffer: bf16 parameters with fp32 masters, or fp32 parameters.

Peers: eager (torch's functional AdamW, one operation after the other over the whole list), fused
(torch's fused AdamW); both followed by the cast of the masters to bf16, which ours does in the same
pass. The gradients are fp32, as the engine accumulates them. `clip` in front stands for nothing
here: all go without.
"""

import torch
from torch.optim.adamw import adamw

from benchmarks.cases import Case, Maker
from benchmarks.shapes import Shape
from stellarator_kernels import adamw_, cost

_SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
_STEP = 3


def cases(shape: Shape, device: str) -> list[Case]:
    """One case, as many elements as the model (or one layer of a large one) has parameters."""
    n = shape.parameters
    return [
        Case(
            op="adamw_",
            variant="",
            sizes={"n": n},
            inputs=lambda make: _inputs(make, n),
            ours=_ours,
            peers={"eager": _peer(foreach=True), "fused": _peer(fused=True)},
            cost=lambda size: cost.adamw(n, size, 4, master=size == 2),
            reference_bytes=12 * 8 * n,
            in_place=True,
        )
    ]


def _inputs(make: Maker, n: int) -> dict[str, torch.Tensor]:
    """The master holds the weights; `param` is its rounding in the dtype of the run."""
    master, grad, exp_avg = (make.normal(n, grad=False, dtype=torch.float32) for _ in range(3))
    squares = exp_avg.square()
    param = master.to(make.dtype)
    return {"param": param, "master": master, "grad": grad, "exp_avg": exp_avg, "squares": squares}


def _ours(impl, param, master, grad, exp_avg, squares):
    """New (param, master, exp_avg, squares); `param` is used if it is bf16."""
    has_master = param.dtype == torch.bfloat16
    weights = {"master": [master]} if has_master else {}
    first = param if has_master else master
    adamw_([first], [grad], [exp_avg], [squares], step=_STEP, impl=impl, **_SETTINGS, **weights)
    return first, master, exp_avg, squares


def _peer(**kind):
    """torch's AdamW on the masters, then the cast."""

    @torch.no_grad()
    def update(param, master, grad, exp_avg, squares):
        # torch counts the step up first.
        steps = [torch.tensor(_STEP - 1.0, device=master.device if "fused" in kind else "cpu")]
        adamw(
            [master], [grad], [exp_avg], [squares], [], steps,
            amsgrad=False, maximize=False, **kind, **_SETTINGS,
        )  # fmt: skip
        if param.dtype != torch.bfloat16:
            return master, master, exp_avg, squares
        return param.copy_(master), master, exp_avg, squares

    return update
