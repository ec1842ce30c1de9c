"""A comparison of many recipes: one table per metric, figures with their Pareto front, one self-contained page."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from finescale.report import frontier, page, units
from finescale.report.figure import Figure
from finescale.report.html import template, write_whole


@dataclass(frozen=True)
class Metric:
    """A number of every row: its name, what it is, how it is written, and whether less is better."""

    key: str
    title: str
    meaning: str
    text: Callable[[float | None], str]
    lower: bool = True


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    Attributes:
        label: recipe or tool.
        scheme: bits and groups in words.
        kind: ``original``, ``cell`` or ``peer``.
        values: by the keys of the metrics.
        errors: standard errors, where known.
        note: why it failed, or where a peer's numbers are from.
    """

    label: str
    scheme: str
    kind: str
    values: Mapping[str, float]
    errors: Mapping[str, float]
    note: str = ""


def _rate(value: float | None) -> str:
    return units.MISSING if value is None else f"{units.sig(value)}/s"


METRICS = (
    Metric("perplexity", "Perplexity", "exp of the mean loss per token", lambda v: units.sig(v, 4)),
    Metric("kl", "KL divergence", "mean divergence from the original's next-token distribution, nats", units.sig),
    Metric("top1", "Top-1 agreement", "share of tokens with the original's likeliest successor", units.percent, False),
    Metric("bits_per_weight", "Bits per weight", "stored bits of the quantized weights, scales included", units.sig),
    Metric("size_bytes", "Size on disk", "bytes of the weight files", units.size),
    Metric("quantize_seconds", "Time to quantize", "seconds, beside the other cells", units.seconds),
    Metric("prompt_speed", "Prompt tokens", "tokens a second through one forward pass", _rate, False),
    Metric("generated_speed", "Generated tokens", "tokens a second of greedy generation for one user", _rate, False),
)


def read_rows(result: Mapping[str, object]) -> list[Row]:
    """Rows of ``compare.json``; the original first, peers last."""
    rows = [_cell_row(units.mapping(item)) for item in units.sequence(result.get("rows"))]
    return rows + [_peer_row(units.mapping(item)) for item in units.sequence(result.get("peers"))]


def _cell_row(item: Mapping[str, object]) -> Row:
    recipe = units.mapping(item.get("recipe"))
    speed = units.mapping(item.get("speed"))
    values = {key: item.get(key) for key in ("perplexity", "kl", "top1", "bits_per_weight", "size_bytes")}
    values |= {"quantize_seconds": item.get("quantize_seconds")}
    values |= {"prompt_speed": speed.get("prompt_tokens_per_second")}
    values |= {"generated_speed": speed.get("generated_tokens_per_second")}
    errors: dict[str, float] = {}
    for task in map(units.mapping, units.sequence(item.get("tasks"))):
        key = f"task {task.get('task')}"
        values[key] = task.get("value")
        error = units.number(task.get("standard_error"))
        if error is not None:
            errors[key] = error
    shares = [units.number(values[key]) for key in values if key.startswith("task ")]
    known = [share for share in shares if share is not None]
    if len(known) > 1:
        values["task mean"] = statistics.fmean(known)
    return Row(
        label=units.clean(item.get("label"), 80),
        scheme=scheme_words(recipe),
        kind="cell" if recipe else "original",
        values=_numbers(values),
        errors=errors,
        note=units.clean(item["error"], 400) if "error" in item else "",
    )


def _peer_row(item: Mapping[str, object]) -> Row:
    weights = {"bits": item.get("bits"), "group_size": item.get("group_size")}
    inputs = {"bits": item.get("activation_bits")} if item.get("activation_bits") else None
    keys = ("perplexity", "kl", "top1", "bits_per_weight", "size_bytes")
    provenance = units.mapping(item.get("provenance"))
    return Row(
        label=units.clean(item.get("label"), 80),
        scheme=scheme_words({"weights": weights, "activations": inputs}),
        kind="peer",
        values=_numbers({key: item.get(key) for key in keys}),
        errors={},
        note=units.clean("; ".join(f"{key} {value}" for key, value in provenance.items()), 400),
    )


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    found = {key: units.number(value) for key, value in values.items()}
    return {key: value for key, value in found.items() if value is not None}


def scheme_words(recipe: Mapping[str, object]) -> str:
    """``W4A8 g64``, ``W3 per channel``; of several schemes the recipe's own."""
    if not recipe:
        return "original"
    weights, inputs = units.mapping(recipe.get("weights")), units.mapping(recipe.get("activations"))
    group = units.integer(weights.get("group_size"))
    words = "auto groups" if group is None else "per channel" if group == -1 else f"g{group}"
    own = " mixed" if units.sequence(recipe.get("overrides")) else ""
    rounded = f"A{inputs.get('bits')}" if inputs else ""
    return f"W{weights.get('bits')}{rounded} {words}{own}"


def metrics_of(rows: Sequence[Row]) -> list[Metric]:
    """Metrics that some row has, tasks after the others."""
    known = [metric for metric in METRICS if any(metric.key in row.values for row in rows)]
    tasks = dict.fromkeys(key for row in rows for key in row.values if key.startswith("task "))
    return known + [
        Metric(key, key.removeprefix("task "), "share of right answers, zero-shot", units.percent, False)
        for key in tasks
    ]


def metric_sheet(metric: Metric, rows: Sequence[Row]) -> page.Sheet:
    """Recipes down, schemes across, as papers have it; the best of each scheme is marked."""
    kept = [row for row in rows if metric.key in row.values or (row.note and row.kind == "cell")]
    original = next((row for row in kept if row.kind == "original"), None)
    others = [row for row in kept if row is not original]
    schemes = list(dict.fromkeys(row.scheme for row in others))
    heads = (("recipe", "", "name"), *((scheme, metric.meaning, "number") for scheme in schemes))
    best: dict[str, float] = {}
    for row in others:
        if metric.key in row.values and row.kind == "cell":
            value = row.values[metric.key]
            better = min if metric.lower else max
            best[row.scheme] = better(value, best.get(row.scheme, value))
    body = []
    for label, kind in dict.fromkeys((row.label, row.kind) for row in others):
        cells = [page.Cell(f"{label} (peer)" if kind == "peer" else label)]
        for scheme in schemes:
            same = [row for row in others if (row.label, row.kind, row.scheme) == (label, kind, scheme)]
            cells.append(_cell(metric, same, best.get(scheme)))
        body.append(tuple(cells))
    if original is not None:
        title = page.Cell(f"original: {_with_error(metric, original)}", kind="reference")
        body.insert(0, (title, *(page.Cell("") for _ in schemes)))
    return page.Sheet(heads, tuple(body))


def _cell(metric: Metric, same: Sequence[Row], best: float | None) -> page.Cell:
    for row in same:
        if metric.key in row.values:
            value = row.values[metric.key]
            mark = "best" if value == best and row.kind == "cell" else ""
            return page.Cell(_with_error(metric, row), repr(value), mark)
        return page.Cell("failed", kind="bad")
    return page.Cell("")


def _with_error(metric: Metric, row: Row) -> str:
    error = row.errors.get(metric.key)
    own = metric.text(row.values.get(metric.key))
    return own if error is None else f"{own} ± {metric.text(error)}"


def comparison_tables(result: Mapping[str, object]) -> list[Table]:
    """The tables for a terminal, one per metric."""
    rows = read_rows(result)
    return [_terminal(metric, metric_sheet(metric, rows)) for metric in metrics_of(rows)]


def _terminal(metric: Metric, sheet: page.Sheet) -> Table:
    table = Table(title=metric.title, caption=metric.meaning)
    for title, _, kind in sheet.heads:
        table.add_column(title, justify="right" if kind == "number" else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(cell.text, style={"best": "bold green", "bad": "red"}.get(cell.kind, "")) for cell in row))
    return table


def markdown(metric: Metric, sheet: page.Sheet) -> str:
    """A table in Markdown, the best of each scheme in bold."""
    lines = [f"## {metric.title}", "", f"{metric.meaning[:1].upper()}{metric.meaning[1:]}.", ""]
    lines.append("| " + " | ".join(head[0] for head in sheet.heads) + " |")
    lines.append("|" + "|".join("---:" if head[2] == "number" else "---" for head in sheet.heads) + "|")
    for row in sheet.rows:
        texts = [cell.text.replace("|", "\\|").replace("\u00a0", " ") for cell in row]
        lines.append(
            "| " + " | ".join(f"**{t}**" if c.kind == "best" else t for t, c in zip(texts, row, strict=True)) + " |"
        )
    return "\n".join(lines) + "\n"


def as_csv(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """Every row with every metric and its standard error, exact."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    with_errors = [metric.key for metric in metrics if any(metric.key in row.errors for row in rows)]
    keys = [metric.key for metric in metrics]
    writer.writerow(["label", "scheme", "kind", *keys, *(f"{key} error" for key in with_errors), "note"])
    for row in rows:
        values = [row.values.get(key, "") for key in keys] + [row.errors.get(key, "") for key in with_errors]
        writer.writerow([row.label, row.scheme, row.kind, *values, row.note])
    return stream.getvalue()


def setting_words(result: Mapping[str, object]) -> str:
    """What all rows have in common, in a sentence."""
    setting, machine = units.mapping(result.get("setting")), units.mapping(result.get("machine"))
    words = [
        f"calibration on {setting.get('calibration')}",
        f"{setting.get('windows')} windows of {setting.get('length')} tokens of {setting.get('text')}",
        f"{'with' if setting.get('bos') else 'without'} BOS",
        f"no chat template, {setting.get('dtype')}",
        str(machine.get("gpu") or machine.get("processor")),
    ]
    return units.clean("; ".join(words), 600) + "."


def write_comparison(result: Mapping[str, object], out: Path) -> Path:
    """``tables.md``, ``tables.txt``, ``rows.csv``, ``figures/*.svg`` and the page; returns the page's path.

    ``compare.json`` beside them is the comparison itself.
    """
    from rich.console import Console

    rows = read_rows(result)
    metrics = metrics_of(rows)
    sheets = [(metric, metric_sheet(metric, rows)) for metric in metrics]
    figures = frontier.figures(rows)
    name = units.clean(result.get("model"))
    head = f"# {name}: recipes compared\n\n{setting_words(result)}\n\n"
    write_whole(out / "tables.md", head + "\n".join(markdown(metric, sheet) for metric, sheet in sheets))
    text = Console(file=io.StringIO(), width=200)
    for metric, sheet in sheets:
        text.print(_terminal(metric, sheet))
    assert isinstance(text.file, io.StringIO)
    write_whole(out / "tables.txt", text.file.getvalue())
    write_whole(out / "rows.csv", as_csv(rows, metrics))
    for figure in figures:
        if isinstance(figure, Figure):
            write_whole(out / "figures" / f"{figure.key}.svg", frontier.alone(figure))
    notes = [(row.label, row.scheme, row.kind, row.note) for row in rows if row.note]
    html = template("compare.html.j2").render(
        model=name,
        version=units.clean(result.get("finescale")),
        setting=setting_words(result),
        figures=figures,
        sheets=[(metric.key.replace(" ", "-").replace("_", "-"), metric, sheet) for metric, sheet in sheets],
        notes=notes,
    )
    path = out / "compare.html"
    write_whole(path, html)
    return path
