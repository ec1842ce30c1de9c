"""The skeleton computes what transformers computes, bit for bit, with the names each checkpoint happens to use."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from finescale.calibration.capture import capture_block_inputs, run_block
from finescale.errors import CheckpointError, InputError
from finescale.formats.source import open_checkpoint
from finescale.models import linear_modules, open_skeleton
from finescale.models.skeleton import (
    check_tensors,
    checkpoint_key,
    fill_except_blocks,
    fill_module,
    layer_name,
    read_tensor,
    release_except_blocks,
    release_module,
    set_weight_OI,
    weight_OI_of,
)
from finescale.runtime.load import load
from tests.helpers import (
    EXPERT_KINDS,
    KINDS,
    assert_sentence,
    change_tensor,
    logits_of,
    make_model,
    read_json,
    read_tensors,
    save_model,
    some_tokens,
)

CPU = torch.device("cpu")
VARIANTS = [(kind, "plain") for kind in KINDS] + [
    ("gpt2", "hub"),
    ("bloom", "hub"),
    ("qwen2_moe", "fused"),
    ("qwen3_moe", "fused"),
    ("llama", "shards"),
]


def reference(path, kind):
    # Experts one by one, as the skeleton runs them; the other ways of transformers sum in another order.
    options = {"experts_implementation": "eager"} if kind in EXPERT_KINDS else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


@pytest.mark.parametrize(("kind", "style"), VARIANTS)
def test_block_by_block_equals_transformers_bit_for_bit(tiny, kind, style):
    path = tiny(kind, style=style)
    batches = [some_tokens(2, 40, seed=1), some_tokens(1, 40, seed=2)]
    theirs = []
    with torch.no_grad():
        for tokens_BT in batches:
            output = reference(path, kind)(input_ids=tokens_BT, output_hidden_states=True, use_cache=False)
            theirs.append(output.hidden_states)
    skeleton = open_skeleton(open_checkpoint(path))
    inputs = capture_block_inputs(skeleton, batches, CPU, torch.float32)
    hidden = inputs.hidden
    for index in range(skeleton.block_count):
        for ours, states in zip(hidden, theirs, strict=True):
            assert torch.equal(ours, states[index]), f"inputs of block {index}"
        block = fill_module(skeleton, skeleton.block_path(index), CPU, torch.float32)
        hidden = [run_block(block, x_BTI, inputs.kwargs[x_BTI.shape[0]][index]) for x_BTI in hidden]
        release_module(block)
    # transformers' last hidden states have gone through the final norm.
    fill_except_blocks(skeleton, CPU, torch.float32)
    norms = [module for name, module in skeleton.model.base_model.named_modules() if _is_final_norm(skeleton, name)]
    for ours, states in zip(hidden, theirs, strict=True):
        assert torch.equal(norms[-1](ours), states[-1])


def _is_final_norm(skeleton, name):
    leaf = name.rpartition(".")[2]
    inside = name.startswith(skeleton.blocks_path.partition(".")[2] + ".")
    return not inside and leaf in ("norm", "ln_f", "final_layer_norm")


@pytest.mark.parametrize(("kind", "style"), VARIANTS)
def test_a_loaded_model_equals_transformers(tiny, kind, style):
    path, tokens_BT = tiny(kind, style=style), some_tokens()
    assert torch.equal(logits_of(load(path), tokens_BT), logits_of(reference(path, kind), tokens_BT))


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_names_with_and_without_base_prefix(tiny, kind):
    plain, hub = (open_skeleton(open_checkpoint(tiny(kind, style=style))) for style in ("plain", "hub"))
    for name, _ in plain.model.named_parameters():
        with_prefix, without = checkpoint_key(plain, name), checkpoint_key(hub, name)
        if name == "lm_head.weight":
            assert with_prefix is None and without is None  # tied
            continue
        assert with_prefix == name
        assert without == name.removeprefix("transformer.")
        assert torch.equal(read_tensor(plain, name), read_tensor(hub, name))
    first = next(iter(linear_modules(hub.blocks[0])))
    assert layer_name(hub, f"transformer.h.0.{first}") == f"h.0.{first}"


def test_mixtral_layers_are_named_as_in_the_checkpoint(tiny):
    skeleton = open_skeleton(open_checkpoint(tiny("mixtral")))
    name = layer_name(skeleton, "model.layers.0.mlp.experts.3.w2")
    assert name == "model.layers.0.block_sparse_moe.experts.3.w2"
    assert name + ".weight" in skeleton.source


def test_linears_leave_out_routers_and_expert_gates(tiny):
    for kind in EXPERT_KINDS:
        names = linear_modules(open_skeleton(open_checkpoint(tiny(kind))).blocks[0])
        assert not [name for name in names if name.endswith("gate")]
        assert len([name for name in names if ".experts." in name]) == 4 * 3


def test_conv1d_weights_are_turned(tiny):
    skeleton = open_skeleton(open_checkpoint(tiny("gpt2")))
    block = fill_module(skeleton, "transformer.h.0", CPU, torch.float32)
    module = block.attn.c_attn
    weight_OI = weight_OI_of(module).clone()
    assert weight_OI.shape == (3 * 64, 64) and module.weight.shape == (64, 3 * 64)
    x_TI = torch.randn(3, 64)
    assert torch.allclose(module(x_TI), x_TI @ weight_OI.T + module.bias, atol=1e-5)
    set_weight_OI(module, 2 * weight_OI)
    assert torch.equal(module.weight, 2 * weight_OI.T)


def test_release_gives_all_memory_back(tiny):
    skeleton = open_skeleton(open_checkpoint(tiny("llama")))
    fill_except_blocks(skeleton, CPU, torch.float32)
    fill_module(skeleton, skeleton.block_path(1), CPU, torch.float32)
    assert any(tensor.device.type == "cpu" for tensor in skeleton.model.state_dict().values())
    release_except_blocks(skeleton)
    release_module(skeleton.blocks[1])
    everything = [*skeleton.model.parameters(), *skeleton.model.buffers()]
    assert all(tensor.device.type == "meta" for tensor in everything)


def test_stored_types_are_converted(tiny):
    path = tiny("llama", torch.bfloat16)
    skeleton = open_skeleton(open_checkpoint(path))
    block = fill_module(skeleton, skeleton.block_path(0), CPU, torch.float32)
    stored = read_tensors(path)["model.layers.0.self_attn.q_proj.weight"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(block.self_attn.q_proj.weight, stored.float())


@pytest.fixture
def broken(tiny, tmp_path):
    return shutil.copytree(tiny("llama"), tmp_path / "model")


def test_a_missing_tensor_is_named(broken):
    change_tensor(broken, "model.layers.1.mlp.up_proj.weight", lambda _: None)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        load(broken)
    assert_sentence(str(caught.value))


def test_a_wrong_shape_is_named_with_both_shapes(broken):
    change_tensor(broken, "model.norm.weight", lambda tensor: tensor[:60])
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \(60,\).*\(64,\)") as caught:
        load(broken)
    assert_sentence(str(caught.value))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 65},
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"model_type": "llama", "hidden_act": "no_such_activation"},
    ],
)
def test_a_config_that_transformers_refuses_gives_one_sentence(broken, change):
    config = read_json(broken / "config.json") | change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises((InputError, CheckpointError)) as caught:
        load(broken)
    assert_sentence(str(caught.value))


def test_a_model_without_a_list_of_blocks_is_refused(tiny):
    from finescale.models.skeleton import find_blocks

    model = make_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="no list of 7 equal blocks"):
        find_blocks(model)


def test_names_that_only_transformers_uses_are_said(tiny):
    skeleton = open_skeleton(open_checkpoint(tiny("mixtral", style="fused")))
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.gate\.weight.*save_original_format=True"
    ) as caught:
        check_tensors(skeleton)
    assert_sentence(str(caught.value))


def test_remote_code_is_never_run(tiny, tmp_path, tokenizer):
    """A folder with its own model class and an auto_map, whose code would leave a mark."""
    folder = save_model(make_model("llama"), tokenizer, tmp_path / "model")
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    config = read_json(folder / "config.json") | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        open_skeleton(open_checkpoint(folder), allow_unknown=True)
    assert_sentence(str(caught.value))
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:attention"},
        {"text_config": {"attn_implementation": {"": "someone/kernel"}}},
        {"experts_implementation": "someone/kernel"},
    ],
)
def test_code_of_the_hub_is_never_fetched(tiny, tmp_path, monkeypatch, change):
    """transformers loads attention from a hub repository that config.json names, without asking."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "eager"}))
    open_skeleton(open_checkpoint(folder))
    (folder / "config.json").write_text(json.dumps(config | change))
    monkeypatch.setattr("finescale.models.skeleton.build_empty", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match="code of the hub") as caught:
        open_skeleton(open_checkpoint(folder))
    assert_sentence(str(caught.value))


def test_files_stay_mapped_only_while_they_are_read(tiny, tmp_path):
    # A copy: transformers' own loader, in other tests, keeps the shared folder's file mapped.
    skeleton = open_skeleton(open_checkpoint(shutil.copytree(tiny("llama"), tmp_path / "model")))
    fill_except_blocks(skeleton, CPU, torch.float64)
    block = fill_module(skeleton, skeleton.block_path(0), CPU, torch.float64)
    assert not any(parameter.device.type == "meta" for parameter in block.parameters())
    with open("/proc/self/maps") as stream:
        assert not [line for line in stream if str(skeleton.source.path) in line]
