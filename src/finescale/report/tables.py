"""Rich tables for the terminal. Names are untrusted: they go in as Text, so that rich markup in them stays text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from finescale.report import facts, page, units
from finescale.report.scales import LIMIT

SHOWN = 10
"""Fallbacks that the terminal shows; the page has all."""
_STYLES = {"best": "bold green", "reference": "dim", "bad": "bold red", "note": "yellow", "error": ""}


def layer_table(report: Mapping[str, object]) -> Table:
    """Every layer of report.json, in the model's order; columns nobody has a value for are left out."""
    sheet = page.layer_sheet(facts.read_layers(report))
    titles = [head[0] for head in sheet.heads]
    same = [i for i in range(1, len(titles)) if len(sheet.rows) > 1 and len({row[i].text for row in sheet.rows}) == 1]
    words = [*sheet.common, *(f"{titles[i]} {sheet.rows[0][i].text}" for i in same)]
    caption = f"all layers: {', '.join(words)}\n" if words else ""
    caption += "relative error = ||(W-Wq)X||^2 / ||WX||^2; overflow use = largest int32 sum / 2^31"
    kept = [i for i in range(len(titles)) if i not in same]  # columns that say one thing are said once, below
    heads = tuple(sheet.heads[i] for i in kept)
    return _sheet("Layers", page.Sheet(heads, tuple(tuple(row[i] for i in kept) for row in sheet.rows)), caption)


def comparison_table(rows: Iterable[Mapping[str, object]]) -> Table:
    """Recipes compared: rows {"name", "perplexity", "size_bytes", "kl" (nats per token), "top1" (share)}."""
    sheet = page.comparison_sheet(facts.read_comparisons(list(rows)))
    return _sheet("Comparison", sheet, "perplexity: lower is better; KL to the original in nats per token")


def summary_table(report: Mapping[str, object], run: Mapping[str, object] | None = None) -> Table:
    """The headline numbers of a run, its fallbacks, and which engines load the files."""
    layers = facts.read_layers(report)
    model = units.clean(units.mapping(report.get("model")).get("name") or "unnamed model")
    table = Table(
        title=Text(f"{model}, {units.clean(report.get('recipe_name') or 'custom recipe')}"), show_header=False
    )
    for style in ("bold", "", "dim"):
        table.add_column(style=style, overflow="fold")
    scheme = page.scheme_line(report, layers)
    if scheme:
        table.add_row("Scheme", Text(scheme), "")
    for tile in page.tiles(report, run, layers):
        table.add_row(Text(tile.label), Text(tile.value), Text(tile.note))
    fallbacks = report.get("fallbacks")
    if isinstance(fallbacks, list | tuple):
        style = "yellow" if fallbacks else "green"
        words = "\n".join(units.clean(item) for item in fallbacks[:SHOWN]) or "none"
        if len(fallbacks) > SHOWN:
            words += f"\nand {len(fallbacks) - SHOWN} more in the report"
        table.add_row("Fallbacks", Text(words, style=style), "")
    for engine, loads, runs_as, remark in page.engine_rows(report):
        word = {True: "loads", False: "does not load", None: "not tried"}[loads]
        note = "" if remark == units.MISSING else remark
        table.add_row(Text(f"Engine {engine}"), Text(f"{word}: {runs_as}"), Text(note))
    return table


def inspect_table(layers: Sequence[Mapping[str, object]]) -> Table:
    """What `finescale inspect` found per layer.

    Takes mappings with "name", "bits", "group_size", "amplifier", "overflow_use" (largest B_j / 2^31),
    "relative_error" and, where known, "kernel" (which one will run); columns without any value are left out.
    """
    columns = (
        "bits",
        "group_size",
        "bits_per_weight",
        "outliers",
        "amplifier",
        "overflow_use",
        "relative_error",
        "kernel",
    )
    used = [key for key in columns if any(layer.get(key) is not None for layer in layers)]
    table = Table(
        title="Layers",
        caption=f"{len(layers)} layers; overflow use is proven below 1" if "overflow_use" in used else None,
    )
    longest = max((len(units.clean(layer.get("name"))) for layer in layers), default=0)
    table.add_column("layer", overflow="fold", min_width=min(longest, 40))
    for key in used:
        table.add_column(key.replace("_size", "").replace("_", " "), justify="left" if key == "kernel" else "right")
    for layer in layers:
        table.add_row(Text(units.clean(layer.get("name"))), *(_inspected(key, layer) for key in used))
    return table


def task_table(tasks: Sequence[Mapping[str, object]]) -> Table:
    """Zero-shot tasks of one model: mappings with "task", "metric", "value", "standard_error", "questions"."""
    table = Table(title="Zero-shot tasks", caption="share of right answers, with its standard error")
    for name in ("task", "metric", "right", "standard error", "questions"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task in tasks:
        table.add_row(
            Text(units.clean(task.get("task"))),
            Text(units.clean(task.get("metric"))),
            units.percent(units.number(task.get("value"))),
            units.percent(units.number(task.get("standard_error"))),
            units.count(units.number(task.get("questions"))),
        )
    return table


def _inspected(key: str, layer: Mapping[str, object]) -> Text:
    value = layer.get(key)
    if key == "kernel":
        return Text(units.clean(value))
    if key == "group_size":
        return Text(units.group(units.integer(value)))
    if key == "amplifier":
        return Text("folded" if layer.get("folded") else units.count(units.number(value)))
    known = units.number(value)
    over = key == "overflow_use" and known is not None and known >= LIMIT
    return Text(units.sig(known), style="bold red" if over else "")


def _sheet(title: str, sheet: page.Sheet, caption: str) -> Table:
    table = Table(title=title, caption=caption)
    for name, _, kind in sheet.heads:
        right = kind == "number"
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in sheet.rows:
        table.add_row(*(Text(cell.text, style=_STYLES.get(cell.kind, "")) for cell in row))
    return table
