"""The tables and pages of a comparison: every number of compare.json in its place, and the plots' Pareto front."""

import csv
import io
import json
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finescale.report.compare import as_csv, comparison_tables, metric_sheet, metrics_of, read_rows, write_comparison
from finescale.report.frontier import pareto
from tests.report.test_html import Page


def row(label, bits, group, perplexity, size, **more):
    recipe = {"weights": {"bits": bits, "group_size": group}, "activations": more.pop("activations", None)}
    numbers = {"perplexity": perplexity, "kl": perplexity / 100, "size_bytes": size, "bits_per_weight": bits + 0.25}
    return {"key": f"{label}{bits}", "label": label, "recipe": recipe} | numbers | more


def task(name, value):
    return {"task": name, "value": value, "standard_error": 0.02, "metric": "accuracy"}


@pytest.fixture
def result():
    original = {"key": "original", "label": "original", "recipe": None, "perplexity": 10.0, "size_bytes": 4000}
    rows = [
        original | {"tasks": [task("piqa", 0.7), task("boolq", 0.6)]},
        row("rtn", 4, 64, 14.0, 1000, tasks=[task("piqa", 0.6), task("boolq", 0.5)]),
        row("rtn", 3, 64, 50.0, 800, tasks=[]),
        row("<b>gptq", 4, 64, 12.0, 1000, speed={"prompt_tokens_per_second": 900.0, "generated_tokens_per_second": 7}),
        row("<b>gptq", 3, 64, 20.0, 800, speed={"prompt_tokens_per_second": 950.0, "generated_tokens_per_second": 8}),
        row("<b>gptq", 4, -1, 13.0, 990, activations={"bits": 8}),
        {"key": "x", "label": "broken", "recipe": {"weights": {"bits": 4, "group_size": 64}}, "error": "no memory"},
    ]
    peer = {"label": "tool", "bits": 4, "group_size": 64, "perplexity": 11.0, "provenance": {"version": "1.2"}}
    setting = {"calibration": "c.txt", "text": "t.txt", "windows": 3, "length": 60, "bos": False, "dtype": "float32"}
    return {"model": "m", "finescale": "0", "rows": rows, "peers": [peer], "setting": setting, "machine": {"gpu": "G"}}


def cells(sheet):
    return [[cell.text for cell in line] for line in sheet.rows]


def test_recipes_down_and_schemes_across(result):
    rows = read_rows(result)
    metrics = {metric.key: metric for metric in metrics_of(rows)}
    sheet = metric_sheet(metrics["perplexity"], rows)
    assert [head[0] for head in sheet.heads] == ["recipe", "W4 g64", "W3 g64", "W4A8 per channel"]
    assert cells(sheet) == [
        ["original: 10", "", "", ""],
        ["rtn", "14", "50", ""],
        ["<b>gptq", "12", "20", "13"],
        ["broken", "failed", "", ""],
        ["tool (peer)", "11", "", ""],
    ]
    best = [(line[0].text, cell.text) for line in sheet.rows for cell in line if cell.kind == "best"]
    assert best == [("<b>gptq", "12"), ("<b>gptq", "20"), ("<b>gptq", "13")]


def test_tasks_have_errors_and_a_mean(result):
    rows = read_rows(result)
    metrics = {metric.key: metric for metric in metrics_of(rows)}
    sheet = cells(metric_sheet(metrics["task piqa"], rows))
    assert [line[:2] for line in sheet[:2]] == [
        ["original: 70.0\u00a0% ± 2.0\u00a0%", ""],
        ["rtn", "60.0\u00a0% ± 2.0\u00a0%"],
    ]
    assert rows[1].values["task mean"] == pytest.approx(0.55) and "task mean" not in rows[2].values
    lower = {key: metric.lower for key, metric in metrics.items()}
    assert lower["perplexity"] and not lower["task piqa"] and not lower["prompt_speed"]


def test_csv_holds_every_number(result):
    rows = read_rows(result)
    lines = list(csv.DictReader(io.StringIO(as_csv(rows, metrics_of(rows)))))
    assert len(lines) == len(rows)
    assert float(lines[1]["perplexity"]) == 14.0 and float(lines[1]["task piqa error"]) == 0.02
    assert lines[3]["label"] == "<b>gptq" and lines[6]["note"] == "no memory"
    assert lines[7]["kind"] == "peer" and lines[7]["note"] == "version 1.2"


def test_every_file_is_written_and_whole(result, tmp_path):
    page = write_comparison(result, tmp_path)
    html = page.read_text(encoding="utf-8")
    parsed = Page(html)
    assert set(parsed.figures) == {"fig-size", "fig-bits", "fig-prompt-speed", "fig-generated-speed"}
    assert "<b>gptq" not in html and "&lt;b&gt;gptq" in html and "no memory" in html and "http:" not in html
    for name in parsed.figures:
        picture = ET.fromstring((tmp_path / "figures" / f"{name}.svg").read_text(encoding="utf-8"))
        assert picture.tag == "{http://www.w3.org/2000/svg}svg" and len(picture.findall(".//{*}circle")) > 0
    tables = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| <b>gptq | **12** | **20** | **13** |" in tables and "G." in tables
    assert "Perplexity" in (tmp_path / "tables.txt").read_text(encoding="utf-8")
    assert write_comparison(json.loads(json.dumps(result)), tmp_path / "b").read_bytes() == page.read_bytes()


def test_what_lost_too_much_is_named_instead_of_drawn(result, tmp_path):
    """Else the models that count are on top of each other."""
    result["rows"].append(row("ruined", 2, 64, 50.1, 500))
    html = write_comparison(result, tmp_path).read_text(encoding="utf-8")
    assert "Not drawn, beyond 5 times the least: ruined (W2 g64) 50.1." in html
    assert "of 5 models drawn are on the Pareto front" in html and "ruined, W2 g64: perplexity" not in html
    result["rows"][0]["perplexity"] = result["rows"][-1]["perplexity"] = 1.0  # all others have lost too much
    assert "Not drawn" not in write_comparison(result, tmp_path).read_text(encoding="utf-8")


def test_nothing_to_draw_is_said(result, tmp_path):
    result["rows"], result["peers"] = result["rows"][:2], []
    html = write_comparison(result, tmp_path).read_text(encoding="utf-8")
    assert "fewer than two models" in html
    assert len(comparison_tables(result)) == len(metrics_of(read_rows(result)))


POINTS = st.lists(st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float)), min_size=1, max_size=9)


@given(POINTS, st.booleans())
def test_the_front_is_what_nothing_beats(points, less):
    sign = 1 if less else -1

    def beaten(one, other):
        x, y = sign * (other[0] - one[0]), other[1] - one[1]
        return x <= 0 and y <= 0 and (x < 0 or y < 0)

    best = {point for point in points if not any(beaten(point, other) for other in points)}
    kept = [points[number] for number in pareto(points, less)]
    assert set(kept) == best and len(kept) == len(best) and kept == sorted(kept)
