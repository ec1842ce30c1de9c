"""Layer names as patterns."""

import re

from hypothesis import given
from hypothesis import strategies as st

from finescale.formats.names import matches, name_patterns, names_in_block

PARTS = ["self_attn.q_proj", "mlp.experts.{}.w1", "mlp.experts.{}.w2", "mlp.gate"]
NAMES = ["lm_head", *(f"model.layers.{b}.{p.format(e)}" for b in range(12) for p in PARTS for e in range(3))]
OTHER = [name.replace("model.", "vision.") for name in NAMES[1:]]


@given(st.sets(st.sampled_from(NAMES)), st.booleans())
def test_patterns_match_exactly_the_layers(layers, other_model_beside):
    names = NAMES + OTHER if other_model_beside else NAMES
    patterns = name_patterns(sorted(layers), names)
    assert {name for name in names if any(matches(name, pattern) for pattern in patterns)} == layers


def test_experts_of_all_blocks_take_few_patterns():
    experts = [f"model.layers.{block}.mlp.experts.{e}.w1" for block in range(60) for e in range(256)]
    patterns = name_patterns(experts, experts)
    assert len(patterns) == 1
    assert all(matches(name, patterns[0]) for name in experts)
    assert matches("language_model.model.layers.3.mlp.experts.7.w1", patterns[0])
    assert not matches("model.layers.60.mlp.experts.7.w1", patterns[0])
    assert re.compile(patterns[0][3:])


def test_names_in_block():
    layers = [f"h.{block}.{part}" for block in range(2) for part in ("attn.c", "mlp.up")]
    assert names_in_block(layers, ["lm_head"]) == ["attn.c", "mlp.up"]
    assert names_in_block(layers, ["h.2.mlp.up"]) == layers
    assert names_in_block(layers, ["h.0.mlp.up_gate"]) == layers
    assert names_in_block(["lm_head"], []) == ["lm_head"]
