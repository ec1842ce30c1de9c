"""Every recipe's checkpoint of a trained model in a real vLLM on a CPU: the tokens of finescale, or a refusal foretold.

What the plugin claims runs in float32 on finescale's kernels. All others are vLLM's own matter: its CPU kernels for
packed weights need float16 and do not round inputs, those for W8A8 need bfloat16. Tuning is left out and calibration is
short, for what counts here is the form of the files.
"""

import json

import pytest
import torch

import finescale
from finescale.recipe import Recipe
from finescale.recipes import recipe_names
from finescale.runtime.load import load
from finescale.runtime.serving import claims, refusal
from tests.vllm.asking import ask, greedy, shortfall

pytestmark = pytest.mark.vllm
MIXTURES = ("mixtral-w4a8-integer-scale",)
SETTINGS = ("tuning=[]", "calibration.samples=2", "calibration.length=64")
RECIPES = tuple(recipe_names())


def shortened(name: str) -> Recipe:
    """The recipe with little of what takes long."""
    recipe = Recipe.load(name, SETTINGS)
    if recipe.solver.name == "quantease":
        recipe = recipe.with_settings(("solver.sweeps=2",))
    few = [
        part.model_copy(update={"options": part.options | {"iterations": 2}})
        if "iterations" in type(part.options_model()).model_fields
        else part
        for part in recipe.transforms
    ]
    return recipe.model_copy(update={"transforms": tuple(few)})


def fate(folder) -> tuple[str, str]:
    """``plugin``, ``float16`` or ``bfloat16``, how it runs; or ``refused`` with words of the reason."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    if claims(quantization):
        reason = refusal(quantization, config["model_type"])
        return ("refused", reason) if reason else ("plugin", "")
    engines = json.loads((folder / "report.json").read_text())["engines"]
    row = next(row for row in engines if row["engine"] == "vLLM (x86 CPU)")
    if not row["loads"]:
        return "refused", ""
    return ("bfloat16" if quantization["format"] == "int-quantized" else "float16"), ""


@pytest.fixture(scope="module")
def answers(request, vllm_python, zoo, shared, tmp_path_factory):
    """Of each recipe whose test was selected: what becomes of its checkpoint, its folder, and vLLM's answer."""
    calls = [item.callspec.params for item in request.session.items if item.path == request.path]
    chosen = [call["name"] for call in calls if "name" in call]
    root = tmp_path_factory.mktemp("recipes")
    text = str(shared / "data" / "books" / "books_valid.txt")
    for name in chosen:
        model = zoo("mixtral" if name in MIXTURES else "llama")
        finescale.quantize(model, shortened(name), out=root / name, calibration=text)
    fates = {name: fate(root / name) for name in chosen}
    each = {str(root / name): {"dtype": how} for name, (how, _) in fates.items() if how in ("float16", "bfloat16")}
    found = ask(vllm_python, root, [root / name for name in chosen], each=each)
    return {name: (*fates[name], root / name, found[name]) for name in chosen}


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_served_as_foretold(answers, name):
    how, words, folder, answer = answers[name]
    if how == "refused":
        assert words in answer["error"]
        return
    assert "error" not in answer, answer["error"]
    if how == "plugin":
        layers = json.loads((folder / "config.json").read_text())["quantization_config"]["finescale"]["layers"]
        integer = all(facts.get("amplifier") for facts in layers.values())
        model = load(folder, path="integer" if integer else "float")
    elif how == "float16":  # so do two tokens that are about as likely
        missed = shortfall(load(folder, rounding="none"), answer["tokens"])
        assert missed < 0.02, missed
        return
    else:  # bfloat16 rounds more than two likely tokens may differ by
        assert shortfall(load(folder, dtype=torch.bfloat16), answer["tokens"]) < 0.25
        return
    assert answer["tokens"] == greedy(model)
