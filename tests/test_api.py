"""finescale from Python, as the README shows it."""

import subprocess
import sys

import pytest
import torch

import finescale
from finescale.errors import CheckpointError, FinescaleError, InputError, NumericsError
from tests.helpers import assert_sentence, command, logits_of, read_json, recipe, some_tokens

SETTINGS = ("calibration.samples=4", "calibration.length=48")


def test_quantize_load_evaluate(tiny, text, tmp_path):
    progress = []
    report = finescale.quantize(
        tiny("llama"),
        "gptq",
        out=tmp_path / "out",
        calibration=str(text),
        settings=(*SETTINGS, "weights.bits=3"),
        on_progress=lambda *args: progress.append(args),
    )
    assert {record["bits"] for record in report["layers"]} == {3}
    assert report == read_json(tmp_path / "out" / "report.json")
    assert (tmp_path / "out" / "report.html").is_file()
    assert [done for _, done, _ in progress] == sorted(done for _, done, _ in progress) and progress[-1][1:] == (2, 2)
    model = finescale.load(tmp_path / "out")
    assert logits_of(model, some_tokens()).shape == (2, 40, 300)
    result = finescale.evaluate(tmp_path / "out", str(text), windows=2, length=60, against=tiny("llama"))
    assert result.kl > 0 and result.perplexity > 1


def test_a_recipe_object_and_a_file(tiny, text, tmp_path):
    options = {"calibration": str(text), "settings": ("weights.bits=8",)}
    report = finescale.quantize(tiny("llama"), recipe("rtn", 4, 32), out=str(tmp_path / "a"), **options)
    assert {(r["bits"], r["group_size"]) for r in report["layers"]} == {(8, 32)}
    assert report["recipe"]["calibration"]["samples"] == 6  # the rest of the recipe stays
    (tmp_path / "r.yaml").write_text("weights: {bits: 2, group_size: 32}\nsolver: {name: rtn}\n")
    report = finescale.quantize(tiny("llama"), tmp_path / "r.yaml", out=tmp_path / "b", calibration=str(text))
    assert {(r["bits"], r["group_size"]) for r in report["layers"]} == {(2, 32)}


def test_checks_are_passed_on(tiny, text, tmp_path):
    skipping = recipe(overrides=[{"pattern": "*mlp*", "skip": True}])
    with pytest.raises(InputError, match="--allow-partial"):
        finescale.quantize(tiny("llama"), skipping, out=tmp_path / "out", calibration=str(text))
    report = finescale.quantize(
        tiny("llama"), skipping, out=tmp_path / "out", calibration=str(text), allow_partial=True
    )
    assert report["model"]["quantized_share"] < 0.8


def test_fresh(tiny, text, tmp_path):
    options = {"out": tmp_path / "out", "calibration": str(text)}
    finescale.quantize(tiny("llama"), recipe(), **options)
    with pytest.raises(InputError):
        finescale.quantize(tiny("llama"), recipe(bits=3), **options)
    report = finescale.quantize(tiny("llama"), recipe(bits=3), fresh=True, **options)
    assert "already_complete" not in report and {record["bits"] for record in report["layers"]} == {3}


def test_errors_have_one_base():
    for error in (InputError, CheckpointError, NumericsError):
        assert issubclass(error, FinescaleError) and error is getattr(finescale, error.__name__)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        finescale.nothing  # noqa: B018
    for name in finescale.__all__:
        assert getattr(finescale, name) is not None


def test_evaluate_is_callable_whatever_was_imported_first():
    """The package finescale.evaluate and the function of that name share it."""
    assert callable(finescale.evaluate)
    code = "import finescale.evaluate.perplexity; import finescale; finescale.load; assert callable(finescale.evaluate)"
    _, environment = command()
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr


def test_importing_is_light():
    code = "import sys, finescale; print('torch' in sys.modules)"
    _, environment = command()
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert answer.stdout.strip() == "False"


def test_a_missing_model_is_one_sentence(tmp_path):
    with pytest.raises(InputError) as caught:
        finescale.quantize(tmp_path / "nowhere", "rtn", out=tmp_path / "out")
    assert_sentence(str(caught.value))


def test_the_result_does_not_depend_on_the_state_of_the_process(tiny, text, tmp_path):
    """Neither on torch's random state, nor on gradients being on or off; and the number of threads is given back."""
    threads, reports = torch.get_num_threads(), []
    for seed, gradients in ((1, True), (2, False)):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(gradients):
            out = tmp_path / str(seed)
            reports.append(finescale.quantize(tiny("mixtral"), recipe("quantease"), out=out, calibration=str(text)))
    assert reports[0] == reports[1] and torch.get_num_threads() == threads
