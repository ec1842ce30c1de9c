"""One batch of columns of QuantEase or GPTQ in one kernel launch, on a GPU.

Columns follow one another, rows are independent: a program takes a few rows through all columns of the batch. What the
finished columns of the batch changed stays in registers, [rows, columns] with the columns spread over the lanes, so
that a column costs one product-sum over them; the part of the matrix, at most 128 x 128, comes out of the cache.

Arithmetic is that of the loops in `quantease` and `gptq`: float32, division rounded to nearest, ties to even.

Shape legend: R rows of a program, B columns of the batch, O outputs, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4
"""Rows of one program, and its warps: on an H100 the fastest of 4 to 32 rows and 1 to 8 warps, by a factor of two to
16 rows and 4 warps."""
WARPS = 1

# Triton reads the signatures below: annotations other than its own are errors there.


@triton.jit
def _nearest(value_R, scale_R, zero_R, low, high):  # type: ignore[no-untyped-def]
    """Code less zero point of the nearest grid point."""
    code_R = tl.div_rn(value_R, scale_R) + zero_R
    code_R = tl.minimum(tl.maximum(code_R, low), high)
    # Adding and taking off 1.5 * 2^23 rounds to the nearest integer, ties to even.
    return (code_R + 12582912.0) - 12582912.0 - zero_R


@triton.jit
def _quantease_kernel(  # type: ignore[no-untyped-def]
    beta_BO,
    current_BO,
    change_BO,
    inner_BB,
    scale_GO,
    zero_GO,
    group_B,
    free_BO,
    columns,
    rows,
    low,
    high,
    relaxed: tl.constexpr,
    has_zero: tl.constexpr,
    has_free: tl.constexpr,
    half: tl.constexpr,
    width: tl.constexpr,
    slab: tl.constexpr,
):
    row_R = tl.program_id(0) * slab + tl.arange(0, slab)
    live_R = row_R < rows
    k_B = tl.arange(0, width)
    change_RB = tl.zeros((slab, width), dtype=tl.float32)
    for column in range(columns):
        at_R = column * rows + row_R
        inner_B = tl.load(inner_BB + column * columns + k_B, mask=k_B < columns, other=0.0)
        beta_R = tl.load(beta_BO + at_R, mask=live_R, other=0.0) + tl.sum(change_RB * inner_B[None, :], axis=1)
        old_R = tl.load(current_BO + at_R, mask=live_R, other=0.0)
        value_R = beta_R
        if not relaxed:
            group = tl.load(group_B + column)
            scale_R = tl.load(scale_GO + group * rows + row_R, mask=live_R, other=1.0)
            zero_R = tl.zeros_like(scale_R)
            if has_zero:
                zero_R = tl.load(zero_GO + group * rows + row_R, mask=live_R, other=0.0)
            value_R = _nearest(beta_R, scale_R, zero_R, low, high) * scale_R
            if has_free:
                free_R = tl.load(free_BO + at_R, mask=live_R, other=0)
                value_R = tl.where(free_R != 0, beta_R, value_R)
        move_R = old_R - value_R
        if half:
            move_R = move_R.to(tl.float16).to(tl.float32)
            value_R = old_R - move_R
        change_RB = tl.where(k_B[None, :] == column, move_R[:, None], change_RB)
        tl.store(current_BO + at_R, value_R, mask=live_R)
        tl.store(change_BO + at_R, move_R, mask=live_R)


@triton.jit
def _gptq_kernel(  # type: ignore[no-untyped-def]
    weight_BO,
    error_BO,
    relative_BO,
    addend_BO,
    inner_BB,
    scale_GO,
    zero_GO,
    group_B,
    free_BO,
    columns,
    rows,
    low,
    high,
    has_zero: tl.constexpr,
    has_free: tl.constexpr,
    width: tl.constexpr,
    slab: tl.constexpr,
):
    row_R = tl.program_id(0) * slab + tl.arange(0, slab)
    live_R = row_R < rows
    k_B = tl.arange(0, width)
    error_RB = tl.zeros((slab, width), dtype=tl.float32)
    for column in range(columns):
        at_R = column * rows + row_R
        inner_B = tl.load(inner_BB + column * columns + k_B, mask=k_B < columns, other=0.0)
        own = tl.load(inner_BB + column * columns + column)
        # The batch's later columns have no error yet, so that their factors do not count.
        value_R = tl.load(weight_BO + at_R, mask=live_R, other=0.0) - tl.sum(error_RB * inner_B[None, :], axis=1)
        group = tl.load(group_B + column)
        scale_R = tl.load(scale_GO + group * rows + row_R, mask=live_R, other=1.0)
        zero_R = tl.zeros_like(scale_R)
        if has_zero:
            zero_R = tl.load(zero_GO + group * rows + row_R, mask=live_R, other=0.0)
        relative_R = _nearest(value_R, scale_R, zero_R, low, high)
        left_R = value_R - relative_R * scale_R
        if has_free:
            free_R = tl.load(free_BO + at_R, mask=live_R, other=0)
            tl.store(addend_BO + at_R, tl.where(free_R != 0, left_R, 0.0), mask=live_R)
            left_R = tl.where(free_R != 0, 0.0, left_R)
        error_R = tl.div_rn(left_R, own + tl.zeros_like(left_R))
        error_RB = tl.where(k_B[None, :] == column, error_R[:, None], error_RB)
        tl.store(relative_BO + at_R, relative_R, mask=live_R)
        tl.store(error_BO + at_R, error_R, mask=live_R)


def _width(columns: int) -> int:
    return max(16, int(triton.next_power_of_2(columns)))


def quantease_batch(
    beta_BO: Tensor,
    current_BO: Tensor,
    change_BO: Tensor,
    inner_BB: Tensor,
    scale_GO: Tensor,
    zero_GO: Tensor | None,
    group_B: Tensor,
    free_BO: Tensor | None,
    low: float,
    high: float,
    relaxed: bool,
    half: bool = False,
) -> None:
    """One sweep over the columns of a batch; all tensors float32 and contiguous unless said.

    Args:
        beta_BO: running targets, without what changes inside the batch.
        current_BO: values; replaced by the new ones.
        change_BO: old less new values; written.
        inner_BB: row j holds H_kj / H_jj for the batch's columns k.
        scale_GO: scales.
        zero_GO: zero points, None when symmetric.
        group_B: int32, group of each column.
        free_BO: bool, entries that take their target unrounded; None for none.
        low: smallest code.
        high: largest code.
        relaxed: no column is rounded.
        half: changes are float16 numbers, and values follow them.
    """
    columns, rows = beta_BO.shape
    _quantease_kernel[(triton.cdiv(rows, ROWS),)](
        beta_BO, current_BO, change_BO, inner_BB, scale_GO, scale_GO if zero_GO is None else zero_GO, group_B,
        group_B if free_BO is None else free_BO.view(torch.uint8), columns, rows, low, high,
        relaxed=relaxed, has_zero=zero_GO is not None, has_free=free_BO is not None, half=half,
        width=_width(columns), slab=ROWS, num_warps=WARPS,
    )  # fmt: skip


def gptq_batch(
    weight_BO: Tensor,
    error_BO: Tensor,
    relative_BO: Tensor,
    addend_BO: Tensor | None,
    inner_BB: Tensor,
    scale_GO: Tensor,
    zero_GO: Tensor | None,
    group_B: Tensor,
    free_BO: Tensor | None,
    low: float,
    high: float,
) -> None:
    """GPTQ over the columns of a batch; all tensors float32 and contiguous unless said.

    Args:
        weight_BO: weights, compensated for all columns before the batch.
        error_BO: rounding errors over the diagonal of the factor; written.
        relative_BO: codes less zero points; written.
        addend_BO: what free entries have beyond their codes; written where ``free_BO`` is given.
        inner_BB: row j holds U_kj of the upper Cholesky factor for the batch's columns k.
        scale_GO: scales.
        zero_GO: zero points, None when symmetric.
        group_B: int32, group of each column.
        free_BO: bool, entries that keep their value; None for none.
        low: smallest code.
        high: largest code.
    """
    columns, rows = weight_BO.shape
    _gptq_kernel[(triton.cdiv(rows, ROWS),)](
        weight_BO, error_BO, relative_BO, error_BO if addend_BO is None else addend_BO, inner_BB, scale_GO,
        scale_GO if zero_GO is None else zero_GO, group_B, group_B if free_BO is None else free_BO.view(torch.uint8),
        columns, rows, low, high, has_zero=zero_GO is not None, has_free=free_BO is not None,
        width=_width(columns), slab=ROWS, num_warps=WARPS,
    )  # fmt: skip
