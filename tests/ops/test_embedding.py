"""embedding against plain indexing and a loop over ids in float64. Where Triton runs: grid.py."""

import grid
import pytest
import torch
from grid import TRITON

from stellarator_kernels import cost, embedding
from stellarator_kernels.embedding import (
    _embedding_backward,
    _embedding_forward,
    add_embedding_gradient,
)
from stellarator_kernels.testing import poison_empty

IMPLS = ["torch", "reference"]
ALL = [*IMPLS, pytest.param("triton", marks=TRITON), *grid.CUDA]
# Rows of one id: more and fewer than a program adds, several long ones side by side, none.
COUNTS = {
    "one": [1],
    "a_unit_and_one_more": [32, 33, 0, 1, 64],
    "long_ones_side_by_side": [40, 50, 3, 33, 97, 0, 65],
    "one_long": [0, 300],
    "short": [3, 1, 8, 9, 0, 31, 2],
}


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


def exact_sums(ids, dy, V):
    """A loop over rows in float64."""
    sums = torch.zeros(V, dy.shape[1], dtype=torch.float64, device="cpu")
    for i, row in zip(ids.tolist(), dy.double().cpu(), strict=True):
        sums[i] += row
    return sums


def check_sums(impl, counts, C, dtype, gap=8, offset=0):
    """Written and added to, the same twice.

    gap: elements between rows of dy. offset: of what is added to, in a flat buffer.
    """
    g = torch.Generator().manual_seed(3)
    V = len(counts)
    ids = torch.arange(V, device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))
    ids = ids[torch.randperm(len(ids), generator=g, device="cpu")]
    dy = torch.randn(len(ids), C + gap, generator=g, device="cpu").to(dtype)
    exact = exact_sums(ids, dy[:, :C], V)
    ids, dy = (t.to(torch.get_default_device()) for t in (ids, dy))
    with poison_empty():
        found = [_embedding_backward(dy[:, :C], ids, V, impl) for _ in range(2)]
        total = torch.ones(V * C + 4)[offset : V * C + offset].view(V, C)
        add_embedding_gradient(total, dy[:, :C], ids, impl=impl)
    assert torch.equal(*found) and found[0].dtype == dtype
    scale = torch.finfo(dtype).eps * exact.abs() + 1e-6 * len(ids) ** 0.5
    assert ((found[0].double().cpu() - exact).abs() <= scale).all()
    # CUDA adds one row after the other, Triton eight sums beside each other.
    scale = 1e-6 * (3 + exact.abs() + (len(ids) ** 0.5 if impl == "cuda" else 0))
    assert ((total.double().cpu() - 1 - exact).abs() <= scale).all()


@TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("C", [5, 700])
@pytest.mark.parametrize("counts", COUNTS)
def test_triton_sums_of_short_and_long_runs(counts, C, dtype):
    check_sums("triton", COUNTS[counts], C, dtype)


@pytest.mark.parametrize(("impl", "dtype"), grid.CUDA_CASES)
@pytest.mark.parametrize("C", [5, 1032])
@pytest.mark.parametrize("counts", COUNTS)
def test_cuda_sums_of_short_and_long_runs(counts, C, impl, dtype):
    check_sums(impl, COUNTS[counts], C, dtype)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_learned_positions_and_both_gradients(impl, dtype):
    dtype = torch.bfloat16 if (impl, dtype) == ("cuda", torch.float16) else dtype
    N, V, P, C = 120, 9, 40, 1030
    g = torch.Generator(torch.get_default_device()).manual_seed(5)
    ids, positions = torch.randint(V, (3, 40), generator=g), torch.arange(40).repeat(3, 1)
    weight, table, dy = (torch.randn(n, C, generator=g).to(dtype) for n in (V, P, N))
    leaves = weight.requires_grad_(), table.requires_grad_()
    with poison_empty():
        y = embedding(ids, weight, positions=positions, position_weight=table, impl=impl)
        found = torch.autograd.grad(y, leaves, dy.view(3, 40, C))
    assert torch.equal(y, weight[ids] + table[positions])  # rounded once, as a sum is
    for numbers, size, gradient in ((ids, V, found[0]), (positions, P, found[1])):
        exact = exact_sums(numbers.flatten(), dy, size)
        scale = torch.finfo(dtype).eps * exact.abs() + 1e-5
        assert ((gradient.double().cpu() - exact).abs() <= scale).all()


@pytest.mark.parametrize("impl", ALL)
def test_no_ids_a_frozen_weight_and_the_added_gradient(impl):
    weight, table = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    y = embedding(none, weight, positions=none, position_weight=table, impl=impl)
    dweight, dtable = torch.autograd.grad(y.sum(), (weight, table))
    assert not dweight.any() and not dtable.any() and y.shape == (0, 6)
    ids = torch.tensor([1, 1, 3])
    rows = {"positions": torch.tensor([0, 2, 2]), "position_weight": table}
    embedding(ids, weight.detach(), **rows, impl=impl).sum().backward()
    assert table.grad.tolist() == [[1.0] * 6, [0.0] * 6, [2.0] * 6] and weight.grad is None
    total = torch.full((4, 6), 0.5)
    add_embedding_gradient(total, torch.ones(3, 6), ids, impl=impl)
    assert total[:, 0].tolist() == [0.5, 2.5, 0.5, 1.5]
    with pytest.raises(ValueError, match="add_embedding_gradient: expected total with dtype in"):
        add_embedding_gradient(total.double(), torch.ones(3, 6), ids, impl=impl)
    for wrong, message in (
        (ids.int(), "expected ids with dtype in"),
        (ids[None], r"expected ids \(N,\), got \(1, 3\)"),
        (ids.to("meta"), "expected all tensors on one device"),
    ):
        with pytest.raises(ValueError, match=f"^add_embedding_gradient: {message}"):
            add_embedding_gradient(total, torch.ones(3, 6), wrong, impl=impl)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=TRITON)])
def test_compiled_in_one_graph(impl):
    weight, table = (torch.randn(7, 8, requires_grad=True) for _ in range(2))
    ids, positions = torch.tensor([1, 1, 6]), torch.tensor([0, 5, 5])

    def function(weight, table):
        rows = {"positions": positions, "position_weight": table}
        return embedding(ids, weight, **rows, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = (
        [y := f(weight, table), *torch.autograd.grad(y, (weight, table), torch.ones(3, 8))]
        for f in (function, compiled)
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


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
    learned = (ids % 3, weight.detach()[:3].clone().requires_grad_())
    torch.library.opcheck(_embedding_forward, (ids, weight, "torch", *learned))
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
    for options, message in (
        ({"positions": ids}, "expected positions with position_weight"),
        ({"positions": ids[1:], "position_weight": weight}, r"expected positions like ids"),
        ({"positions": ids.int(), "position_weight": weight}, "expected positions with dtype in"),
        ({"positions": ids, "position_weight": weight[:, 1:]}, r"position_weight \(P, C\)"),
        ({"positions": ids, "position_weight": weight.half()}, "position_weight with dtype in"),
    ):
        with pytest.raises(ValueError, match=f"embedding: .*{message}"):
            embedding(ids, weight, **options)
    with pytest.raises(IndexError):
        embedding(ids + 7, weight)


def test_cost():
    plain, learned = cost.embedding(8, 4, 2, 2), cost.embedding(8, 4, 2, 2, P=3)
    assert plain.forward_bytes == 2 * 32 and learned.forward_bytes == 3 * 32
    assert learned.backward_bytes - plain.backward_bytes == 32 + 3 * 2 * 2


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_room_gets_the_gradient_unrounded(dtype, impl):
    """600 rows of one id: bf16 would stop at 256, and one rounding shows in the rest."""
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernels are for 16 and 32 bits")
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 8, generator=g).to(dtype).requires_grad_()
    table = torch.randn(3, 8, generator=g).to(dtype).requires_grad_()
    ids = torch.cat([torch.ones(600), torch.arange(5)]).long()
    dy = (1 + torch.arange(len(ids)) % 3 / 128)[:, None].expand(-1, 8).to(dtype)
    rows = {"positions": ids % 3, "position_weight": table}
    wide = torch.promote_types(dtype, torch.float32)
    total, asked = torch.full((5, 8), 0.5, dtype=wide), []

    def room():
        asked.append(None)
        return total

    y = embedding(ids, weight, **rows, room=room, impl=impl)
    assert not asked and torch.equal(y, embedding(ids, weight, **rows, impl=impl))
    y.backward(dy)
    assert len(asked) == 1 and weight.grad is None and table.grad is not None
    exact = torch.zeros(5, 8, dtype=torch.float64).index_add_(0, ids, dy.double())
    torch.testing.assert_close(total.double() - 0.5, exact, rtol=1e-6, atol=0)
    embedding(ids, weight.detach(), **rows, room=room, impl=impl).sum().backward()
    assert len(asked) == 1  # a frozen weight needs none
