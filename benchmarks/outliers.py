"""Perplexity with and without outliers at 3 bits, one row per model as in the README of QuantEase.

    python benchmarks/outliers.py --data ../shared --json benchmarks/results/outliers-zoo.json

The small trained models of ``--data`` (models/zoo), calibrated on the second half of data/books/books_valid.txt and
evaluated on windows of its first half. Columns: the original; QuantEase per channel on the min/max grid as published,
and on ours (clipping search); 1 % structured and 1 % unstructured outliers; the published outlier algorithm; SpQR
(groups of 16, the better of two dampings); QuantEase with as many outliers as make its size SpQR's; and QuantEase from
SpQR on SpQR's grid, of the same size too. ``way`` is the share of the way from the original to a plain 3-bit model in
log perplexity. Rows that the JSON file has already are not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from finescale.api import evaluate, load, quantize
from finescale.bench.machine import machine_facts
from finescale.cli.common import quiet_libraries
from finescale.evaluate import Evaluation
from finescale.formats.source import open_checkpoint

FAMILIES = ("llama", "opt", "bloom", "falcon")
BITS = "weights.bits=3"
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain published": ("quantease-published", (BITS,)),
    "plain": ("quantease", (BITS,)),
    "structured 1 %": ("quantease-structured-outliers", (BITS,)),
    "unstructured 1 %": ("quantease-outliers", (BITS,)),
    "unstructured 1 % published": ("quantease-outliers-published", (BITS,)),
    "spqr": ("spqr", (BITS,)),
    "spqr, damping 0.01": ("spqr", (BITS, "solver.damping=0.01")),
    "spqr-quantease": ("spqr-quantease", (BITS,)),
}
SAME_SIZE = "unstructured of spqr's size"


@dataclass(frozen=True)
class Texts:
    """What models are calibrated and evaluated on, and where."""

    calibration: str
    evaluation: str
    windows: int
    device: str


def perplexity(folder: Path, texts: Texts) -> Evaluation:
    """Of a model, original or quantized, in float32."""
    model = load(folder, device=texts.device, dtype=torch.float32)
    return evaluate(model, texts.evaluation, windows=texts.windows, length=512, tokenizer_from=folder)


def run(model: Path, recipe: str, settings: tuple[str, ...], texts: Texts) -> dict[str, Any]:
    """Quantize and evaluate; perplexity, stored bits per weight and the layers' mean relative error."""
    with tempfile.TemporaryDirectory() as folder:
        common = ("calibration.samples=48", "calibration.length=256")
        settings = (*settings, *common)
        out = Path(folder) / "q"
        report = quantize(model, recipe, out=out, calibration=texts.calibration, settings=settings, device=texts.device)
        found = perplexity(out, texts)
    errors = [layer["relative_error"] for layer in report["layers"]]
    return {
        "recipe": recipe,
        "settings": settings,
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "bits_per_weight": report["size"]["bits_per_weight"],
        "relative_error": sum(errors) / len(errors),
    }


def share_of_size(model: Path, target: float) -> float:
    """The share of outliers with which per-channel QuantEase at 3 bits needs ``target`` bits per weight, about.

    One outlier takes 32 bits; scales, zero points and row pointers take 16 + 3 + 32 bits a row.
    """
    source = open_checkpoint(model)
    width = source.config.get("hidden_size") or source.config["n_embd"]
    return (target - 3 - 51 / (1.33 * width)) / 32


def fit_size(model: Path, target: float, texts: Texts) -> dict[str, Any]:
    """QuantEase with unstructured outliers at no more than ``target`` bits per weight, and at most 0.5 % less."""
    share = share_of_size(model, target)
    for _ in range(4):
        row = run(model, "quantease-outliers", (BITS, f"solver.outliers={share:.6f}"), texts)
        if 0.995 * target <= row["bits_per_weight"] <= target:
            break
        share += (target * 0.999 - row["bits_per_weight"]) / 32
    return row


def way(rows: dict[str, Any], name: str, plain: str) -> float:
    original = math.log(rows["original"]["perplexity"])
    return (math.log(rows[name]["perplexity"]) - original) / (math.log(rows[plain]["perplexity"]) - original)


def compare(family: str, rows: dict[str, Any], data: Path, texts: Texts, save: Any) -> None:
    model = data / "models" / "zoo" / family
    if "original" not in rows:
        found = perplexity(model, texts)
        rows["original"] = {"perplexity": found.perplexity, "tokens": found.tokens, "bits_per_weight": 16.0}
        save()
    for name, (recipe, settings) in RUNS.items():
        if name not in rows:
            rows[name] = run(model, recipe, settings, texts)
            save()
    best = min(("spqr", "spqr, damping 0.01"), key=lambda name: rows[name]["perplexity"])
    if SAME_SIZE not in rows:
        rows[SAME_SIZE] = fit_size(model, rows[best]["bits_per_weight"], texts)
        save()


def judge(rows: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the outliers, family by family."""
    value = {name: row["perplexity"] for name, row in rows.items()}
    best = min(("spqr", "spqr, damping 0.01"), key=lambda name: value[name])
    return {
        "order": value["plain"] > value["structured 1 %"] > value["unstructured 1 %"],
        "way_of_plain": way(rows, "unstructured 1 %", "plain"),
        "way_of_plain_published": way(rows, "unstructured 1 %", "plain published"),
        "way_published": way(rows, "unstructured 1 % published", "plain published"),
        "beats_spqr_per_channel": value[SAME_SIZE] < value[best],
        "beats_spqr_on_its_grid": value["spqr-quantease"] < value["spqr, damping 0.01"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/outliers-zoo.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    result: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"models": {}}
    result |= {"benchmark": "outliers", "seed": 0, "machine": machine_facts(), "windows": arguments.windows}
    result["device"] = arguments.device

    def save() -> None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        text = (arguments.data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")
        evaluation, calibration = Path(folder) / "evaluation.txt", Path(folder) / "calibration.txt"
        evaluation.write_text(text[: len(text) // 2], encoding="utf-8")
        calibration.write_text(text[len(text) // 2 :], encoding="utf-8")
        texts = Texts(str(calibration), str(evaluation), arguments.windows, arguments.device)
        for family in arguments.families.split(","):
            rows = result["models"].setdefault(family, {})
            compare(family, rows, arguments.data, texts, save)
    result["judgement"] = {family: judge(rows) for family, rows in result["models"].items()}
    save()
    show(result)


def show(result: dict[str, Any]) -> None:
    console = Console(width=200)
    names = ["original", *RUNS, SAME_SIZE]
    table = Table("model", *names, title="perplexity (stored bits per weight)")
    for family, rows in result["models"].items():
        table.add_row(
            family, *(f"{rows[name]['perplexity']:.2f} ({rows[name]['bits_per_weight']:.2f})" for name in names)
        )
    console.print(table)
    for family, facts in result["judgement"].items():
        console.print(f"{family}: {facts}")


if __name__ == "__main__":
    main()
