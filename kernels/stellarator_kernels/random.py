"""Random bits as a function of a seed and of where an element is in the whole, and of nothing else.

defines: derived, element_keys, matrix_keys, kept, factors, kept_elements, kept_block, threshold,
counter_base, counter_key, counter_bits, counter_block

A mask of dropout must not depend on how a run is laid out, nor be kept for the backward: both ask
for the bits of single elements. An element of a matrix has the key of its row xor that of its
column; both are made here, in torch, by mixing the seed with the indices one after the other. A
kernel loads the two and mixes their xor: five instructions an element, where Philox takes a
hundred. The keys of different rows are unrelated, so within a row, and within a column, the bits
are as independent as those of the generator; two rows share them where two xors of 32 bits happen
to meet.

An element of a flat tensor has 64 bits of its own: number i of the SplitMix sequence that begins at
a key, for global index i. (Mixing key + i, without the odd factor, pairs of bits agree too often.)

Source: the 64-bit mixer of SplitMix (Steele, Lea, Flood 2014, with the constants of Stafford's
variant 13); the 32-bit one from the hash-prospector project (C. Wellons, public domain).
"""

import torch

from stellarator_kernels._triton import tl, triton

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LOW, _HIGH = 0x21F0AAAD, 0x735A2D97


def _signed(constant: int) -> int:
    """The same 64 bits as a Python number that int64 holds."""
    return constant - (1 << 64) if constant >> 63 else constant


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int64, every bit of the result depends on every bit of x."""
    x = x + _signed(_GOLDEN)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ ((x >> shift) & ((1 << 64 - shift) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def derived(seed: int, *numbers: int) -> int:
    """A seed of its own for each tuple of numbers, 64 bits."""
    key = torch.tensor(_signed(seed % (1 << 64)))
    for number in numbers:
        key = _mix(key + number)
    return int(key)


def element_keys(
    seed: int | torch.Tensor, stream: int, starts: tuple[int, ...], sizes: tuple[int, ...], device
) -> torch.Tensor:
    """Keys of the elements of a tensor that lies at `starts` in a larger one.

    Args:
        seed: any 64 bits; a tensor () int64 is read on its device only, so nothing waits.
        stream: tells uses of one seed apart.
        starts, sizes: per dimension.
        device: of the result.
    Returns:
        (*sizes) int32. Equal indices have equal keys, however the whole is cut.
    """
    if not isinstance(seed, torch.Tensor):
        seed = torch.tensor(_signed(seed % (1 << 64)), device=device)
    key = _mix(_mix(seed.to(device)) + stream).reshape((1,) * len(sizes))
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        index = torch.arange(start, start + size, device=device)
        key = _mix(key + index.reshape((-1,) + (1,) * (len(sizes) - 1 - dim)))
    return (key >> 32).to(torch.int32).expand(sizes)


def matrix_keys(
    seed: int | torch.Tensor, N: int, C: int, device, origin: tuple[int, int] = (0, 0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of the rows (N,) and columns (C,) of a matrix, for dropout of its elements.

    Args:
        seed: as of `element_keys`.
        N, C: size of the matrix, for example tokens and channels.
        device: of the result.
        origin: its first row and column in a larger whole, for example the global token index.
    """
    row, column = origin
    rows = element_keys(seed, 2, (row,), (N,), device)
    return rows, element_keys(seed, 3, (column,), (C,), device)


def threshold(p: float) -> int:
    """An element is dropped when 31 bits of it are below this: p * 2^31, rounded."""
    return min(round(p * 2**31), 2**31 - 1)


def kept(row_keys: torch.Tensor, column_keys: torch.Tensor, p: float) -> torch.Tensor:
    """bool, of the shapes of the two broadcast together: True with probability 1 - p."""
    x = (row_keys ^ column_keys).long() & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * _LOW & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * _HIGH & 0xFFFFFFFF
    return (x >> 1) >= threshold(p)


def factors(keys: tuple[torch.Tensor, torch.Tensor], p: float, dtype) -> torch.Tensor:
    """(N, C) from keys of rows and columns: 1/(1 - p) where an element is kept, else 0."""
    return kept(keys[0][:, None], keys[1], p).to(dtype) * (1.0 / (1.0 - p))


@triton.jit
def kept_elements(keys, least):
    """`kept` for keys of rows xor keys of columns, int32 of any shape; `least` from `threshold`."""
    x = keys.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return (x >> 1).to(tl.int32) >= least


@triton.jit
def kept_block(row_keys, column_keys, least):
    """`kept` for a block: keys (M,) and (N,) int32, `least` from `threshold` -> (M, N) bool."""
    return kept_elements(row_keys[:, None] ^ column_keys[None, :], least)


def counter_base(seed: torch.Tensor, stream: int) -> torch.Tensor:
    """() int64 from a seed () int64 and a number that tells uses of it apart."""
    return _mix(_mix(seed) + stream)


def counter_key(base: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """() int64 from `counter_base` and a counter () int64, such as a step."""
    return _mix(base + count)


def counter_bits(
    key: torch.Tensor, start: int, size: int, rows: tuple[int, int, int] | None = None
) -> torch.Tensor:
    """(size,) int64: the bits of the elements start, start + 1, ... of a flat tensor.

    rows: (offset, width, stride): these are some columns of a matrix whose rows are `stride` long;
    the first element here is number `offset` of its row of `width`.
    """
    index = torch.arange(size, device=key.device)
    if rows is not None:
        offset, width, stride = rows
        index = (index + offset) // width * stride + (index + offset) % width
    return _mix(key + (start + index) * _signed(_GOLDEN))


@triton.jit
def counter_block(key, index):
    """`counter_bits` of any indices (int64), as uint64."""
    x = key.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    x += index.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
