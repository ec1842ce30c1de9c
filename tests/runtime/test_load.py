"""Loading for use. That logits are right is proved for every family in tests/pipeline/test_families.py."""

import json
import shutil

import pytest
import torch

import finescale
from finescale.errors import CheckpointError, FinescaleError, InputError
from finescale.runtime.load import load, quantized_layers
from tests.helpers import (
    KINDS,
    W4A8,
    assert_sentence,
    change_tensor,
    logits_of,
    quantize,
    read_json,
    read_tensors,
    recipe,
    some_tokens,
)


@pytest.fixture(scope="module")
def result(tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("result") / "out"
    quantize(tiny("qwen2"), out, recipe("rtn", 4, 32, integer_scale={"mode": "before"}, **W4A8), text)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_stays_on_the_meta_device(tiny, kind):
    model = load(tiny(kind))
    assert all(tensor.device.type == "cpu" for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "bloom", "falcon", "opt", "gpt2"])
def test_tied_embeddings_are_one_tensor(tiny, kind):
    model = load(tiny(kind))
    assert "lm_head.weight" not in read_tensors(tiny(kind))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_untied_head_is_its_own(tiny):
    model, tensors = load(tiny("llama")), read_tensors(tiny("llama"))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_a_tied_model_whose_file_holds_the_head_as_well(tiny, tmp_path):
    path = shutil.copytree(tiny("llama-tied"), tmp_path / "model")
    from tests.helpers import write_tensors

    tensors = read_tensors(path)
    write_tensors(
        path / "model.safetensors", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    )
    tokens_BT = some_tokens()
    assert torch.equal(logits_of(load(path), tokens_BT), logits_of(load(tiny("llama-tied")), tokens_BT))


def test_dtype_and_cache(result):
    tokens_BT = some_tokens()
    expected = logits_of(load(result), tokens_BT)
    half = load(result, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert float((logits_of(half, tokens_BT).float() - expected).abs().mean()) < 0.3
    lean = load(result, cache=False)
    assert all(layer.dense_OI is None for layer in quantized_layers(lean).values())
    assert torch.equal(logits_of(lean, tokens_BT), expected)


def test_rounding_of_inputs_can_be_that_of_other_engines(result):
    tokens_BT = some_tokens()
    ours, theirs, none = (
        logits_of(load(result, rounding=rounding), tokens_BT)
        for rounding in ("finescale", "compressed-tensors", "none")
    )
    assert not torch.equal(ours, theirs) and not torch.equal(ours, none)
    assert float((ours - theirs).abs().mean()) < 0.2


def test_a_model_with_caches_generates(result, tiny):
    for path in (result, tiny("gpt2")):
        model = load(path)
        prompt_BT = some_tokens(1, 10)
        options = {"attention_mask": torch.ones_like(prompt_BT), "max_new_tokens": 6, "do_sample": False}
        assert model.config.use_cache is True
        cached, plain = (model.generate(prompt_BT, use_cache=cache, **options) for cache in (True, False))
        assert torch.equal(cached, plain) and cached.shape[1] > 10


def test_finescale_load_is_this_one(result):
    assert torch.equal(logits_of(finescale.load(result), some_tokens()), logits_of(load(result), some_tokens()))


def refused(path, error=FinescaleError, match=None):
    with pytest.raises(error, match=match) as caught:
        load(path)
    assert_sentence(str(caught.value))


def test_quantized_tensors_without_a_layer(result, tmp_path):
    path = shutil.copytree(result, tmp_path / "out")
    config = read_json(path / "config.json") | {"num_hidden_layers": 1}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1]
    (path / "config.json").write_text(json.dumps(config))
    refused(path, CheckpointError, "no layer for")


@pytest.mark.parametrize("change", [{"head_dim": 2**40}, {"intermediate_size": 100}])
def test_a_config_of_other_sizes(result, tmp_path, change):
    """Before anything as large as it says is made."""
    folder = shutil.copytree(result, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not belong together"):
        load(folder)


def test_damage_is_found_when_loading_too(result, tmp_path):
    path = shutil.copytree(result, tmp_path / "a")
    change_tensor(path, "model.layers.0.mlp.up_proj.weight_scale", lambda tensor: tensor * 1.001)
    refused(path, match=r"model\.layers\.0\.mlp\.up_proj")
    path = shutil.copytree(result, tmp_path / "b")
    change_tensor(path, "model.layers.0.mlp.up_proj.weight_packed", lambda _: None)
    refused(path, CheckpointError)
    path = shutil.copytree(result, tmp_path / "c")
    change_tensor(path, "model.layers.0.mlp.up_proj.weight_packed", lambda tensor: tensor[:-1])
    refused(path, CheckpointError)


def test_what_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", InputError)
    refused(tmp_path / "model.gguf", InputError, "does not exist")


@pytest.mark.parametrize("device", ["warp", "meta"])
def test_devices(tiny, device):
    with pytest.raises(InputError, match="--device"):
        load(tiny("llama"), device=device)


def test_a_device_beyond_the_last(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="cuda:0 to cuda:1") as caught:
        load(tiny("llama"), device="cuda:2")
    assert_sentence(str(caught.value))


@pytest.mark.parametrize("content", ["{", '{"max_new_tokens": -4}'])
def test_a_damaged_generation_config(tiny, tmp_path, content):
    path = shutil.copytree(tiny("llama"), tmp_path / "model")
    (path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as caught:
        load(path)
    assert_sentence(str(caught.value))
