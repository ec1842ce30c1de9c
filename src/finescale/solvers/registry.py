"""The solvers there are. A new one is a file beside this one and a line here; or, outside of finescale, a
``SolverEntry`` in any module, called ``module:NAME`` in the recipe."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

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
    """The solver called ``name``, or the ``SolverEntry`` that ``module:NAME`` names in an importable module.

    Raises:
        InputError: there is none; the sentence names the choices.
    """
    if ":" in name:
        return _imported(name)
    if name not in SOLVERS:
        raise InputError(
            f"solver.name is {name!r}; choose one of {', '.join(sorted(SOLVERS))}, or module:NAME for your own."
        )
    return SOLVERS[name]


def _imported(name: str) -> SolverEntry:
    module, _, attribute = name.partition(":")
    try:
        entry = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"solver.name is {name!r}, which cannot be imported ({error}); put the folder of the module on PYTHONPATH."
        ) from error
    if not isinstance(entry, SolverEntry):
        raise InputError(f"solver.name is {name!r}, which is no SolverEntry; see docs/adding.md for an example.")
    return entry


def code_of(name: str) -> str | None:
    """What tells versions of a solver apart that finescale's own version does not: the SHA-256 of the file that holds
    ``module:NAME``, of all Python files where that lies in a package; None for finescale's own solvers.

    Raises:
        InputError: the module has no source file.
    """
    if ":" not in name:
        return None
    find_solver(name)
    module = name.partition(":")[0]
    file = getattr(sys.modules[module.partition(".")[0]], "__file__", None)
    if file is None or Path(file).suffix != ".py":
        raise InputError(f"solver.name is {name!r}, which has no source file; a run could not tell its versions apart.")
    path = Path(file)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    digest = hashlib.sha256()
    for part in files:
        content = hashlib.sha256(part.read_bytes()).hexdigest()
        digest.update(f"{part.relative_to(path.parent)} {content}\n".encode())
    return digest.hexdigest()
