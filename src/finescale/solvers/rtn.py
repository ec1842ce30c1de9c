"""Round to nearest: the baseline every solver has to beat."""

from __future__ import annotations

from torch import Tensor

from finescale.grid import Grid, QuantizedWeight, quantize_to_grid
from finescale.solvers.columns import check_finite_weight
from finescale.solvers.solution import Solution, SolverOptions


class RtnOptions(SolverOptions):
    """Round to nearest has no options."""


def solve_rtn(weight_OI: Tensor, hessian_II: Tensor, grid: Grid, options: RtnOptions) -> Solution:
    """Nearest grid point of each weight; the Hessian [I, I] is not used.

    Raises:
        NumericsError: NaN or Inf in the weight.
    """
    del hessian_II, options
    check_finite_weight(weight_OI)
    return Solution(QuantizedWeight(quantize_to_grid(weight_OI.float(), grid), grid))
