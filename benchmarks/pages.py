"""The quality tables as Markdown, out of the result files: ``python benchmarks/pages.py``.

``activations.json`` and ``tuning.json`` become ``activations.md`` and ``tuning.md`` beside them, which the
documentation includes. Numbers are perplexities; the seconds are those of quantizing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BITS = ("W4A4", "W6A6", "W4A8", "W4A16")
TITLES = {
    "ours at W4A4": "Our W4A4 recipe, changed",
    "ours at W4A8": "Our W4A8 recipe, changed; integer scales",
    "expansion": "Reassembly alone: share of added channels",
    "expansion, corrected": "Reassembly and correction: share of added channels",
    "blocks together": "Blocks corrected together (3 % more channels, rank 4, 16 windows)",
    "rank": "Rank of the correction (4 blocks together; rank 4 is above)",
    "samples": "Windows of calibration text (4 blocks, rank 4; 16 windows are above)",
    "correction": "The correction",
}
Rows = Mapping[str, Mapping[str, Any]]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def number(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    value = row["perplexity"]
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def marked(cells: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Numbers of a column, the least in bold."""
    least = min((row["perplexity"] for row in cells if row is not None), default=0.0)
    return [f"**{number(row)}**" if row and row["perplexity"] == least else number(row) for row in cells]


def methods(parts: Mapping[str, Rows]) -> str:
    """Methods down, bits across, perplexity and seconds."""
    names = list(dict.fromkeys(name for bits in BITS for name in parts.get(bits, {})))
    columns = []
    for bits in BITS:
        cells = [parts.get(bits, {}).get(name) for name in names]
        columns += [marked(cells), [f"{row['seconds']:.0f}" if row else "" for row in cells]]
    header = ["method", *(word for bits in BITS for word in (bits, "s"))]
    return table(header, [[name, *cells] for name, *cells in zip(names, *columns, strict=True)])


def scales(rows: Rows) -> str:
    """Each recipe with float scales, with those made integers in the finished model, with scales that are integers
    before the solver runs, and with folded ones: perplexity on the first part of the calibration text, and the
    change over all parts that were tried, with its standard error."""
    found = []
    for name in dict.fromkeys(key.partition(", ")[0] for key in rows):
        line = [f"`{name}`", number(rows.get(f"{name}, float"))]
        for form in ("converted", "integer", "folded"):
            line += [number(rows.get(f"{name}, {form}")), shown_change(changes(rows, name, form))]
        found.append(line)
    header = [
        "recipe",
        "float scales",
        "made integer",
        "change",
        "integer before the solver",
        "change",
        "folded",
        "change",
    ]
    return table(header, found)


def changes(rows: Rows, name: str, form: str) -> list[float]:
    """Changes of log perplexity from float scales, one for each part of the text with both rows."""
    found = []
    for key, row in rows.items():
        title, _, rest = key.partition(", ")
        before = rows.get(f"{name}, {rest.replace(form, 'float')}", {}).get("perplexity")
        before = row.get("float_perplexity", before)  # of the same run
        if title == name and rest.partition(", ")[0] == form and before:
            found.append(math.log(row["perplexity"] / before))
    return found


def shown_change(values: Sequence[float]) -> str:
    """The mean in per cent, with its standard error and their number if there are several."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.2%}"
    return f"{mean:+.2%} ± {statistics.stdev(values) / math.sqrt(len(values)):.2%} ({len(values)})"


def plain(rows: Rows, extra: bool = False) -> str:
    """One row for each, as they are."""
    found = [
        [name, text, f"{row['seconds']:.0f}", *([str(row.get("extra_channels", ""))] if extra else [])]
        for (name, row), text in zip(rows.items(), marked(list(rows.values())), strict=True)
    ]
    return table(["", "perplexity", "s", *(["added channels"] if extra else [])], found)


def setting_of(name: str, entry: Mapping[str, Any]) -> str:
    setting = entry["setting"]
    return (
        f"{name}: original {entry['original_perplexity']:.2f}; {setting['samples']} windows of {setting['length']} "
        f"tokens of {setting['calibration']}, evaluated on {setting['windows']} of {setting['window_length']} of "
        f"{setting['text']}, {setting['device']}.\n"
    )


def activations_page(models: Mapping[str, Any]) -> str:
    parts = []
    for name, entry in models.items():
        rows = entry["rows"]
        parts += [setting_of(name, entry), *([methods(rows)] if any(rows.get(bits) for bits in BITS) else [])]
        if rows.get("integer scales"):
            parts += [f"{name}, W4A8 recipes in groups of 64:\n", scales(rows["integer scales"])]
        for key, title in TITLES.items():
            if rows.get(key):
                where = name if key.startswith("ours") else f"{name}, W4A4"
                parts += [f"{title} ({where}):\n", plain(rows[key], extra=key.startswith("expansion"))]
    return "\n".join(parts)


def tuning_page(models: Mapping[str, Any]) -> str:
    """Methods down, weight bits across, then W4A8."""
    parts = []
    for name, entry in models.items():
        rows = entry["rows"]
        bits = [key for key in ("4", "3", "2") if key in rows]
        names = list(dict.fromkeys(method for key in bits for method in rows[key]))
        columns = []
        for key in bits:
            cells = [rows[key].get(method) for method in names]
            divergences = [f"{row['kl']:.3f}" if row else "" for row in cells]
            columns += [marked(cells), divergences, [f"{row['seconds']:.0f}" if row else "" for row in cells]]
        header = ["method", *(word for key in bits for word in (f"{key} bits", "KL", "s"))]
        parts += [setting_of(name, entry)]
        parts += [table(header, [[method, *cells] for method, *cells in zip(names, *columns, strict=True)])]
        if rows.get("w4a8"):
            parts += [f"{name}, W4A8:\n", plain(rows["w4a8"])]
    return "\n".join(parts)


def write_pages(results: Path) -> list[Path]:
    """Write what result files are there; returns the pages."""
    pages = {"activations": activations_page, "tuning": tuning_page}
    written = []
    for name, page in pages.items():
        file = results / f"{name}.json"
        if file.is_file():
            models = json.loads(file.read_text(encoding="utf-8"))["models"]
            file.with_suffix(".md").write_text(page(models), encoding="utf-8")
            written.append(file.with_suffix(".md"))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    for page in write_pages(parser.parse_args().results):
        print(page)


if __name__ == "__main__":
    main()
