"""A rounded static cache: what the fused decoder computes with it is what the simulation of the recipes computes."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from finescale.errors import InputError
from finescale.runtime.attention import quantize_kv_cache
from finescale.runtime.cache import RoundedLayer, rounded_cache, scales_of
from finescale.runtime.fused import fuse
from finescale.runtime.load import load
from tests.helpers import some_tokens

FACTS = {"bits": 8, "symmetric": True, "queries": False, "rotate": False}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
@torch.no_grad()
def test_as_simulated(tiny, kind):
    simulated, fused_model = (load(tiny(kind)) for _ in range(2))
    quantize_kv_cache(simulated, FACTS)
    assert fuse(fused_model) is None
    tokens_BT = some_tokens(2, 12)
    cache = rounded_cache(fused_model.config, 16)
    found = [fused_model(tokens_BT[:, :7], past_key_values=cache, use_cache=True).logits]
    found += [fused_model(tokens_BT[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(7, 12)]
    torch.testing.assert_close(torch.cat(found, 1), simulated(tokens_BT).logits, rtol=2e-4, atol=2e-4)
    for layer in cache.layers:
        assert isinstance(layer, RoundedLayer) and layer.keys.dtype == torch.int8 and int(layer.cumulative_length) == 12
        key_scale_BKS, value_scale_BKS = scales_of(layer)
        assert (key_scale_BKS[:, :, :12] > 0).all() and not key_scale_BKS[:, :, 12:].any()
        assert layer.values[:, :, :12].abs().amax(-1).eq(127).all() and value_scale_BKS.shape == layer.values.shape[:3]


@torch.no_grad()
def test_generate(tiny):
    model = load(tiny("llama"))
    assert fuse(model) is None
    tokens_BT = some_tokens(2, 9)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(tokens_BT)
    rounded = model.generate(tokens_BT, past_key_values=rounded_cache(model.config, 16), **options)
    exact = model.generate(tokens_BT, past_key_values=StaticCache(config=model.config, max_cache_len=16), **options)
    assert rounded.shape == exact.shape and torch.equal(rounded[:, :10], exact[:, :10])
    assert scales_of(DynamicCache()) == (None, None)


def test_refusals(tiny):
    model = load(tiny("llama"))
    with pytest.raises(InputError, match="serves fused decoders"):
        model(some_tokens(1, 4), past_key_values=rounded_cache(model.config, 8), use_cache=True)
    model.config.layer_types, model.config.sliding_window = ["sliding_attention"] * model.config.num_hidden_layers, 4
    with pytest.raises(InputError, match="does not attend to every token"):
        rounded_cache(model.config, 8)
