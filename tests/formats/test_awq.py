"""The AWQ layout against a packer on Python integers."""

import pytest
from hypothesis import given, settings

from finescale.errors import CheckpointError, InputError
from finescale.formats import awq
from finescale.grid import ActivationScheme, WeightScheme
from tests.formats.examples import layers, random_weight, same


def slow_words(values: list[int]) -> list[int]:
    words = []
    for start in range(0, len(values), 8):
        word = sum(values[start + (0, 2, 4, 6, 1, 3, 5, 7)[k]] << (4 * k) for k in range(8))
        words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return words


@settings(max_examples=60, deadline=None)
@given(layers(bits=(4,), row_step=8, ragged=False))
def test_round_trip(weight):
    assert same(awq.unpack(awq.pack(weight), weight.grid.scheme), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_equal_the_definition(symmetric):
    weight = random_weight(24, 64, WeightScheme(4, 32, symmetric))
    tensors = awq.pack(weight)
    assert tensors["qweight"].tolist() == [slow_words(row) for row in (weight.codes_OI.int() + 8).t().tolist()]
    zeros = [[8] * 24] * 2 if weight.grid.zero_OG is None else (weight.grid.zero_OG.int() + 8).t().tolist()
    assert tensors["qzeros"].tolist() == [slow_words(row) for row in zeros]
    assert tensors["scales"].shape == (2, 24)


def test_refusals():
    four = WeightScheme(4, 32, True)
    with pytest.raises(InputError, match="4-bit"):
        awq.check(WeightScheme(3, 32, True), None, (8, 32))
    with pytest.raises(InputError, match="12 outputs"):
        awq.check(four, None, (12, 32))
    with pytest.raises(InputError, match="multiple of 32"):
        awq.check(four, None, (8, 172))
    with pytest.raises(InputError, match="activations"):
        awq.check(four, ActivationScheme(8), (8, 32))
    with pytest.raises(InputError, match="one scheme"):
        awq.quantization_config({"a": four, "b": WeightScheme(4, 64, True)}, None, [])


def test_config_and_damaged_files():
    scheme = WeightScheme(4, 32, False)
    config = awq.quantization_config({"model.layers.0.a": scheme}, None, ["model.layers.0.b"], {"version": 1})
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.b"]
    assert awq.layer_scheme(config, "model.layers.0.a") == scheme
    assert awq.layer_scheme(config, "model.layers.0.b") is None
    ours = {"layers": {"a": {"symmetric": True}}}
    symmetric = awq.quantization_config({"a": WeightScheme(4, 32, True)}, None, [], ours)
    assert awq.layer_scheme(symmetric, "a") == WeightScheme(4, 32, True)
    good = awq.pack(random_weight(8, 64, scheme))
    for suffix in ("qweight", "qzeros", "scales"):
        with pytest.raises(CheckpointError, match=suffix):
            awq.unpack({key: tensor for key, tensor in good.items() if key != suffix}, scheme)
    with pytest.raises(CheckpointError, match="no zero points"):
        awq.unpack(good, WeightScheme(4, 32, True))
