"""embedding against plain indexing and a loop over ids in float64. Not covered: other devices."""

import pytest
import torch

from stellarator_kernels import embedding
from stellarator_kernels.embedding import _embedding_backward, _embedding_forward
from stellarator_kernels.testing import poison_empty

IMPLS = ["torch", "reference"]


def case(dtype, N=300, V=7, C=5, seed=0):
    """ids, most of them alike, weight and dy."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (N,), generator=g) * (torch.rand(N, generator=g) < 0.3)
    return ids, torch.randn(V, C, generator=g).to(dtype), torch.randn(N, C, generator=g).to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_and_sums(impl, dtype):
    ids, weight, dy = case(dtype)
    weight.requires_grad_()
    with poison_empty():
        y = embedding(ids.view(3, 100), weight, impl=impl)
        (dweight,) = torch.autograd.grad(y, weight, dy.view(3, 100, 5))
    assert y.shape == (3, 100, 5) and torch.equal(y.view(-1, 5), weight.detach()[ids])
    exact = torch.zeros(7, 5, dtype=torch.float64)
    for i, row in zip(ids.tolist(), dy.double(), strict=True):
        exact[i] += row
    assert dweight.dtype == dtype
    error = (dweight.double() - exact).abs()
    terms = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * len(ids)
    assert (error <= torch.finfo(dtype).eps * exact.abs() + terms).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_many_gradients_of_one_id_are_not_lost(impl):
    """In bf16 sums 256 + 1 is 256, which is where ATen's own kernel stays."""
    ids, weight = torch.zeros(4096, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.bfloat16)
    weight.requires_grad_()
    embedding(ids, weight, impl=impl).sum().backward()
    assert weight.grad.tolist() == [[4096.0, 4096.0], [0.0, 0.0], [0.0, 0.0]]


def test_the_same_to_the_bit_with_any_number_of_threads():
    ids, weight, dy = case(torch.float32, N=20_000, V=50, C=64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_embedding_backward(dy, ids, 50, "torch"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_opcheck():
    ids, weight, dy = case(torch.float32)
    torch.library.opcheck(_embedding_forward, (ids, weight.requires_grad_(), "torch"))
    torch.library.opcheck(_embedding_backward, (dy, ids, 7, "torch"))


def test_errors():
    ids, weight, _ = case(torch.float32)
    for arguments, message in (
        ((ids, weight[0]), r"expected weight \(V, C\), got \(5,\)"),
        ((ids.int(), weight), "expected ids with dtype in .*int64"),
        ((ids, weight.long()), "expected weight with dtype in"),
    ):
        with pytest.raises(ValueError, match=f"embedding: {message}"):
            embedding(*arguments)
    with pytest.raises(IndexError):
        embedding(ids + 7, weight)
