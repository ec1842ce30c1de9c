"""SpQR (arXiv 2306.03078): GPTQ with tiny groups, scales that are quantized themselves, and outliers by sensitivity.

A weight's sensitivity is (w - q)^2 / U_jj^2, what its rounding costs after the later columns have made up for it, with
H^-1 = U^T U. Weights above a threshold keep their value. When a group is reached, likely outliers are found first, by
how much less the whole group would cost if the weight were left out of the range, and do not take part in the fit.

Unlike the public code zero points are integers on the code range (as many bits as a weight), so that the weights stay
``scale * (code - zero)``, and they are rounded for the quantized scale, not for the one before. Columns are solved as
they stand: groups are consecutive columns.

Shape legend: O outputs, I inputs, M columns of one group, B columns of one lazy batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from finescale.errors import InputError
from finescale.grid import Grid, QuantizedWeight, WeightScheme
from finescale.grid.bilevel import Bilevel, join_groups, quantize_scales
from finescale.grid.fit import smallest_scale
from finescale.grid.narrow import NOT_NARROW, narrow_outliers
from finescale.grid.outliers import single_outliers
from finescale.solvers.columns import check_finite, one_thread
from finescale.solvers.factor import inverse_factor
from finescale.solvers.products import tf32_products
from finescale.solvers.solution import Solution, SolverOptions


class SpqrOptions(SolverOptions):
    """Options of SpQR; groups are those of the weights (16 in the paper).

    Attributes:
        threshold: of the sensitivity, relative to the mean over the columns of their variance / U_jj^2; higher keeps
            fewer outliers.
        damping: fraction of the mean diagonal added to H; raised when the factorization fails.
        scale_bits: bits of a quantized scale.
        scale_rows: rows whose scales share a step and a base.
        block_size: columns of one lazy batch, rounded to whole groups.
        outlier_bits: of an outlier's value, 16 as published, or 8 (see QuantEase's).
    """

    threshold: float = Field(default=0.2, gt=0.0)
    damping: float = Field(default=1.0, ge=0.0)
    scale_bits: Literal[2, 3, 4, 8] = 3
    scale_rows: int = Field(default=16, ge=1)
    block_size: int = Field(default=128, ge=1)
    outlier_bits: Literal[8, 16] = 16

    @property
    def keeps_outliers(self) -> bool:
        return True

    @property
    def factorizes(self) -> bool:
        return True

    def check_scheme(self, scheme: WeightScheme) -> None:
        """Raises InputError unless the weights are asymmetric with groups."""
        if scheme.group_size == -1 or scheme.symmetric:
            raise InputError("spqr needs asymmetric groups; set weights.group_size 16 and weights.symmetric false.")


def solve_spqr(weight_OI: Tensor, hessian_II: Tensor, grid: Grid, options: SpqrOptions) -> Solution:
    """One pass over the columns.

    Args:
        weight_OI: float [O, I]; computed in float64 if it is float64, else in float32.
        hessian_II: [I, I], sum or mean of x x^T over the calibration tokens.
        grid: its scheme and type of scales count; the scales are fitted anew.
        options: see ``SpqrOptions``.

    Raises:
        InputError: no groups, or symmetric ones.
        NumericsError: NaN or Inf in the inputs, or a Hessian that no damping repairs.
    """
    check_finite(weight_OI, hessian_II)
    options.check_scheme(grid.scheme)
    dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    upper_II, damping = inverse_factor(hessian_II, options.damping)
    upper_II = upper_II.to(dtype)
    weight_OI = weight_OI.to(dtype).clone()
    variance_I = weight_OI.var(0, correction=0) / upper_II.diagonal().square()
    threshold = options.threshold * variance_I.mean()
    codes_OI = torch.empty_like(weight_OI, dtype=torch.int8)
    addend_OI, kept_OI = torch.zeros_like(weight_OI), torch.zeros_like(weight_OI, dtype=torch.bool)
    scales: list[Bilevel] = []
    zeros: list[Tensor] = []
    size, columns = grid.scheme.group_size, weight_OI.shape[1]
    batch = max(options.block_size // size, 1) * size
    for start in range(0, columns, batch):
        end = min(start + batch, columns)
        error_OB = weight_OI.new_zeros(weight_OI.shape[0], end - start)
        for first in range(start, end, size):
            last = min(first + size, end)
            group_OM = weight_OI[:, first:last] - error_OB[:, : first - start] @ upper_II[start:first, first:last]
            scale_O1, zero_O, bilevel = _fit(group_OM, upper_II.diagonal()[first:last], threshold, grid, options)
            scales.append(bilevel)
            zeros.append(zero_O)
            with one_thread():
                for column in range(first, last):
                    done = column - first
                    value_O = group_OM[:, done]
                    if done:
                        inside = slice(first - start, column - start)
                        value_O = value_O - error_OB[:, inside] @ upper_II[first:column, column]
                    code_O = _round(value_O[:, None], scale_O1, zero_O[:, None], grid.scheme)[:, 0]
                    left_O = value_O - (code_O - zero_O) * scale_O1[:, 0]
                    own = upper_II[column, column]
                    kept_O = (left_O / own).square() > threshold
                    codes_OI[:, column] = code_O.to(torch.int8)
                    kept_OI[:, column] = kept_O
                    addend_OI[:, column] = left_O * kept_O
                    error_OB[:, column - start] = torch.where(kept_O, torch.zeros_like(left_O), left_O / own)
        with tf32_products(False):
            weight_OI[:, end:].addmm_(error_OB, upper_II[start:end, end:], alpha=-1)
    bilevel = join_groups(scales)
    fitted = replace(
        grid, scale_OG=bilevel.scale_OG(), zero_OG=torch.stack(zeros, 1).to(torch.int8), bilevel=bilevel, amplifier=None
    )
    outliers = single_outliers(addend_OI, kept_OI, grid.scale_dtype)
    notes = (f"damping raised from {options.damping:g} to {damping:g}",) if damping != options.damping else ()
    wide = QuantizedWeight(codes_OI, fitted, outliers)
    if options.outlier_bits == 16:
        return Solution(wide, damping, notes)
    narrow = narrow_outliers(wide, wide.dequantize(), kept_OI)
    return Solution(narrow or wide, damping, notes if narrow else (*notes, NOT_NARROW))


def _fit(
    group_OM: Tensor, diagonal_M: Tensor, threshold: Tensor, grid: Grid, options: SpqrOptions
) -> tuple[Tensor, Tensor, Bilevel]:
    """Scales [O, 1] (already quantized), zero points [O] and the scales' own grid for one group of columns."""
    likely_OM = _leave_one_out_gain(group_OM, diagonal_M, grid.scheme) > threshold
    kept_O1 = (~likely_OM).sum(1, keepdim=True).clamp(min=1)
    mean_O1 = group_OM.masked_fill(likely_OM, 0.0).sum(1, keepdim=True) / kept_O1
    range_OM = torch.where(likely_OM, mean_O1, group_OM)
    low_O1, wanted_O1 = _range(range_OM, grid.scheme)
    smallest = smallest_scale(grid.scale_dtype)
    bilevel = quantize_scales(
        wanted_O1[:, 0].float().clamp(min=smallest), options.scale_bits, options.scale_rows, grid.scale_dtype, smallest
    )
    scale_O1 = bilevel.scale_OG().to(group_OM.dtype)
    return scale_O1, _zero(low_O1, scale_O1, grid.scheme)[:, 0], bilevel


def _leave_one_out_gain(group_OM: Tensor, diagonal_M: Tensor, scheme: WeightScheme) -> Tensor:
    """By how much the group's cost falls when one weight is left out of both range and cost, [O, M]."""
    members = group_OM.shape[1]
    if members == 1:
        return torch.zeros_like(group_OM)
    cost_O = _costs(group_OM, diagonal_M, scheme).sum(1)
    total_O = group_OM.sum(1)
    gain_OM = torch.empty_like(group_OM)
    for member in range(members):
        rest_OM = group_OM.clone()
        rest_OM[:, member] = (total_O - group_OM[:, member]) / (members - 1)
        costs_OM = _costs(rest_OM, diagonal_M, scheme)
        gain_OM[:, member] = cost_O - (costs_OM.sum(1) - costs_OM[:, member])
    return gain_OM


def _costs(group_OM: Tensor, diagonal_M: Tensor, scheme: WeightScheme) -> Tensor:
    """Sensitivities (w - q)^2 / U_jj^2 on the group's own min/max grid."""
    low_O1, scale_O1 = _range(group_OM, scheme)
    scale_O1 = scale_O1.clamp(min=torch.finfo(group_OM.dtype).tiny)
    zero_O1 = _zero(low_O1, scale_O1, scheme)
    code_OM = _round(group_OM, scale_O1, zero_O1, scheme)
    return ((group_OM - (code_OM - zero_O1) * scale_O1) / diagonal_M).square()


def _range(group_OM: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Lower end (at most zero) and step of the min/max grid, [O, 1] each; the range always holds zero."""
    low_O1 = group_OM.amin(1, keepdim=True).clamp(max=0)
    high_O1 = group_OM.amax(1, keepdim=True).clamp(min=0)
    return low_O1, (high_O1 - low_O1) / (2**scheme.bits - 1)


def _zero(low_O1: Tensor, scale_O1: Tensor, scheme: WeightScheme) -> Tensor:
    return (scheme.code_min - low_O1 / scale_O1).round().clamp(scheme.code_min, scheme.code_max)


def _round(value_OM: Tensor, scale_O1: Tensor, zero_O1: Tensor, scheme: WeightScheme) -> Tensor:
    return (value_OM / scale_O1 + zero_O1).round().clamp(scheme.code_min, scheme.code_max)
