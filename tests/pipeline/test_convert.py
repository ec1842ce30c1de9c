"""Integer scales for checkpoints that exist already, of finescale or of other tools."""

import json
import shutil

import pytest
import torch

from finescale.errors import CheckpointError, InputError, NumericsError
from finescale.grid import QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.pipeline.convert import convert, convert_layer
from finescale.pipeline.verify import verify
from finescale.runtime.checkpoint import open_quantized
from finescale.runtime.load import load
from tests.helpers import (
    StopError,
    assert_sentence,
    change_tensor,
    hashes,
    lasting_files,
    logits_of,
    quantize,
    read_json,
    read_tensors,
    recipe,
    some_tokens,
    stop_after,
)

SOURCES = {
    "compressed-tensors": {},
    "with activations": {"activations": {"bits": 8}},
    "gptq": {"format": "gptq"},
    "gptq_v2": {"format": "gptq_v2"},
    "awq": {"format": "awq"},
}


@pytest.fixture(scope="module")
def source(tiny, text, tmp_path_factory):
    made = {}

    def folder(name, dtype=torch.float16, kind="qwen2", **parts):
        key = (name, dtype, kind, json.dumps(parts))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source") / "model"
            parts = {"weights": {"symmetric": True}} | SOURCES[name] | parts
            quantize(tiny(kind, dtype), made[key], recipe("gptq", 4, 32, **parts), text)
        return made[key]

    return folder


@pytest.mark.parametrize("round_again", [False, True])
@pytest.mark.parametrize("amplifier", ["auto", 1024, "heuristic"])
@pytest.mark.parametrize("name", SOURCES)
def test_convert_verify_load(source, tiny, tmp_path, name, amplifier, round_again):
    path, out = source(name), tmp_path / "out"
    report = convert(path, out, amplifier, round_again)
    result = verify(out, tiny("qwen2", torch.float16))
    assert result.integer_layers == result.layers == len(report["layers"]) == 14
    assert result.worst_relative < 0.4
    before, after = open_quantized(path), open_quantized(out)
    assert after.fmt.name == "compressed-tensors" and after.activations.bits == 8
    for record in report["layers"]:
        old, new = before.read(record["name"]), after.read(record["name"])
        change = float((new.dequantize() - old.dequantize()).norm() / old.dequantize().norm())
        assert change < (0.3 if amplifier == "heuristic" else 0.02)  # the heuristic stops at S = 1
        assert record["relative_error"] == pytest.approx(change**2, rel=1e-3, abs=1e-12)
        assert record["overflow_use"] < 1
        if not round_again:
            assert torch.equal(old.codes_OI, new.codes_OI)
        if amplifier == 1024:
            assert record["amplifier"] == 1024
    tensors, originals = read_tensors(out), read_tensors(path)
    for key, tensor in tensors.items():
        if not key.rpartition(".")[2].startswith("weight_"):
            assert torch.equal(tensor, originals[key])  # embeddings, norms, biases
    logits = logits_of(load(out, path="integer"), some_tokens())
    assert bool(torch.isfinite(logits).all())


def test_auto_amplifier_changes_next_to_nothing(source, tmp_path):
    report = convert(source("compressed-tensors", torch.float32), tmp_path / "out", "auto")
    assert max(record["relative_error"] for record in report["layers"]) < 1e-6
    assert min(record["amplifier"] for record in report["layers"]) > 1024


def test_a_larger_amplifier_changes_less(source, tmp_path):
    changes = []
    for amplifier in (16, 128, 1024, 8192):
        report = convert(source("compressed-tensors", torch.float32), tmp_path / str(amplifier), amplifier)
        changes.append(sum(record["relative_error"] for record in report["layers"]))
    assert changes == sorted(changes, reverse=True) and changes[0] > 30 * changes[-1]


def small_weight(seed=0, dtype=torch.float16):
    """A layer like those of large models: steps of about 0.002, so that 1024 leaves S = 1, 2 or 3."""
    weight_OI = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed)) * 0.006
    grid = fit_grid(weight_OI, WeightScheme(4, 32, True), dtype)
    return QuantizedWeight(quantize_to_grid(weight_OI, grid), grid)


def test_rounding_again_repairs_what_a_coarse_amplifier_spoils():
    for seed in range(5):
        weight = small_weight(seed)
        kept, plain = convert_layer("layer", weight, 1024, round_again=False)
        again, rounded = convert_layer("layer", weight, 1024, round_again=True)
        assert plain["scale_max"] <= 8
        assert rounded["weight_mse"] < 0.8 * plain["weight_mse"]
        assert torch.equal(kept.codes_OI, weight.codes_OI) and not torch.equal(again.codes_OI, weight.codes_OI)
        for converted, record in ((kept, plain), (again, rounded)):
            change_OI = converted.dequantize() - weight.dequantize()
            assert record["weight_mse"] == pytest.approx(float(change_OI.square().mean()), rel=1e-4)


def test_auto_with_round_again_stays_inside_int32():
    """New codes have another bound than the old ones that the amplifier was chosen for."""
    generator = torch.Generator().manual_seed(1)
    for columns in (128, 512, 2048):
        weight_OI = torch.randn(4, columns, generator=generator) * 3
        grid = fit_grid(weight_OI, WeightScheme(8, 128, True), torch.float32)
        weight = QuantizedWeight(quantize_to_grid(weight_OI, grid), grid)
        _, record = convert_layer("layer", weight, "auto", round_again=True)
        assert 0.2 < record["overflow_use"] < 1 or record["scale_max"] > 2**14


def test_negative_scales_change_sign_together_with_their_codes():
    weight = small_weight()
    scale_OG = weight.grid.scale_OG.clone()
    scale_OG[::3] *= -1
    codes_OI = weight.codes_OI.clamp(-7, 7)
    grid = type(weight.grid)(**{**weight.grid.__dict__, "scale_OG": scale_OG})
    converted, record = convert_layer("layer", QuantizedWeight(codes_OI, grid), "auto", round_again=False)
    assert float(converted.grid.scale_OG.min()) > 0
    expected_OI = QuantizedWeight(codes_OI, grid).dequantize()
    torch.testing.assert_close(converted.dequantize(), expected_OI, rtol=2e-3, atol=0)
    assert record["notes"] == ["32 negative group scales changed sign, 0 codes moved by one"]
    # -8 has no opposite: it moves by one, and the note counts it.
    codes_OI = codes_OI.clone()
    codes_OI[0, :5] = -8
    converted, record = convert_layer("layer", QuantizedWeight(codes_OI, grid), "auto", round_again=False)
    assert "5 codes moved by one" in record["notes"][0]
    assert torch.equal(converted.codes_OI[0, :5], torch.full((5,), 7, dtype=torch.int8))


def test_zero_scales_hold_zeros():
    weight = small_weight()
    scale_OG = weight.grid.scale_OG.clone()
    scale_OG[2, 1] = 0
    grid = type(weight.grid)(**{**weight.grid.__dict__, "scale_OG": scale_OG})
    for round_again in (False, True):
        converted, record = convert_layer("layer", QuantizedWeight(weight.codes_OI, grid), 4096, round_again)
        assert bool((converted.dequantize()[2, 32:64] == 0).all())
        assert "1 groups with a zero scale" in record["notes"][0]


def test_negative_scales_in_a_file(source, tmp_path):
    """As some GPTQ checkpoints have them: they convert, verify and compute what they computed before."""
    path = shutil.copytree(source("gptq"), tmp_path / "model")
    key = "model.layers.0.mlp.up_proj.scales"

    def negate(tensor):
        tensor[1, ::4] *= -1
        return tensor

    change_tensor(path, key, negate)
    (path / "report.json").unlink()
    report = convert(path, tmp_path / "out")
    record = next(record for record in report["layers"] if record["name"].endswith("0.mlp.up_proj"))
    assert "negative group scales changed sign" in record["notes"][0]
    assert record["relative_error"] < 2e-3
    verify(tmp_path / "out")


def test_an_amplifier_that_overflows_is_refused(source, tmp_path):
    with pytest.raises(NumericsError, match=r"model\.layers\.\d\.\S+") as caught:
        convert(source("compressed-tensors", torch.float32), tmp_path / "out", 2**24)
    assert_sentence(str(caught.value))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("amplifier", [0, 3, 1000, 2**25, -2])
def test_amplifiers_that_are_no_power_of_two(source, tmp_path, amplifier):
    with pytest.raises(InputError, match="power of two"):
        convert(source("compressed-tensors"), tmp_path / "out", amplifier)
    assert not (tmp_path / "out").exists()


def test_asymmetric_weights_are_refused(tiny, text, tmp_path):
    quantize(tiny("llama"), tmp_path / "model", recipe("rtn", 4, 32), text)
    with pytest.raises(InputError, match="asymmetric") as caught:
        convert(tmp_path / "model", tmp_path / "out")
    assert_sentence(str(caught.value))
    assert not (tmp_path / "out").exists()


def test_groups_in_activation_order_are_refused_before_the_work(tiny, text, tmp_path):
    options = {"act_order": True, "static_groups": False}
    chosen = recipe("gptq", 4, 32, format="gptq", options=options, weights={"symmetric": True})
    quantize(tiny("llama", torch.float16), tmp_path / "model", chosen, text)
    with pytest.raises(InputError, match="activation order") as caught:
        convert(tmp_path / "model", tmp_path / "out")
    assert_sentence(str(caught.value))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_quantized(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="not quantized") as caught:
        convert(tiny("llama"), tmp_path / "out")
    assert_sentence(str(caught.value))


def test_overrides_survive(tiny, text, tmp_path):
    overrides = [
        {"pattern": "*.k_proj", "skip": True},
        {"pattern": "*.down_proj", "weights": {"bits": 8, "group_size": -1}},
    ]
    chosen = recipe("rtn", 4, 32, weights={"symmetric": True}, overrides=overrides)
    quantize(tiny("llama"), tmp_path / "model", chosen, text)
    convert(tmp_path / "model", tmp_path / "out")
    assert verify(tmp_path / "out", tiny("llama")).integer_layers == 12
    quantized = open_quantized(tmp_path / "out")
    schemes = {name: quantized.read(name).grid.scheme for name in quantized.layer_names()}
    assert {(s.bits, s.group_size) for name, s in schemes.items() if name.endswith("down_proj")} == {(8, -1)}
    assert {(s.bits, s.group_size) for name, s in schemes.items() if not name.endswith("down_proj")} == {(4, 32)}
    assert logits_of(load(tmp_path / "out"), some_tokens()).isfinite().all()


def test_experts_convert(source, tiny, tmp_path):
    report = convert(source("compressed-tensors", kind="mixtral"), tmp_path / "out")
    assert len(report["layers"]) == 32
    assert verify(tmp_path / "out", tiny("mixtral", torch.float16)).integer_layers == 32


def test_the_output_folder(source, tmp_path):
    path, out = source("gptq"), tmp_path / "out"
    first = convert(path, out)
    before = hashes(out)
    assert not (out / ".finescale").exists()
    assert first["files"] == hashes(out, [name for name in lasting_files(out) if name != "report.json"])
    assert convert(path, out)["already_complete"] and hashes(out) == before
    with pytest.raises(InputError, match="--fresh"):
        convert(path, out, 1024)
    assert hashes(out) == before
    (out / "notes.txt").write_text("mine")
    convert(path, out, 1024, fresh=True)
    assert verify(out).integer_layers == 14
    assert (out / "notes.txt").read_text() == "mine"
    assert read_json(out / "report.json")["amplifier"] == 1024


def test_a_foreign_folder_is_refused_and_untouched(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.json").write_text("{}")
    for fresh in (False, True):
        with pytest.raises(InputError, match="did not write"):
            convert(source("gptq"), out, fresh=fresh)
    assert [path.name for path in out.iterdir()] == ["thesis.json"]


def test_fresh_never_empties_the_folder_that_it_reads(source, tmp_path):
    path = shutil.copytree(source("gptq"), tmp_path / "model")
    before = hashes(path)
    for fresh in (False, True):
        with pytest.raises(InputError, match="the model itself") as caught:
            convert(path, path, fresh=fresh)
        assert_sentence(str(caught.value))
    assert hashes(path) == before


def test_a_conversion_that_was_stopped_starts_again(source, tmp_path):
    path, out = source("compressed-tensors"), tmp_path / "out"

    with pytest.raises(StopError):
        convert(path, out, on_progress=stop_after(2))
    assert not (out / "config.json").exists() and list(out.glob("*.safetensors"))
    convert(path, tmp_path / "whole")
    convert(path, out)
    assert hashes(out, lasting_files(out)) == hashes(tmp_path / "whole", lasting_files(tmp_path / "whole"))


@pytest.mark.parametrize("round_again", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_folded(source, tiny, tmp_path, name, round_again):
    path, out = source(name), tmp_path / "out"
    report = convert(path, out, round_again=round_again, folded=True)
    result = verify(out, tiny("qwen2", torch.float16))
    assert result.folded_layers == result.integer_layers == result.layers == len(report["layers"]) == 14
    before, after = open_quantized(path), open_quantized(out)
    for record in report["layers"]:
        old, new = before.read(record["name"]), after.read(record["name"])
        assert record["folded"] and record["amplifier"] == 1 and record["scale_max"] <= 15
        assert record["relative_error"] < 0.01
        assert round_again or torch.equal(old.codes_OI, new.codes_OI)
    logits = logits_of(load(out, path="integer"), some_tokens())
    torch.testing.assert_close(logits, logits_of(load(out), some_tokens()), rtol=0, atol=0.2)
    # Folded scales become integers over an amplifier again, and the other way round.
    convert(out, tmp_path / "back", 2**16)
    assert verify(tmp_path / "back").folded_layers == 0


def test_folded_scales_have_no_amplifier_and_few_bits(source, tiny, text, tmp_path):
    with pytest.raises(InputError, match="--amplifier") as caught:
        convert(source("gptq"), tmp_path / "out", 1024, folded=True)
    assert_sentence(str(caught.value))
    quantize(tiny("llama"), tmp_path / "wide", recipe("rtn", 8, 32, weights={"symmetric": True}), text)
    with pytest.raises(InputError, match=r"layers\.0\.\S+ has 8 bits") as caught:
        convert(tmp_path / "wide", tmp_path / "out", folded=True)
    assert_sentence(str(caught.value))
    assert not (tmp_path / "out").exists()
