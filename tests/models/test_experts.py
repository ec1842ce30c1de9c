"""Experts taken apart give what the fused ones give."""

import pytest
import torch

from finescale.models import FAMILIES
from finescale.models.experts import UnfusedExperts, is_fused_experts, unfuse_experts
from tests.helpers import EXPERT_KINDS, make_model


def fused_and_names(kind):
    model = make_model(kind, seed=4)
    experts = next(module for module in model.modules() if is_fused_experts(module))
    return model, experts, FAMILIES[model.config.model_type].experts


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_unfused_equals_fused(kind):
    model, fused, names = fused_and_names(kind)
    gate_up, down = fused.gate_up_proj.data.clone(), fused.down_proj.data.clone()
    x_TI = torch.randn(30, 64)
    weight_TK, index_TK = torch.softmax(torch.randn(30, 4), -1).topk(2)
    fused.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = fused(x_TI, index_TK, weight_TK)
    path = next(name for name, module in model.named_modules() if module is fused)
    unfuse_experts(model, names)
    experts = model.get_submodule(path)
    assert isinstance(experts, UnfusedExperts)
    with torch.no_grad():
        for index, expert in enumerate(experts):
            gate, up = gate_up[index].chunk(2)
            getattr(expert, names.gate).weight.copy_(gate)
            getattr(expert, names.up).weight.copy_(up)
            getattr(expert, names.down).weight.copy_(down[index])
        assert torch.equal(experts(x_TI, index_TK, weight_TK), expected)


def test_every_fused_module_is_replaced():
    model, _, names = fused_and_names("mixtral")
    unfuse_experts(model, names)
    assert not [name for name, module in model.named_modules() if is_fused_experts(module)]
    assert sum(isinstance(module, UnfusedExperts) for module in model.modules()) == model.config.num_hidden_layers


def test_an_expert_without_tokens_adds_nothing():
    model, _, names = fused_and_names("mixtral")
    unfuse_experts(model, names)
    experts = next(module for module in model.modules() if isinstance(module, UnfusedExperts))
    with torch.no_grad():
        for expert in experts:
            for parameter in expert.parameters():
                parameter.normal_()
        for parameter in experts[2].parameters():
            parameter.fill_(float("nan"))
        index_TK = torch.tensor([[0, 1], [1, 3], [3, 0]])
        assert torch.isfinite(experts(torch.randn(3, 64), index_TK, torch.full((3, 2), 0.5))).all()
