"""Experts of a checkpoint packed for the grouped kernels, which run their exact products on a CPU."""

from importlib import import_module

import pytest
import torch

from finescale.api import quantize
from finescale.kernels.dispatch import Choice, LayerFacts, choose_experts_kernel
from finescale.runtime import experts
from finescale.runtime.load import load
from tests.helpers import EXPERT_KINDS, recipe

GROUPED = Choice("hopper-grouped", "as on a Hopper GPU")


@pytest.fixture(scope="module")
def quantized(tiny, text, tmp_path_factory):
    made = {}

    def folder(kind, mode="before"):
        if (kind, mode) not in made:
            path = tmp_path_factory.mktemp("moe") / kind
            integer_scale = {"mode": mode} | ({"amplifier": "auto"} if mode == "before" else {})
            chosen = recipe(
                "rtn", 4, 32, weights={"symmetric": True}, activations={"bits": 8}, integer_scale=integer_scale
            )
            quantize(tiny(kind), chosen, calibration=str(text), out=path)
            made[kind, mode] = path
        return made[kind, mode]

    return folder


@pytest.mark.parametrize("kind, mode", [(kind, "before") for kind in EXPERT_KINDS] + [("mixtral", "folded")])
def test_packed_experts_are_the_exact_product(quantized, kind, mode, monkeypatch):
    folder = quantized(kind, mode)
    tokens = torch.arange(24).view(2, 12)
    expected = load(folder, path="integer")(tokens).logits
    monkeypatch.setattr(import_module("finescale.runtime.load"), "has_hopper_kernels", lambda device: True)
    monkeypatch.setattr(experts, "choose_experts_kernel", lambda gate_up, down, device: GROUPED)
    model = load(folder, path="kernel")
    mixtures = [module for module in model.modules() if isinstance(module, experts.PackedMixture)]
    assert len(mixtures) == 2 and "4 experts" in repr(mixtures[0])
    assert all(m.gate_up_folded == m.down_folded == (mode == "folded") for m in mixtures)
    # Experts are added up in the order of choices, not of experts: a code may move by one.
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-3, atol=2e-3)


def test_elsewhere_experts_run_layer_by_layer(quantized):
    model = load(quantized("mixtral"), path="kernel")
    assert not any(isinstance(module, experts.PackedMixture) for module in model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_models_on_the_grouped_kernels(quantized, kind):
    folder = quantized(kind)
    tokens = torch.arange(24).view(2, 12)
    expected = load(folder, path="integer")(tokens).logits
    model = load(folder, path="kernel", device="cuda")
    assert any(isinstance(module, experts.PackedMixture) for module in model.modules())
    logits = model(tokens.cuda()).logits.cpu()
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()


def facts(**changes):
    standard = {
        "bits": 4, "group_size": 128, "contiguous_groups": True, "integer_scales": True, "largest_scale": 900,
        "activation_bits": 8, "symmetric_activations": True, "outliers": False,
    }  # fmt: skip
    return LayerFacts(**(standard | changes))


def test_all_layers_decide():
    def chosen(*layers):
        return choose_experts_kernel(layers, [facts(group_size=-1, largest_scale=9)], torch.device("cuda"), (9, 0))

    assert chosen(facts(), facts()).kernel == "hopper-grouped"
    assert "multiplied into" in chosen(facts(largest_scale=15), facts(largest_scale=9)).why
    assert "exactly" in chosen(facts(largest_scale=15), facts()).why
    assert chosen(facts(), facts(bits=8)).kernel not in ("hopper", "hopper-folded", "hopper-grouped")
    assert "different sizes" in chosen(facts(), facts(group_size=64)).why
    assert choose_experts_kernel([facts()], [facts()], torch.device("cuda"), (8, 0)).kernel != "hopper-grouped"
