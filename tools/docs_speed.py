"""The speed tables of the pages, and the few numbers that the README begins with: all from benchmarks/results."""

from __future__ import annotations

from typing import Any

from tools.docs_text import table

Results = dict[str, dict[str, Any]]
SCALES = {"integer": "integer", "folded": "folded", "float_scale": "float"}
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((4096, 22016), (4096, 4096), (11008, 4096), (8192, 28672), (14336, 4096))
SERVED = {
    "bf16": "bfloat16",
    "machete": "W4A16, Machete",
    "marlin-w4a8": "W4A8, Marlin",
    "finescale-integer": "finescale, any integers",
    "finescale-folded": "finescale, folded",
    "finescale-folded-flash-attention": "finescale, folded, vLLM's attention",
}
ARMS = {
    "w4a8": "any integers",
    "w4a8-folded": "folded",
    "w4a8-float": "float scales, same kernel",
    "w4a8-folded-kv8": "folded, keys and values in 8 bits",
}
MODELS = {"llama-2-7b": "Llama-2-7B", "llama-2-13b": "Llama-2-13B", "llama-3-8b": "Llama-3-8B"}


def products(results: Results) -> dict[tuple[int, int, str, int], float]:
    """Times faster than cuBLAS bfloat16 by (inputs, outputs, scales, tokens)."""
    return {
        (row["inputs"], row["outputs"], scales, row["tokens"]): row["bf16"] / row[scales]
        for row in results["gemm-h100"]["rows"]
        for scales in SCALES
        if scales in row
    }


def product_table(results: Results, shapes: tuple[tuple[int, int], ...] = SHAPES) -> str:
    """Shapes and scales down, tokens across."""
    found, rows = products(results), []
    for inputs, outputs in shapes:
        for scales, word in SCALES.items():
            ratios = [found.get((inputs, outputs, scales, tokens)) for tokens in TOKENS]
            rows.append((f"{inputs}, {outputs}" if word == "integer" else "", word, *map(_ratio, ratios)))
    return table(("inputs, outputs", "scales", *map(str, TOKENS)), rows)


def served(results: Results) -> dict[tuple[str, str], float]:
    """Milliseconds in vLLM by (arm, ``prefill`` or batch)."""
    return {
        (arm, step): found["median"]
        for arm, facts in results["serving-h100"]["arms"].items()
        for step, found in {"prefill": facts.get("prefill_ms"), **facts.get("decode_ms", {})}.items()
        if found
    }


def serving_table(results: Results) -> str:
    """Arms down, prefill and batches across; the last row is the folded arm's gain over bfloat16."""
    found = served(results)
    steps = list(dict.fromkeys(step for _, step in found))
    rows = [
        (word, *(_milliseconds(found.get((arm, step))) for step in steps))
        for arm, word in SERVED.items()
        if any(key[0] == arm for key in found)
    ]
    gains = [found["bf16", step] / found["finescale-folded", step] for step in steps]
    prefill = results["serving-h100"]["setting"]["prefill"]
    header = ("", *(f"prefill of {prefill}" if step == "prefill" else f"batch {step}" for step in steps))
    return table(header, [*rows, ("folded, times faster than bfloat16", *map(_ratio, gains))])


def decode_table(results: Results) -> str:
    """Whole models by ``finescale bench decode``, times faster than bfloat16 of the same run."""
    facts = results["decode-h100"]
    base = {row["model"]: row for row in facts["rows"] if row["arm"] == "bf16"}
    steps = list(next(iter(base.values()))["decode"])
    rows = []
    for arm, word in ARMS.items():
        for row in facts["rows"]:
            if row["arm"] == arm and row["model"] in base:
                pairs = [(_step(base[row["model"]], step), _step(row, step)) for step in ("prefill", *steps)]
                ratios = [other / own if own and other else None for other, own in pairs]
                rows.append((f"{MODELS[row['model']]}, {word}", *map(_ratio, ratios)))
    rows.sort(key=lambda row: row[0].partition(",")[0])
    header = ("model, scales", f"prefill of {facts['setting']['prefill']}", *(f"batch {step}" for step in steps))
    return table(header, rows)


def _step(row: dict[str, Any], step: str) -> float | None:
    found = row.get("prefill") if step == "prefill" else row["decode"].get(step)
    return float(found["milliseconds"]) if found else None


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value >= 20 else f"{value:.2f}"
