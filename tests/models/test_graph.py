"""Order, shared inputs and norms are read off a forward pass."""

import pytest
import torch
from torch import nn

from finescale.calibration.capture import capture_block_inputs
from finescale.errors import InputError
from finescale.formats.source import open_checkpoint
from finescale.models import Step, linear_modules, open_skeleton, trace_steps
from finescale.models.skeleton import fill_module
from tests.helpers import EXPERT_KINDS, KINDS, assert_sentence, some_tokens

CPU = torch.device("cpu")

_LLAMA = (
    Step(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Step(("self_attn.o_proj",)),
    Step(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Step(("mlp.down_proj",)),
)
_SEQUENTIAL = (
    Step(("self_attention.query_key_value",), "input_layernorm"),
    Step(("self_attention.dense",)),
    Step(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
    Step(("mlp.dense_4h_to_h",)),
)
EXPECTED = {
    "llama": _LLAMA,
    "llama-tied": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "bloom": _SEQUENTIAL,
    # One norm feeds attention and MLP: both start from one input.
    "falcon": (
        Step(("self_attention.query_key_value", "mlp.dense_h_to_4h"), "input_layernorm"),
        Step(("self_attention.dense",)),
        Step(("mlp.dense_4h_to_h",)),
    ),
    "falcon-new": (
        Step(("self_attention.query_key_value",), "ln_attn"),
        Step(("self_attention.dense",)),
        Step(("mlp.dense_h_to_4h",), "ln_mlp"),
        Step(("mlp.dense_4h_to_h",)),
    ),
    "opt": (
        Step(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm"),
        Step(("self_attn.out_proj",)),
        Step(("fc1",), "final_layer_norm"),
        Step(("fc2",)),
    ),
    "gpt2": (
        Step(("attn.c_attn",), "ln_1"),
        Step(("attn.c_proj",)),
        Step(("mlp.c_fc",), "ln_2"),
        Step(("mlp.c_proj",)),
    ),
}


def steps_of(path, tokens_BT=None):
    skeleton = open_skeleton(open_checkpoint(path))
    tokens_BT = some_tokens(1, 24) if tokens_BT is None else tokens_BT
    inputs = capture_block_inputs(skeleton, [tokens_BT], CPU, torch.float32)
    block = fill_module(skeleton, skeleton.block_path(0), CPU, torch.float32)
    return trace_steps(block, inputs.hidden[0], inputs.kwargs[1][0]), linear_modules(block)


@pytest.mark.parametrize("kind", EXPECTED)
def test_steps_of_a_dense_family(tiny, kind):
    steps, _ = steps_of(tiny(kind))
    # OPT computes its query last or first; within one step only the set counts.
    assert [(set(step.linears), step.norm) for step in steps] == [
        (set(step.linears), step.norm) for step in EXPECTED[kind]
    ]


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_experts_are_steps_of_their_own_even_when_no_token_reaches_them(tiny, kind):
    # Two tokens cannot reach all four experts: routing must not decide what exists.
    steps, linears = steps_of(tiny(kind), some_tokens(1, 2))
    names = [name for step in steps for name in step.linears]
    assert sorted(names) == sorted(linears)
    first = [step.linears for step in steps if step.linears[0].startswith("mlp.experts.")]
    for index in range(4):
        leaves = [tuple(name.rpartition(".")[2] for name in step) for step in first[2 * index : 2 * index + 2]]
        assert leaves == ([("w1", "w3"), ("w2",)] if kind == "mixtral" else [("gate_proj", "up_proj"), ("down_proj",)])


def test_every_family_is_expected_here():
    assert set(EXPECTED) | set(EXPERT_KINDS) == set(KINDS)


def test_a_linear_that_is_never_called_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, hidden_states):
            return self.used(hidden_states)

    with pytest.raises(InputError, match="unused") as caught:
        trace_steps(Block(), torch.randn(1, 3, 4), {})
    assert_sentence(str(caught.value))


def test_equal_values_in_different_tensors_are_different_inputs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, hidden_states):
            return self.first(hidden_states) + self.second(hidden_states) + self.third(hidden_states.clone())

    assert [step.linears for step in trace_steps(Block(), torch.randn(1, 3, 4), {})] == [
        ("first", "second"),
        ("third",),
    ]


def test_hooks_are_removed_after_a_failure():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden_states):
            self.linear(hidden_states)
            raise RuntimeError("stop")

    block = Block()
    with pytest.raises(RuntimeError, match="stop"):
        trace_steps(block, torch.randn(1, 3, 4), {})
    assert not block.linear._forward_pre_hooks
