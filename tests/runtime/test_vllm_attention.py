"""Attention of decoding steps in vLLM's graphs: who computes which step."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from finescale.runtime.vllm_attention import PageAttention, Unrotated, page_attention

HEADS, KV_HEADS, WIDTH, TOKENS = 4, 2, 16, 3


def implementation(**changes):
    facts = {"alibi_slopes": None, "sliding_window": (-1, -1), "logits_soft_cap": 0, "sinks": None}
    facts |= {"dcp_world_size": 1, "batch_invariant_enabled": False, "scale": 0.25}
    found = SimpleNamespace(**(facts | changes), usual=[])

    def forward(layer, query, key, value, kv_cache, attn_metadata, output, **options):
        found.usual.append(((layer, query, key, value, kv_cache, attn_metadata, output), options))

    found.forward = forward
    return found


def metadata(**changes):
    facts = {"max_query_len": 1, "use_cascade": False, "num_actual_tokens": TOKENS}
    facts |= {"seq_lens": torch.tensor([4, 5, 0]).int(), "block_table": torch.zeros(TOKENS, 2).int()}
    return SimpleNamespace(**(facts | changes))


@pytest.fixture
def engine(monkeypatch):
    """The kernel, stood in for, and whether a graph is recorded."""
    found, kernel = SimpleNamespace(calls=[], capturing=True), ModuleType("triton_page_attention")
    kernel.attend_pages = lambda *arguments: found.calls.append(arguments)
    monkeypatch.setitem(sys.modules, "finescale.kernels.triton_page_attention", kernel)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    return found


def step(facts):
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * WIDTH).view(TOKENS, -1, WIDTH)
    heads, cache = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1), torch.zeros(2, 4, 16, KV_HEADS, WIDTH)
    return [None, *heads, cache, facts, torch.zeros(TOKENS, HEADS, WIDTH)]


def test_a_recorded_step_of_single_tokens_is_taken(engine):
    inner = implementation()
    attention = PageAttention(SimpleNamespace(impl=inner))
    for left in (None, Unrotated(torch.arange(3), torch.ones(4, WIDTH), torch.tensor([1, 2, -1]))):
        if left is not None:
            attention.leave(left)
        arguments = step(metadata())
        assert inner.forward(*arguments) is arguments[-1]
        query, key, value, keys, values, pages, lengths, out, scaling, rotary = engine.calls.pop()
        assert query.data_ptr() == arguments[1].data_ptr() and query.shape == (TOKENS, HEADS * WIDTH)
        assert key is arguments[2] and value is arguments[3] and keys.shape == values.shape == (4, 16, KV_HEADS, WIDTH)
        assert pages is arguments[5].block_table and lengths is arguments[5].seq_lens and scaling == 0.25
        assert out.data_ptr() == arguments[-1].data_ptr() and rotary is left
    assert not inner.usual


@pytest.mark.parametrize(
    "facts",
    [
        None,
        metadata(max_query_len=2),
        metadata(use_cascade=True),
        metadata(num_actual_tokens=2),
        metadata(seq_lens=torch.tensor([4]).int()),
        metadata(block_table=torch.zeros(1, 2).int()),
        SimpleNamespace(max_query_len=1, use_cascade=False),
        "eager",
    ],
    ids=str,
)
def test_other_steps_are_not(engine, facts):
    engine.capturing = facts != "eager"
    inner = implementation()
    PageAttention(SimpleNamespace(impl=inner))
    arguments = step(metadata() if facts == "eager" else facts)
    inner.forward(*arguments, output_scale=None)
    ((got, options),) = inner.usual
    assert all(a is b for a, b in zip(got, arguments, strict=True)) and options == {"output_scale": None}
    assert not engine.calls


@pytest.mark.parametrize(
    "changes",
    [
        {"alibi_slopes": torch.ones(4)},
        {"sliding_window": (63, 0)},
        {"logits_soft_cap": 30.0},
        {"sinks": torch.ones(4)},
        {"dcp_world_size": 2},
        {"batch_invariant_enabled": True},
        {"sliding_window": None},
        {"forward": lambda layer, q, k, v, cache, output: output},
    ],
    ids=str,
)
def test_other_attention_is_left_alone(changes):
    inner = implementation(**{name: value for name, value in changes.items() if name != "forward"})
    inner.forward = before = changes.get("forward", inner.forward)
    assert page_attention(SimpleNamespace(impl=inner), torch.bfloat16) is None and inner.forward is before
