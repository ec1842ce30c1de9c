"""The GPTQ layout against a packer on Python integers."""

import pytest
import torch
from hypothesis import given, settings

from finescale.errors import CheckpointError, InputError
from finescale.formats import gptq
from finescale.grid import ActivationScheme, Grid, QuantizedWeight, WeightScheme
from tests.formats.examples import layers, random_weight, same


def slow_words(values: list[int], bits: int) -> list[int]:
    stream = sum(value << (bits * index) for index, value in enumerate(values))
    words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(len(values) * bits // 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@settings(max_examples=60, deadline=None)
@given(layers(row_step=32, column_step=32))
def test_round_trip(weight):
    assert same(gptq.unpack_v2(gptq.pack_v2(weight), weight.grid.scheme), weight)
    zero_OG = weight.grid.zero_OG
    if zero_OG is not None and bool((zero_OG == weight.grid.scheme.code_min).any()):
        with pytest.raises(InputError, match="gptq_v2"):
            gptq.pack(weight)
    else:
        assert same(gptq.unpack(gptq.pack(weight), weight.grid.scheme), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_equal_the_definition(bits, symmetric):
    scheme, half = WeightScheme(bits, 32, symmetric), 2 ** (bits - 1)
    weight = random_weight(32, 96, scheme, lowest_zero=scheme.code_min + 1)
    zero_GO = [[half] * 32] * 3 if weight.grid.zero_OG is None else (weight.grid.zero_OG.int() + half).t().tolist()
    columns = [slow_words(row, bits) for row in (weight.codes_OI.int() + half).tolist()]
    for pack, less in ((gptq.pack, 1), (gptq.pack_v2, 0)):
        tensors = pack(weight)
        assert set(tensors) == set(gptq.SUFFIXES)
        assert tensors["qweight"].t().tolist() == columns
        assert tensors["qzeros"].tolist() == [slow_words([zero - less for zero in row], bits) for row in zero_GO]
        assert torch.equal(tensors["scales"].float(), weight.grid.scale_OG.t())
        assert tensors["g_idx"].tolist() == [column // 32 for column in range(96)]
        assert tensors["qweight"].dtype == tensors["qzeros"].dtype == tensors["g_idx"].dtype == torch.int32


def test_symmetric_four_bits_have_the_well_known_zero_words():
    weight = random_weight(8, 32, WeightScheme(4, 32, True))
    assert gptq.pack(weight)["qzeros"].tolist() == [[0x77777777]]
    assert gptq.pack_v2(weight)["qzeros"].tolist() == [[0x88888888 - (1 << 32)]]


def test_version_one_of_foreign_files_wraps_around():
    scheme = WeightScheme(4, 32, False)
    tensors = gptq.pack_v2(random_weight(8, 32, scheme))
    tensors["qzeros"] = torch.full((1, 1), -1, dtype=torch.int32)
    assert gptq.unpack(tensors, scheme).grid.zero_OG.tolist() == [[-8]] * 8
    assert gptq.unpack_v2(tensors, scheme).grid.zero_OG.tolist() == [[7]] * 8


def test_activation_order_keeps_its_groups():
    weight = random_weight(32, 96, WeightScheme(4, 32, False), lowest_zero=-7)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    grid = Grid(
        weight.grid.scheme, weight.grid.scale_OG, weight.grid.zero_OG, weight.grid.group_of_I[order], torch.float16
    )
    scattered = QuantizedWeight(weight.codes_OI, grid)
    read = gptq.unpack(gptq.pack(scattered), grid.scheme)
    assert same(read, scattered)
    assert torch.equal(read.dequantize(), scattered.dequantize())


def test_ragged_last_group():
    weight = random_weight(32, 96, WeightScheme(4, 64, True))
    tensors = gptq.pack(weight)
    assert tensors["scales"].shape == (2, 32)
    assert same(gptq.unpack(tensors, weight.grid.scheme), weight)


def test_refusals():
    scheme = WeightScheme(3, -1, True)
    with pytest.raises(InputError, match="172 inputs"):
        gptq.check(scheme, None, (32, 172))
    with pytest.raises(InputError, match="20 outputs"):
        gptq.check(scheme, None, (20, 32))
    with pytest.raises(InputError, match="activations"):
        gptq.check(scheme, ActivationScheme(8), (32, 32))
    with pytest.raises(InputError, match="activations"):
        gptq.quantization_config({"a": scheme}, ActivationScheme(8), [])
    with pytest.raises(InputError, match="Conv1D"):
        gptq.check(scheme, None, (32, 32), layer_class="Conv1D")


def test_damaged_files_are_named():
    scheme = WeightScheme(4, 32, True)
    good = gptq.pack(random_weight(32, 64, scheme))
    for suffix in ("qweight", "qzeros", "scales"):
        with pytest.raises(CheckpointError, match=suffix):
            gptq.unpack({key: tensor for key, tensor in good.items() if key != suffix}, scheme)
    without_groups = {key: tensor for key, tensor in good.items() if key != "g_idx"}
    assert torch.equal(gptq.unpack(without_groups, scheme).grid.group_of_I, torch.arange(64) // 32)
    with pytest.raises(CheckpointError, match="checkpoint_format"):
        gptq.unpack_v2(good, scheme)
    with pytest.raises(CheckpointError, match="outside of the 2 groups"):
        gptq.unpack(good | {"g_idx": good["g_idx"] + 1}, scheme)
    with pytest.raises(CheckpointError, match="int32"):
        gptq.unpack(good | {"qweight": good["qweight"].to(torch.int64)}, scheme)


def test_config():
    names = [f"model.layers.{block}.mlp.{part}" for block in range(3) for part in ("up_proj", "down_proj")]
    schemes = {name: WeightScheme(4, 128, True) for name in names}
    schemes["model.layers.1.mlp.down_proj"] = WeightScheme(8, -1, True)
    config = gptq.quantization_config(schemes, None, ["lm_head", "model.layers.0.mlp.gate"], {"version": 1})
    assert config["bits"] == 4 and config["sym"] is True and config["desc_act"] is False
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj", "mlp.down_proj"]]
    assert config["dynamic"] == {
        r"+:(.*\.)?layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }
    assert {name: gptq.layer_scheme(config, name) for name in names} == schemes
    left_out = gptq.quantization_config(schemes, None, ["model.layers.9.mlp.up_proj"])
    assert left_out["modules_in_block_to_quantize"] == [names]
    assert gptq.layer_scheme({"bits": 4, "group_size": 128, "dynamic": {"-:.*up": {}}}, names[0]) is None
    with pytest.raises(CheckpointError, match="does not know"):
        gptq.layer_scheme({"group_size": 128}, "a")
