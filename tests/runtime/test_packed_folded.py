"""Folded scales on the fused kernel against the exact product."""

import pytest
import torch

from finescale.grid import (
    ActivationScheme,
    InputRule,
    QuantizedWeight,
    WeightScheme,
    fit_grid,
    quantize_to_grid,
    with_folded_scales,
)
from finescale.runtime.modules import QuantizedLinear
from finescale.runtime.packed import PackedLinear


@pytest.mark.gpu
@pytest.mark.parametrize("group", [64, 128, -1])
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_the_fused_kernel_multiplies_by_the_factor_of_each_output(group, tokens):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    generator = torch.Generator().manual_seed(group + tokens)
    weight_OI = 0.02 * torch.randn(200, 512, generator=generator)
    grid = with_folded_scales(fit_grid(weight_OI, WeightScheme(4, group, True, "mse"), torch.float16), weight_OI)
    weight = QuantizedWeight(quantize_to_grid(weight_OI, grid), grid)
    bias_O, x_TI = torch.randn(200, generator=generator).cuda(), torch.randn(tokens, 512, generator=generator).cuda()
    inputs = InputRule(ActivationScheme(8))
    exact = QuantizedLinear(weight, bias_O, inputs, "integer").to("cuda")
    packed = PackedLinear(weight, bias_O, inputs, torch.device("cuda"))
    torch.testing.assert_close(packed(x_TI), exact(x_TI), rtol=1e-6, atol=1e-6)
