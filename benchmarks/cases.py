"""One op at one shape, and how it is called.

defines: Case, Maker, Calls, results

An op's module (bench_<op>.py) turns a Shape into cases. A case names its inputs, our function, and
the peers; all take the same inputs in the same order and return the same results, so one piece of
code checks, times and weighs them all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stellarator_kernels.cost import Cost

PHASES = ("forward", "backward", "both")


class Maker:
    """Makes the inputs of a case on one device: normal values, the same in every run."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 1):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(
        self, *shape: int, scale: float = 1.0, shift: float = 0.0, grad: bool = True, dtype=None
    ) -> torch.Tensor:
        """Normal values in the dtype of the run; `grad`: its gradient is wanted."""
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return (x * scale + shift).to(dtype or self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op: name of the public op.
        variant: what tells cases of one op apart; may be empty.
        sizes: for the record.
        inputs: from a Maker to {name: tensor}; those that require a gradient are differentiated.
        ours: ours(impl, *inputs) -> a tensor or a tuple of tensors.
        peers: name -> peer(*inputs), the same results. "eager" is plain torch in the dtype of the
            inputs, whose error against float64 is what ours is measured by.
        cost: from the bytes of an element to the Cost.
        reference_bytes: about what the float64 reference holds at its peak.
        in_place: the call changes its inputs.
        phases: those whose times mean something. Left out: phases of an op that does work of one
            phase in the other.
    """

    op: str
    variant: str
    sizes: dict[str, int]
    inputs: Callable[[Maker], dict[str, torch.Tensor]]
    ours: Callable
    peers: dict[str, Callable]
    cost: Callable[[int], Cost]
    reference_bytes: int
    in_place: bool = False
    phases: tuple[str, ...] = PHASES

    @property
    def name(self) -> str:
        """Op and variant."""
        return f"{self.op} {self.variant}".rstrip()


class Calls:
    """The inputs of a case in one precision, and calls on them.

    Args:
        inputs: {name: tensor} of the case.
        seed: of the gradients of the results.
    """

    def __init__(self, inputs: dict[str, torch.Tensor], seed: int = 2):
        self.inputs, self._seed = inputs, seed
        self.wanted = [x for x in inputs.values() if x.requires_grad]
        self._gradients: list[torch.Tensor] = []

    @property
    def phases(self) -> tuple[str, ...]:
        """What there is to time."""
        return PHASES if self.wanted else PHASES[:1]

    def copy(self, dtype: torch.dtype | None = None) -> "Calls":
        """The same values in memory of their own, floats in another dtype if it is given."""
        copies = {}
        for name, x in self.inputs.items():
            to = dtype if dtype and x.is_floating_point() else x.dtype
            copies[name] = x.detach().to(to, copy=True).requires_grad_(x.requires_grad)
        other = Calls(copies, self._seed)
        other._gradients = [g if dtype is None else g.to(dtype) for g in self._gradients]
        return other

    def forward(self, function: Callable) -> tuple[torch.Tensor, ...]:
        """The results of one call."""
        outputs = function(*self.inputs.values())
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Gradients of the inputs, for fixed normal gradients of the results (1 for a scalar)."""
        return torch.autograd.grad(outputs, self.wanted, self._gradients_of(outputs))

    def prepare(self, outputs: tuple[torch.Tensor, ...]) -> None:
        """Draw the gradients of the results, once: in the dtype of these."""
        if not self._gradients:
            generator = torch.Generator(outputs[0].device).manual_seed(self._seed)
            self._gradients = [
                torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)
                if o.dim()
                else torch.ones_like(o)
                for o in outputs
            ]

    def _gradients_of(self, outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        pairs = zip(self._gradients, outputs, strict=True)
        return [g.to(o.dtype) for g, o in pairs]

    def both(self, function: Callable) -> list[torch.Tensor]:
        """Results, then gradients, detached."""
        outputs = self.forward(function)
        if not self.wanted:
            return [o.detach() for o in outputs]
        self.prepare(outputs)
        return [*(o.detach() for o in outputs), *self.backward(outputs)]

    def largest(self) -> float:
        """The largest magnitude of a float among the inputs and the gradients of the results.

        Infinities, as in a mask, are left out.
        """
        floats = [x.detach() for x in self.inputs.values() if x.is_floating_point()]
        finite = [x[torch.isfinite(x)].abs() for x in (*floats, *self._gradients)]
        return max(float(x.max()) for x in finite if x.numel())

    def names(self, num_results: int) -> list[str]:
        """What `both` returns, for messages."""
        gradients = [f"gradient of {n}" for n, x in self.inputs.items() if x.requires_grad]
        return [f"result {i}" for i in range(num_results - len(gradients))] + gradients
