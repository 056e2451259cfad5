"""Gradients of a bucket, summed over four ranks, against their sum in float64.

In bf16 each of n addends is rounded, and so is each of the n - 1 sums: at most n * 2^-9 of the sum
of magnitudes, where an element is the sum of n. Not covered: NCCL, which may add in another order.
"""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from stellarator.parallel.buckets import Bucket, DataParallel
from stellarator.parallel.collectives import Group
from stellarator.parallel.mesh import Axis
from stellarator.parallel.shard import Piece, Shard
from stellarator.parallel.tensor import ALONE

RANKS, SHAPE = 4, (37, 53)
DTYPES = {"bf16": torch.bfloat16, None: None}


def gradient(rank: int) -> torch.Tensor:
    """Of one rank: of many sizes, and some elements nearly cancel."""
    g = torch.Generator().manual_seed(rank)
    scale = torch.logspace(-6, 3, SHAPE[0] * SHAPE[1]).view(SHAPE)
    common = torch.randn(SHAPE, generator=torch.Generator().manual_seed(99)) * (-1) ** rank
    return scale * (torch.randn(SHAPE, generator=g) + 100 * common)


def summed(axis, dtype, zero):
    """The part of the sum that this rank keeps, twice, and where it is among the elements."""
    data = DataParallel(axis, zero=zero, reduce_dtype=dtype)
    parameter = torch.nn.Parameter(torch.zeros(SHAPE))
    shards = {"weight": Shard(SHAPE, 0, (Piece(0, SHAPE[0]),))}
    bucket = Bucket([("weight", parameter)], shards, torch.float32, 0.0, ALONE, data)
    found = []
    for _ in range(2):
        bucket.zero_grad()
        bucket.view(bucket.room(), "weight").copy_(gradient(axis.rank))
        bucket.begin_reduce()
        bucket.end_reduce()
        found.append(bucket.own_view(bucket.grads, "weight").reshape(-1).clone())
    part = bucket.own_part("weight")
    return found, (part.start, part.end)


def all_of_them(rank):
    axis = Axis("dp", rank, RANKS, Group(dist.group.WORLD, "dp"))
    return {(name, zero): summed(axis, DTYPES[name], zero) for name in DTYPES for zero in range(4)}


@pytest.fixture(scope="module")
def results():
    return on_ranks(all_of_them, RANKS)


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_as_exact_as_their_dtype(dtype, zero, results):
    each = torch.stack([gradient(rank).double() for rank in range(RANKS)])
    exact, sizes = each.sum(0).view(-1), each.abs().sum(0).view(-1)
    unit = 2.0**-9 if dtype == "bf16" else 2.0**-24
    for rank in range(RANKS):
        (found, again), (start, end) = results[rank][dtype, zero]
        assert torch.equal(found, again)
        assert len(found) == (end - start if zero else exact.numel())
        mine = slice(start, end) if zero else slice(None)
        error = (found.double() - exact[mine]).abs() / sizes[mine]
        assert error.numel() > 100 and error.max() <= RANKS * unit
        assert error.max() > unit / 4 or dtype is None, "it is summed in bf16"
        if not zero:
            assert torch.equal(found, results[0][dtype, zero][0][0])
