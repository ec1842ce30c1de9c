"""Any damage to a checkpoint is found, and named."""

import json
import shutil

import pytest
import torch

from finescale.errors import CheckpointError, FinescaleError, InputError, NumericsError
from finescale.pipeline.verify import adversarial_tokens, verify
from finescale.runtime.checkpoint import open_quantized
from tests.helpers import (
    W4A8,
    assert_sentence,
    change_tensor,
    quantize,
    read_json,
    read_tensors,
    recipe,
    write_tensors,
)

LAYER = "model.layers.1.mlp.gate_proj"
KINDS = ("integer", "float", "asymmetric", "gptq", "awq", "dense", "converted", "folded", "converted-folded")
INTEGER = {"integer", "converted", "folded", "converted-folded"}


@pytest.fixture(scope="module")
def results(tiny, text, tmp_path_factory):
    """One untouched result of each kind."""
    from finescale.pipeline.convert import convert

    folder = tmp_path_factory.mktemp("results")
    integer = {"mode": "before", "amplifier": "auto"}
    recipes = {
        "integer": recipe("rtn", 4, 32, integer_scale=integer, **W4A8),
        "folded": recipe("rtn", 4, 16, integer_scale={"mode": "folded"}, **W4A8),
        "float": recipe("rtn", 4, 32, weights={"symmetric": True}),
        "asymmetric": recipe("rtn", 3, 40),
        "gptq": recipe("rtn", 4, 32, format="gptq", weights={"symmetric": True}),
        "awq": recipe("rtn", 4, 32, format="awq"),
        "dense": recipe("rtn", 4, 32, format="dense"),
    }
    for name, chosen in recipes.items():
        quantize(tiny("llama", torch.float16), folder / name, chosen, text)
    convert(folder / "float", folder / "converted")
    convert(folder / "float", folder / "converted-folded", folded=True)
    return folder


@pytest.fixture
def damaged(results, tmp_path):
    return lambda kind: shutil.copytree(results / kind, tmp_path / kind)


def found(folder, against=None, error=FinescaleError, match=None):
    with pytest.raises(error, match=match) as caught:
        verify(folder, against)
    assert_sentence(str(caught.value))


@pytest.mark.parametrize("kind", KINDS)
def test_untouched_results_pass(results, tiny, kind):
    original = tiny("llama", torch.float16)
    for against in (None, original):
        result = verify(results / kind, against)
        assert result.layers == 14 and result.shards > 0
        assert result.packed_again == (0 if kind == "dense" else 14)
        assert result.integer_layers == (14 if kind in INTEGER else 0)
        assert result.folded_layers == (14 if "folded" in kind else 0)
        assert result.copied == (None if against is None else 7)
        assert result.worst_relative is None or 0.01 < result.worst_relative < 0.5


def packed_suffix(kind):
    return {"gptq": "qweight", "awq": "qweight", "dense": "weight"}.get(kind, "weight_packed")


def scale_suffix(kind):
    return "scales" if kind in ("gptq", "awq") else "weight_scale"


def flip(position, bit):
    def change(tensor):
        data = tensor.contiguous().view(-1).view(torch.uint8)
        data[position % data.numel()] ^= 1 << bit
        return tensor

    return change


@pytest.mark.parametrize(("position", "bit"), [(0, 0), (777, 3), (2000, 6), (-1, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_of_the_codes(damaged, kind, position, bit):
    folder = damaged(kind)
    change_tensor(folder, f"{LAYER}.{packed_suffix(kind)}", flip(position, bit))
    named = rf"{LAYER}|model-0000" if kind == "dense" else LAYER
    found(folder, match=named.replace(".", r"\."))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
@pytest.mark.parametrize(
    "change", [lambda s: s * 2, lambda s: s.nextafter(s * 2) if s.dtype == torch.float32 else s * 1.01]
)
def test_an_edited_scale(damaged, kind, change):
    folder = damaged(kind)

    def edit(tensor):
        tensor[1, 0] = change(tensor[1:2, :1])[0, 0]
        return tensor

    change_tensor(folder, f"{LAYER}.{scale_suffix(kind)}", edit)
    found(folder, match=LAYER.replace(".", r"\."))


@pytest.mark.parametrize("kind", ["folded", "converted-folded"])
@pytest.mark.parametrize("factor", [1 / 4, 31 / 32, 33 / 32, 17, 1024])
def test_an_edited_folded_scale_without_a_report(damaged, kind, factor):
    """A stranger's file: only the scales themselves and the bound tell."""
    folder = damaged(kind)
    (folder / "report.json").unlink()
    quantized = open_quantized(folder)
    grid = quantized.read(LAYER).grid
    worst = int(quantized.read(LAYER).codes_OI.int().abs().sum(1).argmax())
    assert grid.folded and int(grid.integer_scale_OG().max()) <= 15

    def edit(tensor):
        tensor[worst, 1] *= factor
        return tensor

    change_tensor(folder, f"{LAYER}.weight_scale", edit)
    found(folder, error=NumericsError, match=LAYER.replace(".", r"\."))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("kind", ["integer", "float", "gptq", "folded"])
def test_an_impossible_scale(damaged, kind, value):
    folder = damaged(kind)
    change_tensor(folder, f"{LAYER}.{scale_suffix(kind)}", lambda tensor: tensor.fill_(value))
    found(folder)


def test_an_edited_zero_point(damaged):
    folder = damaged("asymmetric")
    change_tensor(folder, f"{LAYER}.weight_zero_point", flip(5, 2))
    found(folder, match=LAYER.replace(".", r"\."))


def edit_metadata(folder, edit):
    config = read_json(folder / "config.json")
    edit(config["quantization_config"]["finescale"]["layers"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["integer", "converted"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: {"amplifier": layer["amplifier"] * 2},
        lambda layer: {"amplifier": layer["amplifier"] // 2},
        lambda layer: {"amplifier": 3},
        lambda layer: {"amplifier": 0},
        lambda layer: {"amplifier": None},
        lambda layer: {"bound": layer["bound"] + 1},
        lambda layer: {"bound": layer["bound"] - 1},
        lambda layer: {"bound": None},
        lambda layer: {"amplifier": layer["amplifier"] * 2, "bound": layer["bound"] * 2},
    ],
)
def test_an_edited_amplifier_or_bound(damaged, kind, change):
    folder = damaged(kind)
    edit_metadata(folder, lambda layers: layers[LAYER].update(change(layers[LAYER])))
    found(folder, match=LAYER.replace(".", r"\."))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("folded", {"folded": False}),
        ("folded", {"amplifier": 2}),
        ("folded", {"amplifier": None}),
        ("folded", {"bound": 5}),
        ("integer", {"folded": True}),
        ("integer", {"folded": True, "amplifier": 1}),
        ("float", {"folded": True, "amplifier": 1}),
    ],
)
def test_an_edited_claim_of_folded_scales(damaged, kind, change):
    folder = damaged(kind)
    edit_metadata(folder, lambda layers: layers[LAYER].update(change))
    found(folder, match=LAYER.replace(".", r"\."))


def test_codes_times_folded_scales_are_compared_with_the_weights(results, monkeypatch):
    """A factor that is not the one of the scales does not pass."""
    from finescale.grid import Grid

    factor = Grid.channel_scale_O.fget
    monkeypatch.setattr(
        Grid, "channel_scale_O", property(lambda grid: factor(grid) if factor(grid) is None else factor(grid) / 2)
    )
    found(results / "folded", error=FinescaleError)


def test_the_proof_is_made_again_without_the_report(damaged):
    """A stranger's file: no report beside it, only the amplifier and bound it claims."""
    folder = damaged("integer")
    (folder / "report.json").unlink()
    assert verify(folder).integer_layers == 14
    edit_metadata(folder, lambda layers: layers[LAYER].update(bound=layers[LAYER]["bound"] + 1))
    found(folder, error=NumericsError, match="bound")


def test_a_file_whose_bound_does_not_hold_is_refused(damaged):
    """Scales far too large, with metadata that is honest about them: no reader may accept it."""
    folder = damaged("integer")
    (folder / "report.json").unlink()
    change_tensor(folder, f"{LAYER}.weight_scale", lambda tensor: torch.full_like(tensor, 60000.0))
    edit_metadata(folder, lambda layers: layers[LAYER].update(bound=2**31))
    found(folder, error=NumericsError, match="2\\^31")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_layer(damaged, kind):
    folder = damaged(kind)
    for key in [key for key in read_tensors(folder) if key.startswith(LAYER + ".")]:
        change_tensor(folder, key, lambda _: None)
    found(folder, match=LAYER.replace(".", r"\."))


@pytest.mark.parametrize("kind", KINDS)
def test_any_dropped_tensor_of_a_layer(damaged, results, kind):
    for key in [key for key in read_tensors(results / kind) if key.startswith(LAYER + ".")]:
        folder = damaged(kind)
        change_tensor(folder, key, lambda _: None)
        found(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "key", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
)
def test_a_changed_tensor_that_was_not_quantized(damaged, tiny, kind, key):
    folder = damaged(kind)
    change_tensor(folder, key, flip(9, 0))
    found(folder, tiny("llama", torch.float16), match=key.replace(".", r"\."))
    found(folder, match="not the file that was written")


def test_a_changed_type_or_lost_or_added_tensor(damaged, tiny):
    original, key = tiny("llama", torch.float16), "model.norm.weight"
    for change, name in ((lambda t: t.float(), key), (lambda _: None, key)):
        folder = damaged("float")
        change_tensor(folder, key, change)
        found(folder, original, match=name.replace(".", r"\."))
        shutil.rmtree(folder)
    folder = damaged("float")
    (folder / "report.json").unlink()
    file = sorted(folder.glob("*.safetensors"))[0]
    from safetensors.torch import load_file

    write_tensors(file, load_file(file) | {"model.backdoor.weight": torch.zeros(2, 2)})
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["model.backdoor.weight"] = file.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found(folder, original, CheckpointError, r"model\.backdoor\.weight")


def test_zero_and_minus_zero_are_different_bytes(damaged, tiny, tmp_path):
    folder, original = damaged("float"), shutil.copytree(tiny("llama", torch.float16), tmp_path / "original")
    (folder / "report.json").unlink()
    for path, value in ((folder, 0.0), (original, -0.0)):
        change_tensor(path, "model.norm.weight", lambda tensor, value=value: tensor.fill_(value))
    found(folder, original, CheckpointError, r"model\.norm\.weight")


def test_another_original(results, tiny, tmp_path):
    from tests.helpers import make_model, make_tokenizer, save_model

    other = save_model(make_model("llama", torch.float16, seed=9), make_tokenizer(), tmp_path / "other")
    found(results / "float", other, CheckpointError, "another model")
    found(results / "float", tiny("qwen2", torch.float16), CheckpointError)
    found(results / "dense", other, CheckpointError)


def test_an_original_that_was_trained_a_little_further(results, tiny, tmp_path):
    """A merged adapter changes few weights, and those by less than rounding does."""
    other = shutil.copytree(tiny("llama", torch.float16), tmp_path / "other")
    noise = torch.Generator().manual_seed(0)
    change_tensor(other, f"{LAYER}.weight", lambda w: w + 0.01 * torch.randn(w.shape, generator=noise).half())
    for kind in ("float", "integer", "asymmetric", "gptq"):
        found(results / kind, other, CheckpointError, LAYER.replace(".", r"\."))


def test_a_solution_far_from_its_weight_is_no_damage(tiny, text, tmp_path):
    """Huge weights make the inputs of later layers nearly one-dimensional, and their solutions wander."""
    original = shutil.copytree(tiny("llama", torch.float16), tmp_path / "original")

    def with_a_giant(tensor):
        tensor[0, 0] = 300.0
        return tensor

    for layer in ("0.mlp.up_proj", "0.mlp.down_proj", "1.self_attn.v_proj", "1.mlp.down_proj"):
        change_tensor(original, f"model.layers.{layer}.weight", with_a_giant)
    options = {"start": "weight", "act_order": True}
    quantize(original, tmp_path / "out", recipe("quantease", 3, 40, options=options), text)
    assert verify(tmp_path / "out", original).worst_relative > 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_report(damaged, kind):
    folder = damaged(kind)
    report = read_json(folder / "report.json")
    record = next(record for record in report["layers"] if record["name"] == LAYER)
    record["bits"] = 2
    (folder / "report.json").write_text(json.dumps(report))
    found(folder, match=LAYER.replace(".", r"\."))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"layers": 3}', '{"layers": [3]}', '{"layers": [{"name": "x"}]}', "{}"]
)
def test_a_damaged_report(damaged, content):
    folder = damaged("float")
    (folder / "report.json").write_text(content)
    found(folder, error=CheckpointError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_shard(damaged, kind):
    folder = damaged(kind)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-5])
    found(folder, error=CheckpointError, match="truncated")


def test_what_is_no_quantized_checkpoint(tiny, tmp_path):
    found(tiny("llama"), error=CheckpointError, match="not quantized")
    found(tmp_path / "nowhere", error=InputError)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": None},
        {"config_groups": {}},
        {"format": "marlin-24", "config_groups": {"g": {"format": "marlin-24", "weights": {"num_bits": 4}}}},
    ],
)
def test_other_ways_to_quantize_are_refused(damaged, change):
    folder = damaged("float")
    config = read_json(folder / "config.json")
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    found(folder, error=CheckpointError)


def change_config(folder, change):
    facts = read_json(folder / "config.json")
    change(facts["quantization_config"])
    (folder / "config.json").write_text(json.dumps(facts))


DAMAGED_CONFIGS = {
    "version": lambda config: config["finescale"].update(version="x"),
    "no version": lambda config: config["finescale"].update(version=None),
    "key": lambda config: config.update(finescale="x"),
    "layers": lambda config: config["finescale"].update(layers=["a"]),
    "layer": lambda config: config["finescale"]["layers"].update({LAYER: 7}),
    "amplifier": lambda config: config["finescale"]["layers"][LAYER].update(amplifier="x"),
    "amplifier zero": lambda config: config["finescale"]["layers"][LAYER].update(amplifier=0),
    "bound": lambda config: config["finescale"]["layers"][LAYER].update(bound=1.5),
    "inputs": lambda config: config["finescale"]["layers"][LAYER].update(inputs=[1]),
    "targets": lambda config: config["config_groups"]["group_0"].update(targets=5),
    "target": lambda config: config["config_groups"]["group_0"].update(targets=[None]),
    "pattern": lambda config: config["config_groups"]["group_0"].update(targets=["re:("]),
    "group": lambda config: config["config_groups"]["group_0"].update(weights=[None]),
    "activations": lambda config: config["config_groups"]["group_0"].update(input_activations=7),
    "format": lambda config: config["config_groups"]["group_0"].update(format={"a": 1}),
    "formats": lambda config: config.update(format=["pack-quantized"]),
    "cache": lambda config: config["finescale"].update(kv_cache=7),
    "cache bits": lambda config: config["finescale"].update(kv_cache={"bits": 99, "symmetric": True}),
    "cache symmetry": lambda config: config["finescale"].update(kv_cache={"bits": 8}),
    "ignore": lambda config: config.update(ignore=5),
    "ignored pattern": lambda config: config.update(ignore=["re:*"]),
}


@pytest.mark.parametrize("name", DAMAGED_CONFIGS)
def test_a_damaged_quantization_config(damaged, name):
    """Whatever reads the folder says so in one sentence: verify, load, inspect and convert all open it the same way."""
    folder = damaged("integer")
    change_config(folder, DAMAGED_CONFIGS[name])
    found(folder, error=CheckpointError, match=r"damaged")


def test_a_damaged_awq_config(damaged):
    folder = damaged("awq")
    change_config(folder, lambda config: config.update(modules_to_not_convert=[True]))
    found(folder, error=CheckpointError, match="modules_to_not_convert")


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_packed", "weight_shape"])
def test_a_damaged_tensor_is_named(damaged, suffix):
    folder = damaged("integer")
    change_tensor(folder, f"{LAYER}.{suffix}", lambda tensor: tensor[:-1])
    with pytest.raises(CheckpointError, match=LAYER) as caught:
        open_quantized(folder).read(LAYER)
    assert_sentence(str(caught.value))


def test_a_newer_version(damaged):
    folder = damaged("integer")
    config = read_json(folder / "config.json")
    config["quantization_config"]["finescale"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    found(folder, error=CheckpointError, match="newer finescale")


def test_adversarial_tokens_reach_the_bound_exactly(results):
    quantized = open_quantized(results / "integer")
    for name in quantized.layer_names():
        weight = quantized.read(name)
        grid = weight.grid
        x_TI = adversarial_tokens(weight, 127).long()
        product_TO = x_TI @ (grid.integer_scale_OG().long()[:, grid.group_of_I] * weight.codes_OI.long()).T
        bound = quantized.metadata["layers"][name]["bound"]
        assert int(product_TO.max()) == bound and int(product_TO.min()) == -bound < 0


def test_the_int32_product_itself_is_compared_with_int64(results, monkeypatch):
    """A kernel that is off by one, on the tokens at the bound only, does not pass."""
    import finescale.pipeline.verify as module

    product = module.grouped_int32_product

    def wrong(x_TI, *rest):
        total_TO = product(x_TI, *rest)
        total_TO[-1, 0] += 1
        return total_TO

    monkeypatch.setattr(module, "grouped_int32_product", wrong)
    found(results / "integer", error=NumericsError, match="differs from int64")


def test_weights_far_away_that_point_the_same_way_are_no_other_model(tiny):
    """Solvers minimize the error of the outputs: at 2 bits the weights may move by more than their norm."""
    from finescale.pipeline.verify import _Original

    original, name = _Original(tiny("llama")), LAYER
    weight_OI = original.source.read(name + ".weight")
    noise_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(1)) * weight_OI.norm() / 78.4
    assert original.relative_error(name, weight_OI + 1.05 * noise_OI) == pytest.approx(1.05, rel=0.1)
    for other in (noise_OI, -weight_OI, weight_OI.roll(1, 0)):
        with pytest.raises(CheckpointError, match="another model"):
            original.relative_error(name, 1.05 * other)
