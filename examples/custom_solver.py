"""A solver of one's own: round to nearest, then move each code by one step where that lowers the layer's error.

python examples/custom_solver.py MODEL TEXT OUT
"""

import sys

from pydantic import Field

import finescale
from finescale.grid import QuantizedWeight, dequantize, quantize_to_grid
from finescale.solvers import Solution, SolverEntry, SolverOptions


class NudgeOptions(SolverOptions):
    passes: int = Field(default=2, ge=1)


def solve_nudge(weight_OI, hessian_II, grid, options):
    """Each column takes the best of -1, 0, +1 steps: the error (Q - W) H (Q - W)^T never rises."""
    codes_OI, scale_OI = quantize_to_grid(weight_OI, grid), grid.scale_OG[:, grid.group_of_I]
    gradient_OI = (dequantize(codes_OI, grid) - weight_OI) @ hessian_II
    for _ in range(options.passes):
        for column in (hessian_II.diagonal() > 0).nonzero().flatten().tolist():
            wish_O = -gradient_OI[:, column] / hessian_II[column, column] / scale_OI[:, column]
            new_O = codes_OI[:, column] + wish_O.round().clamp(-1, 1)
            new_O = new_O.clamp(grid.scheme.code_min, grid.scheme.code_max)
            change_O = (new_O - codes_OI[:, column]) * scale_OI[:, column]
            gradient_OI += change_O[:, None] * hessian_II[column]
            codes_OI[:, column] = new_O.to(codes_OI.dtype)
    return Solution(QuantizedWeight(codes_OI, grid))


NUDGE = SolverEntry(solve_nudge, NudgeOptions, needs_hessian=True, summary="moves by one step")

if __name__ == "__main__":
    settings = ("solver.name=custom_solver:NUDGE", "solver.passes=3")
    report = finescale.quantize(sys.argv[1], "rtn", out=sys.argv[3], calibration=sys.argv[2], settings=settings)
    print("mean relative error:", sum(x["relative_error"] for x in report["layers"]) / len(report["layers"]))
