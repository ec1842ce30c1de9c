"""Other tools beside finescale at equal bits, groups and calibration: peers-NAME.json and the rows of tuning*.json."""

from __future__ import annotations

import re
from typing import Any

from tools.docs_text import number, table

OURS = (
    "quantease",
    "quantease, signed scales",
    "rounding from quantease",
    "rounding from quantease, signed scales",
)
"""Rows of ``benchmarks/tuning.py`` that stand beside the tools: the solver alone, and our recipes' learned rounding."""


def peers_tables(results: dict[str, dict[str, Any]]) -> str:
    """A table for each model: tools and ours down, bits across; perplexity, with the divergence where it was taken."""
    parts = []
    for name, facts in results.items():
        if facts.get("benchmark") == "peers":
            parts.append(_model(name, facts, ours_beside(results, facts)))
    return "\n".join(parts)


def _model(name: str, facts: dict[str, Any], ours: dict[str, dict[int, dict[str, Any]]]) -> str:
    setting = facts["setting"]
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in facts["peers"]:
        if row["group_size"] == 64 and not row.get("activation_bits"):
            rows.setdefault(row["label"], {})[row["bits"]] = row
    rows |= ours
    bits = sorted({number for row in rows.values() for number in row}, reverse=True)
    columns = {b: [row[b] for row in rows.values() if b in row] for b in bits}
    lines = [(label, *(_cell(row.get(b), columns[b]) for b in bits)) for label, row in rows.items()]
    tools = {row["label"]: row["provenance"] for row in facts["peers"]}
    made = "\n".join(f"* {label}: {own['versions']}; `{_without_bits(own['command'])}`" for label, own in tools.items())
    return (
        f"### {facts['model']}\n\n`benchmarks/results/{name}.json`. Calibration {setting['samples']} windows of "
        f"{setting['sample_length']} tokens, perplexity on {setting['windows']} windows of {setting['length']}, all "
        f"by the same code; in brackets KL to the original.\n\n"
        + table(("symmetric, groups of 64", *(f"{b} bits" for b in bits)), lines)
        + f"\nHow the other tools were run (each in an environment of its own):\n\n{made}\n"
    )


def _without_bits(command: str) -> str:
    return re.sub(r"--bits \d", "--bits BITS", command)


def _cell(row: dict[str, Any] | None, column: list[dict[str, Any]]) -> str:
    if row is None:
        return "–"
    text = _marked(row, column, "perplexity", 4)
    return text + (f" ({_marked(row, column, 'kl', 3)})" if row.get("kl") is not None else "")


def _marked(row: dict[str, Any], column: list[dict[str, Any]], key: str, digits: int) -> str:
    """The number, in bold where it is the least of its column."""
    text = number(row[key], digits)
    return f"**{text}**" if row[key] == min(other[key] for other in column if other.get(key) is not None) else text


def ours_beside(results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows of the same model on the same windows."""
    wanted = {key: facts["setting"][key] for key in ("samples", "windows")}
    wanted |= {"length": facts["setting"]["sample_length"], "window_length": facts["setting"]["length"]}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for other in results.values():
        entry = other.get("models", {}).get(facts["model"], {}) if other.get("benchmark") == "tuning" else {}
        if entry and all(entry["setting"].get(key) == value for key, value in wanted.items()):
            for part, rows in entry["rows"].items():
                for name in OURS:
                    if part.isdigit() and name in rows:
                        found.setdefault(f"finescale: {name}", {}).setdefault(int(part), rows[name])
    return dict(sorted(found.items(), key=lambda item: OURS.index(item[0].removeprefix("finescale: "))))
