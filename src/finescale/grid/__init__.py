"""Bits, groups, scales, rounding, integer scales: pure functions on tensors."""

from finescale.grid.activation import (
    StaticRange,
    fake_quantize,
    fake_quantize_full_range,
    fake_quantize_tokens,
    quantize_activations,
    quantize_tokens,
    static_range,
)
from finescale.grid.fit import fit_grid, fit_group, integerized, with_integer_scales
from finescale.grid.folded import with_folded_scales
from finescale.grid.inputs import Gather, InputRule, input_rule
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
    row_pieces,
)

__all__ = [
    "ActivationScheme",
    "Gather",
    "Grid",
    "InputRule",
    "Outliers",
    "QuantizedWeight",
    "StaticRange",
    "WeightScheme",
    "contiguous_groups",
    "dequantize",
    "fake_quantize",
    "fake_quantize_full_range",
    "fake_quantize_tokens",
    "fit_grid",
    "fit_group",
    "input_rule",
    "integerized",
    "number_of_groups",
    "quantize_activations",
    "quantize_to_grid",
    "quantize_tokens",
    "row_pieces",
    "static_range",
    "with_folded_scales",
    "with_integer_scales",
]
