import pytest
import torch

from finescale.errors import InputError
from finescale.grid import ActivationScheme, InputRule, QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.runtime.packed import PackedLinear


def test_a_layer_without_fused_kernel_is_refused():
    weight = torch.randn(8, 64)
    scheme = WeightScheme(4, 32, True)
    grid = fit_grid(weight, scheme)
    quantized = QuantizedWeight(quantize_to_grid(weight, grid), grid)
    with pytest.raises(InputError, match="scales are floats"):
        PackedLinear(quantized, None, InputRule(ActivationScheme(8)), torch.device("cpu"))
