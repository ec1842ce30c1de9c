import pytest

from finescale.runtime.serving import claims, refusal

LAYER = {"bits": 4, "group_size": 64, "symmetric": True, "amplifier": 1024, "bound": 5}


def config(bits=8, version=1, **layers):
    inputs = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}, "input_activations": inputs}}
    return {
        "format": "pack-quantized",
        "config_groups": groups,
        "finescale": {"version": version, "kv_cache": None, "layers": layers},
    }


def with_rounded_cache():
    config_ = config(a=LAYER)
    config_["finescale"]["kv_cache"] = {"bits": 8}
    return config_


def test_claims_what_vllm_alone_would_compute_otherwise():
    plain = LAYER | {"amplifier": None}
    assert claims(config(a=LAYER, b=LAYER)) and claims(config(a=LAYER, b=plain))
    assert claims(config(a=plain) | {"quant_method": "finescale"}) and claims(config(a=plain | {"outliers": 3}))
    assert claims(config(bits=4, a=plain)) and not claims(config(bits=4, a=plain) | {"format": "int-quantized"})
    fixed = config(a=plain, b=plain)
    one = fixed["config_groups"]["group_0"] | {"targets": ["b"]}
    fixed["config_groups"]["group_1"] = one | {
        "input_activations": one["input_activations"] | {"strategy": "tensor", "dynamic": False}
    }
    assert claims(fixed)
    assert not claims(config(a=plain))
    assert not claims(config())
    assert not claims({"format": "pack-quantized", "quant_method": "compressed-tensors"})


@pytest.mark.parametrize(
    "changed, words",
    [
        (config(a=LAYER) | {"format": "marlin"}, "not marlin"),
        (config(a=LAYER | {"outliers": 12}), "a has outliers"),
        (config(b=LAYER, a=LAYER | {"bound": None}), "a has integer scales without the proof"),
        (config(version=2, a=LAYER), "newer finescale"),
        (with_rounded_cache(), "key-value cache"),
        (config(a=LAYER | {"inputs": {"gather": True, "rotation": None}}), None),
        (config(bits=6, a=LAYER), None),
    ],
)
def test_refusals_name_the_reason(changed, words):
    reason = refusal(changed)
    assert (reason is None) if words is None else (words in reason)


def test_bloom_is_refused_before_vllm_starts():
    assert "BLOOM" in refusal(config(a=LAYER), "bloom") and refusal(config(a=LAYER), "llama") is None
