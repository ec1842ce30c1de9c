"""Checkpoints in a real vLLM on a CPU through finescale's plugin: exact, with the tokens of finescale itself."""

import json
import re
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from torch import nn

import finescale
from finescale.grid import QuantizedWeight, contiguous_groups
from finescale.runtime.load import load
from finescale.runtime.modules import QuantizedLinear
from tests.helpers import change_tensor, make_model, make_tokenizer, read_tensors, save_model
from tests.vllm.asking import ask, greedy

pytestmark = pytest.mark.vllm
FAMILIES = ("llama", "mistral", "opt", "falcon", "mixtral")
OWN_INPUTS = {
    "rotated": ("quarot-w4a4", ()),
    "gathered": ("qllm-w4a8", ("tuning=[]", "transforms=[{name: qllm, options: {expansion: 0.1}}]")),
}
QUICK = ("solver.name=rtn", "weights.group_size=64", "calibration.samples=2", "calibration.length=64")


@pytest.fixture(scope="module")
def checkpoints(vllm_python, zoo, shared, tmp_path_factory):
    """One integer-scale checkpoint of each family, and of a random Qwen3 with experts."""
    root = tmp_path_factory.mktemp("plugin")
    text = str(shared / "data" / "books" / "books_valid.txt")
    for family in FAMILIES:
        finescale.quantize(zoo(family), "w4a8-integer-scale", out=root / family, calibration=text, settings=QUICK)
    source = save_model(make_model("qwen3_moe", head_dim=32), make_tokenizer(), root / "qwen3_moe-source")
    settings = [setting.replace("=64", "=32") for setting in QUICK]
    finescale.quantize(source, "w4a8-integer-scale", out=root / "qwen3_moe", calibration=text, settings=settings)
    for name, (recipe, settings) in OWN_INPUTS.items():
        settings = (*settings, "calibration.samples=2", "calibration.length=64")
        finescale.quantize(zoo("llama"), recipe, out=root / name, calibration=text, settings=settings)
    return root


@pytest.fixture(scope="module")
def answers(checkpoints, vllm_python):
    # float32, which vLLM's own CPU kernels refuse for packed weights: these are finescale's.
    cache = checkpoints / "llama-fp8-cache"
    cache.symlink_to(checkpoints / "llama")
    names = [*FAMILIES, "qwen3_moe", *OWN_INPUTS, cache.name]
    each = {str(cache): {"options": {"kv_cache_dtype": "fp8"}}}
    return ask(vllm_python, checkpoints, [checkpoints / name for name in names], each=each)


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3_moe"])
def test_greedy_tokens_are_those_of_finescale(answers, checkpoints, name):
    assert "error" not in answers[name], answers[name]["error"]
    assert answers[name]["tokens"] == greedy(load(checkpoints / name, path="integer"))


@pytest.mark.parametrize("name", OWN_INPUTS)
def test_inputs_are_gathered_and_rotated(answers, checkpoints, name):
    config = json.loads((checkpoints / name / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "finescale"
    assert any(any(facts.get("inputs", {}).values()) for facts in config["finescale"]["layers"].values())
    assert "error" not in answers[name], answers[name]["error"]
    assert answers[name]["tokens"] == greedy(load(checkpoints / name))


def test_options_of_the_cache_are_vllms_own(answers):
    plain, rounded = answers["llama"], answers["llama-fp8-cache"]
    assert "error" not in rounded, rounded["error"]
    pairs = zip(chain(*plain["prompt_logprobs"]), chain(*rounded["prompt_logprobs"]), strict=True)
    differences = [abs(one - other) for one, other in pairs]
    assert 0 < sum(differences) / len(differences) < 0.3


def test_norms_and_silu_quantize_on_the_way(checkpoints, vllm_python):
    """The path of Hopper GPUs, its operators in plain torch."""
    names = ("llama", "mistral", "opt", "mixtral")
    found = ask(vllm_python, checkpoints, [checkpoints / name for name in names], emulate=True)
    for name in names:
        assert "error" not in found[name], found[name]["error"]
        assert found[name]["tokens"] == greedy(load(checkpoints / name, path="integer"))
        assert ("QuantizingNorm" in found[name]["modules"]) == (name != "opt")
        assert ("QuantizingSilu" in found[name]["modules"]) == (name in ("llama", "mistral"))


class Halves(nn.Module):
    """A layer whose inputs are cut in two, as two ranks do it: each half rounds its tokens by scales of their own."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        weight, half = layer.quantized_weight(), layer.in_features // 2
        size = weight.grid.scheme.group_size
        groups = half // size
        self.halves = nn.ModuleList()
        for part in range(2):
            grid = replace(
                weight.grid,
                scale_OG=weight.grid.scale_OG[:, part * groups : (part + 1) * groups],
                group_of_I=contiguous_groups(half, size),
            )
            codes_OI = weight.codes_OI[:, part * half : (part + 1) * half].contiguous()
            bias = layer.bias if part == 0 else None
            self.halves.append(QuantizedLinear(QuantizedWeight(codes_OI, grid), bias, layer.inputs, "integer"))

    def forward(self, x):
        first, second = x.chunk(2, -1)
        return self.halves[0](first) + self.halves[1](second)


@pytest.fixture(scope="module")
def on_two_ranks(checkpoints, vllm_python, zoo, shared):
    text = str(shared / "data" / "books" / "books_valid.txt")
    settings = (*QUICK[:1], "weights.group_size=256", *QUICK[2:])
    finescale.quantize(
        zoo("llama"), "w4a8-integer-scale", out=checkpoints / "wide", calibration=text, settings=settings
    )
    names = ("llama", "mixtral", "wide", "rotated")
    return ask(vllm_python, checkpoints, [checkpoints / name for name in names], ranks=2)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_ranks_compute_what_two_halves_of_a_layer_do(on_two_ranks, checkpoints, name):
    assert "error" not in on_two_ranks[name], on_two_ranks[name]["error"]
    model = load(checkpoints / name, path="float", cache=False)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            parent, _, leaf = path.rpartition(".")
            cut = leaf in ("o_proj", "down_proj", "w2")
            exact = QuantizedLinear(layer.quantized_weight(), layer.bias, layer.inputs, "integer")
            setattr(model.get_submodule(parent), leaf, Halves(layer) if cut else exact)
    assert on_two_ranks[name]["tokens"] == greedy(model)


def test_a_cut_through_a_group_is_refused(on_two_ranks):
    assert "would cut groups of 256" in on_two_ranks["wide"]["error"]
    assert "gathers or rotates its inputs" in on_two_ranks["rotated"]["error"]


def larger_scales(folder: Path) -> None:
    change_tensor(folder, first_scale(folder), lambda scale: scale * 4.0)


def other_scales(folder: Path) -> None:
    change_tensor(folder, first_scale(folder), lambda scale: scale * 0.77)


def no_scales(folder: Path) -> None:
    change_tensor(folder, first_scale(folder), lambda scale: None)


def first_scale(folder: Path) -> str:
    return next(key for key in sorted(read_tensors(folder)) if key.endswith("weight_scale"))


def newer(folder: Path) -> None:
    change_config(folder, lambda own: own.update(version=99))


def no_proof(folder: Path) -> None:
    change_config(folder, lambda own: next(iter(own["layers"].values())).pop("bound"))


def truncated(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1000])


def change_config(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["finescale"])
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    larger_scales: "int32 bound",
    other_scales: "not integers|not the stored one",
    no_scales: "lacks weight_scale",
    newer: "newer finescale",
    no_proof: "without the proof",
    truncated: "incomplete|[Hh]eader|MetadataIncompleteBuffer",
}


@pytest.fixture(scope="module")
def damaged(checkpoints, vllm_python):
    for damage in DAMAGES:
        folder = checkpoints / damage.__name__
        shutil.copytree(checkpoints / "llama", folder)
        damage(folder)
    return ask(vllm_python, checkpoints, [checkpoints / damage.__name__ for damage in DAMAGES])


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused_by_name(damaged, damage):
    assert re.search(DAMAGES[damage], damaged[damage.__name__]["error"])
