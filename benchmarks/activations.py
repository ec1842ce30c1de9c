"""Quantized activations side by side: W4A4, W6A6 and W4A8 by RTN, SmoothQuant, FPTQ, AWQ, QuaRot, QLLM, combinations.

    python benchmarks/activations.py --data ../shared --models zoo-llama,smollm2

Weights and activations are rounded as in the papers: W4A4 and W6A6 asymmetric, weights per channel, activations per
token; W4A8 in symmetric groups of 64 with symmetric int8 per token, the setting of integer scales. Every method stands
on the same grids and round-to-nearest; rows with a solver say so. `W4A16` of the same solver is the reference of W4A8.
The ablation of QLLM varies the share of channels that splitting adds, and what is done about them.

Calibration is the start of WikiText-2 valid for SmolLM2 (samples x 512 tokens), evaluation the start of WikiText-2 test
(windows x 2048); the zoo's models calibrate on one half of the books and are evaluated on the other. ``--samples`` and
``--windows`` bound both. Rows that the JSON file already holds for the same settings are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finescale.api import evaluate, quantize
from finescale.bench.machine import machine_facts
from finescale.cli.common import quiet_libraries
from finescale.demo import find_demo_model
from finescale.formats.gguf import local_folder
from finescale.pipeline.verify import verify
from finescale.recipe import Recipe
from finescale.runtime.load import load

CHANNEL = {"group_size": -1, "symmetric": False}
BITS: dict[str, dict[str, Any]] = {
    "W4A4": {"weights": {"bits": 4, **CHANNEL}, "activations": {"bits": 4, "symmetric": False}},
    "W6A6": {"weights": {"bits": 6, **CHANNEL}, "activations": {"bits": 6, "symmetric": False}},
    "W4A8": {"weights": {"bits": 4, "group_size": 64, "symmetric": True}, "activations": {"bits": 8}},
    "W4A16": {"weights": {"bits": 4, "group_size": 64, "symmetric": True}},
}
ROTATION: dict[str, Any] = {"name": "quarot", "options": {"online_down": True, "online_o": True}}
FUSED = {"name": "quarot"}
METHODS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "RTN": ("rtn", []),
    "SmoothQuant 0.5": ("rtn", [{"name": "smoothquant"}]),
    "SmoothQuant 0.85": ("rtn", [{"name": "smoothquant", "options": {"alpha": 0.85}}]),
    "FPTQ": ("rtn", [{"name": "fptq"}]),
    "AWQ": ("rtn", [{"name": "awq"}]),
    "QuaRot, fused": ("rtn", [FUSED]),
    "QuaRot, online too": ("rtn", [ROTATION]),
    "QLLM, reassembly": ("rtn", [{"name": "qllm"}]),
    "GPTQ": ("gptq", []),
    "AWQ + GPTQ": ("gptq", [{"name": "awq", "options": {"clip": False}}]),
    "QLLM + GPTQ": ("gptq", [{"name": "qllm"}]),
    "QuaRot, online too + GPTQ": ("gptq", [ROTATION]),
    "QuaRot, online too + QLLM + GPTQ": ("gptq", [ROTATION, {"name": "qllm"}]),
}
WEIGHT_ONLY = ("RTN", "AWQ", "GPTQ", "AWQ + GPTQ", "QuaRot, online too + GPTQ")
EXPANSIONS = (0.01, 0.05, 0.1)
ABLATIONS: dict[str, dict[str, Any]] = {
    f"{mode} {expansion:g}": {"mode": mode, "expansion": expansion}
    for expansion in EXPANSIONS
    for mode in ("disassembly", "assembly", "pruning")
} | {"adaptive": {}, "adaptive, score of the public code": {"distance": "public"}}


def settings_of(name: str, data: Path, work: Path, samples: int, windows: int) -> dict[str, Any]:
    """Model, texts and sizes of the runs."""
    if name == "smollm2":
        wiki = data / "data" / "wikitext2"
        model, texts = str(local_folder(find_demo_model())), (wiki / "wiki.valid.raw", wiki / "wiki.test.joined.txt")
        length = 2048
    else:
        books = (data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")
        texts = work / "books-second-half.txt", work / "books-first-half.txt"
        texts[1].write_text(books[: len(books) // 2], encoding="utf-8")
        texts[0].write_text(books[len(books) // 2 :], encoding="utf-8")
        model, length = str(data / "models" / "zoo" / name.removeprefix("zoo-")), 512
    return {
        "model": model, "calibration": str(texts[0]), "text": str(texts[1]), "samples": samples, "length": 512,
        "windows": windows, "window_length": length,
    }  # fmt: skip


def recipe_of(bits: str, solver: str, transforms: list[dict[str, Any]], setting: dict[str, Any]) -> Recipe:
    """The recipe of one row."""
    calibration = {"samples": setting["samples"], "length": setting["length"]}
    values = {"solver": {"name": solver}, "transforms": transforms, "calibration": calibration}
    return Recipe.from_dict({"name": f"{bits} {solver}"} | BITS[bits] | values)


def run(recipe: Recipe, setting: dict[str, Any], out: Path) -> dict[str, Any]:
    """Quantize, prove and evaluate one row."""
    start = time.perf_counter()
    report = quantize(setting["model"], recipe, out=out, calibration=setting["calibration"], fresh=True)
    seconds = time.perf_counter() - start
    verify(out)
    sizes = {"windows": setting["windows"], "length": setting["window_length"]}
    result = evaluate(load(out), setting["text"], tokenizer_from=setting["model"], **sizes)
    row = {"perplexity": result.perplexity, "seconds": seconds}
    added = [
        layer["extra"] for block in report.get("transforms", []) for part in block for layer in part["layers"].values()
        if "extra" in layer
    ]  # fmt: skip
    return row | ({"extra_channels": sum(added)} if added else {})


def rows_of(bits: str) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Methods that make sense with these bits."""
    return {name: METHODS[name] for name in WEIGHT_ONLY} if bits == "W4A16" else METHODS


def print_table(console: Console, name: str, entry: dict[str, Any]) -> None:
    """Perplexity by method and bits, then the ablation."""
    table = Table(title=f"{name}: perplexity (seconds to quantize); original {entry['original_perplexity']:.2f}")
    table.add_column("method")
    for bits in entry["rows"]:
        table.add_column(bits, justify="right")
    for method in METHODS:
        cells = []
        for rows in entry["rows"].values():
            row = rows.get(method)
            cells.append(f"{row['perplexity']:.2f} ({row['seconds']:.0f})" if row else "")
        table.add_row(method, *cells)
    console.print(table)
    if entry.get("ablation"):
        ablation = Table("QLLM W4A4, round to nearest", "perplexity", "extra channels", title=f"{name}: ablation")
        for label, row in entry["ablation"].items():
            ablation.add_row(label, f"{row['perplexity']:.2f}", str(row.get("extra_channels", 0)))
        console.print(ablation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--models", default="zoo-llama,smollm2")
    parser.add_argument("--bits", default="W4A4,W6A6,W4A8,W4A16")
    parser.add_argument("--methods", default="", help="names of rows, divided by semicolons; all unless given")
    parser.add_argument("--ablation", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/activations.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    console = Console()
    result: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"models": {}}
    result |= {"benchmark": "activations", "machine": machine_facts(), "seed": 0}

    def save() -> None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name in arguments.models.split(","):
            setting = settings_of(name, arguments.data, work, arguments.samples, arguments.windows)
            shown = setting | {key: Path(setting[key]).name for key in ("model", "calibration", "text")}
            entry = result["models"].get(name, {})
            if entry.get("setting") != shown:
                sizes = {"windows": setting["windows"], "length": setting["window_length"]}
                original = evaluate(setting["model"], setting["text"], **sizes)
                entry = {"setting": shown, "original_perplexity": original.perplexity, "rows": {}, "ablation": {}}
                result["models"][name] = entry
                save()
            for bits in arguments.bits.split(","):
                for method, (solver, transforms) in rows_of(bits).items():
                    rows = entry["rows"].setdefault(bits, {})
                    if method in rows or (arguments.methods and method not in arguments.methods.split(";")):
                        continue
                    rows[method] = run(recipe_of(bits, solver, transforms, setting), setting, work / "out")
                    console.print(f"{name} {bits} {method}: {rows[method]}")
                    save()
            for label, options in ABLATIONS.items() if arguments.ablation else ():
                if label not in entry["ablation"]:
                    transforms = [{"name": "qllm", "options": options}]
                    entry["ablation"][label] = run(recipe_of("W4A4", "rtn", transforms, setting), setting, work / "out")
                    console.print(f"{name} ablation {label}: {entry['ablation'][label]}")
                    save()
            print_table(console, name, entry)
    console.print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
