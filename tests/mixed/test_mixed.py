"""Measured divergences against the plainest computation, and recipes that keep their size."""

import json
import re

import pytest
import torch

import finescale.api as api
from finescale.errors import InputError
from finescale.mixed.choose import choices_around, choose_bits, read_choices, sensitivities
from finescale.mixed.sensitivity import Option, Sensitivities, Unit, measure, prepare_measurement
from finescale.models.skeleton import set_weight_OI
from finescale.runtime.checkpoint import open_quantized
from finescale.runtime.load import load
from tests.helpers import assert_sentence, recipe


def plain(*bits):
    return tuple((each, None) for each in bits)


TWO_OR_FOUR = plain(2, 4)


def prepared(path, text, chosen=None, bits=TWO_OR_FOUR, **changes):
    return prepare_measurement(path, chosen or recipe("rtn", group=32), bits, str(text), windows=2, **changes)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "falcon-new", "mixtral"])
def test_divergences_are_those_of_the_whole_model(tiny, text, tmp_path, kind):
    """One unit at a time, put into the model that transformers runs from its beginning."""
    job = prepared(tiny(kind), text)
    found = measure(job)
    assert [layer for unit in found.units for layer in unit.layers].count(job.plan.layers[0].name) == 1
    assert sum(len(unit.layers) for unit in found.units) == len(job.plan.layers)
    api.quantize(tiny(kind), recipe("rtn", 2, 32), out=tmp_path / "o", calibration=str(text))
    weights = dict(open_quantized(tmp_path / "o").layers())
    model, paths = load(tiny(kind)), {}
    for index, block in enumerate(job.plan.blocks):
        paths |= {plan.name: f"{job.skeleton.block_path(index)}.{path}" for path, plan in block.items()}

    def log_probabilities():
        with torch.no_grad():
            return model(input_ids=job.judged_BT, use_cache=False).logits.double().log_softmax(-1)

    original = log_probabilities()
    for unit in [*found.units[:2], found.units[-1]]:
        before = {layer: model.get_submodule(paths[layer]).weight.data.clone() for layer in unit.layers}
        for layer in unit.layers:
            set_weight_OI(model.get_submodule(paths[layer]), weights[layer].dequantize())
        kl = float((original.exp() * (original - log_probabilities())).sum(-1).mean())
        assert unit.options[0].bits == 2 and unit.options[0].kl == pytest.approx(kl, rel=2e-3)
        stored = sum(weights[layer].stored_bits() for layer in unit.layers)
        assert unit.options[0].stored_bits == stored and unit.options[1].kl < unit.options[0].kl
        for layer, weight in before.items():
            model.get_submodule(paths[layer]).weight.data.copy_(weight)


def test_layers_with_one_input_are_one_unit(tiny, text):
    units = measure(prepared(tiny("llama"), text)).units
    names = [tuple(layer.rpartition(".")[2] for layer in unit.layers) for unit in units]
    assert names == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)] * 2
    moe = measure(prepared(tiny("mixtral"), text)).units
    assert [len(unit.layers) for unit in moe] == [3, 1, 12] * 2


def test_judging_text_is_not_the_solvers(tiny, text):
    job = prepared(tiny("llama"), text)
    assert job.tokens_BT.shape == (6, 48) and job.judged_BT.shape == (2, 48)
    own, other = ({tuple(row) for row in rows.tolist()} for rows in (job.tokens_BT, job.judged_BT))
    assert not own & other


def units(*losses):
    """Units of 100 weights at 2, 3 and 4 bits with these losses at 2 bits."""
    options = [
        tuple(Option(bits, None, 100 * bits, loss * 4.0 ** (2 - bits), 0.0) for bits in (2, 3, 4)) for loss in losses
    ]
    found = [Unit((f"layers.{n}.a", f"layers.{n}.b"), 100, own) for n, own in enumerate(options)]
    return Sensitivities("s", {}, tuple(found))


def test_bits_go_where_they_matter():
    found = units(1.0, 0.01, 1.0, 0.01)
    chosen, facts = choose_bits(recipe("rtn", 8), found, target_bits=3.0)
    assert [chosen.weights_of(f"layers.{n}.a").bits for n in range(4)] == [4, 2, 4, 2]
    assert facts["bits_per_weight"] == 3.0 and facts["by_bits"] == {"2": 0.5, "4": 0.5} and facts["gap"] == 0
    assert facts["predicted_kl"] == pytest.approx(2 / 16 + 0.02)
    assert chosen.weights_of("layers.0.b").bits == 4 and chosen.weights.group_size == -1
    uniform, _ = choose_bits(recipe("rtn", 8), units(1.0, 1.0), target_bits=3.0)
    assert uniform.overrides == () and uniform.weights.bits == 3
    least, facts = choose_bits(recipe("rtn", 8), found, max_kl=0.6)
    assert facts["predicted_kl"] <= 0.6 and facts["bits_per_weight"] == 2.5 and least.name == "rtn-kl0.6"


def test_goals_that_cannot_be_reached():
    for goal, words in (({"target_bits": 1.9}, "2.000 to 4.000"), ({"target_bits": 99}, "2.000 to 4.000"),
                        ({"max_kl": 1e-9}, "allow more"),
                        ({}, "either"), ({"target_bits": 3.0, "max_kl": 1.0}, "either")):  # fmt: skip
        with pytest.raises(InputError, match=words) as caught:
            choose_bits(recipe("rtn"), units(1.0), **goal)
        assert_sentence(str(caught.value))


def test_what_cannot_be_measured_is_refused(tiny, text):
    path = tiny("llama")
    with pytest.raises(InputError, match="overrides"):
        prepared(path, text, recipe("rtn", overrides=[{"pattern": "*", "weights": {"bits": 4}}]))
    for windows in (0, -1):
        with pytest.raises(InputError, match="--windows"):
            prepare_measurement(path, recipe("rtn"), plain(3, 4), str(text), windows=windows)
    with pytest.raises(InputError, match="two numbers"):
        prepared(path, text, bits=plain(4, 4))
    with pytest.raises(InputError, match="4-bit weights"):
        prepared(path, text, recipe("rtn", group=32, format="awq"), bits=plain(3, 4))


def test_a_target_out_of_reach_is_refused_before_anything_is_measured(tiny, text, tmp_path, monkeypatch):
    from finescale.mixed import choose

    real = sensitivities(tiny("llama"), recipe("rtn", group=32), tmp_path / "s.json", plain(2, 4), str(text), windows=2)
    sizes = [[option.stored_bits for option in unit.options] for unit in real.units]
    weights = sum(unit.parameters for unit in real.units)
    job = prepared(tiny("llama"), text, recipe("rtn", group=32), plain(2, 4))
    assert job.size_range == tuple(sum(pick(own) for own in sizes) / weights for pick in (min, max))
    monkeypatch.setattr(choose, "measure", None)
    for target in (1.5, 99.0):
        with pytest.raises(InputError, match=f"{target:g} is out of reach.*") as caught:
            sensitivities(
                tiny("llama"), recipe("gptq", group=32), tmp_path / "t.json", plain(2, 4), str(text), windows=2,
                target_bits=target,
            )  # fmt: skip
        least, most = re.findall(r"(\d\.\d{3})", str(caught.value))
        assert 2 < float(least) < float(most) < 6
        assert_sentence(str(caught.value))


def test_choices():
    assert choices_around(3.5) == plain(2, 3, 4, 6) and choices_around(4.25) == plain(3, 4, 6)
    assert choices_around(2.0) == plain(2, 3, 4) and choices_around(8.5) == plain(6, 8)
    assert all(choices_around(far) == plain(2, 3, 4, 6, 8) for far in (None, 1.5, 9.0, 99.0))
    assert read_choices("3, 4:32,4") == ((3, None), (4, 32), (4, None))
    with pytest.raises(InputError, match="4:x") as caught:
        read_choices("4:x")
    assert_sentence(str(caught.value))


def test_measurements_are_kept_and_not_mistaken(tiny, text, tmp_path, monkeypatch):
    from finescale.mixed import choose

    file, made, real = tmp_path / "s.json", [], choose.measure
    monkeypatch.setattr(choose, "measure", lambda job, *rest: made.append(job.choices) or real(job, *rest))
    given = (tiny("llama"), recipe("rtn", group=32), file, plain(2, 4), str(text))
    first = sensitivities(*given, windows=2)
    assert sensitivities(*given, windows=2) == first and len(made) == 1
    # Bits of the recipe's own play no part; another solver does.
    sensitivities(tiny("llama"), recipe("rtn", 8, group=32), file, plain(2, 4), str(text), windows=2)
    sensitivities(tiny("llama"), recipe("gptq", group=32), file, plain(2, 4), str(text), windows=2)
    assert len(made) == 2
    file.write_text("{}")
    with pytest.raises(InputError, match="no sensitivities"):
        sensitivities(*given, windows=2)


def test_an_interrupted_measurement_goes_on(tiny, text, tmp_path, monkeypatch):
    from finescale.mixed import sensitivity

    given = (tiny("llama-tied"), recipe("rtn", group=32), tmp_path / "s.json", plain(2, 4), str(text))
    whole = sensitivities(*given[:2], tmp_path / "whole.json", *given[3:], windows=2)
    real, measured = sensitivity._units_of, []

    def stopping(job, index, *rest):
        if index == 2 and 2 not in measured:
            measured.append(2)
            raise KeyboardInterrupt
        measured.append(index)
        return real(job, index, *rest)

    monkeypatch.setattr(sensitivity, "_units_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        sensitivities(*given, windows=2)
    assert sensitivities(*given, windows=2) == whole and measured == [0, 1, 2, 2]
    assert not list(tmp_path.glob("*.partial*"))


def test_a_quantized_model_has_the_promised_size(tiny, text, tmp_path):
    """And the layers the bits that were chosen for them."""
    chosen = recipe("gptq", group=32)
    found = sensitivities(tiny("llama"), chosen, tmp_path / "s.json", plain(2, 3, 4), str(text), windows=2)
    mixed, facts = choose_bits(chosen, found, target_bits=4.0)
    report = api.quantize(tiny("llama"), mixed, out=tmp_path / "o", calibration=str(text))
    assert (
        report["size"]["bits_per_weight"] == pytest.approx(facts["bits_per_weight"]) and facts["bits_per_weight"] <= 4
    )
    bits = {layer["name"]: layer["bits"] for layer in report["layers"]}
    assert len(set(bits.values())) > 1 and {"2": 2, "3": 3, "4": 4}.keys() >= facts["by_bits"].keys()
    assert all(
        bits[layer.name] == mixed.weights_of(layer.name).bits for layer in prepared(tiny("llama"), text).plan.layers
    )
    assert load(tmp_path / "o") is not None and json.loads((tmp_path / "s.json").read_text())["units"]


def test_groups_may_be_chosen_too(tiny, text, tmp_path):
    chosen = recipe("rtn", group=64)
    schemes = ((3, None), (3, 16))
    found = sensitivities(tiny("llama"), chosen, tmp_path / "s.json", schemes, str(text), windows=2)
    wide, narrow = found.units[0].options
    assert (narrow.bits, narrow.group_size) == (3, 16) and narrow.stored_bits > wide.stored_bits and narrow.kl < wide.kl
    middle = (wide.stored_bits + narrow.stored_bits) / 2 / found.units[0].parameters
    mixed, facts = choose_bits(chosen, found, target_bits=middle)
    report = api.quantize(tiny("llama"), mixed, out=tmp_path / "o", calibration=str(text))
    assert report["size"]["bits_per_weight"] == pytest.approx(facts["bits_per_weight"])
    assert {layer["group_size"] for layer in report["layers"]} > {16} and "3:16" in facts["by_bits"]
