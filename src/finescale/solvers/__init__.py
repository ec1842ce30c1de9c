"""Which grid point each weight takes: one file per algorithm, each a function of tensors."""

from finescale.solvers.registry import SOLVERS, SolverEntry, find_solver
from finescale.solvers.solution import Solution, SolverOptions, relative_error, squared_error

__all__ = ["SOLVERS", "Solution", "SolverEntry", "SolverOptions", "find_solver", "relative_error", "squared_error"]
