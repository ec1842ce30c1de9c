"""The HTML page: complete, self-contained, escaped, and true to the numbers it was given."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finescale.report import render_html, write_html

FIGURES = ("fig-comparison", "fig-error", "fig-error-map", "fig-scales", "fig-amplifier", "fig-memory", "fig-time")
VOID = {"meta", "link", "br", "hr", "img", "input"}
FETCHING = {"src", "href", "srcset", "action", "poster", "data", "xlink:href", "background", "formaction", "ping"}


class Page(HTMLParser):
    """Checks that every tag is closed in order; keeps tags, texts and figures."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.figures: dict[str, list[str]] = {}
        self.texts: list[str] = []
        self.rows: list[list[tuple[str, dict[str, str]]]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {k: v or "" for k, v in attrs}
        assert len(names) == len(attrs), f"an attribute occurs twice in <{tag}>"
        self.tags.append((tag, names))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            assert names["id"] == names["data-figure"]
            self.figures[names["id"]] = []
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append(("", names))

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
            if "figure" in self.open:
                self.figures[next(reversed(self.figures))].append(data)
            if "td" in self.open and self.rows:
                text, names = self.rows[-1][-1]
                self.rows[-1][-1] = (text + data, names)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def omitted(self) -> set[str]:
        return {names["data-omitted"] for _, names in self.tags if "data-omitted" in names}


def assert_self_contained(text: str, page: Page) -> None:
    for tag, names in page.tags:
        for name in FETCHING & names.keys():
            assert names[name].startswith(("#", "data:")), f"<{tag} {name}={names[name]!r}> would fetch something"
        assert not any(name.startswith("on") for name in names), f"<{tag}> has an inline handler"
    for source in re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", text, re.S):
        assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", source)


def test_every_figure_is_drawn_with_words(report: dict, run: dict, comparisons: list) -> None:
    text = render_html(report, run, comparisons)
    page = Page(text)
    assert set(page.figures) == set(FIGURES)
    assert page.omitted() == {"fig-float-scales"}
    pictures = [names for tag, names in page.tags if tag == "svg"]
    assert len(pictures) == len(FIGURES)
    for names in pictures:
        assert names["role"] == "img" and len(names["aria-label"]) > 40
    assert sum(tag == "figcaption" for tag, _ in page.tags) == len(FIGURES)
    assert_self_contained(text, page)
    assert "http://" not in text and "https://" not in text
    assert "nan" not in re.findall(r'[ "(]nan[ ",)]', text)
    ids = [names["id"] for _, names in page.tags if "id" in names]
    assert len(ids) == len(set(ids))
    for _, names in page.tags:
        if names.get("href", "").startswith("#"):
            assert names["href"][1:] in ids


def test_numbers_are_the_inputs(report: dict, run: dict, comparisons: list) -> None:
    page = Page(render_html(report, run, comparisons))
    text = page.text.replace("\u00a0", " ")
    for wanted in (
        "SmolLM2-135M",
        "269 MB → 112 MB",
        "41.8 % of the original",
        "4.141",
        "78.9 %",
        "106.2 million of 134.5 million",
        "1.27 GB",
        "262,144 tokens",
        "128 samples × 2,048 tokens",
        "wikitext-2-raw-v1",
        report["calibration"]["sha256"],
        "4-bit weights",
        "group size 128 (1 layer differs)",
        "8-bit activations",
    ):
        assert wanted in text, wanted
    errors = sorted(layer["relative_error"] for layer in report["layers"])
    worst = max(report["layers"], key=lambda layer: layer["relative_error"])
    assert f"Median {(errors[104] + errors[105]) / 2:.5f}; the largest, {errors[-1]:.3f}, is in {worst['name']}" in text
    shown = {row[0][0]: row for row in page.rows if row}
    for layer in report["layers"]:
        values = {names["data-v"] for _, names in shown[layer["name"]] if "data-v" in names}
        for key in ("bits", "group_size", "amplifier", "overflow_use", "relative_error", "weight_mse", "scale_max"):
            assert any(float(value) == layer[key] for value in values), (layer["name"], key)
    for row in comparisons:
        cells = [float(names["data-v"]) for _, names in shown[row["name"]] if "data-v" in names]
        assert {row["perplexity"], row["size_bytes"], row["kl"], row["top1"]} <= set(cells)


def test_points_of_the_error_figure_name_every_layer(report: dict) -> None:
    text = render_html(report)
    for layer in report["layers"]:
        assert f"<title>{layer['name']}: " in text


def test_exact_share_of_eight_bit_scales(report: dict) -> None:
    low = {"edges": [0.5, 100.5, 255.5, 300.5], "counts": [10, 20, 70]}
    layer = copy.deepcopy(report["layers"][0]) | {"scale_histogram": low, "scale_min": 1, "scale_max": 300}
    page = Page(render_html(report | {"layers": [layer]}))
    text = page.text.replace("\u00a0", " ")
    assert "30.00 % of the 100 integer scales fit 8 bits (S ≤ 255); the largest is 300" in text
    assert "About 30.00" not in text
    layer["scale_histogram"] = {"edges": [0.0, 400.0], "counts": [100]}
    text = Page(render_html(report | {"layers": [layer]})).text.replace("\u00a0", " ")
    assert "About 64.00 % of the 100 integer scales" in text


def test_names_cannot_inject(report: dict, run: dict, comparisons: list) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}</title>\u202e\x00'
    report["model"]["name"] = evil
    report["recipe_name"] = report["finescale"] = report["calibration"]["source"] = evil
    report["recipe"]["solver"]["name"] = evil
    report["fallbacks"].append(evil)
    report["engines"].append({"engine": evil, "loads": None, "runs_as": evil, "remark": evil})
    report["layers"][0] |= {"name": f"model.layers.0.{evil}", "solver": evil, "notes": [evil]}
    run["started"] = run["versions"][evil] = evil
    comparisons[1]["name"] = evil
    text = render_html(report, run, comparisons)
    page = Page(text)
    assert_self_contained(text, page)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "{{ 7*7 }}" in page.text and "alert(1)" in page.text
    assert "\u202e" not in text and "\x00" not in text


def test_without_run_or_comparisons_it_says_so(report: dict) -> None:
    page = Page(render_html(report, None))
    assert page.omitted() == {"fig-float-scales", "fig-comparison", "fig-time", "run"}
    assert "there is no run.json beside the report" in page.text


def test_float_scales(make_report: Any, run: dict) -> None:
    page = Page(render_html(make_report(amplifier=None), run))
    assert {"fig-float-scales", "fig-error", "fig-time"} <= set(page.figures)
    assert {"fig-scales", "fig-amplifier"} <= page.omitted()
    assert "the scales of this model are floats" in page.text
    assert "Columns left out because no row has a value: amplifier, overflow use." in page.text


def test_folded_scales(report: dict, run: dict) -> None:
    for layer in report["layers"]:
        histogram = {"edges": [0.0, 5.0, 10.0, 15.0], "counts": [3, 40, 57]}
        layer |= {"amplifier": 1, "folded": True, "amplifier_curve": None, "scale_min": 2.0, "scale_max": 15.0}
        layer["scale_histogram"] = histogram
    page = Page(render_html(report, run))
    assert {"fig-float-scales", "fig-amplifier"} <= page.omitted() and "fig-scales" in page.figures
    assert "each output has a factor in place of an amplifier" in page.text
    assert "A folded scale is S times one factor per output" in page.text
    assert "the largest is 15 (folded)" in page.text
    assert "amplifier 1" not in page.text


@pytest.mark.parametrize("gone", [None, math.nan, "text", [], {}, -1, True])
def test_fields_without_a_usable_value(make_report: Any, make_run: Any, gone: object) -> None:
    report, run = make_report(4), make_run(4)
    for layer in report["layers"][::2]:
        for key in layer:
            if key not in ("name",):
                layer[key] = gone
    page = Page(render_html(report, run))
    assert "fig-error" in page.figures
    for key in ("model", "recipe", "calibration", "size", "engines", "fallbacks", "layers", "recipe_name"):
        Page(render_html(report | {key: gone}, run))
    for key in run:
        Page(render_html(report, run | {key: gone}))


def test_empty_report_names_everything_that_is_missing() -> None:
    page = Page(render_html({}))
    assert page.figures == {}
    assert {*FIGURES, "fig-float-scales", "layers", "engines", "recipe", "run"} == page.omitted()


def test_one_layer_of_one_block(report: dict, make_run: Any) -> None:
    page = Page(render_html(report | {"layers": report["layers"][:1]}, make_run(1)))
    assert {"fig-error", "fig-scales", "fig-amplifier", "fig-time"} <= set(page.figures)


def test_constant_and_zero_values(report: dict) -> None:
    for layer in report["layers"]:
        layer |= {
            "relative_error": 0.01,
            "scale_histogram": {"edges": [7, 7], "counts": [5]},
            "scale_max": 7,
            "scale_min": 7,
        }
    report["layers"][0]["relative_error"] = 0.0
    page = Page(render_html(report))
    assert {"fig-error", "fig-error-map", "fig-scales"} <= set(page.figures)
    assert "100\u00a0% of the 1,050 integer scales" in page.text or "100 % of the 1,050 integer scales" in page.text


def test_overflow_is_shouted(report: dict) -> None:
    report["layers"][5]["overflow_use"] = 1.25
    page = Page(render_html(report))
    assert "an int32 sum could wrap" in page.text and "NOT below 1" in page.text
    assert "an int32 sum could wrap" not in Page(render_html(report | {"layers": report["layers"][6:]})).text


def test_no_fallbacks_is_said(report: dict) -> None:
    assert "None. Every layer was quantized" in Page(render_html(report | {"fallbacks": []})).text
    assert "damping raised from 0.01 to 0.1, the Hessian" in Page(render_html(report)).text


def test_experts_are_summed_up(report: dict) -> None:
    layers = []
    for layer in report["layers"]:
        for expert in range(12 if ".mlp." in layer["name"] else 1):
            name = layer["name"].replace(".mlp.", f".mlp.experts.{expert}.")
            layers.append(layer | {"name": name, "tokens": 100 + expert})
    layers.append(report["layers"][0] | {"name": "lm_head", "block": None})
    page = Page(text := render_html(report | {"layers": layers * 2}))
    assert "12 × " not in page.figures["fig-error"][0] and "(experts)" in page.text
    assert "The 2,000 layers with the largest relative error" in page.text
    assert len(text) < 2_000_000


@pytest.mark.parametrize(("blocks", "limit"), [(30, 700_000), (80, 1_600_000)])
def test_page_stays_small(make_report: Any, make_run: Any, comparisons: list, blocks: int, limit: int) -> None:
    assert len(render_html(make_report(blocks), make_run(blocks), comparisons).encode()) < limit


def test_write_is_whole_deterministic_and_survives_json(
    report: dict, run: dict, comparisons: list, tmp_path: Path
) -> None:
    report["model"]["name"] = "broken \ud800 surrogate"
    first, second = tmp_path / "deep" / "a.html", tmp_path / "b.html"
    write_html(report, run, first, comparisons)
    write_html(json.loads(json.dumps(report)), json.loads(json.dumps(run)), second, comparisons)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in first.parent.iterdir()) == ["a.html"]
    Page(first.read_text(encoding="utf-8"))
    write_html(report, None, first)
    assert "there is no run.json" in first.read_text(encoding="utf-8")
