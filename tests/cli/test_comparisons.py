"""finescale compare, mix and evaluate --tasks through the real entry point."""

import json

import pytest
import torch
import yaml

from tests.cli.test_commands import refused
from tests.helpers import read_json

WINDOWS = ("--samples", "4", "--sample-length", "48", "--windows", "3", "--length", "60")
QUESTION = {"query": "Question: what is it?", "choices": ["a name", "an object"], "gold": 1}


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "piqa.jsonl").write_text("\n".join(json.dumps(QUESTION) for _ in range(5)))
    return folder


def test_compare(cli, tiny, text, tasks, tmp_path):
    out = tmp_path / "out"
    grid = tmp_path / "grid.yaml"
    grid.write_text("grids:\n  - {recipes: [w4a8-integer-scale], groups: [32], set: [solver.sweeps=2], label: short}\n")
    options = ("--recipes", "rtn,gptq", "--bits", "4,3", "--groups", "32", "--grid", grid, "--calibration", text,
               "--text", text, *WINDOWS, "--tasks", "piqa", "--task-data", tasks, "--limit", "3",
               "--speed")  # fmt: skip
    command = ("compare", tiny("llama", torch.float16), "--out", out, *options, "--json", tmp_path / "c.json")
    code, stdout, stderr = cli(*command)
    assert code == 0, stderr
    assert (
        "Perplexity" in stdout and "W3 g32" in stdout and "W4A8 g32" in stdout and "w4a8-integer-scale short" in stdout
    )
    assert "5/5 gptq-w3-g32: perplexity" in stderr
    result = read_json(tmp_path / "c.json")
    assert result == read_json(out / "compare.json") and len(result["rows"]) == 6
    assert all(
        row["tasks"][0]["questions"] == 3 and row["speed"]["prompt_tokens_per_second"] > 0 for row in result["rows"]
    )
    for name in ("compare.html", "tables.md", "tables.txt", "rows.csv", "figures/fig-size.svg"):
        assert (out / name).is_file(), name
    (out / "compare.html").unlink()
    assert cli(*command)[0] == 0 and (out / "compare.html").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [((), ("--recipes",)), (("--bits", "4"), ("--recipes",)),
     (("--recipes", "rtn", "--bits", "four"), ("whole numbers",)),
     (("--recipes", "none"), ("no recipe",)), (("--recipes", "rtn", "--tasks", "piqa"), ("--task-data",)),
     (("--recipes", "rtn", "--dtype", "int8"), ("float32",)), (("--recipes", "rtn", "--devices", "cuda"), ("cpu",)),
     (("--recipes", "rtn", "--peers", "none.json"), ("none.json",)), (("--grid", "none.yaml"), ("none.yaml",))],
)  # fmt: skip
def test_compare_refuses(cli, tiny, text, tmp_path, options, words):
    if torch.cuda.is_available() and "cuda" in options:
        pytest.skip("there is a GPU")
    given = ("--calibration", text, "--text", text, *WINDOWS)
    refused(cli("compare", tiny("llama"), "--out", tmp_path / "o", *given, *options), *words)
    assert not (tmp_path / "o").exists()


def test_a_failed_cell_makes_the_command_fail(cli, tiny, text, tmp_path, monkeypatch):
    from finescale.compare import cell
    from finescale.errors import NumericsError

    def failing(job):
        raise NumericsError("layer x holds NaN; repair it.")

    monkeypatch.setattr(cell, "run", failing)
    command = (
        "compare",
        tiny("llama"),
        "--out",
        tmp_path / "o",
        "--recipes",
        "rtn",
        "--calibration",
        text,
        "--text",
        text,
    )
    code, stdout, stderr = cli(*command, *WINDOWS)
    assert code == 1 and "1 of 1 cells failed (rtn-w4-channel)" in stderr and "failed" in stdout


def test_mix_and_then_quantize(cli, tiny, text, tmp_path):
    recipe, facts = tmp_path / "mixed.yaml", tmp_path / "facts.json"
    given = (
        "--recipe",
        "gptq",
        "--set",
        "weights.group_size=32",
        "--calibration",
        text,
        "--samples",
        "6",
        "--length",
        "48",
    )
    model = tiny("llama", torch.float16)
    options = ("--target-bits", "4.5", "--choices", "2,3,4,6", "--windows", "2")
    code, stdout, stderr = cli("mix", model, *given, *options, "--out", recipe, "--json", facts)
    assert code == 0, stderr
    assert "stored bits per weight" in stdout and "predicted KL" in stdout
    assert yaml.safe_load(recipe.read_text())["name"] == "gptq-4.5b"
    code, _, stderr = cli("quantize", model, "--recipe", recipe, "--calibration", text, "--out", tmp_path / "a")
    assert code == 0, stderr
    size = read_json(tmp_path / "a" / "report.json")["size"]["bits_per_weight"]
    assert size == pytest.approx(read_json(facts)["bits_per_weight"]) and 4.0 < size <= 4.5
    code, stdout, stderr = cli(
        "quantize", model, *given, "--target-bits", "4.5", "--choices", "2,3,4,6", "--out", tmp_path / "b"
    )
    assert code == 0, stderr
    assert read_json(tmp_path / "b" / "report.json")["size"]["bits_per_weight"] <= 4.5
    assert (tmp_path / "b.sensitivity.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [((), ("--target-bits", "--max-kl")), (("--target-bits", "4", "--max-kl", "1"), ("either",)),
     (("--target-bits", "1.5"), ("2.496 to 8.583",)),
     (("--target-bits", "99"), ("2.496 to 8.583",)), (("--target-bits", "4", "--choices", "a"), ("--choices a",)),
     (("--target-bits", "4", "--choices", "5,4"), ("weights.bits is 5",))],
)  # fmt: skip
def test_mix_refuses(cli, tiny, text, tmp_path, options, words):
    given = ("--recipe", "rtn", "--calibration", text, "--samples", "4", "--length", "48", "--windows", "2")
    refused(cli("mix", tiny("llama"), *given, *options, "--out", tmp_path / "r.yaml"), *words)
    assert not (tmp_path / "r.yaml").exists()


def test_choices_without_a_goal_are_refused(cli, tiny, text, tmp_path):
    given = ("--recipe", "rtn", "--calibration", text, "--out", tmp_path / "o", "--choices", "3,4")
    refused(cli("quantize", tiny("llama"), *given), "--target-bits")


def test_evaluate_tasks(cli, tiny, tasks, tmp_path):
    options = ("--tasks", "piqa", "--task-data", tasks, "--limit", "4", "--json", tmp_path / "e.json")
    code, stdout, stderr = cli("evaluate", tiny("llama"), *options)
    assert code == 0, stderr
    assert "piqa" in stdout and "standard error" in stdout and "zero-shot" in stdout and "perplexity" not in stdout
    (found,) = read_json(tmp_path / "e.json")["tasks"]
    assert (
        found["questions"] == 4 and found["dtype"] == "float32" and found["bos"] is False and found["template"] is None
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--tasks", "mmlu", "--task-data", "TASKS"), ("mmlu", "hellaswag")), (("--tasks", ""), ("names none",)),
     (("--tasks", "boolq", "--task-data", "TASKS"), ("boolq.jsonl",)), (("--limit", "3"), ("--tasks",)),
     (("--tasks", "piqa", "--task-data", "TASKS", "--limit", "0"), ("--limit",)),
     (("--tasks", "piqa", "--task-data", "TASKS", "--against", "MODEL"), ("--against", "--text"))],
)  # fmt: skip
def test_evaluate_tasks_refuses(cli, tiny, tasks, options, words):
    given = [tasks if option == "TASKS" else option for option in options]
    refused(cli("evaluate", tiny("llama"), *given), *words)
