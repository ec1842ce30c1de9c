"""Edges and links of blocks of every family, found without a table, against what is known of the families."""

import pytest
import torch

from tests.helpers import KINDS
from tests.transforms.blocks import make_view

ATTENTION = "self_attn"
LLAMA_LIKE = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")


def found(kind):
    view = make_view(kind)
    return {(link.producer, link.consumers): link.channel_I.tolist() for link in view.links()}


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_values_and_up_projections_are_linked(kind):
    links = found(kind)
    # Four heads of 16 channels, two of them sharing each value head.
    shared = [head // 2 * 16 + channel for head in range(4) for channel in range(16)]
    assert links == {
        ("self_attn.v_proj", ("self_attn.o_proj",)): shared,
        ("mlp.up_proj", ("mlp.down_proj",)): list(range(96)),
    }


def test_a_relu_lets_scales_through_and_other_activations_do_not():
    assert ("fc1", ("fc2",)) in found("opt")
    assert ("self_attn.v_proj", ("self_attn.out_proj",)) in found("opt")
    for kind in ("gpt2", "bloom", "falcon"):
        assert not [pair for pair in found(kind) if "4h" in pair[0] or "c_fc" in pair[0]]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_each_expert_that_saw_tokens_is_linked_inside(kind):
    inside = {pair for pair in found(kind) if ".experts." in pair[0]}
    assert inside
    for producer, consumers in inside:
        assert len(consumers) == 1 and producer.rpartition(".")[0] == consumers[0].rpartition(".")[0]
        assert producer.rpartition(".")[2] in ("w3", "up_proj") and consumers[0].endswith(("w2", "down_proj"))


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_along_links_keeps_the_function(kind):
    from finescale.models.skeleton import set_weight_OI, weight_OI_of
    from finescale.transforms.scaling import divide_linear

    view = make_view(kind)
    expected_BTI = view.run_some(2)
    for link in view.links():
        producer = view.block.get_submodule(link.producer)
        scale_O = torch.rand(weight_OI_of(producer).shape[0], dtype=torch.float64) + 0.5
        divide_linear(producer, scale_O)
        for path in link.consumers:
            module = view.block.get_submodule(path)
            set_weight_OI(module, weight_OI_of(module) * scale_O[link.channel_I])
    torch.testing.assert_close(view.run_some(2), expected_BTI, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_that_feeds_linears_is_found_with_all_that_reads_it(kind):
    view = make_view(kind)
    fed = {path for edge in view.edges for path in edge.consumers}
    for step in view.steps:
        if step.norm is not None:
            assert set(step.linears) <= fed
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        last = view.edges[-1].consumers
        assert "mlp.gate" in last and sum(".experts." in path for path in last) == 8
        assert ("mlp.shared_expert_gate" in last) == (kind == "qwen2_moe")
