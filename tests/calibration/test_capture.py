"""What a block is called with; that the numbers are transformers' own is proved in tests/models/test_skeleton.py."""

import pytest
import torch

from finescale.calibration.capture import bind_arguments, capture_block_inputs
from finescale.formats.source import open_checkpoint
from finescale.models import open_skeleton
from tests.helpers import KINDS, some_tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_filled_and_no_forward_stays_replaced(tiny, kind):
    skeleton = open_skeleton(open_checkpoint(tiny(kind)))
    capture_block_inputs(skeleton, [some_tokens(2, 10)], CPU, torch.float32)
    everything = [*skeleton.model.parameters(), *skeleton.model.buffers()]
    assert all(tensor.device.type == "meta" for tensor in everything)
    assert all(
        "probe" not in repr(block.forward) and "forward_of" not in repr(block.forward) for block in skeleton.blocks
    )


def test_arguments_are_kept_by_size_of_batch(tiny):
    skeleton = open_skeleton(open_checkpoint(tiny("bloom")))
    batches = [some_tokens(2, 10), some_tokens(2, 10, seed=5), some_tokens(1, 10, seed=6)]
    inputs = capture_block_inputs(skeleton, batches, CPU, torch.float32)
    assert [x_BTI.shape for x_BTI in inputs.hidden] == [(2, 10, 64), (2, 10, 64), (1, 10, 64)]
    assert set(inputs.kwargs) == {1, 2}
    # BLOOM's position biases have one row per head of each sequence.
    assert all(inputs.kwargs[size][0]["alibi"].shape[0] == size * 4 for size in (1, 2))
    assert all(len(blocks) == skeleton.block_count for blocks in inputs.kwargs.values())


def test_sliding_windows_reach_the_block(tiny):
    skeleton = open_skeleton(open_checkpoint(tiny("mistral")))
    inputs = capture_block_inputs(skeleton, [some_tokens(1, 40)], CPU, torch.float32)
    mask = inputs.kwargs[1][0]["attention_mask"]
    seen = (mask == 0) if mask.is_floating_point() else mask
    assert seen[0, 0, 39].nonzero().flatten().tolist() == list(range(24, 40))


def test_positional_arguments_get_their_names_and_caches_are_left_out():
    class Block(torch.nn.Module):
        def forward(self, hidden_states, attention_mask=None, position_ids=None, use_cache=False, past_key_values=None):
            return hidden_states

    found = bind_arguments(Block(), ("mask",), {"position_ids": "ids", "use_cache": True, "past_key_values": 3})
    assert found == {"attention_mask": "mask", "position_ids": "ids"}


def test_hidden_states_have_the_asked_type(tiny):
    skeleton = open_skeleton(open_checkpoint(tiny("llama", torch.float16)))
    inputs = capture_block_inputs(skeleton, [some_tokens(1, 10)], CPU, torch.bfloat16)
    assert inputs.hidden[0].dtype == torch.bfloat16
