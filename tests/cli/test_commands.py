"""Every command through the real entry point: what it prints, what it writes, and how it refuses."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from finescale._version import __version__
from finescale.cli import main as entry
from tests.helpers import W4A8, assert_sentence, command, hashes, quantize, read_json, recipe


@pytest.fixture(scope="module")
def result(tiny, text, tmp_path_factory):
    """A W4A8 checkpoint with integer scales."""
    out = tmp_path_factory.mktemp("result") / "out"
    integer = {"mode": "before", "amplifier": "auto"}
    quantize(tiny("llama", torch.float16), out, recipe("gptq", 4, 32, integer_scale=integer, **W4A8), text)
    return out


WINDOWS = ("--samples", "4", "--length", "48")


def refused(answer, *words):
    """Exit code 1, one sentence after ``Error:``, nothing else on either stream, no traceback."""
    code, out, err = answer
    assert code == 1, (code, out, err)
    assert err.startswith("Error: ") and "Traceback" not in out + err
    assert_sentence(err.removeprefix("Error: "))
    for word in words:
        assert word in err, err
    return err


def test_a_stopped_command_says_whether_it_goes_on(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "app", stop)
    for name, goes_on in (("quantize", True), ("evaluate", False)):
        monkeypatch.setattr(sys, "argv", ["finescale", name])
        with pytest.raises(SystemExit) as end:
            entry.main()
        assert end.value.code == 130
        assert ("go on with what is left" in capsys.readouterr().err) is goes_on


# quantize


def test_quantize(cli, tiny, text, tmp_path):
    out, report_file = tmp_path / "out", tmp_path / "deep" / "report.json"
    options = (
        "--recipe",
        "w4a8-integer-scale",
        "--set",
        "solver.sweeps=3",
        "--calibration",
        text,
        "--json",
        report_file,
    )
    code, stdout, stderr = cli("quantize", tiny("llama", torch.float16), "--out", out, *options, *WINDOWS)
    assert code == 0, stderr
    assert "14 layers of 2 blocks" in stdout and str(out) in stdout and "calibration 4 x 48 tokens" in stdout
    report = read_json(report_file)
    assert report == read_json(out / "report.json")
    assert report["recipe_name"] == "w4a8-integer-scale" and report["recipe"]["solver"]["sweeps"] == 3
    assert {record["group_size"] for record in report["layers"]} == {32}
    assert (out / "report.html").stat().st_size > 10_000
    before = hashes(out, [name for name in hashes(out) if name != "report.html"])
    code, stdout, _ = cli("quantize", tiny("llama", torch.float16), "--out", out, *options, *WINDOWS)
    assert code == 0 and "already holds this result" in stdout
    assert hashes(out, before) == before
    refused(cli("quantize", tiny("llama", torch.float16), "--out", out, *options, *WINDOWS, "--seed", 7), "--fresh")
    code, _, _ = cli("quantize", tiny("llama", torch.float16), "--out", out, *options, *WINDOWS, "--seed", 7, "--fresh")
    assert code == 0 and read_json(out / "report.json")["calibration"]["seed"] == 7


def test_dry_run_writes_nothing(cli, tiny, text, tmp_path):
    out = tmp_path / "out"
    answer = cli(
        "quantize", tiny("llama"), "--recipe", "gptq", "--out", out, "--calibration", text, *WINDOWS, "--dry-run"
    )
    assert answer[0] == 0 and "14 layers" in answer[1] and "of memory" in answer[1]
    assert not out.exists()


def test_a_recipe_file(cli, tiny, text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("weights: {bits: 3, group_size: 32}\nsolver: {name: gptq, act_order: true}\n")
    options = ("--calibration", text, *WINDOWS, "--format", "gptq_v2", "--seed", 3)
    code, _, stderr = cli("quantize", tiny("llama"), "--recipe", file, "--out", tmp_path / "out", *options)
    assert code == 0, stderr
    report = read_json(tmp_path / "out" / "report.json")
    assert report["recipe_name"] == "mine" and report["recipe"]["solver"]["act_order"] is True
    assert report["calibration"]["seed"] == 3
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["checkpoint_format"] == "gptq_v2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recipe", "no-such-recipe"), ["no-such-recipe", "w4a8-integer-scale"]),
        (("--recipe", "missing.yaml"), ["missing.yaml", "does not exist"]),
        (("--recipe", "gptq", "--set", "weights.color=3"), ["weights.color"]),
        (("--recipe", "gptq", "--set", "colour=3"), ["colour"]),
        (("--recipe", "gptq", "--set", "solver.sweeps=3"), ["sweeps"]),
        (("--recipe", "gptq", "--set", "weights.bits=5"), ["5"]),
        (("--recipe", "gptq", "--set", "weights.bits=many"), ["weights.bits"]),
        (("--recipe", "gptq", "--set", "weights.bits"), ["key=value"]),
        (("--recipe", "gptq", "--set", "weights.bits=["), ["weights.bits"]),
        (("--recipe", "gptq", "--set", "solver.name=magic"), ["magic", "quantease"]),
        (("--recipe", "gptq", "--set", "integer_scale.mode=before"), ["symmetric"]),
        (("--recipe", "w4a8-integer-scale", "--set", "integer_scale.amplifier=1000"), ["power of two"]),
        (("--recipe", "gptq", "--format", "papyrus"), ["papyrus", "awq"]),
        (("--recipe", "gptq", "--samples", "100000"), ["--samples"]),
        (("--recipe", "gptq", "--samples", "0"), ["samples"]),
        (("--recipe", "gptq", "--seed", "-1"), ["--seed"]),
        (("--recipe", "gptq", "--seed", "18446744073709551616"), ["--seed"]),
        (("--recipe", "gptq", "--device", "cuda:99"), ["--device"]),
        (("--recipe", "gptq", "--tp", "0"), ["--tp"]),
        (("--recipe", "gptq", "--length", "512"), ["256 positions"]),
        (("--recipe", "gptq", "--calibration", "no-such-text.txt"), ["no-such-text.txt"]),
        (("--recipe", "gptq", "--device", "warp"), ["--device"]),
        (("--recipe", "gptq", "--tp", "3"), []),
        (("--recipe", "gptq", "--set", "overrides=[{pattern: '*mlp*', skip: true}]"), ["--allow-partial"]),
    ],
)
def test_quantize_refuses(cli, tiny, text, tmp_path, options, words):
    out = tmp_path / "out"
    defaults = {"--calibration": text, "--samples": "4", "--length": "48"}
    chosen = [item for key, value in defaults.items() if key not in options for item in (key, value)]
    refused(cli("quantize", tiny("llama"), "--out", out, *options, *chosen), *words)
    assert not out.exists()


def test_tensor_parallel_that_cuts_a_group(cli, tiny, text, tmp_path):
    options = ("--recipe", "gptq", "--set", "weights.group_size=32", "--tp", "2", "--calibration", text, *WINDOWS)
    err = refused(cli("quantize", tiny("llama"), "--out", tmp_path / "out", *options))
    assert "group" in err and "down_proj" in err  # 96 inputs over 2 devices are 48, and 48 is no multiple of 32


def test_models_that_cannot_be_quantized(cli, tiny, text, tmp_path, result):
    options = ("--recipe", "rtn", "--out", tmp_path / "out", "--calibration", text, *WINDOWS)
    refused(cli("quantize", tmp_path / "nowhere", *options), "does not exist")
    refused(cli("quantize", "no-such-owner/no-such-model", *options), "neither a folder here nor reachable")
    refused(cli("quantize", tmp_path / "model.gguf", *options), "does not exist")
    refused(cli("quantize", result, *options), "already quantized", "convert")
    unknown = shutil.copytree(tiny("llama"), tmp_path / "unknown")
    config = read_json(unknown / "config.json") | {"model_type": "gpt_bigcode"}
    (unknown / "config.json").write_text(json.dumps(config))
    refused(cli("quantize", unknown, *options), "gpt_bigcode", "--allow-unknown-family")
    truncated = shutil.copytree(tiny("llama"), tmp_path / "truncated")
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(cli("quantize", truncated, *options), "truncated")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "a").write_text("x")
    refused(cli("quantize", tiny("llama"), "--recipe", "rtn", "--out", tmp_path / "busy"), "did not write")


def test_a_recipe_file_in_another_encoding(cli, tiny, text, tmp_path):
    (tmp_path / "r.yaml").write_bytes("description: Straße".encode("latin-1"))
    answer = cli("quantize", tiny("llama"), "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "out")
    refused(answer, "r.yaml", "not UTF-8")


def test_a_bad_line_of_jsonl_is_named(cli, tiny, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n{"body": "y"}\n')
    refused(
        cli("quantize", tiny("llama"), "--recipe", "rtn", "--out", tmp_path / "out", "--calibration", file), "line 2"
    )


def test_square_brackets_in_a_message_are_printed_as_they_are(cli, tmp_path):
    refused(cli("inspect", tmp_path / "[bold]x[/bold]"), "[bold]x[/bold]")


# inspect, verify, convert, evaluate


def test_inspect(cli, result, tmp_path):
    code, stdout, _ = cli("inspect", result, "--json", tmp_path / "layers.json")
    assert code == 0 and "2^31" in stdout
    layers, report = read_json(tmp_path / "layers.json"), read_json(result / "report.json")
    assert isinstance(layers, list) and len(layers) == 14
    for layer in layers:
        record = next(record for record in report["layers"] if record["name"] == layer["name"])
        assert (layer["bits"], layer["group_size"]) == (4, 32)
        for key in ("amplifier", "overflow_use", "relative_error", "shape", "symmetric"):
            assert layer[key] == record[key], key
        assert 0 < layer["overflow_use"] < 1 and 0 < layer["relative_error"] < 0.1


def test_inspect_for_another_device(cli, result, tmp_path):
    code, stdout, _ = cli("inspect", result, "--device", "7.5", "--json", tmp_path / "layers.json")
    assert code == 0 and "from 8.0 on" in " ".join(stdout.split())
    assert {layer["kernel"] for layer in read_json(tmp_path / "layers.json")} == {"reference"}
    code, stdout, _ = cli("inspect", result, "--device", "cpu")
    assert code == 0 and ("int8 products" in " ".join(stdout.split()))
    refused(cli("inspect", result, "--device", "tpu"), "compute capability")


def test_inspect_without_integer_scales_or_report(cli, tiny, text, tmp_path):
    quantize(tiny("llama"), tmp_path / "out", recipe("rtn", 3, -1), text)
    (tmp_path / "out" / "report.json").unlink()
    code, stdout, _ = cli("inspect", tmp_path / "out", "--json", tmp_path / "layers.json")
    assert code == 0 and "int32 proof" not in stdout
    for layer in read_json(tmp_path / "layers.json"):
        assert (layer["bits"], layer["group_size"], layer["amplifier"]) == (3, -1, None)
        assert layer["overflow_use"] is None and layer["relative_error"] is None
    refused(cli("inspect", tiny("llama")), "not quantized")
    refused(cli("inspect", tmp_path / "nowhere"), "does not exist")


def test_verify(cli, result, tiny, tmp_path):
    original = tiny("llama", torch.float16)
    code, stdout, _ = cli("verify", result, "--against", original, "--json", tmp_path / "proof.json")
    assert code == 0 and stdout.count("ok ") == 5
    proof = read_json(tmp_path / "proof.json")
    assert proof["ok"] is True and proof["layers"] == proof["integer_layers"] == 14 and proof["copied"] == 7
    damaged = shutil.copytree(result, tmp_path / "damaged")
    from tests.helpers import change_tensor

    change_tensor(damaged, "model.layers.0.mlp.up_proj.weight_packed", lambda tensor: tensor ^ 1)
    refused(cli("verify", damaged, "--json", tmp_path / "no.json"), "model.layers.0.mlp.up_proj")
    assert not (tmp_path / "no.json").exists()
    refused(cli("verify", result, "--against", tmp_path / "nowhere"), "does not exist")
    refused(cli("verify", original), "not quantized")


def test_verify_claims_no_more_of_dense_weights_than_it_can_prove(cli, tiny, text, tmp_path):
    quantize(tiny("gpt2"), tmp_path / "out", recipe("rtn", 4, 32, format="dense"), text)
    code, stdout, _ = cli("verify", tmp_path / "out", "--against", tiny("gpt2"))
    assert code == 0 and "lie on grids" in stdout and "codes and scales as computed" not in stdout


@pytest.mark.parametrize("amplifier", ["²", "1e3", "", "-1"])
def test_convert_refuses(cli, result, tmp_path, amplifier):
    refused(cli("convert", result, "--out", tmp_path / "out", "--amplifier", amplifier), "--amplifier")


def test_convert(cli, tiny, text, tmp_path):
    quantize(tiny("llama"), tmp_path / "model", recipe("rtn", 4, 32, weights={"symmetric": True}), text)
    code, stdout, _ = cli("convert", tmp_path / "model", "--out", tmp_path / "out", "--json", tmp_path / "r.json")
    assert code == 0 and "14 layers" in stdout
    assert all(record["amplifier"] for record in read_json(tmp_path / "r.json")["layers"])
    assert cli("verify", tmp_path / "out", "--against", tiny("llama"))[0] == 0
    again = cli("convert", tmp_path / "model", "--out", tmp_path / "again", "--amplifier", "1024", "--round-again")
    assert again[0] == 0 and "amplifiers 1024;" in again[1]
    options = ("--out", tmp_path / "third")
    code, stdout, _ = cli("convert", tmp_path / "model", "--out", tmp_path / "folded", "--folded")
    assert code == 0 and "folded scales" in stdout
    assert "scales are 1 to 15 times one factor per output" in cli("verify", tmp_path / "folded")[1]
    assert "folded" in cli("inspect", tmp_path / "folded")[1]
    refused(cli("convert", tmp_path / "model", *options, "--folded", "--amplifier", "64"), "--amplifier")
    refused(cli("convert", tmp_path / "model", *options, "--amplifier", "much"), "power of two")
    refused(cli("convert", tmp_path / "model", *options, "--amplifier", "1000"), "power of two")
    refused(cli("convert", tmp_path / "model", *options, "--amplifier", "-4"), "power of two")
    refused(cli("convert", tiny("llama"), *options), "not quantized")
    refused(cli("convert", tmp_path / "model", "--out", tmp_path / "out", "--amplifier", "64"), "--fresh")
    assert cli("convert", tmp_path / "model", "--out", tmp_path / "out", "--amplifier", "64", "--fresh")[0] == 0


def test_evaluate(cli, result, tiny, text, tmp_path):
    original = tiny("llama", torch.float16)
    options = ("--text", text, "--windows", 3, "--length", 60)
    code, stdout, stderr = cli("evaluate", result, *options, "--against", original, "--json", tmp_path / "e.json")
    assert code == 0, stderr
    facts = read_json(tmp_path / "e.json")
    assert facts["windows"] == 3 and facts["tokens"] == 3 * 59 and facts["length"] == 60
    assert facts["perplexity"] > 1 and facts["kl"] > 0 and 0 < facts["top1"] <= 1
    assert "3 windows of 60 tokens, 177 predicted, without BOS" in stdout
    import finescale

    again = finescale.evaluate(result, str(text), windows=3, length=60)
    assert facts["perplexity"] == again.perplexity and facts["text_sha256"] == again.text_sha256
    code, _, _ = cli("evaluate", result, *options, "--integer", "--bos", "--json", tmp_path / "i.json")
    integer = read_json(tmp_path / "i.json")
    assert code == 0 and integer["bos"] is True and integer["perplexity"] != facts["perplexity"]
    assert cli("evaluate", original, *options, "--dtype", "bfloat16", "--json", tmp_path / "b.json")[0] == 0
    assert read_json(tmp_path / "b.json")["dtype"] == "bfloat16"


def test_evaluate_uses_the_whole_text_and_the_models_length(cli, tiny, tmp_path):
    from finescale.calibration.data import builtin_text

    (tmp_path / "a.txt").write_text(builtin_text()[:3000])
    code, _, _ = cli("evaluate", tiny("llama"), "--text", tmp_path / "a.txt", "--json", tmp_path / "e.json")
    facts = read_json(tmp_path / "e.json")
    assert code == 0 and facts["length"] == 256 and facts["windows"] >= 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--windows", "99999"), ["--windows"]),
        (("--windows", "0"), ["at least 1"]),
        (("--length", "1"), ["at least 2"]),
        (("--length", "0"), ["at least 2"]),
        (("--integer",), ["--integer", "has none"]),
        (("--length", "100000"), ["256 positions"]),
        (("--dtype", "int3"), ["--dtype"]),
        (("--device", "warp"), ["--device"]),
        (("--text", "no-such.txt"), ["no-such.txt"]),
        (("--against", "./nowhere"), ["nowhere"]),
    ],
)
def test_evaluate_refuses(cli, tiny, text, options, words):
    defaults = {"--text": text, "--windows": "2", "--length": "60"}
    chosen = [item for key, value in defaults.items() if key not in options for item in (key, value)]
    refused(cli("evaluate", tiny("llama"), *chosen, *options), *words)


# The rest


def test_recipes(cli, tmp_path):
    from finescale.recipes import recipe_names

    code, stdout, _ = cli("recipes", "--json", tmp_path / "r.json")
    assert code == 0 and set(read_json(tmp_path / "r.json")) == set(recipe_names())
    assert all(name in stdout for name in recipe_names())
    code, stdout, _ = cli("recipes", "gptq")
    assert code == 0 and yaml.safe_load(stdout)["solver"]["name"] == "gptq"
    refused(cli("recipes", "nothing"), "nothing")


def test_the_list_of_recipes_says_what_the_recipes_are():
    """It reads their files without what makes a recipe of them."""
    from finescale.cli.recipes import summary
    from finescale.recipe import Recipe
    from finescale.recipes import recipe_names, recipe_text

    for name in recipe_names():
        recipe = Recipe.named(name)
        group = "per channel" if recipe.weights.group_size == -1 else f"group {recipe.weights.group_size}"
        kind = "symmetric" if recipe.weights.symmetric else "asymmetric"
        inputs = f"{recipe.activations.bits} bits per token" if recipe.activations else "16 bits"
        wanted = (f"{recipe.weights.bits} bits, {group}, {kind}", inputs, recipe.description)
        assert summary(yaml.safe_load(recipe_text(name))) == wanted


def test_a_shown_recipe_can_be_used_as_a_file(cli, tmp_path):
    from finescale.recipe import Recipe
    from finescale.recipes import recipe_names

    for name in recipe_names():
        (tmp_path / "shown.yaml").write_text(cli("recipes", name)[1])
        assert Recipe.from_file(tmp_path / "shown.yaml").to_dict() == Recipe.named(name).to_dict()


def test_bench_solver(cli, tmp_path):
    answer = cli("bench", "solver", "--shape", "32x48", "--sweeps", "2", "--json", tmp_path / "b.json")
    assert answer[0] == 0 and read_json(tmp_path / "b.json")["rows"][0]["shape"] == [32, 48]
    refused(cli("bench", "solver", "--shape", "32"), "--shape")


def test_version_and_help(cli):
    assert cli("--version")[:2] == (0, __version__ + "\n")
    code, stdout, _ = cli("--help")
    assert code == 0
    for name in ("quantize", "evaluate", "inspect", "verify", "convert", "recipes", "demo", "bench"):
        assert name in stdout
        code, text, _ = cli(name, "--help")
        assert code == 0 and "--help" in text


def test_wrong_usage_exits_with_2(cli):
    assert cli("quantize")[0] == 2
    assert cli("no-such-command")[0] == 2
    assert cli("evaluate", "x", "--windows", "many")[0] == 2


def test_the_machines_own_errors_are_one_sentence(cli, tiny, result, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = cli("inspect", result, "--json", tmp_path / "file" / "layers.json")
    assert code == 1 and err.startswith("Error: ") and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_interrupt_says_how_to_go_on(cli, tiny, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a command, through typer, which has a way of its own to end."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("finescale.pipeline.quantize.prepare", interrupted)
    code, _, err = cli("quantize", tiny("llama"), "--recipe", "gptq", "--out", tmp_path / "out")
    assert code == 130 and err.count("same command again") == 1
    monkeypatch.setattr(entry, "app", interrupted)
    code, _, err = cli("quantize")
    assert code == 130 and err.count("same command again") == 1


def test_a_log_gets_a_line_a_minute(capsys, monkeypatch):
    """Where there is no terminal a run of hours would say nothing until it ends."""
    from types import SimpleNamespace

    from finescale.cli import common

    clock = iter([0.0, 59.0, 60.0, 61.0, 125.0])
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with common.progress_bar("blocks") as update:
        for done in range(4):
            update(f"block {done}", done, 9)
    lines = capsys.readouterr().err.split("\n")
    assert lines == ["block 1 (1 of 9 blocks done, 1 min)", "block 3 (3 of 9 blocks done, 2 min)", ""]


@pytest.mark.parametrize(("error", "words"), [(torch.OutOfMemoryError, "the GPU's memory"), (MemoryError, "memory")])
def test_memory_that_is_used_up(cli, monkeypatch, error, words):
    def exhausted():
        raise error("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(entry, "app", exhausted)
    refused(cli("quantize"), words, "--samples")


def test_a_defect_is_not_hidden(cli, monkeypatch):
    def broken():
        raise RuntimeError("a defect")

    monkeypatch.setattr(entry, "app", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        cli("quantize")


def test_the_real_process(tiny, text, tmp_path):
    """Once from outside: exit codes and streams as a script sees them."""
    arguments, environment = command("verify", tmp_path / "nowhere")
    failed = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1 and failed.stdout == "" and re.fullmatch(r"Error: [^\n]+\.\n", failed.stderr)


def test_the_command_line_starts_and_lists_recipes_without_torch():
    code = (
        "import sys; from finescale.cli.main import app; app(['recipes'], standalone_mode=False); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    _, environment = command()
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert answer.stdout.split()[-2:] == ["False", "False"], answer.stderr


def test_serve_refuses_before_vllm_starts(cli, result, tmp_path):
    folder = shutil.copytree(result, tmp_path / "served")
    config = read_json(folder / "config.json")
    name = next(iter(config["quantization_config"]["finescale"]["layers"]))
    config["quantization_config"]["finescale"]["layers"][name]["outliers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    refused(cli("serve", folder), "has outliers")
    refused(cli("serve", tmp_path / "nowhere"), "nowhere")
