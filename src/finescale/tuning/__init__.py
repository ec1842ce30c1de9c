"""Gradient-based correction of a quantized block."""

from finescale.tuning.options import TunerOptions
from finescale.tuning.registry import TUNERS, TunerEntry, find_tuner
from finescale.tuning.rounding import RoundingOptions, TuningLayer, Windows, tune_rounding

__all__ = [
    "TUNERS",
    "RoundingOptions",
    "TunerEntry",
    "TunerOptions",
    "TuningLayer",
    "Windows",
    "find_tuner",
    "tune_rounding",
]
