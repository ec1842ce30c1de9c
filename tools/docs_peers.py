"""Other tools beside finescale at equal bits, groups and calibration: peers-NAME.json and the rows of tuning*.json.

What was run with several seeds is one row, their mean; differences are taken window by window.
"""

from __future__ import annotations

import math
import re
from typing import Any

from tools.docs_text import number, table

OURS = (
    "quantease",
    "quantease, signed scales",
    "rounding from quantease",
    "rounding from quantease, signed scales",
    "rounding from quantease, signed scales, damping 0.1",
)
"""Rows of ``benchmarks/tuning.py`` that stand beside the tools: the solver alone, and our recipes' learned rounding."""
BEST = f"finescale: {OURS[-1]}"
"""What `w4-best`, `w3-best` and `w2-best` do in groups of 64."""
_SEED = re.compile(r", seed \d+$")
Row = dict[str, Any]
Rows = dict[str, dict[int, Row]]
"""Label -> bits -> perplexity, kl and the losses of the windows, means over ``seeds`` runs."""


def peers_tables(results: dict[str, Row]) -> str:
    """For each model: tools and ours down, bits across; perplexity, with the divergence where it was taken."""
    parts = []
    for name, facts in results.items():
        if facts.get("benchmark") == "peers":
            parts.append(_model(name, facts, tools_of(facts), ours_beside(results, facts)))
    return "\n".join(parts)


def tools_of(facts: Row) -> Rows:
    """The tools' rows in symmetric groups of 64 with 16-bit activations."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in facts["peers"]:
        if row["group_size"] == 64 and not row.get("activation_bits"):
            found.setdefault(_SEED.sub("", row["label"]), {}).setdefault(row["bits"], []).append(row)
    return _means(found)


def ours_beside(results: dict[str, Row], facts: Row) -> Rows:
    """Our rows of the same model on the same windows."""
    wanted = {key: facts["setting"][key] for key in ("samples", "windows")}
    wanted |= {"length": facts["setting"]["sample_length"], "window_length": facts["setting"]["length"]}
    found: dict[str, dict[int, dict[str, Row]]] = {}
    for other in results.values():
        entry = other.get("models", {}).get(facts["model"], {}) if other.get("benchmark") == "tuning" else {}
        if entry and all(entry["setting"].get(key) == value for key, value in wanted.items()):
            for part, rows in entry["rows"].items():
                for name, row in rows.items() if part.isdigit() else ():
                    label = f"finescale: {_SEED.sub('', name)}"
                    found.setdefault(label, {}).setdefault(int(part), {})[name] = row
    labels = [label for label in (f"finescale: {name}" for name in OURS) if label in found]
    return _means({label: {bits: list(rows.values()) for bits, rows in found[label].items()} for label in labels})


def _means(found: dict[str, dict[int, list[Row]]]) -> Rows:
    return {label: {bits: _mean(rows) for bits, rows in row.items()} for label, row in found.items()}


def _mean(rows: list[Row]) -> Row:
    """The geometric mean of perplexities, the mean of all else; how far perplexities lie apart."""
    values = [row["perplexity"] for row in rows]
    kls = [row["kl"] for row in rows if row.get("kl") is not None]
    losses = [row.get("window_losses") or [] for row in rows]
    alike = len({len(each) for each in losses}) == 1
    return {
        "perplexity": math.exp(sum(map(math.log, values)) / len(values)),
        "kl": sum(kls) / len(kls) if kls else None,
        "window_losses": [sum(each) / len(each) for each in zip(*losses, strict=True)] if alike else [],
        "seeds": len(rows),
        "spread": (min(values), max(values)),
    }


def _model(name: str, facts: Row, tools: Rows, ours: Rows) -> str:
    setting, rows = facts["setting"], tools | ours
    bits = sorted({number for row in rows.values() for number in row}, reverse=True)
    columns = {b: [row[b] for row in rows.values() if b in row] for b in bits}
    lines = [(label, *(_cell(row.get(b), columns[b]) for b in bits)) for label, row in rows.items()]
    made = {_SEED.sub("", row["label"]): row["provenance"] for row in facts["peers"]}
    notes = "\n".join(f"* {label}: {own['versions']}; `{_without_bits(own['command'])}`" for label, own in made.items())
    return (
        f"### {facts['model']}\n\n`benchmarks/results/{name}.json`. Calibration {setting['samples']} windows of "
        f"{setting['sample_length']} tokens, perplexity on {setting['windows']} windows of {setting['length']}, all "
        f"by the same code; in brackets KL to the original. What has a range was run with several seeds.\n\n"
        + table(("symmetric, groups of 64", *(f"{b} bits" for b in bits)), lines)
        + _differences(bits, tools, BEST, ours.get(BEST, {}))
        + f"\nHow the other tools were run (each in an environment of its own):\n\n{notes}\n"
    )


def _differences(bits: list[int], tools: Rows, name: str, best: dict[int, Row]) -> str:
    """How much lower our best recipe's perplexity is than each tool's, with the standard error over windows."""
    lines = []
    for label, row in tools.items():
        cells = [_difference(best.get(b), row.get(b)) for b in bits]
        if any(cell != "–" for cell in cells):
            lines.append((label, *cells))
    if not lines:
        return ""
    return (
        f"\nPerplexity of {name.removeprefix('finescale: ')} against each tool's, on the same windows, with the "
        "standard error of the mean over windows:\n\n" + table(("against", *(f"{b} bits" for b in bits)), lines)
    )


def _difference(own: Row | None, other: Row | None) -> str:
    if own is None or other is None or not own["window_losses"]:
        return "–"
    if len(own["window_losses"]) != len(other["window_losses"]):
        return "–"
    mean, error = paired(own["window_losses"], other["window_losses"])
    return f"{math.expm1(mean):+.1%} ± {error:.1%}" if abs(mean) < 1 else f"{math.exp(-mean):.0f} times lower"


def paired(own: list[float], other: list[float]) -> tuple[float, float]:
    """Mean of own - other, and its standard error."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((each - mean) ** 2 for each in differences) / max(1, len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def _without_bits(command: str) -> str:
    return re.sub(r" --seed \d+", "", re.sub(r"--bits \d", "--bits BITS", command))


def _cell(row: Row | None, column: list[Row]) -> str:
    if row is None:
        return "–"
    text = _marked(row, column, "perplexity", 4)
    if row["seeds"] > 1:
        text += f" [{number(row['spread'][0], 4)} to {number(row['spread'][1], 4)}]"
    return text + (f" ({_marked(row, column, 'kl', 3)})" if row.get("kl") is not None else "")


def _marked(row: Row, column: list[Row], key: str, digits: int) -> str:
    """The number, in bold where it is the least of its column."""
    text = number(row[key], digits)
    return f"**{text}**" if row[key] == min(other[key] for other in column if other.get(key) is not None) else text
