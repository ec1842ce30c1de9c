"""A rounded key-value cache: what attention sees, and that a checkpoint says so."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finescale.errors import InputError
from finescale.pipeline.quantize import prepare
from finescale.runtime.attention import check_kv_cache, quantize_kv_cache, round_cache
from finescale.runtime.load import load
from tests.helpers import logits_of, make_model, quantize, recipe, some_tokens

PLAIN = {"bits": 4, "symmetric": False, "queries": False, "rotate": False}


def slow_round(x, bits):
    out = torch.empty_like(x)
    for index in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])):
        row = x[tuple(index)]
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        out[tuple(index)] = ((row / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step
    return out


def test_keys_and_values_are_rounded_per_token_and_head():
    query, key, value = (torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    found = round_cache(query, key, value, PLAIN)
    assert torch.equal(found[0], query)
    torch.testing.assert_close(found[1], slow_round(key, 4))
    torch.testing.assert_close(found[2], slow_round(value, 4))
    assert not torch.equal(round_cache(query, key, value, PLAIN | {"queries": True})[0], query)


def test_rotation_keeps_products_and_spreads_an_outlier():
    query, key, value = (torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    key[..., 3] += 40
    exact = query @ key.transpose(-1, -2)
    errors = []
    for turn in (False, True):
        rounded = round_cache(query, key, value, PLAIN | {"rotate": turn})
        errors.append(float((rounded[0] @ rounded[1].transpose(-1, -2) - exact).norm()))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "opt", "gpt2", "qwen3"])
def test_fewer_bits_are_farther_from_the_original(kind):
    errors = []
    for bits in (8, 4):
        model, tokens_BT = make_model(kind), some_tokens()
        expected = logits_of(model, tokens_BT)
        quantize_kv_cache(model, PLAIN | {"bits": bits})
        errors.append(float((logits_of(model, tokens_BT) - expected).norm() / expected.norm()))
    assert 0 < errors[0] < 0.1 < errors[1] or 0 < 4 * errors[0] < errors[1]


@pytest.mark.parametrize("kind", ["bloom", "falcon"])
def test_families_with_their_own_attention_are_refused_by_name(tiny, text, tmp_path, kind):
    with pytest.raises(InputError, match=f"{kind} computes its attention"):
        prepare(tiny(kind), recipe("rtn", kv_cache={"bits": 8}), tmp_path / "out", str(text))


def test_attention_with_soft_caps_is_refused_too():
    config = AutoConfig.for_model("gemma2", num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="gemma2 computes its attention"):
        check_kv_cache(model)


def test_a_checkpoint_says_so_and_is_loaded_so(tiny, text, tmp_path):
    quantize(tiny("llama"), tmp_path / "plain", recipe("rtn", 8), text)
    quantize(tiny("llama"), tmp_path / "kv", recipe("rtn", 8, kv_cache={"bits": 4}), text)
    plain, rounded = (logits_of(load(tmp_path / name), some_tokens()) for name in ("plain", "kv"))
    assert not torch.allclose(plain, rounded, rtol=1e-3, atol=1e-3)
    off = logits_of(load(tmp_path / "kv", rounding="none"), some_tokens())
    torch.testing.assert_close(off, plain, rtol=1e-3, atol=1e-3)
