"""The tuners there are. A new one is a file beside this one and a line here."""

from __future__ import annotations

from dataclasses import dataclass

from finescale.errors import InputError
from finescale.tuning.options import TunerOptions
from finescale.tuning.rounding import RoundingOptions


@dataclass(frozen=True)
class TunerEntry:
    """A tuner: the class of its options and one line for people."""

    options: type[TunerOptions]
    summary: str


TUNERS: dict[str, TunerEntry] = {
    "rounding": TunerEntry(RoundingOptions, "learned codes and scales (arXiv 2309.05516)"),
}


def find_tuner(name: str) -> TunerEntry:
    """The tuner called ``name``; InputError names the choices."""
    if name not in TUNERS:
        raise InputError(f"a tuner is called {name!r}; choose one of {', '.join(sorted(TUNERS))}.")
    return TUNERS[name]
