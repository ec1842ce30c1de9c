"""Reading a quantized checkpoint layer by layer."""

import pytest
import torch

from finescale.errors import CheckpointError
from finescale.runtime.checkpoint import open_quantized
from tests.helpers import W4A8, quantize, read_tensors, recipe


def test_layers_in_full(tiny, text, tmp_path):
    report = quantize(tiny("llama"), tmp_path / "out", recipe("rtn", 4, 32), text)
    quantized = open_quantized(tmp_path / "out")
    assert set(quantized.layer_names()) == {record["name"] for record in report["layers"]}
    hashes = {record["name"]: record["sha256"] for record in report["layers"]}
    for name, weight in quantized.layers():
        assert weight.sha256() == hashes[name]
        # Rounding to nearest: no weight is further from its grid point than half a step.
        original_OI = read_tensors(tiny("llama"))[name + ".weight"]
        half_OI = weight.grid.scale_OG[:, weight.grid.group_of_I] / 2
        assert bool(((weight.dequantize() - original_OI).abs() <= half_OI * 1.001 + 1e-7).all())
    with pytest.raises(CheckpointError, match="lm_head is not quantized"):
        quantized.read("lm_head")


def test_activations_and_amplifiers_come_back(tiny, text, tmp_path):
    quantize(tiny("llama"), tmp_path / "out", recipe("rtn", 4, 32, integer_scale={"mode": "after"}, **W4A8), text)
    quantized = open_quantized(tmp_path / "out")
    assert quantized.activations.bits == 8 and quantized.metadata["version"] == 1
    for name, weight in quantized.layers():
        assert weight.grid.amplifier == quantized.metadata["layers"][name]["amplifier"]
        assert weight.grid.integer_scale_OG().dtype == torch.int32
