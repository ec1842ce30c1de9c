"""Bits, groups, scales, rounding, integer scales: pure functions on tensors."""

from finescale.grid.activation import fake_quantize_tokens, quantize_tokens
from finescale.grid.fit import fit_grid, fit_group, integerized, with_integer_scales
from finescale.grid.outliers import Outliers
from finescale.grid.scheme import (
    ActivationScheme,
    Grid,
    QuantizedWeight,
    WeightScheme,
    contiguous_groups,
    dequantize,
    number_of_groups,
    quantize_to_grid,
)

__all__ = [
    "ActivationScheme",
    "Grid",
    "Outliers",
    "QuantizedWeight",
    "WeightScheme",
    "contiguous_groups",
    "dequantize",
    "fake_quantize_tokens",
    "fit_grid",
    "fit_group",
    "integerized",
    "number_of_groups",
    "quantize_to_grid",
    "quantize_tokens",
    "with_integer_scales",
]
