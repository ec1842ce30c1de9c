"""Folded scales: group scales of 4 bits and one float factor per output, scale_OG = c_O * S_OG with S from 1 to 15.

A kernel multiplies S into the 4-bit codes, -8..7 times S is at most 120 in magnitude, and then runs an ordinary int8
product: no second accumulator, one float factor per output at the end,

    y_TO = x_scale_T * c_O * sum over the inputs k of x_Tk * (S_O,g(k) * code_Ok).

Integer scales are those of arXiv 2405.14597; multiplying them into the weight before the product is the idea of QServe
(arXiv 2405.04532) and LiquidGEMM (arXiv 2509.01229). Here codes and scales stay separate in the file and the
numbers are the plain scale * code, so that any engine reads it.

Shape legend: O outputs, I inputs, G groups, C candidates, P inputs of one group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from finescale.errors import NumericsError
from finescale.grid.fit import rounding_error, smallest_scale
from finescale.grid.integer_scale import LARGEST_FOLDED_SCALE, power_of_two, significand_bits
from finescale.grid.scheme import Grid, WeightScheme

FOLDED_BITS = 4
"""Widest codes that may be folded, and the bits of S."""
LARGEST_S = range(8, LARGEST_FOLDED_SCALE + 1)
"""What the largest scale of an output may become; a smaller S has its double among them."""


def with_folded_scales(grid: Grid, weight_OI: Tensor, codes_OI: Tensor | None = None) -> Grid:
    """The same grid with the folded scales of the least weight error.

    For each output c is tried such that the largest group's S is 8, 9, ... 15, and for each c the two S around each
    group's scale. c keeps 4 bits less than the stored type has (7 in float16, 4 in bfloat16), so that every c * S is
    stored without error. With one group per output c is its scale and nothing changes.

    Args:
        grid: symmetric grid of at most 4 bits with float scales.
        weight_OI: float [O, I], the weights the grid was fitted to.
        codes_OI: int8 [O, I] when codes are to stay as they are; else the error is that of the nearest codes.

    Raises:
        NumericsError: another kind of grid.
    """
    if not grid.scheme.symmetric:
        raise NumericsError("integer scales need symmetric weights; set weights.symmetric true.")
    if grid.scheme.bits > FOLDED_BITS:
        raise NumericsError(
            f"{grid.scheme.bits}-bit codes times a scale do not fit int8; use integer_scale.mode before for them."
        )
    if grid.scale_OG.shape[1] == 1:
        return replace(grid, amplifier=1, folded=True)
    factor_CO = _factors(grid.scale_OG.amax(1), grid.scale_dtype)
    largest_CO = (torch.finfo(grid.scale_dtype).max / factor_CO).floor().clamp(max=LARGEST_FOLDED_SCALE)
    error_CO = torch.zeros_like(factor_CO)
    integer_COG = factor_CO.new_empty(*factor_CO.shape, grid.scale_OG.shape[1])
    for group, scale_O in enumerate(grid.scale_OG.double().unbind(1)):
        inside_I = grid.group_of_I == group
        weight_OP = weight_OI[:, inside_I].float()
        codes_OP = None if codes_OI is None else codes_OI[:, inside_I].float()
        for candidate, (factor_O, largest_O) in enumerate(zip(factor_CO, largest_CO, strict=True)):
            below_O = torch.minimum((scale_O / factor_O).floor().clamp(min=1), largest_O)
            above_O = torch.minimum(below_O + 1, largest_O)
            below_error_O = _error(weight_OP, below_O * factor_O, grid.scheme, codes_OP)
            above_error_O = _error(weight_OP, above_O * factor_O, grid.scheme, codes_OP)
            error_CO[candidate] += torch.minimum(below_error_O, above_error_O)
            integer_COG[candidate, :, group] = torch.where(above_error_O < below_error_O, above_O, below_O)
    best_O = error_CO.argmin(0)
    row_O = torch.arange(grid.rows, device=best_O.device)
    scale_OG = integer_COG[best_O, row_O] * factor_CO[best_O, row_O][:, None]
    return replace(grid, scale_OG=scale_OG.float(), amplifier=1, folded=True)


def _factors(scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """Candidates of c for the largest scale of each output, float64 [C, O], with so few bits that c * 15 is stored."""
    wanted_CO = torch.stack([scale_O.double() / largest for largest in LARGEST_S])
    _, exponent_CO = torch.frexp(wanted_CO)
    step_CO = power_of_two(exponent_CO - (significand_bits(dtype) - FOLDED_BITS))
    # Below the normal numbers a type has fewer bits: multiples of its smallest number only.
    step_CO = step_CO.clamp(min=smallest_scale(dtype))
    return ((wanted_CO / step_CO).round() * step_CO).clamp(min=smallest_scale(dtype))


def _error(weight_OP: Tensor, scale_O: Tensor, scheme: WeightScheme, codes_OP: Tensor | None) -> Tensor:
    """Squared weight error of each output, float64 [O]."""
    if codes_OP is None:
        return rounding_error(weight_OP, scale_O.float(), None, scheme).double()
    return (codes_OP * scale_O.float()[:, None] - weight_OP).square().sum(1).double()
