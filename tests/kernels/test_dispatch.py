from dataclasses import replace

import pytest
import torch

from finescale.grid import (
    ActivationScheme,
    InputRule,
    QuantizedWeight,
    WeightScheme,
    fit_grid,
    quantize_to_grid,
    with_integer_scales,
)
from finescale.grid.outliers import single_outliers
from finescale.kernels import dispatch
from finescale.kernels.dispatch import LayerFacts, choose_kernel, layer_facts

W4A8 = LayerFacts(4, 128, True, True, 400, 8, True, False)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    "layer, device, capability, kernel, why",
    [
        (W4A8, CUDA, (9, 0), "hopper", "exactly"),
        (replace(W4A8, largest_scale=15), CUDA, (9, 0), "hopper-folded", "up to 15"),
        (replace(W4A8, largest_scale=16), CUDA, (9, 0), "hopper", "exactly"),
        (replace(W4A8, largest_scale=2**15 - 1), CUDA, (9, 0), "hopper", "exactly"),
        (replace(W4A8, largest_scale=2**15), CUDA, (9, 0), "triton", "16 bits"),
        (W4A8, CUDA, (8, 0), "triton", "capability 8.0"),
        (replace(W4A8, group_size=-1), CUDA, (8, 6), "triton", "capability 8.6"),
        (W4A8, CUDA, (10, 0), "triton", "capability 10.0"),
        (W4A8, CUDA, (7, 5), "reference", "from 8.0 on"),
        (replace(W4A8, group_size=96), CUDA, (9, 0), "triton", "groups of 96"),
        (replace(W4A8, largest_scale=40000), CUDA, (9, 0), "triton", "16 bits"),
        (replace(W4A8, bits=8), CUDA, (9, 0), "reference", "W8A8"),
        (replace(W4A8, activation_bits=6), CUDA, (8, 0), "reference", "W4A6"),
        (replace(W4A8, group_size=48), CUDA, (9, 0), "reference", "groups of 48"),
        (replace(W4A8, contiguous_groups=False), CUDA, (9, 0), "float", "scattered"),
        (replace(W4A8, activation_bits=None), CUDA, (9, 0), "float", "not quantized"),
        (replace(W4A8, integer_scales=False), CUDA, (9, 0), "float", "floats"),
        (replace(W4A8, outliers=True), CUDA, (9, 0), "float", "outliers"),
        (replace(W4A8, symmetric_activations=False), CPU, None, "float", "asymmetric"),
        (W4A8, torch.device("meta"), None, "reference", "no kernel for meta"),
    ],
)
def test_table(layer, device, capability, kernel, why):
    choice = choose_kernel(layer, device, capability)
    assert choice.kernel == kernel and why in choice.why


@pytest.mark.parametrize("changes", [{}, {"bits": 8}, {"activation_bits": 6}, {"group_size": 48},
                                     {"contiguous_groups": False}, {"largest_scale": 2**20}])  # fmt: skip
def test_a_cpu_with_exact_products_runs_all_integer_layers(monkeypatch, changes):
    monkeypatch.setattr(dispatch, "int8_product_is_exact", lambda: True)
    choice = choose_kernel(replace(W4A8, **changes), CPU)
    assert choice.kernel == "cpu-int8" and "no CUDA device" in choice.why


def test_other_cpus(monkeypatch):
    monkeypatch.setattr(dispatch, "int8_product_is_exact", lambda: False)
    assert choose_kernel(W4A8, CPU).kernel == "reference"
    assert choose_kernel(replace(W4A8, contiguous_groups=False), CPU).kernel == "float"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    choice = choose_kernel(W4A8, CUDA, (8, 0))
    assert choice.kernel == "reference" and "triton is not installed" in choice.why


def test_facts_of_a_layer():
    """Each fact follows what it is of; scattered groups and fixed or asymmetric ranges would be multiplied wrongly."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(8, 64, generator=generator)
    grid = with_integer_scales(fit_grid(weight_OI, WeightScheme(4, 32, True)), weight_OI, 1024)
    weight = QuantizedWeight(quantize_to_grid(weight_OI, grid), grid)
    plain = layer_facts(weight, InputRule(ActivationScheme(8)))
    largest = int(grid.integer_scale_OG().max())
    assert plain == LayerFacts(4, 32, True, True, largest, 8, True, False)
    scattered = replace(grid, group_of_I=grid.group_of_I.flip(0))
    assert not layer_facts(replace(weight, grid=scattered), InputRule(ActivationScheme(8))).contiguous_groups
    for scheme in (ActivationScheme(8, symmetric=False), ActivationScheme(8, "tensor", False)):
        assert layer_facts(weight, InputRule(scheme)) == replace(plain, symmetric_activations=False)
    assert layer_facts(weight, InputRule()) == replace(plain, activation_bits=None, symmetric_activations=False)
    floats = replace(weight, grid=replace(grid, amplifier=None))
    assert layer_facts(floats, InputRule(ActivationScheme(8))) == replace(plain, integer_scales=False, largest_scale=0)
    outliers = single_outliers(weight_OI, weight_OI > 2, torch.float32)
    assert layer_facts(replace(weight, outliers=outliers), InputRule()).outliers
