"""What a recipe asks for is what the folder holds."""

import json
import shutil

import pytest
import torch

from finescale.errors import InputError, NumericsError
from finescale.pipeline.quantize import prepare
from finescale.pipeline.verify import verify
from finescale.runtime.checkpoint import open_quantized
from finescale.runtime.load import load, quantized_layers
from finescale.runtime.portable import PortableLinear
from tests.helpers import (
    CHAT_TEMPLATE,
    W4A8,
    assert_same_logits,
    assert_sentence,
    change_tensor,
    hashes,
    lasting_files,
    logits_of,
    quantize,
    read_json,
    read_tensors,
    recipe,
    reference_model,
    some_tokens,
)

INT32 = 2**31


def integer_recipe(mode="before", amplifier="auto", solver="gptq", group=32, **parts):
    return recipe(solver, 4, group, integer_scale={"mode": mode, "amplifier": amplifier}, **W4A8, **parts)


# Types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_stored_in_the_models_type(tiny, text, tmp_path, dtype, symmetric):
    path = tiny("qwen2", dtype)
    report = quantize(path, tmp_path / "out", recipe("gptq", 4, 32, weights={"symmetric": symmetric}), text)
    tensors = read_tensors(tmp_path / "out")
    for record in report["layers"]:
        assert tensors[f"{record['name']}.weight_scale"].dtype == dtype
        assert tensors[f"{record['name']}.weight_packed"].dtype == torch.int32
        assert (f"{record['name']}.weight_zero_point" in tensors) == (not symmetric)
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == dtype
    verify(tmp_path / "out", path)
    # What the solver counted on is what a reader computes with: no scale was rounded on the way to the file.
    assert_same_logits(path, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integer_scales_are_exact_in_the_stored_type(tiny, text, tmp_path, dtype):
    path = tiny("llama", dtype)
    report = quantize(path, tmp_path / "out", integer_recipe(), text)
    tensors = read_tensors(tmp_path / "out")
    for record in report["layers"]:
        scale_OG = tensors[f"{record['name']}.weight_scale"]
        integer_OG = scale_OG.double() * record["amplifier"]
        assert scale_OG.dtype == dtype and torch.equal(integer_OG, integer_OG.round()) and float(integer_OG.min()) >= 1
    assert verify(tmp_path / "out", path).integer_layers == len(report["layers"])


# Integer scales


@pytest.mark.parametrize("mode", ["before", "after"])
@pytest.mark.parametrize("amplifier", [1024, "heuristic", "auto"])
@pytest.mark.parametrize("solver", ["rtn", "gptq", "quantease"])
def test_integer_scales(tiny, text, tmp_path, mode, amplifier, solver):
    path, out = tiny("llama", torch.float16), tmp_path / "out"
    report = quantize(path, out, integer_recipe(mode, amplifier, solver), text)
    assert verify(out, path).integer_layers == len(report["layers"])
    quantized = open_quantized(out)
    for record in report["layers"]:
        chosen = record["amplifier"]
        assert chosen & (chosen - 1) == 0 and chosen >= 1
        assert amplifier != 1024 or chosen == 1024
        weight = quantized.read(record["name"])
        scale_OI = weight.grid.integer_scale_OG().long()[:, weight.grid.group_of_I]
        bound = int((127 * scale_OI * weight.codes_OI.long().abs()).sum(1).max())
        assert bound == record["bound"] < INT32
        assert record["overflow_use"] == bound / INT32 < 1
        assert quantized.metadata["layers"][record["name"]]["bound"] == bound
        if amplifier == "auto":
            # The largest that fits: with twice the amplifier the bound, or S in 16 bits, would not hold any more.
            assert record["overflow_use"] > 0.2 or record["scale_max"] > 2**14
        if amplifier == "heuristic":
            assert record["scale_min"] >= 1 and (chosen == 1 or float(weight.grid.scale_OG.min()) * chosen < 2.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("solver", ["rtn", "gptq", "quantease"])
def test_folded_scales(tiny, text, tmp_path, solver, dtype):
    path, out = tiny("llama", dtype), tmp_path / "out"
    parts = W4A8 | {"weights": {"symmetric": True, "clip": "mse"}}
    chosen = recipe(solver, 4, 16, integer_scale={"mode": "folded"}, **parts)
    report = quantize(path, out, chosen, text)
    assert verify(out, path).folded_layers == len(report["layers"])
    quantized, tensors = open_quantized(out), read_tensors(out)
    for record in report["layers"]:
        name = record["name"]
        assert record["folded"] and record["amplifier"] == 1 and record["amplifier_curve"] is None
        assert record["scale_min"] >= 1 and 8 <= record["scale_max"] <= 15
        assert quantized.metadata["layers"][name]["folded"] is True
        weight = quantized.read(name)
        assert weight.sha256() == record["sha256"]
        integer_OG, factor_O = weight.grid.integer_scale_OG(), weight.grid.channel_scale_O
        stored_OG = tensors[f"{name}.weight_scale"]
        assert stored_OG.dtype == dtype and torch.equal(stored_OG.double(), integer_OG * factor_O.double()[:, None])
        scale_OI = integer_OG.long()[:, weight.grid.group_of_I]
        assert record["bound"] == int((127 * scale_OI * weight.codes_OI.long().abs()).sum(1).max()) < INT32
    # Another engine multiplies the stored scales: the same numbers, but for the order of float sums.
    if dtype == torch.float32:
        expected = logits_of(reference_model(path, out), some_tokens())
        torch.testing.assert_close(logits_of(load(out, rounding="none"), some_tokens()), expected, rtol=1e-4, atol=1e-4)
    floats, integers = (logits_of(load(out, path=way), some_tokens()) for way in ("float", "integer"))
    assert float((floats - integers).abs().amax(-1).median()) < 1e-4


def test_before_is_at_least_as_good_as_after_at_a_coarse_amplifier(tiny, text, tmp_path):
    """The claim of the method: the solver absorbs the rounding of the scales."""
    total = {}
    for mode in ("before", "after"):
        report = quantize(tiny("llama"), tmp_path / mode, integer_recipe(mode, 64), text)
        total[mode] = sum(record["relative_error"] for record in report["layers"] if record["block"] == 0)
    assert total["before"] < total["after"]


def test_integer_and_float_path_agree(tiny, text, tmp_path):
    for kind in ("qwen2", "gpt2", "mixtral"):
        out = tmp_path / kind
        quantize(tiny(kind), out, integer_recipe(solver="rtn"), text)
        floats, integers = load(out), load(out, path="integer")
        exact = [layer for layer in integers.modules() if isinstance(layer, PortableLinear)]
        assert exact or {layer.path for layer in quantized_layers(integers).values()} == {"integer"}
        assert {layer.path for layer in quantized_layers(floats).values()} == {"float"}
        tokens_BT = some_tokens()
        # Both round inputs per token to the same codes; only the order of float sums differs. A code on the edge may
        # still fall to the other side, which moves a few logits a little.
        difference_BT = (logits_of(floats, tokens_BT) - logits_of(integers, tokens_BT)).abs().amax(-1)
        assert float(difference_BT.median()) < 1e-4
        assert float(difference_BT.max()) < 0.5


def test_rounded_inputs_are_part_of_a_w4a8_model(tiny, text, tmp_path):
    """The float path rounds inputs too: its logits are not those of the same weights with float inputs."""
    out, tokens_BT = tmp_path / "out", some_tokens()
    quantize(tiny("llama"), out, integer_recipe(), text)
    rounded, plain = (logits_of(model, tokens_BT) for model in (load(out), reference_model(tiny("llama"), out)))
    assert 1e-4 < float((rounded - plain).abs().mean()) < 0.1


def test_an_amplifier_that_could_overflow_is_refused_with_the_layer(tiny, text, tmp_path):
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.\S+.*overflow int32") as caught:
        quantize(tiny("llama"), tmp_path / "out", integer_recipe(amplifier=2**22), text)
    assert_sentence(str(caught.value))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (6, 31), (4, 7)])
def test_the_bound_is_that_of_the_activations_bits(tiny, text, tmp_path, bits, largest):
    parts = {"weights": {"symmetric": True}, "activations": {"bits": bits}}
    chosen = recipe("rtn", 4, 32, integer_scale={"mode": "after", "amplifier": 1024}, **parts)
    report = quantize(tiny("llama"), tmp_path / "out", chosen, text)
    assert verify(tmp_path / "out").integer_layers == len(report["layers"])
    quantized = open_quantized(tmp_path / "out")
    for record in report["layers"]:
        weight = quantized.read(record["name"])
        scale_OI = weight.grid.integer_scale_OG().long()[:, weight.grid.group_of_I]
        assert record["bound"] == int((largest * scale_OI * weight.codes_OI.long().abs()).sum(1).max())


# Overrides and share


@pytest.mark.parametrize("override", [{"weights": {"bits": 8}}, {"activations": {"bits": 8}}, {"skip": True}])
def test_an_override_that_matches_no_layer_is_refused(tiny, text, tmp_path, override):
    for pattern in ("*.dwon_proj", "re:layers\\.[0-9]+\\.mlp\\.fc1$"):
        chosen = recipe("rtn", overrides=[{"pattern": pattern} | override])
        with pytest.raises(InputError, match="matches no layer") as caught:
            prepare(tiny("llama"), chosen, tmp_path / "o", str(text))
        assert_sentence(str(caught.value))
        assert pattern in str(caught.value)


def test_what_is_never_quantized_may_be_skipped_and_not_changed(tiny, text, tmp_path):
    chosen = recipe(overrides=[{"pattern": "lm_head", "skip": True}])
    assert len(prepare(tiny("llama"), chosen, tmp_path / "o", str(text)).plan.layers) == 14
    with pytest.raises(InputError, match="lm_head"):
        chosen = recipe(overrides=[{"pattern": "lm_head", "weights": {"bits": 8}}])
        prepare(tiny("llama"), chosen, tmp_path / "o", str(text))


def test_overrides_skip_and_change_layers(tiny, text, tmp_path):
    path, out = tiny("llama"), tmp_path / "out"
    overrides = [
        {"pattern": "*.k_proj", "skip": True},
        {"pattern": r"re:layers\.1\.mlp\.down_proj$", "weights": {"bits": 8, "group_size": -1, "symmetric": True}},
    ]
    report = quantize(path, out, recipe("gptq", 3, 32, overrides=overrides), text)
    schemes = {r["name"]: (r["bits"], r["group_size"], r["symmetric"]) for r in report["layers"]}
    assert not [name for name in schemes if name.endswith("k_proj")]
    assert schemes.pop("model.layers.1.mlp.down_proj") == (8, -1, True)
    assert set(schemes.values()) == {(3, 32, False)}
    before, after = read_tensors(path), read_tensors(out)
    for block in (0, 1):
        key = f"model.layers.{block}.self_attn.k_proj.weight"
        assert torch.equal(before[key], after[key])
    assert verify(out, path).layers == 12
    assert_same_logits(path, out)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_whole_block_may_stay_as_it_is(tiny, text, tmp_path, block, sequential):
    """The usual way to protect the first or the last block."""
    path, out = tiny("llama-tied"), tmp_path / "out"
    overrides = [{"pattern": f"model.layers.{block}.*", "skip": True}]
    chosen = recipe("gptq", 4, 32, overrides=overrides, calibration={"true_sequential": sequential})
    report = quantize(path, out, chosen, text, allow_partial=True)
    assert {record["block"] for record in report["layers"]} == {0, 1, 2} - {block}
    assert verify(out, path).layers == 14
    assert_same_logits(path, out)


def test_skipped_experts_of_fused_tensors_are_kept(tiny, text, tmp_path):
    """3-D expert tensors are written expert by expert: also the experts that stay as they are."""
    path, out = tiny("qwen3_moe", style="fused"), tmp_path / "out"
    quantize(path, out, recipe("rtn", overrides=[{"pattern": "*.experts.1.*", "skip": True}]), text, allow_partial=True)
    fused = read_tensors(path)["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(read_tensors(out)["model.layers.0.mlp.experts.1.down_proj.weight"], fused[1])
    verify(out, path)
    assert_same_logits(path, out)


def test_too_small_a_share_is_refused_unless_allowed(tiny, text, tmp_path):
    chosen = recipe("rtn", overrides=[{"pattern": "*.mlp.*", "skip": True}])
    with pytest.raises(InputError, match=r"only \d+%.*--allow-partial") as caught:
        prepare(tiny("llama"), chosen, tmp_path / "out", str(text))
    assert_sentence(str(caught.value))
    assert "model.layers.0.mlp" in str(caught.value)
    assert not (tmp_path / "out").exists()
    report = quantize(tiny("llama"), tmp_path / "out", chosen, text, allow_partial=True)
    assert report["model"]["quantized_share"] < 0.8
    verify(tmp_path / "out", tiny("llama"))


def test_nothing_left_to_quantize(tiny, text, tmp_path):
    chosen = recipe("rtn", overrides=[{"pattern": "*", "skip": True}])
    with pytest.raises(InputError, match="no layer is left"):
        prepare(tiny("llama"), chosen, tmp_path / "out", str(text), allow_partial=True)


@pytest.mark.parametrize("family", ["stablelm", "gemma3_text", "phi3", "olmoe", "lfm2_moe"])
def test_an_unknown_family_needs_the_flag(text, tmp_path, tokenizer, family):
    """Gemma scales its embeddings by a buffer that no file holds; Phi fuses query, key and value; the names of experts
    are seen in the files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
                                  num_attention_heads=4, num_key_value_heads=2, vocab_size=300, pad_token_id=0,
                                  bos_token_id=0, eos_token_id=1, max_position_embeddings=256, num_experts=4,
                                  num_experts_per_tok=2, moe_intermediate_size=32, num_dense_layers=1,
                                  layer_types=["full_attention"] * 2)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="--allow-unknown-family"):
        prepare(tmp_path / "model", recipe(), tmp_path / "out", str(text))
    report = quantize(tmp_path / "model", tmp_path / "out", recipe("gptq", 4, 32), text, allow_unknown_family=True)
    assert report["model"]["family"] == family and report["model"]["quantized_share"] > 0.95
    verify(tmp_path / "out", tmp_path / "model")
    assert_same_logits(tmp_path / "model", tmp_path / "out")


def test_auto_group_size(tiny, text, tmp_path):
    report = quantize(tiny("llama"), tmp_path / "a", recipe("rtn", group="auto"), text)
    assert {record["group_size"] for record in report["layers"]} == {32}  # divides 64 and 96
    report = quantize(tiny("mixtral"), tmp_path / "b", recipe("rtn", group="auto"), text)
    by_width = {record["shape"][1]: record["group_size"] for record in report["layers"]}
    assert by_width == {64: 32, 32: 32} or by_width == {64: 32, 32: -1}
    verify(tmp_path / "a"), verify(tmp_path / "b")


def test_a_group_as_wide_as_the_layer_is_per_channel(tiny, text, tmp_path):
    report = quantize(tiny("llama"), tmp_path / "out", recipe("rtn", group=64), text)
    assert {(r["shape"][1], r["group_size"]) for r in report["layers"]} == {(64, -1), (96, 64)}
    assert any("ragged" in note for note in report["fallbacks"])
    verify(tmp_path / "out")


# What lies beside the weights


def test_tokenizer_template_and_generation_config_are_copied(tiny, text, tmp_path):
    path, out = tiny("llama"), tmp_path / "out"
    quantize(path, out, recipe(), text)
    small = [name for name in lasting_files(path) if name not in ("config.json", "model.safetensors")]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= set(small)
    assert hashes(path, small) == hashes(out, small)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    assert load(out).generation_config.max_new_tokens == 7


def test_code_pickles_and_earlier_reports_are_not_copied(tiny, text, tmp_path):
    path = shutil.copytree(tiny("llama"), tmp_path / "model")
    for name in ("modeling.py", "pytorch_model.bin", "report.json", "run.json", "report.html", ".hidden", "a.gguf"):
        (path / name).write_text("{}")
    (path / "LICENSE").write_text("free")
    quantize(path, tmp_path / "out", recipe(), text)
    names = set(lasting_files(tmp_path / "out"))
    assert "LICENSE" in names
    assert not names & {"modeling.py", "pytorch_model.bin", ".hidden", "a.gguf"}
    assert read_json(tmp_path / "out" / "report.json")["layers"]


def test_config_keeps_every_key_of_the_model(tiny, text, tmp_path):
    path = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = read_json(path / "config.json") | {"a_key_of_another_tool": [1, {"b": None}]}
    (path / "config.json").write_text(json.dumps(config))
    quantize(path, tmp_path / "out", recipe(), text)
    after = read_json(tmp_path / "out" / "config.json")
    quantization = after.pop("quantization_config")
    assert after == config
    assert quantization["quant_method"] == "compressed-tensors" and "lm_head" in quantization["ignore"]
    assert len(quantization["finescale"]["layers"]) == 14


def test_the_index_names_every_tensor_and_the_report_every_file(tiny, text, tmp_path):
    out = tmp_path / "out"
    report = quantize(tiny("llama", style="shards"), out, recipe(), text)
    index = read_json(out / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(read_tensors(out))
    assert index["metadata"]["total_size"] == report["size"]["after_bytes"]
    assert index["metadata"]["total_size"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert report["files"] == hashes(out, [name for name in lasting_files(out) if name != "report.json"])
    assert report["size"]["before_bytes"] == sum(
        file.stat().st_size for file in tiny("llama", style="shards").glob("*.safetensors")
    )


def test_report_facts(tiny, text, tmp_path):
    report = quantize(tiny("llama"), tmp_path / "out", recipe("gptq", 4, 32), text)
    model = report["model"]
    tensors = read_tensors(tiny("llama"))
    assert model["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert model["block_parameters"] == sum(t.numel() for key, t in tensors.items() if ".layers." in key)
    assert model["quantized_parameters"] == sum(
        tensor.numel() for key, tensor in tensors.items() if ".layers." in key and tensor.dim() == 2
    )
    # 4 bits, and a float32 scale and a 4-bit zero point for each 32 weights.
    assert report["size"]["bits_per_weight"] == pytest.approx(4 + (32 + 4) / 32)
    run = read_json(tmp_path / "out" / "run.json")
    assert len(run["blocks"]) == 2 and run["peak_rss_bytes"] > 0 and run["resumed_from_block"] is None
    assert report == read_json(tmp_path / "out" / "report.json")


def test_same_settings_same_bytes_other_seed_other_bytes(tiny, text, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(tiny("llama"), tmp_path / name, recipe("quantease", 3, 32), text, seed=seed)
    first, again, other = (hashes(tmp_path / name, lasting_files(tmp_path / name)) for name in "abc")
    assert first == again
    assert first["model-00002-of-00003.safetensors"] != other["model-00002-of-00003.safetensors"]


# Formats


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "dense", "compressed-tensors", "int-quantized"])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_formats_through_the_pipeline(tiny, text, tmp_path, name, kind):
    path, out = tiny(kind, torch.float16), tmp_path / "out"
    bits = 8 if name == "int-quantized" else 4
    chosen = recipe("gptq", bits, 32, format=name, weights={"symmetric": name == "gptq"})
    report = quantize(path, out, chosen, text)
    verification = verify(out, path)
    assert verification.layers == len(report["layers"])
    assert verification.packed_again == (0 if name == "dense" else len(report["layers"]))
    tokens_BT = some_tokens()
    ours = logits_of(load(out), tokens_BT)
    quantize(path, tmp_path / "same", chosen.model_copy(update={"format": "compressed-tensors"}), text)
    expected = logits_of(reference_model(path, tmp_path / "same"), tokens_BT)
    if name == "dense":  # these weights are rounded to float16 once more
        assert float((ours - expected).abs().mean()) < 1e-2
    else:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["rtn", "gptq", "quantease"])
def test_gptq_version_1_holds_groups_without_negative_weights(tiny, text, tmp_path, solver):
    """Their zero point would be the lowest code, which this layout cannot store: found only when a block is written."""
    path, out = shutil.copytree(tiny("llama", torch.float16), tmp_path / "model"), tmp_path / "out"

    def edit(tensor):
        tensor[3] = 0
        tensor[5] = tensor[5].abs()
        return tensor

    change_tensor(path, "model.layers.1.mlp.up_proj.weight", edit)
    quantize(path, out, recipe(solver, 4, 32, format="gptq"), text)
    verify(out, path)
    assert_same_logits(path, out)
    weight = open_quantized(out).read("model.layers.1.mlp.up_proj")
    assert bool((weight.dequantize()[3] == 0).all())
    if solver == "rtn":
        original_I = read_tensors(path)["model.layers.1.mlp.up_proj.weight"][5].float()
        steps_I = weight.grid.scale_OG[5, weight.grid.group_of_I]
        assert bool(((weight.dequantize()[5] - original_I).abs() <= 0.51 * steps_I).all())


def test_activation_order_with_scattered_groups_in_gptq(tiny, text, tmp_path):
    path, out = tiny("llama", torch.float16), tmp_path / "out"
    options = {"act_order": True, "static_groups": False}
    chosen = recipe("gptq", 4, 32, format="gptq", options=options, weights={"symmetric": True})
    report = quantize(path, out, chosen, text)
    assert read_json(out / "config.json")["quantization_config"]["desc_act"] is True
    orders = [tensor for key, tensor in read_tensors(out).items() if key.endswith("g_idx")]
    assert any(bool((order.diff() < 0).any()) for order in orders)
    assert verify(out, path).packed_again == len(report["layers"])
    assert_same_logits(path, out)
    with pytest.raises(InputError, match="static_groups"):
        prepare(path, chosen.model_copy(update={"format": "compressed-tensors"}), tmp_path / "other", str(text))


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("gptq", {"activations": {"bits": 8}}, "activations"),
        ("awq", {"activations": {"bits": 8}}, "activations"),
        ("awq", {"weights": {"bits": 3}}, "4-bit"),
        ("no-such-format", {}, "unknown format"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_the_work(tiny, text, tmp_path, name, parts, message):
    with pytest.raises(InputError, match=message) as caught:
        prepare(tiny("llama"), recipe("rtn", 4, 32, format=name, **parts), tmp_path / "out", str(text))
    assert_sentence(str(caught.value))
    assert not (tmp_path / "out").exists()
