import pytest

from finescale.runtime.serving import claims, refusal

LAYER = {"bits": 4, "group_size": 64, "symmetric": True, "amplifier": 1024, "bound": 5}


def config(bits=8, **layers):
    inputs = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}, "input_activations": inputs}}
    return {
        "format": "pack-quantized",
        "config_groups": groups,
        "finescale": {"version": 1, "kv_cache": None, "layers": layers},
    }


def with_rounded_cache():
    config_ = config(a=LAYER)
    config_["finescale"]["kv_cache"] = {"bits": 8}
    return config_


def test_claims_integer_scales_only():
    assert claims(config(a=LAYER, b=LAYER))
    assert not claims(config(a=LAYER, b=LAYER | {"amplifier": None}))
    assert not claims(config())
    assert not claims({"format": "pack-quantized", "quant_method": "compressed-tensors"})


@pytest.mark.parametrize(
    "changed, words",
    [
        (config(a=LAYER) | {"format": "int-quantized"}, "not int-quantized"),
        (config(a=LAYER | {"inputs": {"gather": True}}), "a gathers"),
        (config(a=LAYER | {"outliers": 12}), "a has outliers"),
        (config(bits=6, a=LAYER), "a does not take 8-bit inputs"),
        (with_rounded_cache(), "key-value cache"),
        (config(a=LAYER), None),
    ],
)
def test_refusals_name_the_reason(changed, words):
    reason = refusal(changed)
    assert (reason is None) if words is None else (words in reason)


def test_bloom_is_refused_before_vllm_starts():
    assert "BLOOM" in refusal(config(a=LAYER), "bloom") and refusal(config(a=LAYER), "llama") is None
