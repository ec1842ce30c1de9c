"""Which grid point each weight takes: one file per algorithm, each a function of tensors."""

from finescale.solvers.registry import SOLVERS, SolverEntry, code_of, find_solver
from finescale.solvers.solution import Solution, SolverOptions, ratio, relative_error, row_energies, squared_error

__all__ = [
    "SOLVERS",
    "Solution",
    "SolverEntry",
    "SolverOptions",
    "code_of",
    "find_solver",
    "ratio",
    "relative_error",
    "row_energies",
    "squared_error",
]
