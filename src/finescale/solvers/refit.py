"""Scales fitted anew to the codes that coordinate descent has found.

With codes c_g of group g (less the zero point) and r = w - sum_g s_g c_g, the error r H r^T is least in s_g at
s_g + (r H c_g) / (c_g H c_g): once through all groups of all rows costs about as much as a sweep.

Shape legend: O outputs, I inputs, G groups, C columns of one group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from finescale.errors import NumericsError
from finescale.grid import Grid, quantize_to_grid
from finescale.grid.integer_scale import integer_scales


def refit_scales(
    weight_OI: Tensor, value_OI: Tensor, hessian_II: Tensor, grid: Grid, free_OI: Tensor | None = None
) -> tuple[Grid, Tensor]:
    """The grid with the best scales for the codes at hand, one group after the other, and the values on it.

    Zero points and codes stay. Scales are rounded as they are stored, to integers over the amplifier where the grid has
    one; a scale that would change its sign stays.

    Args:
        weight_OI: the original weight, float.
        value_OI: its approximation on the grid, of the same type.
        hessian_II: mean of x x^T.
        grid: rows of this weight.
        free_OI: entries that are not on the grid and keep their value; None for none.

    Raises:
        NumericsError: folded scales, which depend on each other.
    """
    if grid.folded:
        raise NumericsError("folded scales cannot be fitted group by group; leave solver.refits out.")
    dtype = weight_OI.dtype
    hessian_II = hessian_II.to(dtype)
    code_OI = quantize_to_grid(value_OI, grid).to(dtype)
    if grid.zero_OG is not None:
        code_OI -= grid.zero_OG.to(dtype)[:, grid.group_of_I]
    if free_OI is not None:
        code_OI.masked_fill_(free_OI, 0.0)
    value_OI, scale_OG = value_OI.clone(), grid.scale_OG.clone()
    rest_OI = weight_OI - value_OI
    order_I = torch.argsort(grid.group_of_I, stable=True)
    starts = torch.cumsum(torch.bincount(grid.group_of_I, minlength=scale_OG.shape[1]), 0).tolist()
    for group, (first, last) in enumerate(zip([0, *starts], starts, strict=False)):
        members_C = order_I[first:last]
        code_OC, of_group_IC = code_OI[:, members_C], hessian_II[:, members_C]
        slope_O = ((rest_OI @ of_group_IC) * code_OC).sum(1)
        curve_O = ((code_OC @ of_group_IC[members_C]) * code_OC).sum(1)
        old_O = scale_OG[:, group]
        found_O = old_O + torch.where(curve_O > 0, slope_O / curve_O, torch.zeros_like(slope_O)).float()
        sign_O = old_O.sign()
        stored_O = _stored(torch.where(found_O * sign_O > 0, found_O, old_O), grid)
        stored_O = torch.where(stored_O * sign_O > 0, stored_O, old_O)
        change_OC = (stored_O - old_O).to(dtype)[:, None] * code_OC
        value_OI[:, members_C] += change_OC
        rest_OI[:, members_C] -= change_OC
        scale_OG[:, group] = stored_O
    return replace(grid, scale_OG=scale_OG), value_OI


def _stored(scale_O: Tensor, grid: Grid) -> Tensor:
    if grid.amplifier is None:
        return scale_O.to(grid.scale_dtype).float()
    integer_O1 = integer_scales(scale_O[:, None], grid.amplifier, grid.scale_dtype)
    return (integer_O1[:, 0].double() / grid.amplifier).float()
