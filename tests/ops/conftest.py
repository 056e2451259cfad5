"""Puts the tensors of a test where Triton runs, see grid.py; and makes its interpreter faster."""

import contextlib
import functools
import inspect

import pytest
import torch
from grid import NATIVE  # before anything imports Triton

from stellarator_kernels import _triton


@pytest.fixture(autouse=True)
def device(request):
    """A test marked `gpu` makes its tensors there; beside it nothing can be interpreted."""
    marks = {mark.name for mark in request.node.iter_markers()}
    if NATIVE and "interpret" in marks:
        pytest.skip("Triton runs on the GPU in this process, not in its interpreter")
    with torch.device("cuda") if "gpu" in marks else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def language_is_patched_once_a_launch():
    """Triton's interpreter does so again, to no effect, for every function that a kernel calls.

    That is a third of its time. A builtin that has been replaced is not marked as one any more.
    """
    if NATIVE or _triton.FAILURE is not None:
        yield
        return
    from triton.runtime import interpreter

    tl, patch = _triton.tl, interpreter._patch_lang

    @functools.cache
    def languages(function):
        found = [x for x in function.__globals__.values() if inspect.ismodule(x)]
        return [x for x in found if x in (tl, tl.core)]

    def patch_once(function):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", patch_once)
        yield
