"""The tuners there are. A new one is a file beside this one and a line here."""

from __future__ import annotations

from dataclasses import dataclass

from finescale.errors import InputError
from finescale.tuning.low_rank import LowRankOptions
from finescale.tuning.reconstruction import ReconstructionOptions
from finescale.tuning.rounding import RoundingOptions


@dataclass(frozen=True)
class TunerEntry:
    """A tuner.

    Attributes:
        options: the class of its options.
        summary: one line for people.
        after_solver: whether it goes on from the solver's codes; the others change the weights that are solved.
    """

    options: type[ReconstructionOptions]
    summary: str
    after_solver: bool = False


TUNERS: dict[str, TunerEntry] = {
    "low_rank": TunerEntry(LowRankOptions, "low-rank additions merged into the weights (arXiv 2310.08041)"),
    "rounding": TunerEntry(RoundingOptions, "learned codes and scales (arXiv 2309.05516)", after_solver=True),
}


def find_tuner(name: str) -> TunerEntry:
    """The tuner called ``name``; InputError names the choices."""
    if name not in TUNERS:
        raise InputError(f"a tuner is called {name!r}; choose one of {', '.join(sorted(TUNERS))}.")
    return TUNERS[name]
