"""Tables of the comparisons in benchmarks/results: methods side by side, mixed precision, tasks with integer scales."""

from __future__ import annotations

import math
from typing import Any

from finescale.report.compare import markdown, metric_sheet, metrics_of, read_rows, setting_words
from tools.docs_text import number, table

SHOWN = ("perplexity", "kl", "bits_per_weight")


def compared(facts: dict[str, Any]) -> str:
    """Recipes down, schemes across; other tools' rows and where they are from; then what else the file holds."""
    rows = read_rows(facts)
    words = setting_words(facts)
    parts = [f"{facts['model']}: {words}\n"]
    for metric in metrics_of(rows):
        if metric.key in SHOWN or metric.key.startswith("task "):
            parts.append(markdown(metric, metric_sheet(metric, rows)).replace("## ", "### ", 1))
    peers = [row for row in facts.get("peers", []) if row.get("provenance")]
    if peers:
        notes = {row["label"]: row["provenance"] for row in peers}
        lines = [f"* {label}: {'; '.join(f'{k} {v}' for k, v in own.items())}." for label, own in notes.items()]
        parts.append("Other tools' numbers:\n\n" + "\n".join(lines) + "\n")
    parts += [part(facts) for part in (mixed, changes)]
    return "\n".join(part for part in parts if part)


def mixed(facts: dict[str, Any]) -> str:
    """Mixed precision against the same recipe at one number of bits, interpolated to the same size."""
    lines = []
    for row in facts["rows"]:
        recipe = row.get("recipe") or {}
        if "error" in row or not any("bits" in each.get("weights", {}) for each in recipe.get("overrides", ())):
            continue
        same = [other for other in facts["rows"] if _uniform_twin(other, recipe)]
        below = max((o for o in same if o["bits_per_weight"] <= row["bits_per_weight"]), key=_bits, default=None)
        above = min((o for o in same if o["bits_per_weight"] > row["bits_per_weight"]), key=_bits, default=None)
        if below is None or above is None:
            continue
        share = (row["bits_per_weight"] - below["bits_per_weight"]) / (_bits(above) - _bits(below))
        values = [f"{_bits(row):.3f}"]
        for key, digits in (("perplexity", 4), ("kl", 3)):
            low, high = below[key], above[key]
            between = math.exp((1 - share) * math.log(low) + share * math.log(high))
            alike = f"{number(low, digits)} at {_bits(below):.2f}, {number(high, digits)} at {_bits(above):.2f}"
            values += [number(row[key], digits), alike, number(between, digits), f"{row[key] / between - 1:+.1%}"]
        lines.append(tuple(values))
    if not lines:
        return ""
    columns = [(name, "all layers alike", "interpolated", "change") for name in ("perplexity", "KL")]
    header = ("bits per weight", *columns[0], *columns[1])
    return (
        "### Mixed precision\n\nBits chosen layer by layer, and the same recipe with all layers alike, interpolated "
        "to the same size in the logarithm (which is below the straight line).\n\n" + table(header, lines)
    )


def mixed_tables(results: dict[str, dict[str, Any]]) -> str:
    """The tables of ``mixed`` of every comparison that has mixed recipes."""
    found = {name: mixed(facts) for name, facts in results.items() if facts.get("benchmark") == "compare"}
    tables = {name: text.rpartition("\n\n")[2] for name, text in found.items() if text}
    return "\n".join(f"{results[name]['model']} (`{name}.json`):\n\n{text}" for name, text in tables.items())


def scales(facts: dict[str, Any]) -> str:
    """QuantEase with 8-bit inputs, by kind of group scale."""
    kinds = {"w4a8-float-scale": "float", "w4a8-integer-scale": "integer, automatic amplifier", "w4a8-folded": "folded"}
    kinds["w4a8-integer-scale amplifier 1024"] = "integer, amplifier 1024"
    kinds["w4a8-integer-scale-published"] = "as published: GPTQ, then rounded over 1024"
    rows = {row["label"]: row for row in facts["rows"] if "error" not in row and _inputs(row) == 8}
    lines = [
        (kind, number(rows[label]["perplexity"], 4), number(rows[label]["kl"]))
        for label, kind in kinds.items()
        if label in rows
    ]
    return table(("scales (`compare-smollm2.json`)", "perplexity", "KL to the original"), lines)


def _inputs(row: dict[str, Any]) -> int | None:
    activations = (row.get("recipe") or {}).get("activations")
    return activations["bits"] if activations else None


def _bits(row: dict[str, Any]) -> float:
    return float(row["bits_per_weight"])


def _uniform_twin(row: dict[str, Any], recipe: dict[str, Any]) -> bool:
    """Whether a row is the same recipe but for its bits and its overrides."""
    own = row.get("recipe")
    if "error" in row or not own or own.get("overrides"):
        return False
    parts = ("solver", "transforms", "tuning", "activations", "integer_scale")
    weights, others = ({k: v for k, v in each["weights"].items() if k != "bits"} for each in (own, recipe))
    return weights == others and all(own.get(part) == recipe.get(part) for part in parts)


def rounded_scales(facts: dict[str, Any]) -> str:
    """What making scales integers changes by itself: the scales by stored type, and layers' errors."""
    lines = [
        (
            f"{row['bits']} bits", row["stored"], f"{row['changed']:.1%}", f"{row['largest_change']:.2%}",
            f"{row['rms_change']:.3%}", row["smallest_integer"],
        )
        for row in facts["scales"]
    ]  # fmt: skip
    header = ("weights", "scales stored as", "scales that change", "at most by", "root mean square", "smallest S")
    errors = [
        (name, found["layers"], f"{found['mean_log_change']:+.3%} ± {found['standard_error']:.3%}")
        for name, found in facts["errors"].items()
    ]
    return (
        f"All linears of {facts['model']}'s blocks, groups of {facts['group_size']}, `auto` amplifier:\n\n"
        + table(header, lines)
        + "\nOutput errors of single layers, integer scales over float ones of float32:\n\n"
        + table(("solver and fit of the scales", "layers", "change"), errors)
    )


def merged_channels(facts: dict[str, Any]) -> str:
    """Merging beside dropping, input by input."""
    lines = [
        (
            f"`{row['input']}`", f"{float(row['share']):.0%}", f"{row['merged_change']:.2%}",
            f"{row['dropped_change']:.2%}", number(row["members"]), f"{row['merged_range'] - 1:+.0%}",
            f"{row['dropped_range'] - 1:+.0%}",
        )
        for row in facts["rows"]
    ]  # fmt: skip
    header = (
        "input of", "channels", "output's change, merged", "dropped", "largest average", "weights' range, merged",
        "dropped",
    )  # fmt: skip
    return f"{facts['model']}, means over {facts['rows'][0]['layers']} blocks:\n\n" + table(header, lines)


def changes(facts: dict[str, Any]) -> str:
    """Accuracy with integer scales minus that with float scales, on the same questions."""
    if not facts.get("changes"):
        return ""
    labels = list(dict.fromkeys(row["label"] for row in facts["changes"]))
    names = list(dict.fromkeys(row["task"] for row in facts["changes"]))
    known = {(row["label"], row["task"]): row for row in facts["changes"]}
    counts = _questions(facts)
    lines = [(n, counts.get(n, "–"), *(_change(known.get((label, n))) for label in labels)) for n in names]
    return (
        "### Integer scales against float scales\n\nChange in accuracy on the same questions, in points, with its "
        "standard error (questions answered alike count as no change); in bold what is more than two of them from "
        "zero.\n\n" + table(("task", "questions", *labels), lines)
    )


def _change(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    error = row["error"] or 0.0
    text = f"{100 * row['change']:+.2f} ± {100 * error:.2f}"
    return f"**{text}**" if abs(row["change"]) > 2 * error else text


def _questions(facts: dict[str, Any]) -> dict[str, int]:
    """Questions of each task, and of all."""
    row = next((row for row in facts["rows"] if row.get("tasks")), {"tasks": ()})
    found = {each["task"]: each["questions"] for each in row["tasks"]}
    return found | {"all": sum(found.values())} if found else {}
