import pytest
import torch

from finescale.api import quantize
from finescale.errors import InputError
from finescale.grid import ActivationScheme, InputRule, QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.runtime.load import load
from finescale.runtime.packed import PackedLinear
from tests.helpers import recipe


def test_kernel_path_on_a_cpu_is_the_exact_product(tiny, text, tmp_path):
    integer_scale = {"mode": "before", "amplifier": "auto"}
    chosen = recipe("rtn", 4, 32, weights={"symmetric": True}, activations={"bits": 8}, integer_scale=integer_scale)
    quantize(tiny("llama"), chosen, calibration=str(text), out=tmp_path / "out")
    tokens = torch.arange(12).view(2, 6)
    by_path = {path: load(tmp_path / "out", path=path)(tokens).logits for path in ("integer", "kernel")}
    assert torch.equal(by_path["kernel"], by_path["integer"])


def test_a_layer_without_fused_kernel_is_refused():
    weight = torch.randn(8, 64)
    scheme = WeightScheme(4, 32, True)
    grid = fit_grid(weight, scheme)
    quantized = QuantizedWeight(quantize_to_grid(weight, grid), grid)
    with pytest.raises(InputError, match="scales are floats"):
        PackedLinear(quantized, None, InputRule(ActivationScheme(8)), torch.device("cpu"))
