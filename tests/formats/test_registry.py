"""Formats by name, and their detection."""

import pytest
import torch

from finescale.errors import CheckpointError, InputError
from finescale.formats import FORMATS, activation_scheme, detect, get
from finescale.grid import ActivationScheme, WeightScheme
from tests.formats.examples import random_weight, same


def test_what_other_tools_do_beside_rounding_is_refused_by_name():
    group = {"targets": ["Linear"], "weights": {"num_bits": 4}, "format": "pack-quantized"}

    def config(**parts):
        return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}} | parts

    def rotated(*places):
        apply = [{"targets": ["Linear"], "location": place} for place in places]
        return config(transform_config={"config_groups": {"R": {"type": "hadamard", "apply": apply}}})

    assert detect(config()) == detect(rotated("weight_input", "weight_output")) == "compressed-tensors"
    for online in (rotated("weight_input", "input"), rotated("k_cache"), config(transform_config={"other": 1})):
        with pytest.raises(CheckpointError, match="rotates activations at run time"):
            detect(online)
    with pytest.raises(CheckpointError, match="outputs are rounded"):
        detect(config(config_groups={"group_0": group | {"output_activations": {"num_bits": 8}}}))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "dense"])
def test_every_format_is_detected_and_reads_what_it_wrote(name):
    scheme = WeightScheme(4, 32, False)
    weight = random_weight(32, 64, scheme, lowest_zero=-7)
    entry = get(name)
    entry.check(scheme, None, (32, 64))
    config = {"quantization_config": entry.quantization_config({"model.a": scheme}, None, ["lm_head"], {"version": 1})}
    assert detect(config) == detect(config["quantization_config"]) == name
    assert activation_scheme(config) is None
    tensors = entry.pack(weight)
    assert set(tensors) <= set(entry.suffixes)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    read = get(detect(config))
    found = read.layer_scheme(config["quantization_config"], "model.a")
    assert found == scheme
    assert same(read.unpack(tensors, found), weight)


def test_dense():
    weight = random_weight(8, 64, WeightScheme(4, 32, False))
    entry = get("dense")
    assert entry.quantization_config({"a": weight.grid.scheme}, None, []) is None
    assert torch.equal(entry.pack(weight)["weight"], weight.dequantize().half())
    assert torch.equal(entry.pack(weight, torch.float32)["weight"], weight.dequantize())
    assert torch.equal(entry.pack(weight, torch.float32, transposed=True)["weight"], weight.dequantize().t())
    with pytest.raises(InputError, match="no codes"):
        entry.unpack({}, weight.grid.scheme)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "not quantized"),
        ({"quantization_config": None}, "not quantized"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "version": "GEMV"}, "gemv"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": None}}},
            "without quantized weights",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {}, "format": "float-quantized"}},
            },
            "float-quantized",
        ),
    ],
)
def test_what_is_not_read_is_said(config, message):
    with pytest.raises(CheckpointError, match=message):
        detect(config)


def test_mixtures_and_old_names():
    groups = {"a": {"weights": {}, "format": "int-quantized"}, "b": {"weights": {}, "format": "pack-quantized"}}
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    assert detect(config) == "compressed-tensors"
    assert detect({"quant_method": "gptq", "bits": 4}) == "gptq"
    assert detect({"quant_method": "awq", "version": "GEMM"}) == "awq"
    with pytest.raises(InputError, match="unknown format"):
        get("gguf")


def test_activations_are_read_back():
    config = get("int-quantized").quantization_config({"a": WeightScheme(8, -1, True)}, ActivationScheme(8), [])
    assert activation_scheme({"quantization_config": config}) == ActivationScheme(8)
