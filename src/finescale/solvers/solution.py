"""What a solver returns, and how good it is.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from finescale.grid import Grid, QuantizedWeight, WeightScheme
from finescale.solvers.products import tf32_products

PIECE = 2048
"""Rows and columns of what is computed in float64 at a time."""


class SolverOptions(BaseModel):
    """Options of a solver: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def keeps_outliers(self) -> bool:
        """Whether solutions hold weights beside the grid, which few formats and engines know."""
        return False

    @property
    def moves_scales(self) -> bool:
        """Whether solutions may have other scales than the grid that was given."""
        return False

    @property
    def rows_apart(self) -> bool:
        """Whether rows can be solved each for itself: outliers are counted over the layer, and scales move with it."""
        return not (self.keeps_outliers or self.moves_scales)

    @property
    def factorizes(self) -> bool:
        """Whether the Hessian is factorized, for any number of rows. Only the dealing out of work goes by it."""
        return False

    @property
    def pass_count(self) -> int:
        """How often a solver goes over all columns. Only the dealing out of work goes by it."""
        return 1

    @property
    def column_cost(self) -> int:
        """What a column costs in a pass beside its products, as if the layer had so many inputs more. Only the dealing
        out of work goes by it."""
        return 1024

    def check_scheme(self, scheme: WeightScheme) -> None:
        """Raises InputError for weights that the solver cannot make."""


@dataclass(frozen=True)
class Solution:
    """A solved layer and what had to be done to get it.

    Attributes:
        weight: int8 codes, their grid and the outliers, columns in the original order.
        damping: fraction of the mean diagonal that was added to the Hessian.
        notes: fallbacks and choices worth a line in the report.
    """

    weight: QuantizedWeight
    damping: float = 0.0
    notes: tuple[str, ...] = field(default_factory=tuple)


Solver = Callable[[Tensor, Tensor, Grid, Any], Solution]
"""``(weight_OI, hessian_II, grid, options) -> Solution``; pure, and free to use the device of its inputs."""


def squared_error(weight_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T): the squared output error over the calibration tokens, in float64.

    Computed piece by piece: the whole Hessian in float64 would be the largest matrix of a run.
    """
    total = torch.zeros((), dtype=torch.float64, device=weight_OI.device)
    for first in range(0, weight_OI.shape[0], PIECE):
        rows = slice(first, first + PIECE)
        difference_OI = weight_OI[rows].double() - approximation_OI[rows].double()
        for start in range(0, hessian_II.shape[1], PIECE):
            columns = slice(start, start + PIECE)
            total += ((difference_OI @ hessian_II[:, columns].double()) * difference_OI[:, columns]).sum()
    return float(total)


def relative_error(weight_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor) -> float:
    """||(W - Q) X||^2 / ||W X||^2 from H = X X^T (QuantEase, arXiv 2309.01885); 0 when the layer saw only zeros.

    Products in the type of the weight, at least float32, and only their sum in float64: a report has it of every layer
    and in float64 it would take longer than solving with few sweeps.
    """
    error, reference = map(float, row_energies(weight_OI, approximation_OI, hessian_II).sum(0))
    return ratio(error, reference)


def ratio(error: float, reference: float) -> float:
    """Error over reference, 0 where there is none."""
    return error / reference if reference > 0 else 0.0


def row_energies(weight_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """``(w - q) H (w - q)^T`` and ``w H w^T`` of each row, float64 [O, 2] in host memory; products as in
    ``relative_error``, which their sums make."""
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    hessian_II = hessian_II.to(dtype)
    found_O2 = torch.empty(weight_OI.shape[0], 2, dtype=torch.float64, device=weight_OI.device)
    for first in range(0, weight_OI.shape[0], PIECE):
        rows = slice(first, first + PIECE)
        part_OI = weight_OI[rows].to(dtype)
        found_O2[rows, 1] = _energies(part_OI, hessian_II)
        found_O2[rows, 0] = _energies(part_OI - approximation_OI[rows].to(dtype), hessian_II)
    return found_O2.cpu()


def _energies(part_OI: Tensor, hessian_II: Tensor) -> Tensor:
    with tf32_products(False):
        return (part_OI @ hessian_II).mul_(part_OI).sum(1, dtype=torch.float64)
