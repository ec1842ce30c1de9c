"""Outliers from the recipe to the loaded model."""

import pytest
import torch

from finescale.errors import CheckpointError, InputError
from finescale.pipeline.convert import convert
from finescale.pipeline.inspect import inspect_layers
from finescale.pipeline.quantize import prepare
from finescale.pipeline.verify import verify
from finescale.recipe import Recipe
from finescale.runtime.checkpoint import open_quantized
from finescale.runtime.load import load
from tests.helpers import assert_same_logits, change_tensor, quantize, read_json, recipe, some_tokens


@pytest.fixture(scope="module")
def llama(tiny):
    return tiny("llama")


def with_outliers(structured=False, **parts):
    return recipe("quantease", 3, options={"outliers": 0.02, "structured": structured}, **parts)


@pytest.mark.parametrize("structured", [False, True])
def test_stored_loaded_and_reported(llama, text, tmp_path, structured):
    report = quantize(llama, tmp_path / "out", with_outliers(structured), text)
    assert_same_logits(llama, tmp_path / "out")
    assert verify(tmp_path / "out", llama).layers == len(report["layers"])
    found = {record["name"]: record for record in inspect_layers(tmp_path / "out")}
    for record in report["layers"]:
        rows, columns = record["shape"]
        expected = rows * round(0.02 * columns) if structured else round(0.02 * rows * columns)
        assert record["outliers"] == expected == found[record["name"]]["outliers"]
        assert record["bits_per_weight"] == pytest.approx(found[record["name"]]["bits_per_weight"])
        least = 3 + (32 + 3) / columns + expected * (32 if structured else 40) / (rows * columns)
        least += 16 * round(0.02 * columns) / (rows * columns) if structured else 0
        if structured:
            assert record["bits_per_weight"] == pytest.approx(least)
        else:  # here and there a place is farther than a byte reaches
            assert least <= record["bits_per_weight"] <= least + 0.02
    assert report["size"]["bits_per_weight"] > 3.3
    for row in report["engines"]:
        assert row["loads"] is (row["engine"] == "finescale")
    layer = next(module for name, module in load(tmp_path / "out", cache=False).named_modules() if "q_proj" in name)
    weight = layer.quantized_weight()
    assert weight.outliers is not None
    x_TI = torch.randn(4, layer.in_features)
    torch.testing.assert_close(layer(x_TI), x_TI @ weight.dequantize().T)


def test_outliers_of_8_bits_from_the_recipe_to_the_loaded_model(llama, text, tmp_path):
    wide = quantize(llama, tmp_path / "wide", with_outliers(), text)
    part = recipe("quantease", 3, options={"outliers": 0.02, "outlier_bits": 8})
    narrow = quantize(llama, tmp_path / "narrow", part, text)
    assert_same_logits(llama, tmp_path / "narrow")
    assert verify(tmp_path / "narrow", llama).layers == len(narrow["layers"])
    found = {record["name"]: record for record in inspect_layers(tmp_path / "narrow")}
    for one, other in zip(wide["layers"], narrow["layers"], strict=True):
        assert found[other["name"]]["bits_per_weight"] == pytest.approx(other["bits_per_weight"])
        assert other["outliers"] == one["outliers"]
    saved = wide["size"]["bits_per_weight"] - narrow["size"]["bits_per_weight"]
    assert saved == pytest.approx(0.02 * 24, rel=0.05)  # the test's model is float32


def test_they_lower_the_error_of_the_layers(llama, text, tmp_path):
    plain = quantize(llama, tmp_path / "plain", recipe("quantease", 3), text)
    kept = quantize(llama, tmp_path / "kept", with_outliers(), text)
    first = [(one["relative_error"], other["relative_error"]) for one, other in zip(plain["layers"], kept["layers"])]  # noqa: B905
    assert all(other < one for one, other in first[:7])


def test_dense_output_runs_everywhere(llama, text, tmp_path):
    packed = quantize(llama, tmp_path / "packed", with_outliers(), text)
    dense = quantize(llama, tmp_path / "dense", with_outliers(format="dense"), text)
    assert all(row["loads"] for row in dense["engines"])
    assert packed["layers"][0]["sha256"] == dense["layers"][0]["sha256"]
    tokens_BT = some_tokens()
    with torch.no_grad():
        one, other = (load(tmp_path / name)(tokens_BT).logits for name in ("packed", "dense"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structured", [False, True])
def test_dense_weights_may_leave_the_grid_as_often_as_there_are_outliers(llama, text, tmp_path, structured):
    chosen = recipe(
        "quantease", 3, 32, format="dense", options={"start": "weight", "outliers": 0.05, "structured": structured}
    )
    report = quantize(llama, tmp_path / "out", chosen, text)
    assert verify(tmp_path / "out", llama).layers == 14
    name = report["layers"][0]["name"]
    noise = torch.Generator().manual_seed(0)
    change_tensor(
        tmp_path / "out", f"{name}.weight", lambda tensor: tensor + 1e-3 * torch.randn(tensor.shape, generator=noise)
    )
    with pytest.raises(CheckpointError, match="more values in a group"):
        verify(tmp_path / "out", llama)


def test_what_cannot_be_is_refused(llama, text, tmp_path):
    with pytest.raises(InputError, match="no place for outliers"):
        prepare(llama, with_outliers(format="gptq"), tmp_path / "a", str(text))
    with pytest.raises(InputError, match="integer_scale has no outliers"):
        Recipe.load("w4a8-integer-scale", ("solver.outliers=0.01",))
    symmetric = with_outliers(weights={"symmetric": True, "group_size": 16})
    quantize(llama, tmp_path / "b", symmetric, text)
    with pytest.raises(InputError, match="has outliers"):
        convert(tmp_path / "b", tmp_path / "c")


def test_the_config_stays_standard(llama, text, tmp_path):
    quantize(llama, tmp_path / "out", with_outliers(), text)
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert len(open_quantized(tmp_path / "out").layer_names()) == 14


@pytest.mark.parametrize(
    "name", ["quantease-outliers", "quantease-structured-outliers", "quantease-outliers-published"]
)
def test_the_named_recipes(name):
    assert Recipe.named(name).solver.options().keeps_outliers


def test_spqr_is_stored_loaded_and_verified(llama, text, tmp_path):
    report = quantize(llama, tmp_path / "out", recipe("spqr", 3, 16), text)
    assert_same_logits(llama, tmp_path / "out")
    assert verify(tmp_path / "out", llama).packed_again == 14
    assert [row["engine"] for row in report["engines"] if row["loads"]] == ["finescale"]
    record, weight = report["layers"][0], open_quantized(tmp_path / "out").read(report["layers"][0]["name"])
    assert weight.grid.bilevel is not None and record["outliers"] == weight.outliers.count > 0
    assert weight.stored_bits() / weight.codes_OI.numel() == pytest.approx(record["bits_per_weight"])
    with pytest.raises(InputError, match="asymmetric groups"):
        Recipe.load("spqr", ("weights.group_size=-1",))
    with pytest.raises(InputError, match="asymmetric groups"):
        Recipe.from_dict(
            Recipe.named("spqr").to_dict() | {"overrides": [{"pattern": "*", "weights": {"group_size": -1}}]}
        )
