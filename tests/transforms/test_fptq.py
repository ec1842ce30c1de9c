"""FPTQ: thresholds, equalization, and every family's function."""

import math

import pytest
import torch
from pydantic import ValidationError

from finescale.grid import ActivationScheme, WeightScheme
from finescale.transforms import Target
from finescale.transforms.fptq import FptqOptions, apply_fptq, logarithmic_scale
from tests.helpers import KINDS
from tests.transforms.blocks import assert_function_kept, make_view


def test_logarithmic_scale():
    scale_I = logarithmic_scale(torch.tensor([0.0, 0.5, 2.0, 100.0]))
    assert scale_I.tolist() == pytest.approx([1.0, 0.5 / math.log2(2.5), 1.0, 100 / math.log2(102)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_computes_the_same(kind):
    assert_function_kept(kind, lambda view: apply_fptq(view, FptqOptions(low=0.01, high=1e9)))


@pytest.mark.parametrize(
    ("low", "high", "policy"), [(1e8, 1e9, "tensor"), (1e-6, 1e9, "equalized"), (1e-7, 1e-6, "token")]
)
def test_policy_by_range(low, high, policy):
    view = make_view("llama")
    for path in view.targets:
        view.targets[path] = Target(WeightScheme(), ActivationScheme(6, symmetric=False))
    before = view.ranges(norms=["input_layernorm"])["input_layernorm"].absmax_I
    changes = apply_fptq(view, FptqOptions(low=low, high=high))
    after = view.ranges(norms=["input_layernorm"])["input_layernorm"].absmax_I
    assert changes.facts["input_layernorm"]["policy"] == policy
    expected = torch.log2(2 + before) if policy == "equalized" else before
    torch.testing.assert_close(after, expected)
    static = ActivationScheme(6, "tensor", False, False)
    token = ActivationScheme(6, symmetric=False)
    assert changes.activations["self_attn.q_proj"] == (token if policy == "token" else static)
    assert changes.activations["mlp.down_proj"] == (static if policy == "tensor" else token)
    assert set(changes.activations) == set(view.targets)


def test_what_is_beyond_the_published_range_can_be_equalized_too():
    view = make_view("llama")
    for path in view.targets:
        view.targets[path] = Target(WeightScheme(), ActivationScheme(8))
    before = view.ranges(norms=["input_layernorm"])["input_layernorm"].absmax_I
    changes = apply_fptq(view, FptqOptions(low=1e-7, high=1e-6, equalize="all"))
    after = view.ranges(norms=["input_layernorm"])["input_layernorm"].absmax_I
    torch.testing.assert_close(after, torch.log2(2 + before))
    assert changes.facts["input_layernorm"]["policy"] == "equalized token"
    assert changes.activations["self_attn.q_proj"] == ActivationScheme(8)


def test_thresholds_must_be_in_order():
    with pytest.raises(ValidationError, match="must not be above"):
        FptqOptions(low=20, high=10)
