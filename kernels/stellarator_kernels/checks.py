"""Validation of arguments. Every message of every op is built here, in one form:

`<op>: expected <invariant with sizes>, got <actual>. <what to do>.`

defines: expect, expect_dtype, expect_same_device, expect_shape
"""

import torch


def expect(condition: bool, op: str, expected: str, got: object, todo: str) -> None:
    """Raise ValueError unless `condition`.

    Raises:
        ValueError: the three parts, joined in the house form.
    """
    if not condition:
        raise ValueError(f"{op}: expected {expected}, got {got}. {todo}.")


def expect_shape(op: str, name: str, tensor: torch.Tensor, form: str, shape: tuple, todo: str):
    """`tensor.shape == shape`; `form` is the shape in letters, for example "(C,)"."""
    if tuple(tensor.shape) != tuple(shape):
        expect(False, op, f"{name} {form} = {tuple(shape)}", tuple(tensor.shape), todo)


def expect_dtype(op: str, name: str, tensor: torch.Tensor, allowed: tuple, todo: str):
    """`tensor.dtype in allowed`."""
    if tensor.dtype not in allowed:
        expect(False, op, f"{name} with dtype in {allowed}", tensor.dtype, todo)


def expect_same_device(op: str, **tensors: torch.Tensor | None):
    """All given tensors are on one device."""
    devices = {name: str(t.device) for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        expect(False, op, "all tensors on one device", devices, "Move them to one device")
