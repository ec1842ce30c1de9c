"""Layers without a kernel of the device's own against the exact product, layer by layer and as a model."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from finescale.api import quantize
from finescale.errors import InputError
from finescale.grid import (
    ActivationScheme,
    InputRule,
    QuantizedWeight,
    WeightScheme,
    fit_grid,
    quantize_to_grid,
    with_folded_scales,
    with_integer_scales,
)
from finescale.kernels import portable
from finescale.kernels.cpu_int8 import int8_product_is_exact
from finescale.kernels.dispatch import Choice
from finescale.runtime.load import load
from finescale.runtime.modules import QuantizedLinear
from finescale.runtime.portable import JoinedProduct, PartOfProduct, PortableLinear, join_same_inputs
from tests.helpers import recipe

CPU = torch.device("cpu")


def layer_weight(bits=4, group_size=32, folded=False, integer=True):
    weight_OI = torch.randn(24, 90, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(weight_OI, WeightScheme(bits, group_size, True, "mse"))
    if folded:
        grid = with_folded_scales(grid, weight_OI)
    elif integer:
        grid = with_integer_scales(grid, weight_OI, "auto")
    return QuantizedWeight(quantize_to_grid(weight_OI, grid), grid)


@pytest.mark.parametrize("kind", [{}, {"folded": True}, {"bits": 8, "group_size": -1}, {"group_size": 7}], ids=str)
@pytest.mark.parametrize("kernel", ["cpu-int8", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_the_exact_product(monkeypatch, kernel, kind, dtype):
    monkeypatch.setattr("finescale.kernels.dispatch.int8_product_is_exact", lambda: kernel == "cpu-int8")
    weight, bias_O, inputs = layer_weight(**kind), torch.randn(24), InputRule(ActivationScheme(8))
    layer = PortableLinear(weight, bias_O, inputs, CPU)
    assert layer.product.kernel == kernel and kernel in repr(layer)
    exact = QuantizedLinear(weight, bias_O, inputs, "integer")
    for shape in ((1, 90), (2, 5, 90), (0, 90)):
        x_TI = torch.randn(shape).to(dtype)
        assert torch.equal(layer(x_TI), exact(x_TI)) and layer(x_TI).dtype == dtype


def test_layers_of_floats_are_refused():
    with pytest.raises(InputError, match="scales are floats"):
        PortableLinear(layer_weight(integer=False), None, InputRule(ActivationScheme(8)), CPU)


def test_what_runs_is_said_once(caplog):
    portable._said.clear()
    with caplog.at_level(logging.WARNING, "finescale"):
        for _ in range(2):
            PortableLinear(layer_weight(), None, InputRule(ActivationScheme(8)), CPU)
    assert len(caplog.messages) == 1 and "no CUDA device" in caplog.text


def test_a_model_on_a_cpu_is_the_exact_product(tiny, text, tmp_path, monkeypatch):
    integer_scale = {"mode": "before", "amplifier": "auto"}
    chosen = recipe("rtn", 4, 32, weights={"symmetric": True}, activations={"bits": 8}, integer_scale=integer_scale)
    quantize(tiny("llama"), chosen, calibration=str(text), out=tmp_path / "out")
    tokens = torch.arange(12).view(2, 6)
    models = {path: load(tmp_path / "out", path=path) for path in ("integer", "kernel")}
    by_hand = lambda layer, device: Choice("float", "for this test")  # noqa: E731
    monkeypatch.setattr(sys.modules["finescale.runtime.load"], "choose_kernel", by_hand)
    models["parts"] = load(tmp_path / "out", path="integer")
    kinds = {
        path: {type(m) for m in model.modules()} & {PortableLinear, QuantizedLinear} for path, model in models.items()
    }
    assert kinds == {"integer": {PortableLinear}, "kernel": {PortableLinear}, "parts": {QuantizedLinear}}
    by_path = {path: model(tokens).logits for path, model in models.items()}
    assert torch.equal(by_path["kernel"], by_path["parts"]) and torch.equal(by_path["integer"], by_path["parts"])


def test_without_gpu_and_compiler(tiny, text, tmp_path):
    """A fresh process that finds no program at all loads a model, says what it runs on, and multiplies."""
    chosen = recipe(
        "rtn", 4, 32, weights={"symmetric": True}, activations={"bits": 8}, integer_scale={"mode": "before"}
    )
    quantize(tiny("llama"), chosen, calibration=str(text), out=tmp_path / "out")
    code = (
        "import sys, torch, finescale; model = finescale.load(sys.argv[1], path='kernel'); "
        "print(bool(model(torch.arange(4)[None]).logits.isfinite().all()))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True,
        env=environment | {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True" and "finescale runs W4A8 layers on" in done.stderr


def siblings(kinds, biased=(False, True, False)):
    """Queries, keys and values of one input, and the exact layers of the same weights."""
    weights = [layer_weight(**kind) for kind in kinds]
    biases = [torch.randn(24) if one else None for one in biased]
    inputs = InputRule(ActivationScheme(8))
    parent, names = torch.nn.Module(), ("q_proj", "k_proj", "v_proj")
    for name, weight, bias_O in zip(names, weights, biases, strict=True):
        parent.add_module(name, PortableLinear(weight, bias_O, inputs, CPU))
    exact = [QuantizedLinear(w, b, inputs, "integer") for w, b in zip(weights, biases, strict=True)]
    join_same_inputs(parent)
    return [getattr(parent, name) for name in names], exact


needs_int8 = pytest.mark.skipif(not int8_product_is_exact(), reason="needs int8 dot products")


@needs_int8
@pytest.mark.parametrize("kinds", [[{}, {}, {}], [{}, {"folded": True}, {"group_size": 7}], [{"group_size": -1}] * 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_one_input_are_one_product(kinds, dtype, monkeypatch):
    layers, exact = siblings(kinds)
    assert all(isinstance(layer.product, PartOfProduct) for layer in layers)
    calls = []
    multiply = JoinedProduct.multiply
    monkeypatch.setattr(JoinedProduct, "multiply", lambda self, x_TI: calls.append(1) or multiply(self, x_TI))
    for shape in ((1, 90), (2, 5, 90), (0, 90)):
        x_TI = torch.randn(shape).to(dtype)
        for layer, other in zip(layers, exact, strict=True):
            assert torch.equal(layer(x_TI), other(x_TI)) and layer(x_TI).dtype == dtype
    assert layers[0].product.whole is layers[2].product.whole
    calls.clear()
    x_TI = torch.randn(1, 90).to(dtype)
    for layer in layers:
        layer(x_TI)
    assert len(calls) == 1 and layers[0].product.whole._last is None


@needs_int8
@pytest.mark.parametrize("kinds", [[{}, {}, {}], [{}, {"folded": True}, {"group_size": 7}]])
def test_traced_layers_multiply_for_themselves_alone(kinds):
    layers, exact = siblings(kinds)
    widths = []

    def backend(graph, _):
        called = [node for node in graph.graph.nodes if "cpu_int8_linear" in str(node.target)]
        widths.extend(node.meta["example_value"].shape[-1] for node in called)
        return graph.forward

    x_TI = torch.randn(3, 90)
    outputs = torch.compile(lambda x_TI: [layer(x_TI) for layer in layers], backend=backend)(x_TI)
    assert widths == [24, 24, 24]
    assert all(torch.equal(out, other(x_TI)) for out, other in zip(outputs, exact, strict=True))


@needs_int8
def test_outputs_of_other_inputs_are_not_taken():
    layers, exact = siblings([{}] * 3)
    x_TI = torch.randn(3, 90)
    first = layers[0](x_TI)
    first.zero_()  # the caller's own
    x_TI[1] += 1  # in place
    assert torch.equal(layers[1](x_TI), exact[1](x_TI))
    assert torch.equal(layers[0](x_TI), exact[0](x_TI)) and torch.equal(layers[0](x_TI), exact[0](x_TI))
    with torch.inference_mode():
        assert torch.equal(layers[2](x_TI), exact[2](x_TI))
    out = layers[1](x_TI)
    assert not out.is_inference() and torch.equal(out, exact[1](x_TI))


@needs_int8
def test_layers_without_a_common_way_stay_apart():
    layers, _ = siblings([{"group_size": -1}, {}, {}])
    assert all(not isinstance(layer.product, PartOfProduct) for layer in layers)
