"""Checkpoints in the compressed-tensors layouts, loaded by transformers, against the dequantized model."""

import pytest
import torch

from finescale.grid import ActivationScheme, WeightScheme
from tests.formats.checkpoints import LLAMA, MIXTRAL, prompt_logits, random_model, write_checkpoint, write_dense

pytest.importorskip("compressed_tensors")
A8 = ActivationScheme(8)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, random_model(LLAMA, folder)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    return folder, random_model(MIXTRAL, folder)


def largest_difference(model, tmp_path, *arguments, **keywords):
    """Largest difference of the logits, relative to their spread."""
    source, tensors = model
    dense = write_checkpoint(source, tensors, tmp_path / "quantized", *arguments, **keywords)
    expected = prompt_logits(write_dense(source, dense, tmp_path / "dense"))
    found = prompt_logits(tmp_path / "quantized")
    return max(float((a - b).abs().max() / b.std()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("format_name", "scheme"),
    [
        ("compressed-tensors", WeightScheme(4, 64, True)),
        ("compressed-tensors", WeightScheme(4, -1, True)),
        ("compressed-tensors", WeightScheme(2, 32, True)),
        ("compressed-tensors", WeightScheme(8, -1, True)),
        ("int-quantized", WeightScheme(8, -1, True)),
        ("int-quantized", WeightScheme(8, 64, False)),
    ],
)
def test_weight_only(llama, tmp_path, format_name, scheme):
    assert largest_difference(llama, tmp_path, format_name, scheme) < 1e-5


def test_several_schemes(llama, tmp_path):
    overrides = {"1.mlp.down_proj": WeightScheme(8, -1, True), "0.self_attn": WeightScheme(4, 32, True)}
    difference = largest_difference(
        llama, tmp_path, "compressed-tensors", WeightScheme(4, 64, True), overrides=overrides
    )
    assert difference < 1e-5


@pytest.mark.parametrize("format_name", ["compressed-tensors", "int-quantized"])
def test_activations_are_rounded(llama, tmp_path, format_name):
    """Rounding the inputs changes the logits, but not much: the layout and the config are understood."""
    difference = largest_difference(llama, tmp_path, format_name, WeightScheme(4, 64, True), A8)
    assert 1e-4 < difference < 0.2


def test_experts_keep_their_checkpoint_names(mixtral, tmp_path):
    """transformers fuses the experts of a model into one tensor, yet reads them packed one by one; it does so in the
    type of the scales, hence the wider tolerance."""
    assert any("block_sparse_moe.experts.3.w2" in name for name in mixtral[1])
    assert largest_difference(mixtral, tmp_path, "compressed-tensors", WeightScheme(4, 64, True)) < 0.02


@pytest.mark.parametrize("scheme", [WeightScheme(4, 64, False), WeightScheme(4, -1, False)])
def test_zero_points_load_when_dequantized_on_the_way(llama, tmp_path, scheme):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source, tensors = llama
    dense = write_checkpoint(source, tensors, tmp_path / "quantized", "compressed-tensors", scheme)
    try:
        way = CompressedTensorsConfig(dequantize=True)
    except TypeError:
        pytest.skip("this transformers has no CompressedTensorsConfig(dequantize=True)")
    from finescale.claim import left_to_transformers

    with left_to_transformers(), pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "quantized", dtype=torch.float32, quantization_config=way
        )
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, dense[name], rtol=2e-3, atol=1e-6), name


@pytest.mark.parametrize("activations", [A8, ActivationScheme(4, "tensor", False)])
def test_finescale_can_round_inputs_as_transformers_does(tiny, text, tmp_path, activations):
    """Random tokens leave the range of the calibration text, where the two roundings differ in their lowest code."""
    from dataclasses import asdict

    from transformers import AutoModelForCausalLM

    from finescale.claim import left_to_transformers
    from finescale.runtime.load import load
    from tests.helpers import logits_of, quantize, recipe, some_tokens

    calibration = {"samples": 1, "length": 8, "batch_size": 1}
    chosen = recipe(weights={"symmetric": True}, activations=asdict(activations), calibration=calibration)
    quantize(tiny("llama"), tmp_path / "out", chosen, text)
    found = logits_of(load(tmp_path / "out", rounding="compressed-tensors"), some_tokens())
    with left_to_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(found, logits_of(theirs, some_tokens()), rtol=1e-4, atol=1e-4)
