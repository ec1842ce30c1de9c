"""QLLM's search on blocks of every family: what is reassembled, and that the chosen threshold is the best one."""

import pytest
import torch

from finescale.grid import ActivationScheme, WeightScheme
from finescale.transforms import Target
from finescale.transforms.qllm import QllmOptions, apply_qllm, search, sites, statistics, thresholds
from finescale.transforms.reassembly import splits
from tests.helpers import KINDS
from tests.transforms.blocks import make_view


def outlier_view(kind, size=30.0, bits=4):
    """A block whose norms put out two large channels; weights take them back, so that the function is unchanged."""
    view = make_view(kind)
    for edge in view.edges:
        norm = view.block.get_submodule(edge.norm)
        for parameter in norm.parameters():
            parameter.data[[3, 20]] *= size
        for path in edge.consumers:
            module = view.block.get_submodule(path)
            if type(module).__name__ == "Conv1D":
                module.weight.data[[3, 20]] /= size
            else:
                module.weight.data[:, [3, 20]] /= size
    for path in view.targets:
        view.targets[path] = Target(WeightScheme(8, -1, False), ActivationScheme(bits, symmetric=False))
    return view


def rounded_error(view, changes):
    """Mean squared change of the block's output when inputs are gathered and rounded, against the plain block."""
    handles = []
    for path, target in view.targets.items():
        rule = changes.inputs.get(path)
        full = target.rule(None if rule is None else rule.gather)
        module = view.block.get_submodule(path)
        handles.append(
            module.register_forward_pre_hook(lambda _, args, full=full: (full.round(full.rearrange(args[0])),))
        )
    found = view.run_some(2)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_gains_by_it(kind):
    plain, view = outlier_view(kind), outlier_view(kind)
    expected_BTI = plain.run_some(2)
    without = (rounded_error(plain, apply_qllm(plain, QllmOptions(expansion=0.0, sequences=2))) - expected_BTI).norm()
    changes = apply_qllm(view, QllmOptions(sequences=2, candidates=8))
    with_it = (rounded_error(view, changes) - expected_BTI).norm()
    assert changes.inputs
    for norm in {edge.norm for edge in view.edges}:
        assert changes.facts[norm]["extra"] > 0 and changes.facts[norm]["width"] == 64
        assert changes.facts[norm]["error"] < changes.facts[norm]["error_without"]
    assert float(with_it) < 0.8 * float(without)


@pytest.mark.parametrize("kind", KINDS)
def test_splitting_alone_keeps_the_function(kind):
    view = outlier_view(kind)
    expected_BTI = view.run_some(2)
    changes = apply_qllm(view, QllmOptions(mode="disassembly", expansion=0.2, sequences=1))
    for path, rule in changes.inputs.items():
        view.block.get_submodule(path).register_forward_pre_hook(lambda _, args, rule=rule: (rule.rearrange(args[0]),))
    torch.testing.assert_close(view.run_some(2), expected_BTI, rtol=1e-6, atol=1e-6)
    assert any(facts["width"] > 64 for facts in changes.facts.values())


def test_linears_of_one_input_share_one_reassembly_and_the_attentions_output_has_none():
    view = outlier_view("llama")
    found = {site.name: site.linears for site in sites(view, True)}
    assert found == {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    }
    assert "mlp.down_proj" not in {site.name for site in sites(view, False)}
    changes = apply_qllm(view, QllmOptions(sequences=1))
    gathers = [changes.inputs[f"self_attn.{name}_proj"].gather for name in "qkv"]
    assert gathers[0] is gathers[1] is gathers[2]
    assert "self_attn.o_proj" not in changes.inputs


def test_no_reassembly_is_a_candidate_too():
    view = make_view("llama")
    for path in view.targets:
        view.targets[path] = Target(WeightScheme(8, -1, False), None)  # inputs are not rounded: merging only harms
    changes = apply_qllm(view, QllmOptions(sequences=1))
    assert changes.inputs == {} and all(facts["extra"] == 0 for facts in changes.facts.values())


def test_more_candidates_are_never_worse():
    view = outlier_view("llama")
    site = sites(view, True)[0]
    seen = statistics(view, [site])[site.name]
    errors = [search(view, site, seen, QllmOptions(candidates=n, sequences=1))[1]["error"] for n in (1, 0)]
    assert errors[1] <= errors[0]


def test_thresholds_walk_down_and_stop_at_the_limit():
    absmax_I = torch.tensor([1.0, 2.0, 50.0, 3.0, 20.0])
    found = thresholds(absmax_I, 4)
    assert [extra for _, extra in found] == sorted({extra for _, extra in found}) and found[-1][1] <= 4
    for theta, extra in found:
        assert int((splits(absmax_I, theta) - 1).sum()) == extra
    steps = [50 - step * 49 / 100 for step in range(1, 100)]
    assert found[0][0] == pytest.approx(steps[0])
    assert thresholds(torch.ones(4), 3) == []
