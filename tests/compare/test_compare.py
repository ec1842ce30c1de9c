"""A comparison has the numbers of separate runs, and does nothing twice."""

import json
import shutil

import pytest
import torch

import finescale.api as api
from finescale.compare import cell as cell_module
from finescale.compare.grid import cells_of, make_grid, with_shared_statistics
from finescale.compare.run import Options, compare, read_peers
from finescale.compare.speed import add_speeds
from finescale.errors import InputError, NumericsError
from finescale.evaluate import cut_windows, evaluate_windows
from finescale.evaluate.reference import capture_reference, load_reference, save_reference
from finescale.formats.source import open_checkpoint
from finescale.runtime.load import load
from tests.helpers import assert_sentence, some_tokens

SETTINGS = ("calibration.samples=4", "calibration.length=48", "calibration.batch_size=4")


def grid(recipes=("rtn", "gptq"), bits=(4, 3)):
    return cells_of([make_grid({"recipes": list(recipes), "bits": list(bits)}, "x")], SETTINGS)


def options(text, **changes):
    return Options(**({"calibration": str(text), "text": str(text), "windows": 3, "length": 60} | changes))


@pytest.fixture(scope="module")
def done(tiny, text, tmp_path_factory):
    """(folder, result) of a comparison of four cells."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, compare(tiny("llama"), grid(), out, options(text))


def test_numbers_are_those_of_separate_runs(tiny, text, done, tmp_path):
    _, result = done
    assert [row["key"] for row in result["rows"]] == [
        "original", "rtn-w4-channel", "rtn-w3-channel", "gptq-w4-channel", "gptq-w3-channel",
    ]  # fmt: skip
    row = result["rows"][4]
    report = api.quantize(tiny("llama"), "gptq", out=tmp_path / "o", calibration=str(text),
                          settings=("weights.bits=3", *SETTINGS))  # fmt: skip
    expected = api.evaluate(tmp_path / "o", str(text), windows=3, length=60, against=tiny("llama"))
    assert row["perplexity"] == expected.perplexity and row["kl"] == pytest.approx(expected.kl, rel=1e-6)
    assert row["top1"] == expected.top1 and row["text_sha256"] == expected.text_sha256
    assert row["bits_per_weight"] == report["size"]["bits_per_weight"]
    assert row["size_bytes"] == report["size"]["after_bytes"]
    original = result["rows"][0]
    assert original["perplexity"] == expected.reference_perplexity and original["recipe"] is None
    assert original["size_bytes"] == open_checkpoint(tiny("llama")).total_bytes() and original["kl"] is None


def test_finished_cells_are_kept_and_new_ones_are_made(tiny, text, done, tmp_path, monkeypatch):
    out = shutil.copytree(done[0], tmp_path / "out")
    made = []
    real = cell_module.run
    monkeypatch.setattr(cell_module, "run", lambda job: made.append(job.recipe.name) or real(job))
    again = compare(tiny("llama"), grid(), out, options(text))
    assert again["rows"] == done[1]["rows"] and made == []
    more = compare(tiny("llama"), grid(bits=(4, 3, 8)), out, options(text))
    assert made == ["rtn", "gptq"] and len(more["rows"]) == 7
    # A cell without its numbers finds its checkpoint finished.
    (out / "cells" / "rtn-w4-channel" / "cell.json").unlink()
    third = compare(tiny("llama"), grid(), out, options(text))
    assert third["rows"][1]["perplexity"] == done[1]["rows"][1]["perplexity"] and made[2:] == ["rtn"]


def test_another_setting_is_refused_and_another_recipe_replaces_its_cell(tiny, text, done, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    with pytest.raises(InputError, match="another --out") as caught:
        compare(tiny("llama"), grid(), out, options(text, windows=2))
    assert_sentence(str(caught.value))
    moved = shutil.copy(text, tmp_path / "moved.txt")  # the same text elsewhere is the same
    assert compare(tiny("llama"), grid(), out, options(moved))["rows"] == done[1]["rows"]
    other = cells_of([make_grid({"recipes": ["rtn"], "set": ["weights.clip=mse"]}, "x")], SETTINGS)
    result = compare(tiny("llama"), other, out, options(text))
    assert result["rows"][1]["key"] == "rtn-w4-channel"
    assert result["rows"][1]["perplexity"] != done[1]["rows"][1]["perplexity"]
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").touch()
    with pytest.raises(InputError, match="did not write"):
        compare(tiny("llama"), grid(), tmp_path / "busy", options(text))


def test_a_failed_cell_is_a_row_and_is_tried_again(tiny, text, tmp_path, monkeypatch):
    real = cell_module.run

    def failing(job):
        if job.recipe.name == "rtn":
            raise NumericsError("layer x is broken; repair it.")
        return real(job)

    monkeypatch.setattr(cell_module, "run", failing)
    result = compare(tiny("llama"), grid(bits=(4,)), tmp_path / "o", options(text))
    assert result["rows"][1]["error"] == "layer x is broken; repair it." and "perplexity" in result["rows"][2]
    monkeypatch.setattr(cell_module, "run", real)
    again = compare(tiny("llama"), grid(bits=(4,)), tmp_path / "o", options(text))
    assert "error" not in again["rows"][1] and again["rows"][2] == result["rows"][2]


def test_a_stopped_comparison_goes_on(tiny, text, tmp_path, monkeypatch):
    """What was done before is in compare.json, and only the rest is made."""
    real, made = cell_module.run, []

    def stopping(job):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(job.recipe.name)
        return real(job)

    monkeypatch.setattr(cell_module, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(tiny("llama"), grid(bits=(4,)), tmp_path / "o", options(text))
    kept = json.loads((tmp_path / "o" / "compare.json").read_text())
    assert [row["key"] for row in kept["rows"]] == ["original", "rtn-w4-channel"]
    monkeypatch.setattr(cell_module, "run", lambda job: made.append(job.recipe.name) or real(job))
    result = compare(tiny("llama"), grid(bits=(4,)), tmp_path / "o", options(text))
    assert made == ["rtn", "gptq"] and result["rows"][:2] == kept["rows"]


@pytest.mark.slow
def test_processes_make_the_same_numbers(tiny, text, done, tmp_path):
    result = compare(tiny("llama"), grid(), tmp_path / "o", options(text, jobs=2, keep=False))
    for own, other in zip(result["rows"], done[1]["rows"], strict=True):
        assert (own["key"], own["perplexity"], own["kl"]) == (other["key"], other["perplexity"], other["kl"])
    assert not list((tmp_path / "o").glob("cells/*/checkpoint"))


def test_statistics_are_collected_once(tiny, text, tmp_path, monkeypatch):
    """Every recipe is solved on the same ones, with the numbers of a run by itself; learners keep their own."""
    from finescale.compare import run as run_module
    from finescale.pipeline import block

    collected, real = [], run_module.collect_statistics
    monkeypatch.setattr(run_module, "collect_statistics", lambda *args: collected.append(1) or real(*args))
    cells = cells_of([make_grid({"recipes": ["gptq"], "bits": [4, 3], "groups": [32]}, "x")], SETTINGS)
    (learner,) = cells_of([make_grid({"recipes": ["awq-w4-g128"]}, "x")], SETTINGS)
    assert with_shared_statistics(learner) == learner
    shared = [with_shared_statistics(cell) for cell in cells]
    assert [cell.key for cell in shared] == ["gptq-w4-g32-shared", "gptq-w3-g32-shared"]
    monkeypatch.setattr(block, "collect_moments", None)
    result = compare(tiny("llama"), shared, tmp_path / "o", options(text))
    assert len(collected) == 1 and not any("error" in row for row in result["rows"])
    compare(tiny("llama"), shared, tmp_path / "o", options(text))
    assert len(collected) == 1
    monkeypatch.undo()
    api.quantize(tiny("llama"), shared[0].recipe, out=tmp_path / "alone", calibration=str(text))
    alone = api.evaluate(tmp_path / "alone", str(text), windows=3, length=60)
    assert result["rows"][1]["perplexity"] == alone.perplexity


def test_tasks_in_every_row(tiny, text, tmp_path):
    rows = [{"query": "Question: what?", "choices": ["a name", "an object"], "gold": 1}] * 3
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = options(text, tasks=("piqa",), task_data=str(tmp_path / "tasks"), limit=2)
    result = compare(tiny("llama"), grid(("rtn",), (4,)), tmp_path / "o", given)
    assert [row["tasks"][0]["questions"] for row in result["rows"]] == [2, 2]
    with pytest.raises(InputError, match="--task-data"):
        compare(tiny("llama"), grid(), tmp_path / "p", options(text, tasks=("piqa",)))


def test_what_cannot_work_is_refused_before_the_first_cell(tiny, text, tmp_path):
    with pytest.raises(InputError, match="nothing to compare"):
        compare(tiny("llama"), [], tmp_path / "o", options(text))
    awq = cells_of([make_grid({"recipes": ["rtn"], "bits": [3], "set": ["format=awq"]}, "x")], SETTINGS)
    with pytest.raises(InputError, match="rtn-w3-channel: "):
        compare(tiny("llama"), awq, tmp_path / "o", options(text))
    with pytest.raises(InputError, match="at most 256"):
        compare(tiny("llama"), grid(), tmp_path / "o", options(text, length=300))
    with pytest.raises(InputError, match="--devices"):
        compare(tiny("llama"), grid(), tmp_path / "o", options(text, devices=()))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "bloom", "gpt2"])
def test_a_kept_reference_is_the_model(tiny, kind, tmp_path):
    model = load(tiny(kind))
    windows_WT = cut_windows(some_tokens(1, 200)[0], 3, 60, None)
    reference = capture_reference(model, windows_WT)
    save_reference(reference, tmp_path / "r.safetensors")
    kept = load_reference(tmp_path / "r.safetensors", torch.device("cpu"))
    other = load(tiny(kind), torch.bfloat16).float()
    by_model, by_file = (evaluate_windows(other, windows_WT, each) for each in (model, kept))
    assert by_file.kl == pytest.approx(by_model.kl, rel=1e-4) and by_file.top1 == by_model.top1
    assert by_file.reference_perplexity == pytest.approx(by_model.reference_perplexity, rel=1e-6)


def test_a_model_that_does_more_to_its_logits_has_no_reference(tiny):
    model = load(tiny("llama"))

    def halved(module, args, kwargs, output):
        output.logits = output.logits / 2
        return output

    model.register_forward_hook(halved, with_kwargs=True)
    assert capture_reference(model, cut_windows(some_tokens(1, 200)[0], 2, 60, None)) is None


def test_speed_of_every_row(tiny, done, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    result = add_speeds(done[1] | {"rows": done[1]["rows"][:2]}, tiny("llama"), out, "cpu", lambda *_: None)
    assert len(result["rows"]) == 2
    for row in result["rows"]:
        assert row["speed"]["prompt_tokens_per_second"] > 0 and row["speed"]["generated_tokens_per_second"] > 0
        assert row["speed"]["prompt"] == 240
    assert json.loads((out / "compare.json").read_text()) == json.loads(json.dumps(result))


def test_peers(tmp_path):
    row = {"label": "tool 1.0", "perplexity": 3.5, "bits": 4, "group_size": 64, "provenance": {"script": "x.py"}}
    (tmp_path / "p.json").write_text(json.dumps({"peers": [row]}))
    assert read_peers(tmp_path / "p.json") == [row]
    for bad in ({"peers": [{"label": "x"}]}, [], {"peers": [row | {"provenance": None}]}):
        (tmp_path / "p.json").write_text(json.dumps(bad))
        with pytest.raises(InputError, match="provenance") as caught:
            read_peers(tmp_path / "p.json")
        assert_sentence(str(caught.value))
