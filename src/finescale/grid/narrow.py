"""Single outliers whose addends are a byte each: float8 numbers (e4m3) of steps of the grid.

Shape legend: O outputs, I inputs, N single outliers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from finescale.grid.outliers import Outliers, single_outliers
from finescale.grid.scheme import Grid, QuantizedWeight

NOT_NARROW = "outliers of 16 bits, since one is too large for 8"
"""Note of a layer whose outliers were to have 8."""
LARGEST_FLOAT8 = 448.0
FARTHEST = 0.5
"""Steps by which an outlier may miss its value, as a weight on the grid does."""


def narrow_outliers(weight: QuantizedWeight, value_OI: Tensor, chosen_OI: Tensor) -> QuantizedWeight | None:
    """The weight with single outliers whose addends are bytes, and with the codes under them that make these err least.

    A float8 number has four bits of precision, but every code leaves another addend to be rounded.

    Args:
        weight: codes and grid; outliers are those of ``chosen_OI`` instead.
        value_OI: wanted values, float [O, I].
        chosen_OI: bool, the outliers.

    Returns:
        None when a value would be missed by more than ``FARTHEST`` steps, as those beyond about a hundred steps are.
    """
    grid, scheme = weight.grid, weight.grid.scheme
    row_N, column_N = chosen_OI.nonzero(as_tuple=True)
    scale_N = _scales(grid, row_N, column_N)
    wanted_N = value_OI[row_N, column_N].float() / scale_N
    if grid.zero_OG is not None:
        wanted_N += grid.zero_OG[row_N, grid.group_of_I[column_N]].float()
    best_N = torch.full_like(wanted_N, torch.inf)
    addend_N, code_N = torch.zeros_like(wanted_N), torch.zeros_like(row_N, dtype=torch.int8)
    for code in range(scheme.code_min, scheme.code_max + 1):
        rest_N = wanted_N - code
        rounded_N = rest_N.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).float()
        miss_N = (rest_N - rounded_N).abs()
        better_N = miss_N < best_N
        best_N = torch.where(better_N, miss_N, best_N)
        addend_N = torch.where(better_N, rounded_N, addend_N)
        code_N = torch.where(better_N, torch.full_like(code_N, code), code_N)
    if not bool((best_N <= FARTHEST).all()):
        return None
    codes_OI = weight.codes_OI.clone()
    codes_OI[row_N, column_N] = code_N
    outliers = single_outliers(torch.zeros_like(value_OI, dtype=torch.float32), chosen_OI, torch.float32)
    return QuantizedWeight(codes_OI, grid, replace(outliers, value=addend_N * scale_N, narrow=True))


def value_bytes(outliers: Outliers, grid: Grid) -> Tensor:
    """The addends of narrow outliers as a file holds them, uint8 [N]."""
    scale_N = _scales(grid, outliers.row_of_N(), outliers.column.to(torch.int64))
    return (outliers.value / scale_N).to(torch.float8_e4m3fn).view(torch.uint8)


def values_of_bytes(bytes_N: Tensor, outliers: Outliers, grid: Grid) -> Tensor:
    """The addends again, float32 [N]; ``outliers`` say where they are."""
    scale_N = _scales(grid, outliers.row_of_N(), outliers.column.to(torch.int64))
    return bytes_N.view(torch.float8_e4m3fn).float() * scale_N


def _scales(grid: Grid, row_N: Tensor, column_N: Tensor) -> Tensor:
    return grid.scale_OG[row_N, grid.group_of_I[column_N]].float()
