"""How AdamW's weights and moments lie in memory: what is narrower than fp32, and how it is rounded.

defines: Storage, split_master, join_master, round_stochastically, quantise, dequantise, widen,
store_, and what a kernel needs of them; GROUP

remainder   a bf16 parameter is an fp32 weight rounded to nearest (ties away from zero), an int16
            beside it has the weight's lower 16 bits: 4 bytes hold the exact weight. Where these
            are 2^15 or more the parameter is one step up, so both tell the upper half.
stochastic  a bf16 weight and no other: rounded up or down so that its expectation is the fp32
            result. Without this an update below half of the last place is lost, at each step.
8 bits      a moment is one byte an element and an fp32 scale, the largest magnitude, for each 256:
            exp_avg a sign and 7 bits, exp_avg_sq 8 bits. Code c > 0 of c_max stands for
            scale * 2^((c - c_max) / 8), 0 for 0: 16 octaves, or 32 of the squares, in steps of 9 %.
            Rounded stochastically too: at beta2 = 0.999 a moment decays by less than half a step
            and would never fall. A square below the least level is raised to it, because 0 under a
            moment that is not 0 would divide by eps; the first moment may become 0.

The random bits are a function of (seed, step, global index of the element) and so independent of
how a run is laid out; of 64, 16 each for the weight and the two moments. A moment that is not
finite makes its group of 256 NaN at the next step.

Source: remainder: apex DistributedFusedAdam (`store_param_remainders`); stochastic rounding of
weights: arXiv:2010.06192; moments by groups: Dettmers et al. 2021, arXiv:2110.02861, there with
another code and nearest rounding; logarithmic codes: Miyashita et al. 2016, arXiv:1603.01025.
"""

from typing import NamedTuple

import torch

from stellarator_kernels import random
from stellarator_kernels._triton import tl, triton

GROUP = 256  # elements with one scale
_STREAM = 0xADA8  # tells these random bits from other uses of the seed
_STEPS = 8  # codes of an octave


class Storage(NamedTuple):
    """What there is of one flat tensor beside its parameter and its moments; None: not used."""

    remainder: torch.Tensor | None = None  # (n,) int16
    exp_avg_scale: torch.Tensor | None = None  # (ceil(n / 256),) fp32, with both moments uint8
    exp_avg_sq_scale: torch.Tensor | None = None
    key: torch.Tensor | None = None  # () int64, of the random bits
    first_index: int = 0  # global index of element 0
    rows: tuple[int, int, int] | None = None  # as in `adamw_`: (offset, width, stride)


def random_key(seed: torch.Tensor, step: float | torch.Tensor, device) -> torch.Tensor:
    """() int64 on the device. What the host has is filled in there, so nothing waits."""
    base = random.counter_base(seed, _STREAM)
    if base.device.type == "cpu":
        base = torch.full((), base.item(), device=device)
    if not isinstance(step, torch.Tensor):
        step = torch.full((), int(step), device=device)
    return random.counter_key(base, step.long())


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An fp32 weight as (bf16 parameter, int16 remainder); every NaN becomes one."""
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))
    param = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return param, ((bits << 16) >> 16).to(torch.int16)


def join_master(param: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 weight that `split_master` split."""
    low = remainder.int()
    upper = param.view(torch.int16).int() - (low < 0).int()
    return ((upper << 16) | (low & 0xFFFF)).view(torch.float32)


def round_stochastically(weight: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 -> bf16, up with the probability of the distance; bits: as many integers below 2^16."""
    rounded = ((weight.view(torch.int32) + bits.int()) >> 16).to(torch.int16)
    return torch.where(weight.isnan(), torch.nan, rounded.view(torch.bfloat16))


def num_groups(n: int) -> int:
    """Scales of n elements."""
    return -(-n // GROUP)


def _in_groups(x: torch.Tensor) -> torch.Tensor:
    """(n,) -> (groups, 256), zeros behind the last."""
    return torch.nn.functional.pad(x, (0, -x.numel() % GROUP)).view(-1, GROUP)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """(n,) fp32 of (n,) uint8 codes and the scales of their groups."""
    byte = _in_groups(codes).int()
    magnitude, top = (byte & 127, 127) if signed else (byte, 255)
    value = torch.where(magnitude > 0, torch.exp2((magnitude - top).float() / _STEPS), 0.0)
    value = torch.where(byte > 127, -value, value) if signed else value
    return (value * scales[:, None]).view(-1)[: codes.numel()]


def quantise(
    x: torch.Tensor, bits: torch.Tensor, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) fp32 -> codes (n,) uint8 and scales; bits: (n,) integers below 2^16."""
    groups, top = _in_groups(x), 127 if signed else 255
    scales = torch.where(groups.isnan(), torch.inf, groups.abs()).amax(1)
    ratio = (groups.abs() / torch.where(scales > 0, scales, 1.0)[:, None]).nan_to_num(0.0)
    lower = (top + _STEPS * ratio.log2()).floor().clamp(0, top)
    low = torch.where(lower > 0, torch.exp2((lower - top) / _STEPS), 0.0)
    up = torch.exp2((lower + 1 - top) / _STEPS)
    chance = (_in_groups(bits) + 0.5) / 65536
    code = (lower + (chance * (up - low) < ratio - low)).clamp(max=top)
    if signed:
        code = torch.where((groups < 0) & (code > 0), code + 128, code)
    else:
        code = torch.where(ratio > 0, code.clamp(min=1), code)
    return code.to(torch.uint8).view(-1)[: x.numel()], scales


def widen(weight, exp_avg, exp_avg_sq, storage: Storage):
    """fp32 (weight, exp_avg, exp_avg_sq); what is fp32 already is itself."""
    if storage.remainder is not None:
        weight = join_master(weight, storage.remainder)
    elif weight.dtype == torch.bfloat16:
        weight = weight.float()
    if storage.exp_avg_scale is not None:
        exp_avg = dequantise(exp_avg, storage.exp_avg_scale, True)
        exp_avg_sq = dequantise(exp_avg_sq, storage.exp_avg_sq_scale, False)
    return weight, exp_avg, exp_avg_sq


def store_(param, exp_avg, exp_avg_sq, new, storage: Storage, is_all: bool) -> None:
    """Put back what `widen` widened: new = (weight, exp_avg, exp_avg_sq) in fp32.

    is_all: the weight was widened, so there is nothing but the parameter and the remainder of it.
    """
    weight, new_avg, new_sq = new
    bits = None
    if storage.key is not None:
        bits = random.counter_bits(storage.key, storage.first_index, weight.numel(), storage.rows)
    if storage.remainder is not None:
        upper, low = split_master(weight)
        param.copy_(upper)
        storage.remainder.copy_(low)
    elif is_all:
        param.copy_(round_stochastically(weight, bits >> 48 & 0xFFFF))
    if storage.exp_avg_scale is not None:
        moments = (exp_avg, new_avg, storage.exp_avg_scale, True, 32)
        squares = (exp_avg_sq, new_sq, storage.exp_avg_sq_scale, False, 16)
        for codes, value, scales, signed, shift in (moments, squares):
            new_codes, new_scales = quantise(value, bits >> shift & 0xFFFF, signed)
            codes.copy_(new_codes)
            scales.copy_(new_scales)


@triton.jit
def split_block(w):
    """`split_master` of fp32 values: bf16 and int16."""
    bits = tl.where(w != w, 0x7FC00000, w.to(tl.int32, bitcast=True))
    param = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return param, bits.to(tl.int16)


@triton.jit
def join_block(param, remainder):
    """`join_master`."""
    low = remainder.to(tl.int32)
    upper = param.to(tl.int16, bitcast=True).to(tl.int32) - (low < 0).to(tl.int32)
    return ((upper << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def round_block(w, bits):
    """`round_stochastically`."""
    rounded = (w.to(tl.int32, bitcast=True) + bits) >> 16
    rounded = tl.where(w != w, 0x7FC0, rounded).to(tl.int16)
    return rounded.to(tl.bfloat16, bitcast=True)


@triton.jit
def dequantise_block(codes, scales, SIGNED: tl.constexpr):
    """`dequantise` of (groups, 256) codes and (groups,) scales."""
    byte = codes.to(tl.int32)
    TOP: tl.constexpr = 127 if SIGNED else 255
    magnitude = byte & TOP
    value = tl.where(magnitude > 0, tl.exp2((magnitude - TOP).to(tl.float32) * 0.125), 0.0)
    if SIGNED:
        value = tl.where(byte > 127, -value, value)
    return value * scales[:, None]


@triton.jit
def quantise_block(x, bits, SIGNED: tl.constexpr):
    """`quantise` of (groups, 256) values: their codes, and (groups,) scales."""
    TOP: tl.constexpr = 127 if SIGNED else 255
    scales = tl.max(tl.where(x != x, float("inf"), tl.abs(x)), axis=1)
    ratio = tl.abs(x) / tl.where(scales > 0, scales, 1.0)[:, None]
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    # The logarithm of 0 is -inf, which no integer is: the least float instead.
    lower = tl.floor(TOP + 8 * tl.log2(tl.maximum(ratio, 1.17549435e-38)))
    lower = tl.minimum(tl.maximum(lower, 0.0), TOP)
    low = tl.where(lower > 0, tl.exp2((lower - TOP) * 0.125), 0.0)
    up = tl.exp2((lower + 1 - TOP) * 0.125)
    chance = (bits.to(tl.float32) + 0.5) * (1.0 / 65536)
    code = lower.to(tl.int32) + (chance * (up - low) < ratio - low).to(tl.int32)
    code = tl.minimum(code, TOP)
    if SIGNED:
        code = tl.where((x < 0) & (code > 0), code + 128, code)
    else:
        code = tl.where(ratio > 0, tl.maximum(code, 1), code)
    return code.to(tl.uint8), scales
