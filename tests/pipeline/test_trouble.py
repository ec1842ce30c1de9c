"""What cannot work is refused before the work starts; what breaks on the way is named."""

import json
import re
import shutil

import pytest
import torch

from finescale.errors import CheckpointError, InputError, NumericsError
from finescale.pipeline.layers import FEW_TOKENS_DAMPING
from finescale.pipeline.quantize import prepare
from finescale.pipeline.rounds import solve_together
from finescale.pipeline.verify import verify
from finescale.recipe import Recipe
from finescale.runtime.checkpoint import open_quantized
from tests.helpers import assert_sentence, change_tensor, quantize, read_json, recipe

# In the model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parts", [{"solver": "quantease"}, {"transforms": ["smoothquant"]}, {"transforms": ["awq"]}])
def test_nan_in_a_weight_names_the_layer(tiny, text, tmp_path, value, parts):
    """Before anything is computed with it, whose complaint would be about something else."""
    path = shutil.copytree(tiny("llama"), tmp_path / "model")

    def spoil(tensor):
        tensor[3, 5] = value
        return tensor

    change_tensor(path, "model.layers.1.mlp.gate_proj.weight", spoil)
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight") as caught:
        quantize(path, tmp_path / "out", recipe(**parts), text)
    assert_sentence(str(caught.value))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_nan_anywhere_stops_the_run(tiny, text, tmp_path, key):
    path = shutil.copytree(tiny("llama"), tmp_path / "model")

    def spoil(tensor):
        tensor.view(-1)[7] = float("nan")
        return tensor

    change_tensor(path, key, spoil)
    with pytest.raises(NumericsError, match=re.escape(key)) as caught:
        quantize(path, tmp_path / "out", recipe("rtn"), text)
    assert_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("opt", "model.decoder.layers.1.fc2.bias"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
        ("llama", "model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_nan_in_what_the_last_block_keeps_stops_the_run(tiny, text, tmp_path, kind, key):
    """No later block is fed with it: a bias, a router, a layer that the recipe leaves out."""
    path = shutil.copytree(tiny(kind), tmp_path / "model")

    def spoil(tensor):
        tensor.view(-1)[7] = float("inf")
        return tensor

    change_tensor(path, key, spoil)
    overrides = [{"pattern": key.removesuffix(".weight"), "skip": True}] if "down_proj" in key else []
    chosen = recipe("rtn", overrides=overrides)
    with pytest.raises(NumericsError, match=key) as caught:
        quantize(path, tmp_path / "out", chosen, text, allow_partial=True)
    assert_sentence(str(caught.value))
    assert not (tmp_path / "out" / "config.json").exists()


def test_experts_with_too_few_tokens_are_named(tiny, text, tmp_path):
    """One short window cannot fill a 64 x 64 Hessian per expert: each such expert is solved, damped and reported."""
    path, out = tiny("mixtral"), tmp_path / "out"
    report = quantize(path, out, recipe("gptq", 4, 32, calibration={"samples": 1, "length": 16}), text)
    experts = {record["name"]: record for record in report["layers"] if ".experts." in record["name"]}
    assert len(experts) == 24
    for name, record in experts.items():
        if record["tokens"] < record["shape"][1]:
            assert any(line.startswith(f"{name}: short of tokens: {record['tokens']} ") for line in report["fallbacks"])
    assert sum(record["tokens"] < record["shape"][1] for record in experts.values()) >= 16
    verify(out, path)


def test_a_layer_short_of_tokens_is_solved_on_a_damped_hessian(tiny, text, tmp_path):
    """As if the mean of its diagonal, times the damping, had been added to the Hessian of enough tokens."""
    (plan, *_) = prepare(tiny("llama"), recipe("gptq", 3, 32), tmp_path / "out", str(text)).plan.layers
    generator = torch.Generator().manual_seed(0)
    rows, columns = plan.shape_OI
    weight_OI = torch.randn(rows, columns, generator=generator)
    x_TI = torch.randn(8, columns, generator=generator)
    hessian_II = x_TI.T @ x_TI / 8
    damped_II = hessian_II + FEW_TOKENS_DAMPING * hessian_II.diagonal().mean() * torch.eye(columns)

    def solved(matrix_II, tokens):
        layers = [(plan, weight_OI)]
        (result,) = solve_together(layers, matrix_II, tokens, recipe("gptq", 3, 32), torch.float32, 0)
        return result

    few, enough = solved(hessian_II, columns - 1), solved(damped_II, columns)
    assert torch.equal(few.weight.codes_OI, enough.weight.codes_OI)
    assert not torch.equal(few.weight.codes_OI, solved(hessian_II, columns).weight.codes_OI)
    assert few.record["notes"] and not enough.record["notes"]


def test_an_expert_without_any_token_is_still_quantized(tiny, text, tmp_path):
    path = shutil.copytree(tiny("mixtral"), tmp_path / "model")
    for block in (0, 1):  # routers that always choose the first two experts
        change_tensor(path, f"model.layers.{block}.block_sparse_moe.gate.weight", lambda tensor: tensor * 0)
    for solver in ("rtn", "gptq", "quantease"):
        report = quantize(path, tmp_path / solver, recipe(solver, 4, 32), text)
        idle = [record for record in report["layers"] if record["tokens"] == 0]
        assert len(idle) == 2 * 2 * 3 and all(record["weight_mse"] < 1e-3 for record in idle)
        assert solver == "rtn" or all("short of tokens: 0" in record["notes"][0] for record in idle)
        verify(tmp_path / solver, path)


@pytest.mark.parametrize("solver", ["gptq", "quantease"])
def test_dead_inputs_and_dead_rows(tiny, text, tmp_path, solver):
    """Units that never fire and outputs whose weights are all zero, as pruned models have."""
    path = shutil.copytree(tiny("opt"), tmp_path / "model")

    def zero_rows(tensor):
        tensor[:7] = 0
        return tensor

    change_tensor(path, "model.decoder.layers.0.fc1.weight", zero_rows)
    change_tensor(path, "model.decoder.layers.0.fc1.bias", lambda tensor: tensor.clamp(max=-0.1))
    report = quantize(path, tmp_path / "out", recipe(solver, 4, 32), text)
    weight = open_quantized(tmp_path / "out").read("model.decoder.layers.0.fc1")
    assert torch.equal(weight.dequantize()[:7], torch.zeros(7, 64))
    assert all(0 <= record["relative_error"] < 0.2 for record in report["layers"])
    verify(tmp_path / "out", path)


# In the settings


def test_what_the_recipe_does_not_ask_for_gives_way(tiny, tmp_path):
    """Defaults of 128 x 2048 tokens shrink to what a short model and a short text give; what is asked for does not."""
    short = tmp_path / "short.txt"
    from finescale.calibration.data import builtin_text

    short.write_text(builtin_text()[:16_000])
    job = prepare(tiny("llama"), Recipe.named("gptq"), tmp_path / "out", str(short))
    facts = job.calibration.facts()
    assert facts["length"] == 256 and 16 <= facts["samples"] < 128
    assert any("fewer than the usual 128" in note for note in job.notes)
    with pytest.raises(InputError, match="256 positions"):
        prepare(tiny("llama"), Recipe.load("gptq", ("calibration.length=512",)), tmp_path / "out", str(short))
    with pytest.raises(InputError, match="--samples"):
        prepare(tiny("llama"), Recipe.load("gptq", ("calibration.samples=128",)), tmp_path / "out", str(short))
    assert prepare(tiny("llama"), Recipe.named("rtn"), tmp_path / "out", str(short)).calibration.tokens_BT.shape[0] == 8


def test_a_tokenizer_of_another_model_is_refused(tiny, text, tmp_path):
    path = shutil.copytree(tiny("llama"), tmp_path / "model")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        change_tensor(path, key, lambda tensor: tensor[:150])
    config = read_json(path / "config.json") | {"vocab_size": 150}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another model") as caught:
        prepare(path, recipe(), tmp_path / "out", str(text))
    assert_sentence(str(caught.value))


@pytest.mark.parametrize("device", ["warp", "cuda:99", "meta"])
def test_devices_that_are_not_here(tiny, text, tmp_path, device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(InputError, match="--device") as caught:
        prepare(tiny("llama"), recipe(), tmp_path / "out", str(text), device=device)
    assert_sentence(str(caught.value))


def test_a_quantized_model_is_not_quantized_again(tiny, text, tmp_path):
    quantize(tiny("llama"), tmp_path / "out", recipe(), text)
    with pytest.raises(InputError, match="already quantized"):
        prepare(tmp_path / "out", recipe(), tmp_path / "again", str(text))


def test_tensor_parallel_is_checked(tiny, text, tmp_path):
    prepare(tiny("llama"), recipe("rtn", 4, 32), tmp_path / "out", str(text), tensor_parallel=1)
    with pytest.raises(InputError) as caught:
        prepare(tiny("llama"), recipe("rtn", 4, 32), tmp_path / "out", str(text), tensor_parallel=4)
    assert_sentence(str(caught.value))
    with pytest.raises(InputError):
        prepare(tiny("llama"), recipe("rtn", 4, -1), tmp_path / "out", str(text), tensor_parallel=5)
    prepare(tiny("llama"), recipe("rtn", 4, -1), tmp_path / "out", str(text), tensor_parallel=2)


def test_too_full_a_disk_or_too_little_memory_is_refused_before_the_work(tiny, text, tmp_path, monkeypatch):
    from types import SimpleNamespace

    import finescale.pipeline.plan as plan

    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="GB free") as caught:
        prepare(tiny("llama"), recipe(), tmp_path / "out", str(text))
    assert_sentence(str(caught.value))
    monkeypatch.undo()
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(InputError, match="of memory") as caught:
        prepare(tiny("llama"), recipe(), tmp_path / "out", str(text))
    assert_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("limit", "used"), [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")]
)
def test_the_limit_of_a_container_counts(tmp_path, limit, used):
    import psutil

    from finescale.pipeline.plan import available_memory

    folder = tmp_path / "memory" if "bytes" in limit else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / used).write_text("700000\n")
    (folder / "memory.stat").write_text("anon 500000\nactive_file 50000\ninactive_file 100000\nworkingset_nodes 7\n")
    (folder / limit).write_text("1000000\n")
    assert available_memory(tmp_path) == 1_000_000 - 700_000 + 150_000
    for value in ("max\n", "9223372036854771712\n"):  # no limit, as version 2 and version 1 say it
        (folder / limit).write_text(value)
        assert 0.5 < available_memory(tmp_path) / psutil.virtual_memory().available < 2
    assert available_memory(tmp_path / "nowhere") > 1_000_000


def test_blocks_beyond_the_config_are_noted(tiny, text, tmp_path):
    """The file of a larger model with the config of a smaller one: transformers too would leave a block out."""
    path = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = read_json(path / "config.json")
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    (note,) = prepare(path, recipe(), tmp_path / "out", str(text)).notes
    assert "no place for 7 weights" in note and "model.layers.1." in note


def test_what_is_written_already_needs_no_disk_and_spilled_activations_do(tiny, text, tmp_path, monkeypatch):
    """A run that goes on, or is complete, on a disk that has room for one result; --spill on one that has not more."""
    from types import SimpleNamespace

    import finescale.pipeline.plan as plan

    out = tmp_path / "out"
    quantize(tiny("llama"), out, recipe(), text)
    needed = prepare(tiny("llama"), recipe(), tmp_path / "new", str(text)).output_bytes
    enough = (16 << 20) + 1000
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=enough))
    assert quantize(tiny("llama"), out, recipe(), text)["already_complete"]
    (out / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="GB free"):
        prepare(tiny("llama"), recipe(), out, str(text))
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(needed * 1.05) + enough))
    prepare(tiny("llama"), recipe(), tmp_path / "new", str(text))
    with pytest.raises(InputError, match="GB free"):
        prepare(tiny("llama"), recipe(), tmp_path / "new", str(text), spill=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_floats_are_not_taken_for_numbers(tiny, text, tmp_path, dtype):
    """Codes without their scales, as in a quantized file whose config lost its quantization_config."""
    path = shutil.copytree(tiny("llama"), tmp_path / "model")
    change_tensor(path, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.to(dtype))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is stored as") as caught:
        prepare(path, recipe(), tmp_path / "out", str(text))
    assert_sentence(str(caught.value))


def test_a_missing_tensor_is_found_before_the_work(tiny, text, tmp_path):
    for name, change in (("missing", lambda _: None), ("other-shape", lambda tensor: tensor[:-1])):
        path = shutil.copytree(tiny("llama"), tmp_path / name)
        change_tensor(path, "model.layers.1.mlp.down_proj.weight", change)
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight") as caught:
            prepare(path, recipe(), tmp_path / "out", str(text))
        assert_sentence(str(caught.value))
        assert not (tmp_path / "out").exists()
