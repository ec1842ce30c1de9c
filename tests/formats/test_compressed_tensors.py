"""The compressed-tensors layouts, bit for bit against the library of that name."""

import json

import pytest
import torch
from hypothesis import given, settings
from packaging.version import Version

from finescale.errors import CheckpointError, InputError, NumericsError
from finescale.formats import compressed_tensors as ct
from finescale.grid import ActivationScheme, Grid, QuantizedWeight, WeightScheme
from finescale.grid.packing import pack_rows, to_unsigned
from tests.formats.examples import layers, random_weight, same

library = pytest.importorskip("compressed_tensors")
DENSE_THREE_BITS = Version(library.__version__) >= Version("0.18")


def library_scheme(scheme: WeightScheme, activations: ActivationScheme | None = None, layout: str = ct.PACKED):
    from compressed_tensors.quantization import QuantizationConfig

    config = ct.quantization_config({"layer": scheme}, activations, [], layout=layout)
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


def library_compress(weight: QuantizedWeight, layout: str):
    from compressed_tensors.compressors import BaseCompressor

    state = {"weight": weight.dequantize(), "weight_scale": weight.grid.scale_OG}
    if weight.grid.zero_OG is not None:
        state["weight_zero_point"] = weight.grid.zero_OG
    compressor = BaseCompressor.get_value_from_registry(layout)
    return compressor.compress(state, library_scheme(weight.grid.scheme, layout=layout))


def library_decompress(tensors, scheme: WeightScheme, layout: str):
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(layout).decompress(tensors, library_scheme(scheme, layout=layout))


@settings(max_examples=80, deadline=None)
@given(layers())
def test_round_trip(weight):
    for pack in (ct.pack, ct.pack_int8):
        assert same(ct.unpack(pack(weight), weight.grid.scheme), weight)


@pytest.mark.parametrize("layout", [ct.PACKED, ct.INT8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_library_writes_the_same_bits_and_reads_ours(bits, group_size, symmetric, layout):
    if bits == 3 and not DENSE_THREE_BITS:
        pytest.skip("this compressed-tensors packs 3 bits in the older, aligned layout")
    weight = random_weight(40, 192, WeightScheme(bits, group_size, symmetric), seed=bits, scale_dtype=torch.float32)
    ours = (ct.pack if layout == ct.PACKED else ct.pack_int8)(weight)
    theirs = library_compress(weight, layout)
    assert set(ours) == set(theirs)
    for suffix, tensor in theirs.items():
        assert ours[suffix].dtype == tensor.dtype
        assert torch.equal(ours[suffix], tensor), suffix
    dense_OI = library_decompress(ours, weight.grid.scheme, layout)["weight"]
    assert torch.equal(dense_OI, weight.dequantize())


@pytest.mark.parametrize("columns", [172, 191, 33])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_library_agrees_on_odd_shapes(bits, symmetric, columns):
    if bits == 3 and not DENSE_THREE_BITS:
        pytest.skip("this compressed-tensors packs 3 bits in the older, aligned layout")
    weight = random_weight(37, columns, WeightScheme(bits, -1, symmetric), scale_dtype=torch.float32)
    theirs = library_compress(weight, ct.PACKED)
    ours = ct.pack(weight)
    assert all(torch.equal(ours[suffix], tensor) for suffix, tensor in theirs.items())


def test_library_refuses_a_ragged_last_group_which_finescale_reads():
    weight = random_weight(8, 172, WeightScheme(4, 64, True))
    tensors = ct.pack(weight)
    assert tensors["weight_scale"].shape == (8, 3)
    assert same(ct.unpack(tensors, weight.grid.scheme), weight)
    with pytest.raises(ValueError, match=r"divisb?i?ble"):
        library_decompress(tensors, weight.grid.scheme, ct.PACKED)


@pytest.mark.parametrize("symmetric", [True, False])
def test_reads_the_older_three_bit_packing(symmetric):
    weight = random_weight(24, 64, WeightScheme(3, 32, symmetric))
    tensors = ct.pack(weight)
    tensors["weight_packed"] = pack_rows(to_unsigned(weight.codes_OI, 3), 3, "aligned")
    if weight.grid.zero_OG is not None:
        zero_GO = pack_rows(to_unsigned(weight.grid.zero_OG.t(), 3), 3, "aligned")
        tensors["weight_zero_point"] = zero_GO.t().contiguous()
    assert tensors["weight_packed"].shape == (24, 7)
    assert same(ct.unpack(tensors, weight.grid.scheme), weight)


def test_scale_type_and_amplifier_survive():
    scheme = WeightScheme(4, 32, True)
    grid = random_weight(8, 64, scheme).grid
    scale_OG = torch.arange(1, 17, dtype=torch.float32).reshape(8, 2) / 1024
    weight = QuantizedWeight(
        torch.zeros(8, 64, dtype=torch.int8), Grid(scheme, scale_OG, None, grid.group_of_I, torch.bfloat16, 1024)
    )
    tensors = ct.pack(weight)
    assert tensors["weight_scale"].dtype == torch.bfloat16
    assert torch.equal(
        ct.unpack(tensors, scheme, amplifier=1024).grid.integer_scale_OG().flatten(), torch.arange(1, 17)
    )


def test_what_cannot_be_stored_is_refused():
    weight = random_weight(8, 64, WeightScheme(4, 32, True))
    scattered = Grid(weight.grid.scheme, weight.grid.scale_OG, None, weight.grid.group_of_I.flip(0), torch.float16)
    with pytest.raises(InputError, match="consecutive columns"):
        ct.pack(QuantizedWeight(weight.codes_OI, scattered))
    inexact = Grid(weight.grid.scheme, weight.grid.scale_OG * 1.0001, None, weight.grid.group_of_I, torch.float16)
    with pytest.raises(NumericsError, match="not exact"):
        ct.pack(QuantizedWeight(weight.codes_OI, inexact))
    with pytest.raises(NumericsError, match="outside of"):
        ct.pack(QuantizedWeight(weight.codes_OI + 8, weight.grid))
    with pytest.raises(InputError, match="Conv1D"):
        ct.check(weight.grid.scheme, None, (8, 64), layer_class="Conv1D")


def test_groups_of_old_files_are_checked():
    """weight_g_idx of act-order; a negative group counts from the end."""
    scheme = WeightScheme(4, 16)
    good = ct.pack(random_weight(8, 64, scheme))
    index_I = torch.arange(64, dtype=torch.int32).flip(0) // 16
    assert torch.equal(ct.unpack(good | {"weight_g_idx": index_I}, scheme).grid.group_of_I, index_I.long())
    for damaged_I in (index_I - 1, index_I + 1, index_I[:-1]):
        with pytest.raises(CheckpointError, match="weight_g_idx"):
            ct.unpack(good | {"weight_g_idx": damaged_I}, scheme)


def test_damaged_files_are_named():
    scheme = WeightScheme(4, 32, False)
    good = ct.pack(random_weight(8, 64, scheme))
    with pytest.raises(CheckpointError, match="no quantized weight"):
        ct.unpack({"weight_scale": good["weight_scale"]}, scheme)
    for suffix in ("weight_scale", "weight_shape", "weight_zero_point"):
        with pytest.raises(CheckpointError, match=suffix):
            ct.unpack({key: tensor for key, tensor in good.items() if key != suffix}, scheme)
    for suffix in ("weight_packed", "weight_zero_point"):
        with pytest.raises(CheckpointError, match=suffix):
            ct.unpack(good | {suffix: good[suffix][:, :-1]}, scheme)
    with pytest.raises(CheckpointError, match="scale"):
        ct.unpack(good | {"weight_scale": good["weight_scale"][:, :1]}, scheme)
    with pytest.raises(CheckpointError, match="not finite"):
        ct.unpack(good | {"weight_scale": good["weight_scale"] * float("inf")}, scheme)


NAMES = [f"model.layers.{block}.{part}" for block in range(12) for part in ("self_attn.q_proj", "mlp.down_proj")]


def test_config_of_one_scheme_is_minimal_and_accepted_by_the_library():
    from compressed_tensors.quantization import QuantizationConfig

    schemes = dict.fromkeys(NAMES, WeightScheme(4, 128, True))
    config = ct.quantization_config(schemes, ActivationScheme(8), ["model.layers.0.gate"], {"version": 1})
    assert config["format"] == config["config_groups"]["group_0"]["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head", "model.layers.0.gate"]
    assert config["finescale"] == {"version": 1}
    assert json.loads(json.dumps(config)) == config
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert group.weights.num_bits == 4 and group.weights.group_size == 128 and group.weights.strategy == "group"
    assert group.input_activations.strategy == "token" and group.input_activations.dynamic is True


def test_config_of_several_schemes_gives_each_layer_its_own():
    from compressed_tensors.utils.match import match_targets

    schemes = {name: WeightScheme(4, 128, True) for name in NAMES}
    for block in (1, 11):
        schemes[f"model.layers.{block}.mlp.down_proj"] = WeightScheme(8, -1, True)
    schemes["model.layers.3.self_attn.q_proj"] = WeightScheme(4, 64, False)
    config = ct.quantization_config(schemes, None, [])
    assert list(config["config_groups"]) == ["group_0", "group_1", "group_2"]
    assert config["config_groups"]["group_2"]["targets"] == ["Linear"]
    assert config["config_groups"]["group_0"]["targets"] == [r"re:(.*\.)?layers\.(1|11)\.mlp\.down_proj$"]
    for name, scheme in schemes.items():
        assert ct.layer_scheme(config, name) == scheme
    targets = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    for name, scheme in schemes.items():
        first = match_targets(name, torch.nn.Linear(1, 1), targets)[0]
        assert targets[first]["weights"]["num_bits"] == scheme.bits


def test_layer_scheme_of_foreign_configs():
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 32}
    config = {"config_groups": {"g": {"targets": ["re:.*proj"], "weights": weights}}, "ignore": ["re:.*o_proj$"]}
    assert ct.layer_scheme(config, "model.q_proj") == WeightScheme(4, 32, False)
    assert ct.layer_scheme(config, "model.o_proj") is None
    assert ct.layer_scheme(config, "model.gate") is None
    for key, value in (("type", "float"), ("strategy", "block"), ("num_bits", 5)):
        broken = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights | {key: value}}}}
        with pytest.raises(CheckpointError):
            ct.layer_scheme(broken, "model.q_proj")


def test_activation_scheme_of_a_config():
    schemes = {"a": WeightScheme(4, 128, True), "b": WeightScheme(8, -1, True)}
    assert ct.activation_scheme(ct.quantization_config(schemes, None, [])) is None
    config = ct.quantization_config(schemes, ActivationScheme(8), [])
    assert ct.activation_scheme(config) == ActivationScheme(8)
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(CheckpointError, match="dynamic"):
        ct.activation_scheme(config)


def test_layers_may_round_their_inputs_differently():
    weights = WeightScheme(4, 128, True)
    inputs = {
        "model.layers.0.q": ActivationScheme(8),
        "model.layers.0.k": ActivationScheme(8),
        "model.layers.0.v": ActivationScheme(8, "tensor", False),
        "model.layers.0.o": ActivationScheme(4, symmetric=False),
        "model.layers.0.down": None,
    }
    config = ct.quantization_config(dict.fromkeys(inputs, weights), inputs, ["model.layers.0.gate"])
    assert {name: ct.layer_activations(config, name) for name in inputs} == inputs
    assert {ct.layer_scheme(config, name) for name in inputs} == {weights}
    assert ct.layer_activations(config, "model.layers.0.gate") is None
    assert ct.activation_scheme(config) == ActivationScheme(8)
    groups = config["config_groups"].values()
    assert {"bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True} in [
        {"bits": found["num_bits"], **{key: found[key] for key in ("strategy", "dynamic", "symmetric")}}
        for group in groups
        if (found := group["input_activations"])
    ]


def test_no_layer_is_refused():
    with pytest.raises(InputError, match="nothing to write"):
        ct.quantization_config({}, None, [])
