"""Who owns an output folder, and what may be removed from it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from finescale.errors import CheckpointError, InputError
from finescale.pipeline import journal as journals
from finescale.pipeline.journal import Journal, clear_output, finished_signature, signature, write_json, write_shard
from finescale.pipeline.quantize import prepare, run
from finescale.pipeline.verify import verify
from tests.helpers import StopError, assert_sentence, hashes, quantize, read_json, recipe, stop_after


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_signatures_tell_settings_apart():
    assert signature({"a": 1, "b": [2]}) == signature({"b": [2], "a": 1})
    assert signature({"a": 1}) != signature({"a": 2})


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})  # not JSON
    assert read_json(path) == {"x": 1}
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert read_json(path) == {"x": 1}


def test_shards_do_not_depend_on_the_order_of_their_tensors(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2).T}
    write_shard(tmp_path / "1.safetensors", tensors)
    write_shard(tmp_path / "2.safetensors", dict(reversed(tensors.items())))
    first, second = (tmp_path / f"{n}.safetensors" for n in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("failure", ["No space left on device (os error 28)", "ENOSPC"])
def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path, monkeypatch, failure):
    def full(*args, **kwargs):
        if failure == "ENOSPC":
            raise OSError(28, "No space left on device")
        raise RuntimeError(f"Error while serializing: I/O error: {failure}")

    write_shard(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    before = contents(tmp_path)
    monkeypatch.setattr(journals, "save_file", full)
    with pytest.raises(InputError, match="is full") as caught:
        write_shard(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert_sentence(str(caught.value))
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(journals.Path, "open", refuse)
    with pytest.raises(InputError, match="cannot be written") as caught:
        write_json(tmp_path / "a.json", {})
    assert_sentence(str(caught.value))


def test_the_second_run_changes_nothing(tiny, text, tmp_path):
    out = tmp_path / "out"
    first = quantize(tiny("llama"), out, recipe(), text)
    before, times = contents(out), {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = quantize(tiny("llama"), out, recipe(), text)
    assert again.pop("already_complete") is True and again == first
    assert contents(out) == before and {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert not (out / ".finescale").exists()


@pytest.mark.parametrize(
    "other", [{"solver": "gptq"}, {"bits": 3}, {"group": 32}, {"calibration": {"samples": 5}}, {"format": "dense"}]
)
def test_other_settings_are_refused_and_change_nothing(tiny, text, tmp_path, other):
    out = tmp_path / "out"
    quantize(tiny("llama"), out, recipe(), text)
    before = contents(out)
    with pytest.raises(InputError, match=r"other settings.*--fresh") as caught:
        quantize(tiny("llama"), out, recipe(**other), text)
    assert_sentence(str(caught.value))
    assert contents(out) == before


def test_another_model_seed_or_text_is_other_settings(tiny, text, tmp_path):
    out, other_text = tmp_path / "out", tmp_path / "other.txt"
    other_text.write_text(text.read_text()[2000:])
    quantize(tiny("llama"), out, recipe(), text)
    for model, words, options in (
        (tiny("llama", torch.float16), text, {}),
        (tiny("llama"), other_text, {}),
        (tiny("llama"), text, {"seed": 1}),
    ):
        with pytest.raises(InputError, match="other settings"):
            quantize(model, out, recipe(), words, **options)


@pytest.mark.parametrize("package", ["finescale.pipeline.quantize", "torch"])
def test_another_version_is_other_settings(tiny, text, tmp_path, monkeypatch, package):
    """Blocks of two versions must not stand in one file."""
    before = prepare(tiny("llama"), recipe(), tmp_path / "out", str(text)).signature
    assert prepare(tiny("llama"), recipe(), tmp_path / "out", str(text)).signature == before
    monkeypatch.setattr(f"{package}.__version__", "2.99.0")
    assert prepare(tiny("llama"), recipe(), tmp_path / "out", str(text)).signature != before


def test_an_unfinished_run_with_other_settings_is_refused(tiny, text, tmp_path):
    out = tmp_path / "out"
    stop_after_a_block(tiny, text, out)
    before = contents(out)
    with pytest.raises(InputError, match=r"unfinished run.*--fresh") as caught:
        quantize(tiny("llama"), out, recipe(bits=3), text)
    assert_sentence(str(caught.value))
    assert contents(out) == before


def stop_after_a_block(tiny, text, out):
    with pytest.raises(StopError):
        run(prepare(tiny("llama"), recipe(), out, str(text)), on_progress=stop_after(1))
    assert (out / ".finescale" / "block-00000.json").is_file()


@pytest.mark.parametrize("finished", [True, False])
def test_fresh_replaces_what_a_run_wrote_and_nothing_else(tiny, text, tmp_path, finished):
    out = tmp_path / "out"
    if finished:
        quantize(tiny("llama"), out, recipe(bits=3), text)
    else:
        stop_after_a_block(tiny, text, out)
    own = {"notes.txt": "mine", "results.json": "{}", "other.safetensors": "x", "plot.html": "<p>"}
    for name, content in own.items():
        (out / name).write_text(content)
    stale = out / "model-00001-of-00003.safetensors.partial"
    stale.write_text("half")
    run(prepare(tiny("llama"), recipe("gptq"), out, str(text)), fresh=True)
    expected = tmp_path / "expected"
    quantize(tiny("llama"), expected, recipe("gptq"), text)
    wanted = set(hashes(expected)) | set(own)
    assert set(hashes(out)) == wanted
    for name, content in own.items():
        assert (out / name).read_text() == content
    names = [name for name in hashes(expected) if name != "run.json"]
    assert hashes(out, names) == hashes(expected, names)


def test_fresh_on_a_folder_of_a_larger_model_leaves_no_shard_behind(tiny, text, tmp_path):
    out = tmp_path / "out"
    quantize(tiny("llama-tied"), out, recipe(), text)
    run(prepare(tiny("llama"), recipe(), out, str(text)), fresh=True)
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    verify(out, tiny("llama"))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "x"},
        {"config.json": "{}", "report.json": '{"layers": []}'},
        {"config.json": "{}", "report.json": '{"signature": "abc"}'},
        {"config.json": "{}", "model.safetensors": "x"},
    ],
)
def test_a_folder_with_foreign_files_is_refused_and_untouched(tiny, text, tmp_path, fresh, files):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in files.items():
        (out / name).write_text(content)
    before = contents(out)
    with pytest.raises(InputError, match="did not write") as caught:
        run(prepare(tiny("llama"), recipe(), out, str(text)), fresh=fresh)
    assert_sentence(str(caught.value))
    assert contents(out) == before and not (out / ".finescale").exists()


def test_the_model_itself_is_no_output_folder(tiny, text, tmp_path):
    path = shutil.copytree(tiny("llama"), tmp_path / "model")
    before = contents(path)
    for fresh in (False, True):
        with pytest.raises(InputError, match="did not write"):
            run(prepare(path, recipe(), path, str(text)), fresh=fresh)
    assert contents(path) == before


def test_fresh_never_empties_the_folder_that_it_reads(tiny, text, tmp_path):
    """A dense result is a model like any other, and finescale's own folder: --fresh would remove its shards."""
    path = tmp_path / "dense"
    quantize(tiny("llama"), path, recipe(format="dense"), text)
    before = contents(path)
    (tmp_path / "link").symlink_to(path)
    for out in (path, tmp_path / "link", tmp_path / "dense" / ".." / "dense"):
        for fresh in (False, True):
            with pytest.raises(InputError, match="the model itself") as caught:
                run(prepare(path, recipe("gptq"), out, str(text)), fresh=fresh)
            assert_sentence(str(caught.value))
    assert contents(path) == before


def test_a_result_with_a_missing_file_is_not_complete(tiny, text, tmp_path):
    out = tmp_path / "out"
    quantize(tiny("llama"), out, recipe(), text)
    before = contents(out)
    (out / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors.*--fresh") as caught:
        quantize(tiny("llama"), out, recipe(), text)
    assert_sentence(str(caught.value))
    run(prepare(tiny("llama"), recipe(), out, str(text)), fresh=True)
    assert {name for name in contents(out) if contents(out)[name] != before[name]} <= {"run.json"}


def test_a_file_is_no_output_folder(tiny, text, tmp_path):
    (tmp_path / "out").write_text("x")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(InputError, match="out is a file"):
            prepare(tiny("llama"), recipe(), out, str(text))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, words in ((tmp_path / "link", "link to nothing"), (Path(os.devnull) / "below", "is a file")):
        with pytest.raises(InputError, match=words):
            prepare(tiny("llama"), recipe(), out, str(text))


def test_an_empty_folder_and_new_parents_are_fine(tiny, text, tmp_path):
    (tmp_path / "empty").mkdir()
    quantize(tiny("llama"), tmp_path / "empty", recipe(), text)
    quantize(tiny("llama"), tmp_path / "a" / "b" / "c", recipe(), text)


@pytest.mark.parametrize("fresh", [False, True])
def test_two_runs_at_once_are_refused_and_do_not_disturb_each_other(tiny, text, tmp_path, fresh):
    """--fresh must not pull the folder from under a run that is writing to it."""
    out = tmp_path / "out"
    seen = []

    def second(label, done, total):
        if done == 1 and not seen:
            before = contents(out)
            with pytest.raises(InputError, match="another run") as caught:
                run(prepare(tiny("llama"), recipe(), out, str(text)), fresh=fresh)
            assert_sentence(str(caught.value))
            assert contents(out) == before
            seen.append(True)

    run(prepare(tiny("llama"), recipe(), out, str(text)), on_progress=second)
    assert seen and verify(out, tiny("llama")).layers == 14


def test_a_damaged_report_is_not_taken_for_a_foreign_folder(tiny, text, tmp_path):
    out = tmp_path / "out"
    quantize(tiny("llama"), out, recipe(), text)
    (out / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        quantize(tiny("llama"), out, recipe(), text)
    assert_sentence(str(caught.value))


def test_a_list_of_files_that_points_elsewhere_removes_nothing_there(tmp_path):
    """The list comes from a file in the folder, which may be a stranger's."""
    victim = tmp_path / "victim.txt"
    victim.write_text("x")
    out = tmp_path / "out"
    out.mkdir()
    facts = {"finescale": "0", "signature": "s", "files": ["../victim.txt", str(victim), "sub/../../victim.txt"]}
    (out / "report.json").write_text(json.dumps(facts))
    (out / "config.json").write_text("{}")
    assert finished_signature(out) == "s"
    clear_output(out)
    assert victim.read_text() == "x"


def test_a_lock_left_by_a_killed_process_is_free(tmp_path):
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with Journal(out, "s").locked():
            os._exit(0)
    os.waitpid(child, 0)
    assert (out / ".finescale" / "lock").exists()
    with Journal(out, "s").locked():
        pass
