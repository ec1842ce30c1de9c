"""Per-token rounding of activations against a loop in float32."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.errors import InputError
from finescale.grid import (
    ActivationScheme,
    StaticRange,
    fake_quantize_full_range,
    fake_quantize_tokens,
    quantize_tokens,
)

BITS = [4, 6, 8]


def slow_token(values, bits):
    """Codes and scale of one token; every operation in float32, ties to even."""
    largest = np.float32(2 ** (bits - 1) - 1)
    values = [np.float32(value) for value in values]
    absmax = max(abs(value) for value in values)
    if absmax == 0:
        return [0] * len(values), 1.0
    scale = max(absmax / largest, np.finfo(np.float32).tiny)
    codes = [int(np.clip(np.rint(value / scale), -largest, largest)) for value in values]
    return codes, float(scale)


def check(x_TI, bits):
    codes_TI, scale_T1 = quantize_tokens(x_TI, ActivationScheme(bits))
    assert codes_TI.dtype == torch.int8 and scale_T1.dtype == torch.float32
    assert codes_TI.shape == x_TI.shape and scale_T1.shape == (*x_TI.shape[:-1], 1)
    tokens = x_TI.float().flatten(0, -2).tolist()
    for token, codes, scale in zip(tokens, codes_TI.flatten(0, -2).tolist(), scale_T1.flatten().tolist(), strict=True):
        assert (codes, scale) == slow_token(token, bits)
    return codes_TI, scale_T1


wide = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(wide, min_size=5, max_size=5), min_size=1, max_size=4), st.sampled_from(BITS))
def test_codes_and_scales_equal_the_loop(values, bits):
    check(torch.tensor(values), bits)


@settings(max_examples=80, deadline=None)
@given(st.lists(wide, min_size=1, max_size=9), st.sampled_from(BITS))
def test_range_is_symmetric_and_used_up_to_its_end(values, bits):
    x_TI = torch.tensor([values, [-value for value in values]])
    codes_TI, scale_T1 = quantize_tokens(x_TI, ActivationScheme(bits))
    largest = 2 ** (bits - 1) - 1
    assert int(codes_TI.min()) >= -largest and int(codes_TI.max()) <= largest
    assert torch.equal(codes_TI[0], -codes_TI[1])
    if float(x_TI.abs().max()) > 1e-30:
        assert int(codes_TI.abs().max()) == largest
        error_TI = (codes_TI.double() * scale_T1.double() - x_TI.double()).abs()
        assert bool((error_TI <= 0.5001 * scale_T1).all())


@pytest.mark.parametrize("bits", BITS)
def test_zero_tiny_and_huge_tokens(bits):
    tiny = torch.finfo(torch.float32).tiny
    x_TI = torch.tensor(
        [[0.0, 0.0, -0.0], [1e-40, -1e-42, 0.0], [tiny, -tiny, tiny / 2], [1e-37, 3e-38, 0.0],
         [3.4e38, -3.4e38, 1e37], [1e-30, -1e38, 1.0]]
    )  # fmt: skip
    codes_TI, scale_T1 = check(x_TI, bits)
    assert scale_T1[0] == 1 and codes_TI[0].tolist() == [0, 0, 0]
    assert bool(torch.isfinite(scale_T1).all()) and bool((scale_T1 > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_and_leading_dimensions(dtype):
    x_TI = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(x_TI, 8)
    rounded_TI = fake_quantize_tokens(x_TI, ActivationScheme(8))
    assert rounded_TI.dtype == dtype and rounded_TI.shape == x_TI.shape
    codes_TI, scale_T1 = quantize_tokens(x_TI, ActivationScheme(8))
    assert torch.equal(rounded_TI, (codes_TI.float() * scale_T1).to(dtype))


def test_each_token_has_its_own_scale():
    x_TI = torch.tensor([[1.0, 0.5], [1000.0, -10.0]])
    _, scale_T1 = quantize_tokens(x_TI, ActivationScheme(8))
    assert torch.allclose(scale_T1, torch.tensor([[1 / 127], [1000 / 127]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_show_in_the_output_of_their_token_only(bad):
    rounded_TI = fake_quantize_tokens(torch.tensor([[1.0, bad, 0.0], [1.0, 2.0, 3.0]]), ActivationScheme(8))
    assert not bool(torch.isfinite(rounded_TI[0]).all())
    assert bool(torch.isfinite(rounded_TI[1]).all())


@pytest.mark.parametrize("bits", BITS)
def test_full_range_has_one_more_code_below_zero(bits):
    x_TI = torch.tensor([[-1.0, 1.0, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]])
    rounded_TI = fake_quantize_full_range(x_TI, ActivationScheme(bits))
    scale = 2 / (2**bits - 1)
    codes = (rounded_TI[0] / scale).tolist()
    assert codes == pytest.approx([round(code) for code in codes], abs=1e-3)
    assert min(codes) >= -(2 ** (bits - 1)) - 1e-3 and max(codes) <= 2 ** (bits - 1) - 1 + 1e-3
    assert rounded_TI[0].tolist() == pytest.approx(x_TI[0].tolist(), abs=0.501 * scale)
    assert rounded_TI[1].tolist() == [0, 0, 0, 0]
    fixed = fake_quantize_full_range(x_TI * 9, ActivationScheme(bits, "tensor", False), StaticRange(0.5))
    assert fixed[0].tolist() == [max(-9.0, -(2 ** (bits - 2))), min(9.0, (2 ** (bits - 1) - 1) / 2), 2.5, 0.0]


@pytest.mark.parametrize("values", [{"bits": 5}, {"bits": 16}, {"granularity": "tensor"}, {"dynamic": False}])
def test_what_is_not_supported_is_refused(values):
    with pytest.raises(InputError, match="activations"):
        ActivationScheme(**values)
