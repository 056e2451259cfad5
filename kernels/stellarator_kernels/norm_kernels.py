"""Triton kernels of layer_norm and rms_norm, with residual addition and dropout, and launchers.

defines: forward, backward, tiles, num_partials

A program holds a row in registers, in CHUNKS blocks of a power of two, so that 3072, 4608 and 6144
leave no lane idle; one pass then feeds dx and both partial sums. The mask of dropout is made again
from the keys of rows and columns (random.py), in the backward too. The weight is read once for all
rows of the backward. CENTRED: layer_norm; otherwise rms_norm, whose mean is 0.

Source: partial sums per persistent program: QuACK, Fast-LLM.
"""

import torch

from stellarator_kernels import random
from stellarator_kernels._triton import FUSED, tl, triton
from stellarator_kernels.layout import dense_rows, multiprocessors


@triton.jit
def _kept(row_key, column_key_ptr, cols, in_row, least):
    """Which elements of a row dropout keeps: `random.kept_block` for one row."""
    keys = tl.load(column_key_ptr + cols, mask=in_row, other=0)
    return random.kept_elements(row_key ^ keys, least)


@triton.jit
def _norm_fwd_kernel(
    x_ptr, x_stride_row, residual_ptr, residual_stride_row, weight_ptr, bias_ptr,
    row_key_ptr, column_key_ptr, y_ptr, summed_ptr, mean_ptr, rstd_ptr,
    eps, least, keep_scale, C: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    rows = ()
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + lanes
        in_row = cols < C
        x = tl.load(x_ptr + row * x_stride_row + cols, mask=in_row, other=0.0).to(tl.float32)
        if DROPOUT:
            kept = _kept(tl.load(row_key_ptr + row), column_key_ptr, cols, in_row, least)
            x = tl.where(kept, x * keep_scale, 0.0)
        if HAS_RESIDUAL:
            offset = row * residual_stride_row + cols
            x += tl.load(residual_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        if HAS_RESIDUAL or DROPOUT:
            stored = x.to(summed_ptr.dtype.element_ty)
            tl.store(summed_ptr + row * C + cols, stored, mask=in_row)
            x = stored.to(tl.float32)
        total += x
        rows += (x,)
    mean = tl.sum(total, 0) / C if CENTRED else 0.0
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for chunk in tl.static_range(CHUNKS):
        centred = tl.where(chunk * BLOCK + lanes < C, rows[chunk] - mean, 0.0)
        total += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(total, 0) / C + eps)
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + lanes
        in_row = cols < C
        y = (rows[chunk] - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=in_row)
    if CENTRED:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, dy_stride_row, dsummed_ptr, dsummed_stride_row, summed_ptr, summed_stride_row,
    weight_ptr, row_key_ptr, column_key_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, N, least, keep_scale, C: tl.constexpr,
    HAS_DSUMMED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_PARAMS: tl.constexpr, DROPOUT: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th row; one partial sum of dweight and dbias for them all."""
    program = tl.program_id(0).to(tl.int64)  # and so is each row
    lanes = tl.arange(0, BLOCK)
    dweights, dbiases = (), ()
    for _ in tl.static_range(CHUNKS):
        dweights += (tl.zeros((BLOCK,), dtype=tl.float32),)
        dbiases += (tl.zeros((BLOCK,), dtype=tl.float32),)
    for row in range(program, N, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + row)
        mean = tl.load(mean_ptr + row) if CENTRED else 0.0
        # Kept as they are stored, so that they take half the registers; all loads come first.
        dys, xs, dsums = (), (), ()
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * BLOCK + lanes
            in_row = cols < C
            dys += (tl.load(dy_ptr + row * dy_stride_row + cols, mask=in_row, other=0.0),)
            offset = row * summed_stride_row + cols
            xs += (tl.load(summed_ptr + offset, mask=in_row, other=0.0),)
            if HAS_DSUMMED:
                offset = row * dsummed_stride_row + cols
                dsums += (tl.load(dsummed_ptr + offset, mask=in_row, other=0.0),)
        sum_g = tl.zeros((BLOCK,), dtype=tl.float32)
        sum_gn = tl.zeros((BLOCK,), dtype=tl.float32)
        new_dweights, new_dbiases = (), ()
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * BLOCK + lanes
            g, n = dys[chunk].to(tl.float32), (xs[chunk].to(tl.float32) - mean) * rstd
            new_dweights += (dweights[chunk] + g * n,)
            new_dbiases += (dbiases[chunk] + g,)
            if HAS_WEIGHT:
                g *= tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
            sum_g += g
            sum_gn += g * n
        dweights, dbiases = new_dweights, new_dbiases
        mean_g = tl.sum(sum_g, 0) / C if CENTRED else 0.0
        mean_gn = tl.sum(sum_gn, 0) / C
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * BLOCK + lanes
            in_row = cols < C
            g, n = dys[chunk].to(tl.float32), (xs[chunk].to(tl.float32) - mean) * rstd
            if HAS_WEIGHT:
                g *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
            dx = rstd * (g - mean_g - n * mean_gn)
            if HAS_DSUMMED:
                dx += dsums[chunk].to(tl.float32)
            if DROPOUT:
                target = dresidual_ptr + row * C + cols
                tl.store(target, dx.to(dresidual_ptr.dtype.element_ty), mask=in_row)
                kept = _kept(tl.load(row_key_ptr + row), column_key_ptr, cols, in_row, least)
                dx = tl.where(kept, dx * keep_scale, 0.0)
            tl.store(dx_ptr + row * C + cols, dx.to(dx_ptr.dtype.element_ty), mask=in_row)
    if NEED_PARAMS:
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * BLOCK + lanes
            tl.store(dweight_ptr + program * C + cols, dweights[chunk], mask=cols < C)
            if HAS_BIAS:
                tl.store(dbias_ptr + program * C + cols, dbiases[chunk], mask=cols < C)


def tiles(C: int) -> tuple[int, int, int]:
    """(BLOCK, CHUNKS, num_warps): eight elements a thread in each chunk, 16 bytes of 16-bit rows.

    3072 = 3 * 1024 and 6144 = 3 * 2048 leave no lane idle; 4608 takes 5 * 1024, 10 % idle, because
    9 * 512 would load 8 bytes at a time.
    """
    width = triton.next_power_of_2(C)
    BLOCK = width if width <= 1024 else 1024 if C <= 5 * 1024 else 2048
    return BLOCK, triton.cdiv(C, BLOCK), max(1, BLOCK // 256)


def num_partials(N: int, C: int, multiprocessors: int) -> int:
    """Programs of the backward: as many as fit, by its registers; no more than rows, at least one.

    It takes about 160 registers for three chunks, 215 for five.
    """
    _, CHUNKS, num_warps = tiles(C)
    return max(1, min(N, max(1, min(8, 40 // (CHUNKS * num_warps))) * multiprocessors))


def _mask(x, keys, p):
    """(keys of rows, keys of columns, threshold, scale, whether there is dropout)."""
    if keys is None:
        return x, x, 0, 1.0, False
    return *(k.contiguous() for k in keys), random.threshold(p), 1.0 / (1.0 - p), True


def forward(x, residual, weight, bias, eps, *, centred, keys=None, p=0.0):
    """y, summed (x itself without a residual), mean (None unless `centred`), rstd."""
    x, residual, weight, bias = (dense_rows(t) for t in (x, residual, weight, bias))
    N, C = x.shape
    y = x.new_empty(N, C)
    summed = x if residual is None else x.new_empty(N, C)
    rstd = x.new_empty((N, 1), dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    BLOCK, CHUNKS, num_warps = tiles(C)
    other = x if residual is None else residual
    row_keys, column_keys, least, scale, dropout = _mask(x, keys, p)
    if N > 0:
        with torch.cuda.device_of(x):
            _norm_fwd_kernel[(N,)](
                x, x.stride(0), other, other.stride(0), x if weight is None else weight,
                x if bias is None else bias, row_keys, column_keys, y, summed,
                rstd if mean is None else mean, rstd, eps, least, scale, C, residual is not None,
                weight is not None, bias is not None, dropout, centred, BLOCK, CHUNKS,
                num_warps=num_warps, **FUSED,
            )  # fmt: skip
    return y, summed, mean, rstd


def backward(dy, dsummed, summed, weight, mean, rstd, has_bias, need_params, *, keys=None, p=0.0):
    """dx, dweight, dbias, dresidual; what is not needed, or the same as dx, is None."""
    dy, dsummed, summed, weight = (dense_rows(t) for t in (dy, dsummed, summed, weight))
    N, C = summed.shape
    dx = summed.new_empty(N, C)
    need_params = need_params and weight is not None
    dresidual = None if keys is None else summed.new_empty(N, C)
    programs = num_partials(N, C, multiprocessors(summed.device))
    partials = [
        summed.new_empty((programs if need_params else 0, C), dtype=torch.float32)
        for _ in range(1 + has_bias)
    ]
    BLOCK, CHUNKS, num_warps = tiles(C)
    other = dy if dsummed is None else dsummed
    row_keys, column_keys, least, scale, dropout = _mask(dy, keys, p)
    with torch.cuda.device_of(summed):
        _norm_bwd_kernel[(programs,)](
            dy, dy.stride(0), other, other.stride(0), summed, summed.stride(0),
            dy if weight is None else weight, row_keys, column_keys, rstd if mean is None else mean,
            rstd, dx, dx if dresidual is None else dresidual, partials[0], partials[-1], N, least,
            scale, C, dsummed is not None, weight is not None, has_bias, need_params, dropout,
            mean is not None, BLOCK, CHUNKS, num_warps=num_warps, **FUSED,
        )  # fmt: skip
    sums = [part.sum(0).to(weight.dtype) for part in partials] if need_params else [None]
    return dx, sums[0], sums[1] if need_params and has_bias else None, dresidual
