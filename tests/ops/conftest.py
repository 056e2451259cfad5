"""Puts the tensors of a test where Triton runs; see grid.py."""

import contextlib

import pytest
import torch
from grid import NATIVE  # before anything imports Triton


@pytest.fixture(autouse=True)
def device(request):
    """A test marked `gpu` makes its tensors there; beside it nothing can be interpreted."""
    marks = {mark.name for mark in request.node.iter_markers()}
    if NATIVE and "interpret" in marks:
        pytest.skip("Triton runs on the GPU in this process, not in its interpreter")
    with torch.device("cuda") if "gpu" in marks else contextlib.nullcontext():
        yield
