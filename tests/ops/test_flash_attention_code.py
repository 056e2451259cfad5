"""The parts of flash attention that are not arithmetic: plans, tiles, and the code for GPUs.

The Triton kernels are compiled here for GPUs that are not there, in a process without the
interpreter: they must spill no register, fit in shared memory, and use the matrix instructions of
the GPU. Not covered: that they are fast, or right on a GPU (test_flash_attention.py interprets
them).
"""

import itertools

import pytest
import torch
from attention_builds import BUILDS, check, compile_all

from stellarator_kernels.attention import aten, tiles
from stellarator_kernels.layout import aligned_rows, strides_in_units
from stellarator_kernels.reference import visible_keys
from stellarator_kernels.testing import shared_memory_limit


def test_code_for_gpus_that_are_not_here():
    _, found = compile_all(BUILDS)
    for build, one in zip(BUILDS, found, strict=True):
        check(build, one)


def test_rows_are_copied_only_where_loads_need_it():
    """The gate above compiles for strides in units of 8 elements: so the launchers pass those."""
    for D in (16, 72):
        projection = torch.randn(2, 5, (4 + 2) * D)
        for part in projection.split((4 * D, D, D), dim=-1):
            heads = part.unflatten(-1, (-1, D))
            assert aligned_rows(heads) is heads
            assert strides_in_units(heads) == (
                30 * D // 8,
                6 * D // 8,
                D // 8 * (heads.shape[2] > 1),
            )
    odd_rows = torch.randn(2, 5, 4 * 16 + 1)[..., :64].unflatten(-1, (4, 16))
    odd_start = torch.randn(2, 5, 5, 16)[..., 1:].reshape(-1)[1:].as_strided(
        (2, 5, 2, 8), (160, 32, 8, 1)
    )  # fmt: skip
    strided = torch.randn(2, 5, 16, 4).mT
    for x in (odd_rows, odd_start, strided):
        copy = aligned_rows(x)
        assert torch.equal(copy, x) and copy.is_contiguous() and copy.data_ptr() % 16 == 0
    one = torch.randn(1, 1, 1, 24 + 3)[..., :24]  # strides that are never taken
    assert aligned_rows(one) is one and strides_in_units(one) == (0, 0, 0)


@pytest.mark.parametrize("phase", ["forward", "dq", "dkdv"])
def test_every_width_has_tiles(phase):
    capabilities = (None, (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for D, capability, dtype in itertools.product(range(16, 257, 8), capabilities, dtypes):
        found = tiles.tile_sizes(phase, D, dtype, capability)
        assert found.own in (16, 32, 64, 128) and found.step in (16, 32, 64, 128)
        assert found == tiles.tile_sizes(phase, D, dtype, capability)
        if capability is None:
            continue
        # What a program cannot do without: its own rows (two operands in the backward kernels)
        # and one step of the two operands that it walks over.
        width = max(64, 2 ** (D - 1).bit_length()) * dtype.itemsize
        rows = found.own * (1 if phase == "forward" else 2) + 2 * found.step
        assert rows * width <= shared_memory_limit(capability), (D, capability, dtype)


def test_shared_memory_limits():
    """CUDA programming guide, table of compute capabilities: maximum shared memory of a block."""
    limits = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227}
    for capability, kilobytes in {**limits, (12, 0): 99}.items():
        assert shared_memory_limit(capability) == kilobytes * 1024


@pytest.mark.parametrize("T,S", [(1, 1), (1, 900), (7, 7), (256, 256), (257, 257), (900, 900)])
@pytest.mark.parametrize("extra", [0, 300])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 255, 300, 5000])
def test_pieces_cover_what_is_visible_and_skip_the_rest(T, S, extra, causal, window):
    if window is not None and not causal:
        return
    for queries, keys in {(T, S), (T + extra, S), (T, S + extra)}:
        covered = torch.zeros(queries, keys, dtype=torch.bool)
        masks = aten._Masks(queries, keys, window, torch.float32)
        parts = aten.pieces(queries, keys, causal, window)
        row = None
        for part in parts:
            rows, columns = part.q_stop - part.q_start, part.k_stop - part.k_start
            assert row is None or part.q_start == row  # in order, without a hole
            row = part.q_stop
            seen = torch.ones(rows, columns, dtype=torch.bool)
            if part.mask == "causal":
                assert rows == columns or window is None
                seen = seen.tril()
            elif part.mask == "band":
                seen = masks.of(part) == 0
            assert seen.any(1).all()  # ATen gives NaN for a row that sees nothing
            covered[part.q_start : part.q_stop, part.k_start : part.k_stop] = seen
            if window is not None and part.mask == "band":
                assert columns <= rows + window - 1
        assert torch.equal(covered, visible_keys(queries, keys, causal=causal, window=window))


def test_document_runs():
    assert aten.document_runs([0, 3, 6, 6, 7, 9, 11]) == [(0, 3, 2), (6, 1, 1), (7, 2, 2)]
    assert aten.document_runs([0, 0, 5]) == [(0, 5, 1)]


@pytest.mark.parametrize("group,calls", [(1, 1), (9, 1), (12, 1), (13, 13), (24, 2), (48, 4)])
def test_large_groups_are_split_evenly(group, calls):
    assert aten._group_calls(group) == calls


def test_document_bounds():
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    found = tiles.document_bounds(cu_seqlens, 5)
    assert found.tolist() == [[0, 0, 2, 2, 2], [2, 2, 5, 5, 5]]
    assert found.dtype == torch.int32
