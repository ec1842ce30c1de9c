"""Learned rounding as a part of a run: every family, integer scales, resume, and what is refused."""

from dataclasses import replace

import pytest
import torch

from finescale.errors import InputError
from finescale.grid import QuantizedWeight
from finescale.grid.integer_scale import INT32_LIMIT
from finescale.pipeline import layers as module
from finescale.pipeline.layers import LayerResult, Solved, with_tuned_weight
from finescale.pipeline.plan import LayerPlan
from finescale.pipeline.tune import learning_options, tuner_options
from finescale.pipeline.verify import verify
from finescale.recipe import Recipe
from finescale.runtime.checkpoint import open_quantized
from finescale.solvers import Solution
from finescale.transforms.reassembly import Reassembly
from tests.helpers import (
    W4A8,
    StopError,
    assert_same_logits,
    assert_sentence,
    hashes,
    lasting_files,
    make_model,
    quantize,
    read_json,
    read_tensors,
    recipe,
    save_model,
    stop_after,
)
from tests.tuning.test_moving import solved as rounded_weight


def tuned(solver="quantease", bits=3, group=32, iterations=24, options=None, **parts):
    return recipe(solver, bits, group, tuning=part(iterations, options), **parts)


def part(iterations=24, options=None):
    return {"name": "rounding", "options": {"iterations": iterations} | (options or {})}


@pytest.mark.parametrize("kind", ["llama", "mixtral", "opt", "bloom", "falcon-new", "gpt2"])
def test_every_family_comes_closer_to_the_original(kind, tiny, text, tmp_path):
    report = quantize(tiny(kind), tmp_path / "out", tuned(), text)
    assert len(report["tuning"]) == 2
    for block in report["tuning"]:
        assert block[0]["error_after"] < 0.95 * block[0]["error_before"]
    verify(tmp_path / "out", tiny(kind))
    assert_same_logits(tiny(kind), tmp_path / "out")


@pytest.mark.parametrize("mode", ["before", "after"])
def test_integer_scales_stay_integers_and_proved(mode, tiny, text, tmp_path):
    chosen = tuned("rtn", 4, integer_scale={"mode": mode, "amplifier": "auto"}, options={"scale_rate": 0.01}, **W4A8)
    report = quantize(tiny("llama"), tmp_path / "out", chosen, text)
    for layer in report["layers"]:
        assert layer["amplifier"] >= 1 and 0 < layer["overflow_use"] < 1
    for block in report["tuning"]:
        assert block[0]["error_after"] < block[0]["error_before"]
    verify(tmp_path / "out", tiny("llama"))
    plain = quantize(tiny("llama"), tmp_path / "plain", chosen.model_copy(update={"tuning": ()}), text)
    before = {layer["name"]: layer for layer in plain["layers"]}
    assert any(layer["scale_max"] != before[layer["name"]]["scale_max"] for layer in report["layers"])


@pytest.mark.parametrize("fmt", ["gptq", "awq", "dense"])
def test_other_formats_hold_what_was_tuned(fmt, tiny, text, tmp_path):
    symmetric = {"symmetric": fmt == "gptq"}
    quantize(tiny("llama"), tmp_path / "out", tuned(bits=4, format=fmt, weights=symmetric), text)
    verify(tmp_path / "out", tiny("llama"))


@pytest.mark.parametrize("fmt", ["compressed-tensors", "gptq"])
def test_scales_may_be_negative(fmt, tiny, text, tmp_path):
    """Lower errors than with positive ones, solved, tuned, stored and loaded."""
    errors = []
    for clip in ("mse", "signed"):
        chosen = tuned("quantease", 3, group=16, format=fmt, weights={"symmetric": True, "clip": clip})
        report = quantize(tiny("llama"), tmp_path / clip, chosen, text)
        errors.append(sum(layer["weight_mse"] for layer in report["layers"]))
        assert all(block[0]["error_after"] < block[0]["error_before"] for block in report["tuning"])
    assert errors[1] < 0.97 * errors[0]
    scales = [weight.grid.scale_OG for _, weight in open_quantized(tmp_path / "signed").layers()]
    assert all(bool((scale_OG < 0).any()) and bool((scale_OG > 0).any()) for scale_OG in scales)
    verify(tmp_path / "signed", tiny("llama"))
    assert_same_logits(tiny("llama"), tmp_path / "signed")


@pytest.mark.parametrize("options", [{"inputs": "float"}, {"target": "quantized"}, {"start": "weight", "loss": "mse"}])
def test_other_inputs_and_targets_give_other_weights(options, tiny, text, tmp_path):
    usual = quantize(tiny("llama"), tmp_path / "usual", tuned(), text)
    other = quantize(tiny("llama"), tmp_path / "other", tuned(options=options), text)
    pairs = zip(usual["layers"], other["layers"], strict=True)
    assert any(a["sha256"] != b["sha256"] for a, b in pairs)
    assert all(block[0]["error_after"] < block[0]["error_before"] for block in other["tuning"])


def test_transformed_blocks_are_tuned_with_their_gathers(tiny, text, tmp_path):
    parts = {"transforms": ["qllm"], **W4A8}
    report = quantize(tiny("llama"), tmp_path / "out", tuned(bits=4, **parts), text)
    assert all(block[0]["error_after"] < block[0]["error_before"] for block in report["tuning"])
    verify(tmp_path / "out", tiny("llama"))


def test_an_interrupted_run_ends_with_the_same_bytes(tokenizer, text, tmp_path):
    model = save_model(make_model("llama", num_hidden_layers=3), tokenizer, tmp_path / "model")
    chosen = tuned(iterations=8)
    quantize(model, tmp_path / "whole", chosen, text)

    from finescale.pipeline.quantize import prepare, run

    job = prepare(model, chosen, tmp_path / "out", str(text))
    with pytest.raises(StopError):
        run(job, on_progress=stop_after(2))
    run(prepare(model, chosen, tmp_path / "out", str(text)))
    assert read_json(tmp_path / "out" / "run.json")["resumed_from_block"] == 2
    files = lasting_files(tmp_path / "whole")
    assert hashes(tmp_path / "out", files) == hashes(tmp_path / "whole", files)


def result_of(weight, bits, amplifier):
    weight_OI, loud = rounded_weight(bits, 8, True, integer=True)
    plan = LayerPlan("layer", "layer", (6, 21), loud.grid.scheme)
    grid = replace(loud.grid, amplifier=amplifier, scale_OG=torch.full_like(loud.grid.scale_OG, 1.0))
    quiet = QuantizedWeight(torch.ones_like(loud.codes_OI), grid)
    solved = Solved(weight_OI, torch.eye(21), Solution(quiet), 100, ())
    record = {"block": 0, "relative_error": 0.5}
    return LayerResult(plan, quiet, record, solved), QuantizedWeight(loud.codes_OI * 0 + 7, grid)


def test_an_automatic_amplifier_is_halved_where_tuned_codes_overflow():
    result, wild = result_of(None, 4, 2**18)
    assert module._bound(result.plan, result.weight) < INT32_LIMIT <= module._bound(result.plan, wild)
    chosen = recipe("rtn", 4, 8, integer_scale={"mode": "before"}, tuning=part(), **W4A8)
    final = with_tuned_weight(result, wild, chosen)
    assert final.weight.grid.amplifier == 2**16 and torch.equal(final.weight.codes_OI, wild.codes_OI)
    assert final.record["bound"] < INT32_LIMIT


def test_with_a_fixed_amplifier_the_solved_weight_comes_back():
    result, wild = result_of(None, 4, 2**18)
    chosen = recipe("rtn", 4, 8, integer_scale={"mode": "before", "amplifier": 2**18}, tuning=part(), **W4A8)
    final = with_tuned_weight(result, wild, chosen)
    assert final.weight is result.weight and "solver" in final.record["notes"][0]


def test_scales_move_only_if_asked(tiny, text, tmp_path):
    plain = quantize(tiny("llama"), tmp_path / "plain", recipe("quantease", 3, 32), text)
    assert plain.get("tuning") is None
    quantize(tiny("llama"), tmp_path / "tuned", tuned(options={"scale_rate": 0}), text)
    scales = [
        [weight.grid.scale_OG for _, weight in open_quantized(tmp_path / name).layers()][:7]
        for name in ("plain", "tuned")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*scales, strict=True))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"tuning": "annealing"}, "rounding"),
        ({"tuning": {"name": "rounding", "options": {"steps": 3}}}, "steps"),
        ({"tuning": {"name": "rounding", "options": {"rate": 0}}}, "rate"),
        ({"tuning": ["rounding", "low_rank"]}, "last"),
        ({"tuning": ["low_rank", {"name": "rounding", "options": {"target": "quantized"}}]}, "blocks 1"),
        ({"tuning": ["low_rank", {"name": "low_rank", "options": {"blocks": 2}}]}, "same blocks"),
        ({"tuning": "rounding", "solver": {"name": "quantease", "outliers": 0.01}}, "outliers"),
        ({"tuning": "rounding", "solver": {"name": "gptq", "static_groups": False}}, "static_groups"),
    ],
)
def test_what_cannot_work_is_refused(values, word):
    with pytest.raises(InputError, match=word) as caught:
        Recipe.from_dict(values)
    assert_sentence(str(caught.value))


def test_a_recipe_tells_all_its_options():
    values = Recipe.from_dict({"tuning": "rounding"}).to_dict()["tuning"][0]
    assert values["name"] == "rounding" and values["options"]["iterations"] == 128
    assert (
        Recipe.from_dict({})
        .with_settings(("tuning.name=rounding", "tuning.options.rate=0.5"))
        .tuning[0]
        .options["rate"]
        == 0.5
    )


def test_rotated_models_are_tuned_towards_rotated_outputs(tiny, text, tmp_path):
    report = quantize(tiny("llama"), tmp_path / "out", tuned(transforms=["quarot"]), text)
    plain = quantize(tiny("llama"), tmp_path / "plain", tuned(), text)
    for turned, usual in zip(report["tuning"], plain["tuning"], strict=True):
        assert turned[0]["error_after"] < 0.95 * turned[0]["error_before"]
        assert turned[0]["error_before"] < 2 * usual[0]["error_before"]  # unrotated targets would be far away
    verify(tmp_path / "out", tiny("llama"))


def test_low_rank_correction_before_the_solver_and_rounding_after_it(tiny, text, tmp_path):
    correction = {"name": "low_rank", "options": {"iterations": 60, "rate": 5e-3, "batch_size": 2}}
    activations = {"bits": 4}
    plain = recipe("rtn", 4, 32, activations=activations)
    both = recipe("rtn", 4, 32, activations=activations, tuning=[correction, part()])
    before = quantize(tiny("llama"), tmp_path / "plain", plain, text)
    report = quantize(tiny("llama"), tmp_path / "out", both, text)
    for first, second in report["tuning"]:
        assert first["error_after"] < first["error_before"]
        assert second["error_after"] < second["error_before"]
    pairs = zip(before["layers"], report["layers"], strict=True)
    assert all(a["sha256"] != b["sha256"] for a, b in pairs)
    verify(tmp_path / "out", tiny("llama"))


def corrected(blocks, iterations=40, **parts):
    options = {"iterations": iterations, "rate": 5e-3, "batch_size": 2, "blocks": blocks}
    return recipe("rtn", 4, 32, activations={"bits": 4}, tuning=[{"name": "low_rank", "options": options}], **parts)


@pytest.mark.parametrize(("solver", "forward"), [("rtn", "merged"), ("gptq", "unrounded"), ("quantease", "unrounded")])
def test_the_solver_says_what_a_correction_learns_beside(solver, forward):
    for given, wanted in (({}, forward), ({"forward": "sum"}, "sum")):
        chosen = recipe(solver, 4, 32, tuning=[{"name": "low_rank", "options": given}])
        assert [options.forward for options in tuner_options(chosen)] == [wanted]
        assert [options.forward for options in learning_options(chosen)] == [wanted]


def test_blocks_corrected_together_come_closer_at_their_end(tokenizer, text, tmp_path):
    model = save_model(make_model("llama", num_hidden_layers=4), tokenizer, tmp_path / "model")
    facts, norm = {}, "model.layers.1.input_layernorm.weight"
    for blocks in (1, 3):
        report = quantize(model, tmp_path / str(blocks), corrected(blocks, 16), text)
        facts[blocks] = [block[0] for block in report["tuning"]]
        assert all(fact["error_after"] < fact["error_before"] for fact in facts[blocks])
        verify(tmp_path / str(blocks), model)
        before, after = read_tensors(model)[norm], read_tensors(tmp_path / str(blocks))[norm]
        assert norm in report["changed_tensors"] and 0 < float((after - before).abs().max()) < 0.1
    # Groups of 3 and 1; the blocks of a group share one error, that of the last one's output.
    assert facts[3][0] == facts[3][1] == facts[3][2] != facts[3][3]
    assert facts[3][2]["error_before"] != facts[1][2]["error_before"]


@pytest.mark.parametrize("transforms", [[], ["quarot", "qllm"]])
def test_a_run_broken_within_a_group_ends_with_the_same_bytes(tokenizer, text, tmp_path, monkeypatch, transforms):
    model = save_model(make_model("llama", num_hidden_layers=5), tokenizer, tmp_path / "model")
    chosen = corrected(2, 4, transforms=transforms)
    quantize(model, tmp_path / "whole", chosen, text)

    from finescale.pipeline import journal, walk
    from finescale.pipeline.quantize import prepare, run

    finish = journal.Journal.finish_block

    def stop(self, block, entry):
        finish(self, block, entry)
        if block == 2:  # the first of the second group
            raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(journal.Journal, "finish_block", stop)
        with pytest.raises(StopError):
            run(prepare(model, chosen, tmp_path / "out", str(text)))
    prepared, original = [], walk._prepare
    monkeypatch.setattr(walk, "_prepare", lambda *args: (prepared.append(args[1]), original(*args))[1])
    run(prepare(model, chosen, tmp_path / "out", str(text)))
    assert prepared == [2, 3, 4]  # the broken group as a whole
    files = lasting_files(tmp_path / "whole")
    assert hashes(tmp_path / "out", files) == hashes(tmp_path / "whole", files)


def test_an_interrupted_omniquant_ends_with_the_same_bytes(tokenizer, text, tmp_path):
    model = save_model(make_model("opt", num_hidden_layers=3), tokenizer, tmp_path / "model")
    transforms = [{"name": "omniquant", "options": {"iterations": 4, "batch_size": 2, "links": "all"}}]
    chosen = recipe("rtn", 4, 32, activations={"bits": 4}, transforms=transforms)
    report = quantize(model, tmp_path / "whole", chosen, text)
    assert any(".bias" in name for name in report["changed_tensors"])
    verify(tmp_path / "whole", model)

    from finescale.pipeline.quantize import prepare, run

    with pytest.raises(StopError):
        run(prepare(model, chosen, tmp_path / "out", str(text)), on_progress=stop_after(2))
    run(prepare(model, chosen, tmp_path / "out", str(text)))
    files = lasting_files(tmp_path / "whole")
    assert hashes(tmp_path / "out", files) == hashes(tmp_path / "whole", files)


def test_gradients_pass_through_a_rounded_cache():
    from finescale.runtime.attention import round_cache

    x_BHTD = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    facts = {"bits": 4, "symmetric": False, "queries": True, "rotate": False}
    tuned_on = round_cache(*x_BHTD, facts)
    for found, expected in zip(tuned_on, round_cache(*x_BHTD.detach(), facts), strict=True):
        torch.testing.assert_close(found, expected)
    sum(x.sum() for x in tuned_on).backward()
    torch.testing.assert_close(x_BHTD.grad, torch.ones_like(x_BHTD))


@pytest.mark.gpu
def test_on_a_gpu_channels_merged_by_the_dozen_are_summed_in_one_order():
    group_E = torch.arange(4096, device="cuda") % 64
    parts = Reassembly(torch.arange(4096, device="cuda"), torch.ones(4096, device="cuda"), group_E, 64)
    weight_OI = torch.randn(256, 4096, device="cuda")
    sums = [parts.weight(weight_OI) for _ in range(5)]
    assert all(torch.equal(sums[0], sum_OJ) for sum_OJ in sums)
    torch.testing.assert_close(sums[0], weight_OI.unflatten(1, (64, 64)).sum(1))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "length"), [("llama", 48), ("opt", 48), ("mixtral", 48), ("llama", 200), ("opt", 200)]
)
def test_on_a_gpu_everything_that_learns_does_and_repeats_itself(kind, length, tiny, text, tmp_path):
    options = {"iterations": 8, "batch_size": 2}
    transforms = [{"name": "omniquant", "options": options}, "qllm"]
    tuning = [{"name": "low_rank", "options": options | {"blocks": 2}}, part(8)]
    windows = {"length": length}
    chosen = recipe(
        "quantease", 4, 32, activations={"bits": 4}, transforms=transforms, tuning=tuning, calibration=windows
    )
    reports = [quantize(tiny(kind), tmp_path / name, chosen, text, device="cuda") for name in ("first", "second")]
    for block in reports[0]["transforms"]:
        learned = block[0]["layers"]["block"]
        assert learned["error_after"] <= learned["error_before"]
    for block in reports[0]["tuning"]:
        assert all(fact["error_after"] <= fact["error_before"] for fact in block)
    files = lasting_files(tmp_path / "first")
    assert hashes(tmp_path / "first", files) == hashes(tmp_path / "second", files)
    verify(tmp_path / "first", tiny(kind))
