"""Puts the tensors of a test where Triton runs, see grid.py; and makes its interpreter faster."""

import contextlib
import dataclasses
import functools
import inspect
import os

import pytest
import torch
from grid import COMPILED, EMULATED, NATIVE  # before anything imports Triton

from stellarator_kernels import _triton


@pytest.fixture(autouse=True)
def device(request):
    """A test marked `gpu` makes its tensors there; beside it nothing can be interpreted."""
    marks = {mark.name for mark in request.node.iter_markers()}
    if NATIVE and "interpret" in marks:
        pytest.skip("Triton runs on the GPU in this process, not in its interpreter")
    with torch.device("cuda") if "gpu" in marks else contextlib.nullcontext():
        yield


def pytest_collection_modifyitems(config, items):
    """On an emulated GPU there is nothing for tests that need none; of the rest, a part may do."""
    if EMULATED is None:
        return
    share = int(os.environ.get("STELLARATOR_EMULATED_SHARE", "1"))
    chosen = [item for item in items if item.get_closest_marker("emulated")][::share]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def pytest_configure():
    if EMULATED is not None:
        from ptx_machine import device, machine

        seed = int(os.environ.get("STELLARATOR_EMULATED_SEED", "0"))
        device.install(EMULATED, functools.partial(machine.run, seed=seed))


@pytest.fixture(scope="session", autouse=True)
def faster_interpreter():
    """Triton's interpreter without more than half of its work, which has no effect.

    It patches the language again for every function that a kernel calls; a builtin that is patched
    is not marked as one any more. It adds integers again in int64 for an assertion that is made
    only with `debug`, which it has off.
    """
    if COMPILED or _triton.FAILURE is not None:
        yield
        return
    from triton.runtime import interpreter

    tl, patch, builder = _triton.tl, interpreter._patch_lang, interpreter.interpreter_builder

    @functools.cache
    def languages(function):
        found = [x for x in function.__globals__.values() if inspect.ismodule(x)]
        return [x for x in found if x in (tl, tl.core)]

    def patch_once(function):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", patch_once)
        patched.setattr(builder, "options", options)
        yield
