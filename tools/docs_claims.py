"""What the three papers claim, beside what the results say: a table each, with the commands that made the numbers.

A result that is not there yet is said to be missing; no number stands in this file besides the papers' own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.docs_text import number, table

ROWS_OF_THE_CLAIM = (
    "RTN", "SmoothQuant 0.5", "OmniQuant", "QLLM, reassembly", "QLLM", "QuaRot, online too + GPTQ",
    "QuaRot, online too + QuantEase + rounding",
)  # fmt: skip
"""Of the many methods of ``benchmarks/activations.py``; all are on the page of benchmarks."""
Results = dict[str, dict[str, Any]]
MISSING = "not measured yet"
Measured = Callable[[Results], list[str]]


def load_results(folder: Path) -> Results:
    """Every result by its file's name without ``.json``."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: facts for name, facts in found.items() if isinstance(facts, dict)}


def layer_errors(results: Results) -> list[str]:
    """QuantEase over GPTQ on the same statistics."""
    lines = []
    for name, facts in results.items():
        if facts.get("benchmark") == "layer_errors":
            for bits, summary in facts["summary"].items():
                lines.append(
                    f"{facts['model']}, {bits} bits: lower on {summary['below_gptq']:.0%} of {summary['layers']} "
                    f"layers, median {1 - summary['median_ratio']:.0%} lower (`{name}.json`)"
                )
    return lines


def perplexities(results: Results) -> list[str]:
    """QuantEase over GPTQ in perplexity, whole runs."""
    lines = []
    for name, facts in results.items():
        if facts.get("benchmark") != "accuracy":
            continue
        for bits, entry in sorted(facts.get("solvers", {}).items(), reverse=True):
            change = entry["log_perplexity_quantease_minus_gptq"]
            error = change["standard_error"]
            spread = "" if error is None else f" ± {error:.1%} over {len(facts['setting']['seeds'])} calibrations"
            before, after = (entry["summary"][solver]["perplexity"]["mean"] for solver in ("gptq", "quantease"))
            lines.append(
                f"{facts['model']}, {bits} bits per channel: {number(before, 4)} → {number(after, 4)}, "
                f"{math.expm1(change['mean']):+.1%}{spread} (`{name}.json`)"
            )
    return lines


def algorithm_2(results: Results) -> list[str]:
    """The solver's speed over the paper's own algorithm."""
    rows, lines = results.get("solver-gpu", {}).get("rows", []), []
    for key, products in (("", "float32"), ("_2xfp16", "2xfp16"), ("_3xfp16", "3xfp16")):
        ratios = [row[f"speedup_over_algorithm_2{key}"] for row in rows if row.get(f"speedup_over_algorithm_2{key}")]
        if ratios:
            times = f"{number(min(ratios))} to {number(max(ratios))} times faster than Algorithm 2"
            gpu = results["solver-gpu"]["machine"].get("gpu")
            lines.append(f"{times}, layer by layer, products {products}, on one {gpu}")
    for model, found in results.get("solver-gpu", {}).get("models", {}).items():
        keys = {f"quantease_{kind}_seconds": f"with {kind} " for kind in ("2xfp16", "3xfp16")} | {
            "quantease_seconds": ""
        }
        seconds = [f"{label}{number(found[key])} s" for key, label in reversed(keys.items()) if key in found]
        lines.append(f"{model}: {', '.join(seconds)} of solver for 30 sweeps, from its layers' times")
    return [f"{line} (`solver-gpu.json`)" for line in lines]


def outliers(results: Results) -> list[str]:
    """Outlier-aware QuantEase and SpQR beside each other."""
    names = [name for name, facts in results.items() if facts.get("benchmark") == "outliers"]
    lines = [f"tables of `{name}.json` on [Benchmarks](benchmarks.md)" for name in names]
    rows = _cells(results, "compare-smollm2")
    for bits in (4, 3):
        found = {label: row for label, row in rows if _is(row, bits, -1, None) and label.startswith("quantease")}
        if {"quantease", "quantease-outliers"} <= found.keys():
            plain, kept = (found[label]["perplexity"] for label in ("quantease", "quantease-outliers"))
            change = f"{number(plain, 4)} → {number(kept, 4)}"
            lines.append(f"SmolLM2, {bits} bits per channel, 1 %: {change} (`compare-smollm2.json`)")
    return lines


def _cells(results: Results, name: str) -> list[tuple[str, dict[str, Any]]]:
    rows = results.get(name, {}).get("rows", [])
    return [(row["label"], row) for row in rows if row.get("recipe") and "error" not in row]


def _is(row: dict[str, Any], bits: int, group: int | None, activations: int | None) -> bool:
    weights, inputs = row["recipe"]["weights"], row["recipe"].get("activations")
    same = weights["bits"] == bits and (group is None or weights["group_size"] == group)
    return same and (None if inputs is None else inputs["bits"]) == activations


def activations(results: Results) -> list[str]:
    """W4A4 by method."""
    lines = []
    for name, facts in results.items():
        for model, entry in facts.get("models", {}).items() if facts.get("benchmark") == "activations" else ():
            runs = entry.get("rows", {}).get("W4A4", {})
            chosen = {label: runs[label] for label in ROWS_OF_THE_CLAIM if label in runs}
            values = ", ".join(f"{label} {number(run['perplexity'], 4)}" for label, run in chosen.items())
            if values:
                original = number(entry.get("original_perplexity"), 4)
                lines.append(f"{model}, W4A4, original {original}: {values} (`{name}.json`)")
    for label, row in _cells(results, "compare-smollm2"):
        if row["recipe"].get("activations") and label.startswith(("qllm", "omniquant", "quarot", "w4a4")):
            bits = row["recipe"]["activations"]["bits"]
            lines.append(f"SmolLM2, {label}, W4A{bits}: {number(row['perplexity'], 4)} (`compare-smollm2.json`)")
    return lines


def integer_perplexities(results: Results) -> list[str]:
    """Integer scales over float scales in perplexity."""
    lines = []
    for name, facts in results.items():
        for label, row in facts.get("scales", {}).items() if facts.get("benchmark") == "accuracy" else ():
            if "integer" in label or label.startswith(("converted", "folded")):
                change = row.get("long", {}).get("log_change")
                if change:
                    lines.append(f"{facts['model']}, {label}: {math.expm1(change['mean']):+.2%} (`{name}.json`)")
    return lines


def integer_tasks(results: Results) -> list[str]:
    """Integer scales over float scales on eight tasks."""
    lines = []
    for name, facts in results.items():
        for change in facts.get("changes", []) if facts.get("benchmark") == "compare" else ():
            if change["task"] == "all":
                error = 100 * (change["error"] or 0.0)
                points = f"{100 * change['change']:+.2f} ± {error:.2f} points"
                lines.append(f"{facts['model']}, {change['label']}, all tasks' questions: {points} (`{name}.json`)")
    return lines


def kernel(results: Results) -> list[str]:
    """The W4A8 product over bfloat16 at the paper's shape, by tokens."""
    kinds = {"integer": "integer scales", "folded": "folded scales", "float_scale": "float scales"}
    lines = []
    for name, facts in results.items():
        rows = facts.get("rows", []) if facts.get("benchmark") == "gemm" and facts.get("base") == "bf16" else ()
        here = [row for row in rows if (row["inputs"], row["outputs"]) == (4096, 22016)]
        for key, kind in kinds.items():
            found = [f"{row['bf16'] / row[key]:.2f} at {row['tokens']}" for row in here if key in row]
            if found:
                lines.append(f"{kind}, times bfloat16, by tokens: {', '.join(found)} (`{name}.json`)")
    return lines


CLAIMS: dict[str, tuple[tuple[str, str, Measured], ...]] = {
    "quantease": (
        ("layer errors 12 % below GPTQ's in the median, up to 30 % (OPT-350M, 3 bits)",
         "`python benchmarks/layer_errors.py`", layer_errors),
        ("up to 15 % better than GPTQ in perplexity and zero-shot accuracy",
         "`python benchmarks/accuracy.py --data ../shared`", perplexities),
        ("with outliers up to two times better perplexity than SpQR near or below 3 bits",
         "`python benchmarks/outliers.py`", outliers),
        ("Falcon-180B in about three hours on one A100, by Algorithm 2's partial updates",
         "`python benchmarks/solver_gpu.py`", algorithm_2),
    ),
    "qllm": (
        ("LLaMA-1-7B W4A4, WikiText-2 perplexity, original 5.68: SmoothQuant 52.85, OmniQuant 11.26, QLLM 9.65; its "
         "W4A8 5.96; LLaMA-2-70B W4A4, five tasks: 7.89 points above the best earlier method",
         "`python benchmarks/activations.py`, `python benchmarks/compare.py --model MODEL --work WORK`", activations),
    ),
    "integer-scale": (
        ("integer scales cost next to nothing in perplexity (LLaMA-2, amplifier 1024, groups of 128)",
         "`python benchmarks/accuracy.py --data ../shared`", integer_perplexities),
        ("nor in accuracy (LAMBADA, common sense)",
         "`python benchmarks/compare.py --model MODEL --work WORK --parts tasks`", integer_tasks),
        ("the fine-grained kernel at K = 4096, N = 22016 up to 4 times 16 bits where memory bounds it, 2 times where "
         "arithmetic does; float scales 3.15 to 0.5 times",
         "`finescale bench gemm`", kernel),
    ),
}  # fmt: skip


def claims_table(page: str, results: Results) -> str:
    """The table of one paper."""
    rows = []
    for claim, command, measured in CLAIMS[page]:
        rows.append((claim, "<br>".join(measured(results)) or MISSING, command))
    return table(("the paper", "measured here", "command"), rows)
