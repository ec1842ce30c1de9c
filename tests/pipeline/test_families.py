"""Every family, every solver: quantize, verify, load, compare with transformers' own model given the same weights."""

import pytest
import torch

from finescale.formats.source import open_checkpoint
from finescale.models import linear_modules, open_skeleton
from finescale.pipeline.verify import verify
from finescale.runtime.checkpoint import open_quantized
from finescale.runtime.load import load, quantized_layers
from tests.helpers import (
    KINDS,
    assert_same_logits,
    logits_of,
    make_model,
    quantize,
    read_tensors,
    recipe,
    reference_model,
    some_tokens,
)

SOLVERS = ("rtn", "gptq", "quantease")
VARIANTS = [(kind, "plain") for kind in KINDS] + [("gpt2", "hub"), ("bloom", "hub"), ("qwen3_moe", "fused")]
# Groups of 40 are ragged for every layer of these models; 32 divides every layer.
FAST = [(4, -1), (3, 40)]
MORE = [(3, -1), (4, 40), (4, 32), (8, 32), (2, 32)]


def check(source, out, report):
    """All that must hold of any result: proof, logits, and untouched tensors."""
    verification = verify(out, source)
    names = {record["name"] for record in report["layers"]}
    assert verification.layers == verification.packed_again == len(names)
    assert verification.copied > 0 and verification.shards == len(list(out.glob("*.safetensors")))
    assert_same_logits(source, out)
    before, after = read_tensors(source), read_tensors(out)
    fused = {key for key in before if key.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
    for key, tensor in before.items():
        if key.removesuffix(".weight") in names or key in fused:
            assert key not in after
        else:
            assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key
    packed = {f"{name}.{suffix}" for name in names for suffix in open_quantized(out).fmt.suffixes}
    assert set(after) <= set(before) | packed


def run_one(tiny, text, out, kind, style, solver, bits, group):
    source = tiny(kind, style=style)
    report = quantize(source, out, recipe(solver, bits, group), text)
    skeleton = open_skeleton(open_checkpoint(source))
    everything = sum(len(linear_modules(block)) for block in skeleton.blocks)
    assert len(report["layers"]) == everything
    assert {(record["bits"], record["group_size"]) for record in report["layers"]} <= {(bits, group), (bits, -1)}
    assert report["model"]["quantized_share"] > 0.97
    check(source, out, report)


@pytest.mark.parametrize(("bits", "group"), FAST)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("kind", "style"), VARIANTS)
def test_quantize_verify_load(tiny, text, tmp_path, kind, style, solver, bits, group):
    run_one(tiny, text, tmp_path / "out", kind, style, solver, bits, group)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group"), MORE)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("kind", "style"), VARIANTS)
def test_quantize_verify_load_more(tiny, text, tmp_path, kind, style, solver, bits, group):
    run_one(tiny, text, tmp_path / "out", kind, style, solver, bits, group)


def test_a_wrong_bias_or_a_lost_layer_would_be_seen(tiny, text, tmp_path):
    """The comparison of logits above is sharp: zeroing any one parameter moves the logits far beyond its tolerance."""
    for kind in ("opt", "bloom", "qwen2", "gpt2"):
        model = make_model(kind)
        before = logits_of(model, some_tokens())
        for name, parameter in model.named_parameters():
            kept = parameter.data.clone()
            parameter.data.zero_()
            moved = float((logits_of(model, some_tokens()) - before).abs().max())
            parameter.data.copy_(kept)
            assert moved > 1e-3 or name.endswith("k_proj.bias"), name  # softmax does not see a bias of all keys


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_quantized_layers_replace_the_modules(tiny, text, tmp_path, kind):
    report = quantize(tiny(kind), tmp_path / "out", recipe(), text)
    layers = quantized_layers(load(tmp_path / "out"))
    assert len(layers) == len(report["layers"])
    shapes = {tuple(record["shape"]) for record in report["layers"]}
    assert {(layer.out_features, layer.in_features) for layer in layers.values()} == shapes


def test_generation_runs_like_the_reference(tiny, text, tmp_path):
    quantize(tiny("qwen2"), tmp_path / "out", recipe("gptq"), text)
    prompt_BT = some_tokens(1, 12)
    options = {"attention_mask": torch.ones_like(prompt_BT), "max_new_tokens": 8, "do_sample": False}
    ours = load(tmp_path / "out").generate(prompt_BT, **options)
    theirs = reference_model(tiny("qwen2"), tmp_path / "out").generate(prompt_BT, **options)
    assert torch.equal(ours, theirs)
