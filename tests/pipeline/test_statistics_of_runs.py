"""Each layer is solved for, and its error reported on, the inputs that the run claims it has."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from finescale.calibration.data import calibration_windows, encode, open_tokenizer, read_text
from finescale.calibration.statistics import matrix_power
from finescale.grid import fit_grid
from finescale.models.skeleton import weight_OI_of
from finescale.runtime.checkpoint import open_quantized
from finescale.runtime.load import load
from finescale.solvers import find_solver
from tests.helpers import W4A8, quantize, recipe, reference_model

SAMPLES, LENGTH = 6, 48


def inputs_of(model, names, tokens_BT):
    """float64 [T, I] inputs of some modules of a transformers model."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=tokens_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def expected_errors(original, seen_by, out, tokens_BT):
    """||(W - Q) X||^2 / ||W X||^2 of every layer with X as ``seen_by`` makes it."""
    float_model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    layers = dict(open_quantized(out).layers())
    inputs = inputs_of(seen_by, layers, tokens_BT)
    errors = {}
    for name, weight in layers.items():
        original_OI = weight_OI_of(float_model.get_submodule(name)).double()
        change_OI = original_OI - weight.dequantize().double()
        errors[name] = float(
            (inputs[name] @ change_OI.T).square().sum() / (inputs[name] @ original_OI.T).square().sum()
        )
    return errors


def windows(path, text):
    tokens_T = encode(open_tokenizer(path), read_text(str(text)))
    return calibration_windows(tokens_T, SAMPLES, LENGTH, 0, "text").tokens_BT


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "falcon"])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_the_first_block_sees_the_original_model(tiny, text, tmp_path, kind, solver):
    path, out = tiny(kind), tmp_path / "out"
    report = quantize(path, out, recipe(solver, 3, 32), text)
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = expected_errors(path, original, out, windows(path, text))
    for record in report["layers"]:
        if record["block"] == 0:
            assert record["relative_error"] == pytest.approx(expected[record["name"]], rel=2e-3), record["name"]
            assert record["tokens"] == SAMPLES * LENGTH


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_true_sequential_sees_everything_before_it_quantized(tiny, text, tmp_path, kind):
    path, out = tiny(kind), tmp_path / "out"
    report = quantize(path, out, recipe("gptq", 3, 32, calibration={"true_sequential": True}), text)
    expected = expected_errors(path, reference_model(path, out), out, windows(path, text))
    for record in report["layers"]:
        assert record["relative_error"] == pytest.approx(expected[record["name"]], rel=2e-3), record["name"]


def test_without_true_sequential_a_block_sees_the_blocks_before_it_quantized(tiny, text, tmp_path):
    path, out = tiny("llama"), tmp_path / "out"
    report = quantize(path, out, recipe("gptq", 3, 32), text)
    after = expected_errors(path, reference_model(path, out), out, windows(path, text))
    for record in report["layers"]:
        if record["name"].endswith(("1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj")):
            assert record["relative_error"] == pytest.approx(after[record["name"]], rel=2e-3)
        if record["name"].endswith("1.mlp.down_proj"):  # its input passes layers of its own block, not quantized yet
            assert record["relative_error"] != pytest.approx(after[record["name"]], rel=2e-3)


@pytest.mark.parametrize("rounded", [True, False])
def test_later_blocks_see_inputs_rounded_as_at_run_time(tiny, text, tmp_path, rounded):
    path, out = tiny("llama"), tmp_path / "out"
    chosen = recipe("rtn", 4, 32, calibration={"quantized_activations": rounded}, **W4A8)
    report = quantize(path, out, chosen, text)
    seen_by = load(out) if rounded else reference_model(path, out)
    name = "model.layers.1.self_attn.q_proj"
    inputs_TI = inputs_of(seen_by, [name], windows(path, text))[name]
    weight = open_quantized(out).read(name)
    original_OI = weight_OI_of(AutoModelForCausalLM.from_pretrained(path).get_submodule(name)).double()
    change_OI = original_OI - weight.dequantize().double()
    expected = float((inputs_TI @ change_OI.T).square().sum() / (inputs_TI @ original_OI.T).square().sum())
    record = next(record for record in report["layers"] if record["name"] == name)
    assert record["relative_error"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_expert_counts_the_tokens_that_were_routed_to_it(tiny, text, tmp_path, kind):
    report = quantize(tiny(kind), tmp_path / "out", recipe("gptq", 4, 32), text)
    experts = [record for record in report["layers"] if ".experts." in record["name"]]
    assert len(experts) == 2 * 4 * 3
    for block in (0, 1):
        firsts = [r["tokens"] for r in experts if r["block"] == block and r["name"].endswith(("w1", "gate_proj"))]
        assert len(firsts) == 4 and sum(firsts) == SAMPLES * LENGTH * 2  # two experts a token


def test_solvers_keep_their_promise(tiny, text, tmp_path):
    """On the first block, whose inputs are the same for all: GPTQ beats rounding, QuantEase beats GPTQ."""
    errors = {}
    for solver in ("rtn", "gptq", "quantease"):
        report = quantize(tiny("llama"), tmp_path / solver, recipe(solver, 3, 32, options={}), text)
        errors[solver] = {r["name"]: r["relative_error"] for r in report["layers"] if r["block"] == 0}
    for name in errors["rtn"]:
        assert errors["gptq"][name] < errors["rtn"][name]
    assert sum(errors["quantease"].values()) < sum(errors["gptq"].values())


def test_batch_size_does_not_change_the_codes_much(tiny, text, tmp_path):
    """Windows are independent: how many run at once only changes the order of sums."""
    reports = []
    for size in (1, 4, 6):
        chosen = recipe("rtn", 4, 32, calibration={"batch_size": size})
        reports.append(quantize(tiny("bloom"), tmp_path / str(size), chosen, text))
    for report in reports[1:]:
        for left, right in zip(report["layers"], reports[0]["layers"], strict=True):
            assert left["sha256"] == right["sha256"]  # rounding does not look at the text
            assert left["relative_error"] == pytest.approx(right["relative_error"], rel=1e-3)


def test_solvers_get_the_power_of_the_moments_and_errors_are_of_the_moments(tiny, text, tmp_path):
    path, out = tiny("llama"), tmp_path / "out"
    report = quantize(path, out, recipe("gptq", 3, 32, calibration={"power": 0.5}), text)
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = expected_errors(path, original, out, windows(path, text))
    name = "model.layers.0.self_attn.o_proj"
    x_TI = inputs_of(original, [name], windows(path, text))[name]
    weight_OI = weight_OI_of(original.get_submodule(name)).float()
    hessian_II = matrix_power((x_TI.T @ x_TI / x_TI.shape[0]).float(), 0.5)
    stored = open_quantized(out).read(name)
    entry = find_solver("gptq")
    solved = entry.solve(weight_OI, hessian_II, fit_grid(weight_OI, stored.grid.scheme), entry.options())
    assert (solved.weight.codes_OI != stored.codes_OI).float().mean() < 0.01
    record = next(record for record in report["layers"] if record["name"] == name)
    assert record["relative_error"] == pytest.approx(expected[name], rel=2e-3)
    plain = quantize(path, tmp_path / "plain", recipe("gptq", 3, 32), text)
    shas = [[record["sha256"] for record in one["layers"]] for one in (report, plain)]
    assert shas[0] != shas[1]
