import pytest

from finescale.runtime.serving import claims, refusal

LAYER = {"bits": 4, "group_size": 64, "symmetric": True, "amplifier": 1024, "bound": 5}


def config(**layers):
    return {"format": "pack-quantized", "finescale": {"version": 1, "layers": layers}}


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
        (config(a=LAYER), None),
    ],
)
def test_refusals_name_the_reason(changed, words):
    reason = refusal(changed)
    assert (reason is None) if words is None else (words in reason)


def test_bloom_is_refused_before_vllm_starts():
    assert "BLOOM" in refusal(config(a=LAYER), "bloom") and refusal(config(a=LAYER), "llama") is None
