"""Gradient-based correction of a quantized block."""

from finescale.tuning.low_rank import LowRankOptions, correct_weights
from finescale.tuning.options import TunerOptions
from finescale.tuning.reconstruction import ReconstructionOptions, Windows
from finescale.tuning.registry import TUNERS, TunerEntry, find_tuner
from finescale.tuning.rounding import RoundingOptions, TuningLayer, tune_rounding

__all__ = [
    "TUNERS",
    "LowRankOptions",
    "ReconstructionOptions",
    "RoundingOptions",
    "TunerEntry",
    "TunerOptions",
    "TuningLayer",
    "Windows",
    "correct_weights",
    "find_tuner",
    "tune_rounding",
]
