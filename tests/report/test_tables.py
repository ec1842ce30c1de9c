"""Tables for the terminal: the right numbers, and untrusted names stay text."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from finescale.report import comparison_table, inspect_table, layer_table, summary_table


def shown(table: Table, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().replace("\u00a0", " ")


def test_layer_table_says_common_facts_once(report: dict) -> None:
    text = shown(layer_table(report))
    for layer in report["layers"]:
        assert layer["name"] in text
    assert "all layers: solver quantease, tokens 262,144, bits 4, amplifier 1,024" in text
    assert "overflow use" in text and "damping raised" in text


def test_layer_table_fits_a_terminal(report: dict) -> None:
    for line in shown(layer_table(report | {"layers": report["layers"][:7]}), 100).splitlines():
        assert len(line) <= 100
    assert "model.layers.0.self_attn.q_proj" in shown(layer_table(report | {"layers": report["layers"][:7]}), 110)


def test_summary(report: dict, run: dict) -> None:
    text = shown(summary_table(report, run))
    for wanted in (
        "269 MB → 112 MB",
        "4.141",
        "78.9 %",
        "1.27 GB",
        "262,144 tokens",
        "does not load",
        "damping raised",
    ):
        assert wanted in text
    assert "no run.json" in shown(summary_table(report, None))
    assert "none" in shown(summary_table(report | {"fallbacks": []}, run))


def test_comparison(comparisons: list) -> None:
    text = shown(comparison_table(comparisons))
    for wanted in ("17.239", "+1.200", "0.0724", "86.8 %", "112 MB", "41.8 %"):
        assert wanted in text
    bare = shown(comparison_table([{"name": "rtn", "perplexity": 20.0, "size_bytes": None, "kl": None, "top1": None}]))
    assert "KL" not in bare.splitlines()[2] and "20" in bare


def test_inspect(report: dict) -> None:
    rows = [dict(layer, kernel="cpu int8 [amx]") for layer in report["layers"][:3]]
    rows.append(rows[0] | {"name": "folded_proj", "amplifier": 1, "folded": True})
    rows.append({"name": "lm_head", "bits": None, "group_size": -1, "overflow_use": 1.5})
    text = shown(inspect_table(rows))
    for wanted in ("cpu int8 [amx]", "per channel", "1,024", "1.50", "lm_head", "folded "):
        assert wanted in text
    assert "kernel" not in shown(inspect_table(report["layers"][:3]))
    assert "layer" in shown(inspect_table([]))


def test_markup_and_escapes_in_names_stay_text(report: dict, run: dict) -> None:
    evil = "[red]x[/red][/]\x1b[31m"
    report["model"]["name"] = report["recipe_name"] = evil
    report["layers"] = report["layers"][:2]
    report["layers"][0]["name"] = evil
    report["fallbacks"] = [evil]
    report["engines"][0]["engine"] = evil
    texts = [
        shown(summary_table(report, run)),
        shown(layer_table(report)),
        shown(inspect_table(report["layers"])),
        shown(comparison_table([{"name": evil, "perplexity": 2.0}])),
    ]
    for text in texts:
        assert "[red]x[/red][/]" in text and "\x1b" not in text
