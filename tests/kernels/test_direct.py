"""Layers past torch's operators give what the operators give."""

import shutil

import pytest
import torch

from finescale.kernels import direct, layout
from finescale.kernels.linear import quantize_tokens, w4a8_linear, w4a8_product
from tests.kernels import emulator

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICES = [
    "cpu",
    pytest.param("emulated", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]),
]


@pytest.mark.parametrize("where", DEVICES)
def test_same_as_the_operators(where, monkeypatch):
    if where == "emulated":
        emulator.emulate(monkeypatch, 4)
        monkeypatch.setattr(direct, "untraced", lambda x: True)
    device = "cuda" if where == "cuda" else "cpu"
    g = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(-8, 8, (128, 256), generator=g, dtype=torch.int8)
    scale_OG = torch.randint(1, 16, (128, 2), generator=g, dtype=torch.int32)
    packed = layout.pack_weight(codes_OI, scale_OG, 128).to(device)
    x_BTI, factor_O, bias_O = torch.randn(2, 4, 256, generator=g), torch.rand(128, generator=g), torch.randn(128)
    x_BTI, factor_O, bias_O = x_BTI.to(device, torch.bfloat16), factor_O.to(device), bias_O.to(device)
    gain_I, residual_TI = torch.rand(256, generator=g).to(x_BTI), torch.randn(8, 256, generator=g).to(x_BTI)
    sums = [residual_TI.clone() for _ in range(2)]
    want = quantize_tokens(x_BTI.flatten(0, 1), "rms", sums[0], gain_I, None, 1e-5)
    got = direct.quantized(x_BTI.flatten(0, 1), "rms", sums[1], gain_I, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and torch.equal(*sums)
    for bias in (None, bias_O):
        one = direct.product(*got, packed, bias, factor_O, 128, True, torch.bfloat16)
        assert torch.equal(one, w4a8_product(*want, packed, bias, factor_O, 128, 1, True, torch.bfloat16))
        whole = direct.linear(x_BTI, packed, bias, factor_O, 128, True)
        assert torch.equal(whole, w4a8_linear(x_BTI, packed, bias, factor_O, 128, 1, True))
        assert torch.equal(direct.linear(x_BTI[0], packed, bias, factor_O, 128, True), whole[0])
