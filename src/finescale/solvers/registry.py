"""The solvers there are. A new one is a file beside this one and a line here."""

from __future__ import annotations

from dataclasses import dataclass

from finescale.errors import InputError
from finescale.solvers.gptq import GptqOptions, solve_gptq
from finescale.solvers.quantease import QuantEaseOptions, solve_quantease
from finescale.solvers.rtn import RtnOptions, solve_rtn
from finescale.solvers.solution import Solver, SolverOptions
from finescale.solvers.spqr import SpqrOptions, solve_spqr


@dataclass(frozen=True)
class SolverEntry:
    """A solver, the class of its options, and whether it looks at the Hessian."""

    solve: Solver
    options: type[SolverOptions]
    needs_hessian: bool
    summary: str


SOLVERS: dict[str, SolverEntry] = {
    "rtn": SolverEntry(solve_rtn, RtnOptions, False, "round to nearest"),
    "gptq": SolverEntry(solve_gptq, GptqOptions, True, "one pass with error feedback (arXiv 2210.17323)"),
    "spqr": SolverEntry(solve_spqr, SpqrOptions, True, "GPTQ with two-level scales and outliers (arXiv 2306.03078)"),
    "quantease": SolverEntry(solve_quantease, QuantEaseOptions, True, "coordinate descent (arXiv 2309.01885)"),
}


def find_solver(name: str) -> SolverEntry:
    """The solver called ``name``; InputError names the choices."""
    if name not in SOLVERS:
        raise InputError(f"solver.name is {name!r}; choose one of {', '.join(sorted(SOLVERS))}.")
    return SOLVERS[name]
