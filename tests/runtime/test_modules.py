"""One quantized layer: both ways to compute it against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.grid import (
    ActivationScheme,
    QuantizedWeight,
    WeightScheme,
    fit_grid,
    quantize_to_grid,
    quantize_tokens,
    with_folded_scales,
    with_integer_scales,
)
from finescale.runtime.modules import QuantizedLinear


def layer_weight(rows=12, columns=80, group=32, bits=4, symmetric=True, integer=False, seed=0, folded=False):
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = fit_grid(weight_OI, WeightScheme(bits, group, symmetric), torch.float16)
    if integer:
        grid = with_integer_scales(grid, weight_OI, "auto")
    if folded:
        grid = with_folded_scales(grid, weight_OI)
    return QuantizedWeight(quantize_to_grid(weight_OI, grid), grid)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_path(cache, symmetric, dtype):
    weight, bias_O = layer_weight(symmetric=symmetric), torch.randn(12)
    layer = QuantizedLinear(weight, bias_O, None, "float", cache)
    x_BTI = torch.randn(2, 5, 80, dtype=dtype)
    output = layer(x_BTI)
    assert output.dtype == dtype and output.shape == (2, 5, 12)
    expected = x_BTI.double() @ weight.dequantize().double().T + bias_O.double()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5 if dtype == torch.float32 else 0.2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([-1, 16, 32, 48]), st.sampled_from([4, 8]), st.booleans())
def test_integer_path_is_the_exact_product_of_the_codes(seed, group, bits, folded):
    folded = folded and bits == 4
    weight = layer_weight(group=group, bits=bits, integer=not folded, seed=seed, folded=folded)
    x_TI = torch.randn(7, 80, generator=torch.Generator().manual_seed(seed + 1))
    layer = QuantizedLinear(weight, None, ActivationScheme(8), "integer")
    codes_TI, scale_T1 = quantize_tokens(x_TI, ActivationScheme(8))
    exact_TO = (codes_TI.double() * scale_T1.double()) @ weight.dequantize().double().T
    torch.testing.assert_close(layer(x_TI).double(), exact_TO, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [{"integer": True}, {"folded": True}], ids=str)
def test_both_paths_agree_with_bias_and_leading_dimensions(kind):
    weight, bias_O, x_BTI = layer_weight(**kind), torch.randn(12), torch.randn(3, 4, 80)
    layers = [QuantizedLinear(weight, bias_O, ActivationScheme(8), path) for path in ("float", "integer")]
    torch.testing.assert_close(layers[0](x_BTI), layers[1](x_BTI), rtol=1e-5, atol=1e-5)


def test_the_weight_comes_out_as_it_went_in():
    for kind in ({}, {"integer": True}, {"folded": True}):
        weight = layer_weight(**kind)
        again = QuantizedLinear(weight, None, None).quantized_weight()
        assert again.sha256() == weight.sha256() and again.grid.amplifier == weight.grid.amplifier
        assert again.grid.folded == weight.grid.folded
        assert again.grid.scheme == weight.grid.scheme and again.grid.scale_dtype == weight.grid.scale_dtype


def test_a_token_of_zeros_gives_the_bias():
    weight, bias_O = layer_weight(integer=True), torch.randn(12)
    for path in ("float", "integer"):
        layer = QuantizedLinear(weight, bias_O, ActivationScheme(8), path)
        assert torch.equal(layer(torch.zeros(1, 80)), bias_O[None])


def test_the_description_says_what_it_is():
    text = repr(QuantizedLinear(layer_weight(integer=True), None, ActivationScheme(8), "integer"))
    assert "80 -> 12" in text and "4 bits" in text and "groups of 32" in text and "integer scales over" in text
    assert "folded scales" in repr(QuantizedLinear(layer_weight(folded=True), None, ActivationScheme(8), "integer"))
    assert "per channel" in repr(QuantizedLinear(layer_weight(group=-1), None, None))
