"""Quality with and without outliers at 3 bits, one row per model as in the README of QuantEase.

    python benchmarks/outliers.py --data ../shared --json benchmarks/results/outliers-zoo.json

The small trained models of ``--data`` (models/zoo), calibrated on the second half of data/books/books_valid.txt and
evaluated on all windows of its first half, perplexity and KL divergence from the original's next tokens. Columns: the
original; QuantEase per channel on the min/max grid as published, and on ours (clipping search); 1 % structured and 1 %
unstructured outliers; the published outlier algorithm; SpQR (groups of 16, two dampings); QuantEase with as many
outliers as make its size SpQR's; and QuantEase from SpQR on SpQR's grid, of the same size too.

Every run is made for several seeds of the choice of calibration windows; the table has means over them (of log
perplexities), since the difference of two runs is about as large as that of two seeds where a model of 7 million
parameters loses 3 %. ``way`` is the share of the way from the original to a plain 3-bit model in log perplexity. Rows
that the JSON file has are not computed again; --merge takes them from other files too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from finescale.api import evaluate, load, quantize
from finescale.bench.machine import machine_facts
from finescale.cli.common import quiet_libraries
from finescale.evaluate import Evaluation
from finescale.formats.source import open_checkpoint

FAMILIES = ("llama", "opt", "bloom", "falcon")
BITS = "weights.bits=3"
LENGTH = 512
"""Tokens of a window, calibrated or evaluated."""
SPQR, SPQR_DAMPED = "spqr", "spqr, damping 0.01"
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain published": ("quantease-published", (BITS,)),
    "plain": ("quantease", (BITS,)),
    "structured 1 %": ("quantease-structured-outliers", (BITS,)),
    "unstructured 1 %": ("quantease-outliers", (BITS,)),
    "unstructured 1 % published": ("quantease-outliers-published", (BITS,)),
    SPQR: ("spqr", (BITS,)),
    SPQR_DAMPED: ("spqr", (BITS, "solver.damping=0.01")),
    "spqr-quantease": ("spqr-quantease", (BITS,)),
}
ONE_SEED = ("plain published", "unstructured 1 % published", "spqr-quantease")
"""Runs that are made for the first seed only."""
SAME_SIZE = "unstructured of spqr's size"


@dataclass(frozen=True)
class Texts:
    """What models are calibrated and evaluated on, and where."""

    calibration: str
    evaluation: str
    windows: int | None
    device: str


def evaluate_on(texts: Texts, folder: Path, original: PreTrainedModel | None) -> Evaluation:
    """Of a model, original or quantized, in float32."""
    model = load(folder, device=texts.device, dtype=torch.float32)
    return evaluate(
        model, texts.evaluation, windows=texts.windows, length=LENGTH, tokenizer_from=folder, against=original
    )


def run(model: Path, recipe: str, settings: tuple[str, ...], texts: Texts, seed: int = 0) -> dict[str, Any]:
    """Quantize and evaluate; perplexity, KL, stored bits per weight and the layers' mean relative error."""
    with tempfile.TemporaryDirectory() as folder:
        # Windows as long as those evaluated: some models have learned their positions.
        settings = ("calibration.samples=128", f"calibration.length={LENGTH}", *settings)
        out = Path(folder) / "q"
        report = quantize(
            model, recipe, out=out, calibration=texts.calibration, settings=settings, seed=seed, device=texts.device
        )
        found = evaluate_on(texts, out, load(model, device=texts.device, dtype=torch.float32))
    errors = [layer["relative_error"] for layer in report["layers"]]
    return {
        "recipe": recipe,
        "settings": settings,
        "perplexity": found.perplexity,
        "kl": found.kl,
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


def fit_size(model: Path, target: float, texts: Texts, seed: int) -> dict[str, Any]:
    """QuantEase with unstructured outliers at no more than ``target`` bits per weight, and at most 0.5 % less."""
    share = share_of_size(model, target)
    for _ in range(4):
        row = run(model, "quantease-outliers", (BITS, f"solver.outliers={share:.6f}"), texts, seed)
        if 0.995 * target <= row["bits_per_weight"] <= target:
            break
        share += (target * 0.999 - row["bits_per_weight"]) / 32
    return row


def compare(model: Path, rows: dict[str, Any], seed: int, texts: Texts, save: Callable[[], None]) -> None:
    """All runs of a seed that are not in ``rows`` yet."""
    if "original" not in rows:
        found = evaluate_on(texts, model, None)
        rows["original"] = {"perplexity": found.perplexity, "kl": 0.0, "tokens": found.tokens, "bits_per_weight": 16.0}
        save()
    for name, (recipe, settings) in RUNS.items():
        if name not in rows and (seed == 0 or name not in ONE_SEED):
            rows[name] = run(model, recipe, settings, texts, seed)
            save()
    if SAME_SIZE not in rows:
        rows[SAME_SIZE] = fit_size(model, rows[SPQR]["bits_per_weight"], texts, seed)
        save()


def means(seeds: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each run over its seeds: perplexity (its logarithm's mean), KL, bits; and the deviation of both means."""
    result = {}
    for name in ("original", *RUNS, SAME_SIZE):
        rows = [rows[name] for rows in seeds.values() if name in rows]
        if not rows:
            continue
        logs, kls = [math.log(row["perplexity"]) for row in rows], [row["kl"] for row in rows]
        result[name] = {
            "seeds": len(rows),
            "perplexity": math.exp(statistics.fmean(logs)),
            "kl": statistics.fmean(kls),
            "bits_per_weight": statistics.fmean(row["bits_per_weight"] for row in rows),
        }
        if len(rows) > 1 and name != "original":
            result[name]["log_deviation"] = statistics.stdev(logs) / len(rows) ** 0.5
            result[name]["kl_deviation"] = statistics.stdev(kls) / len(rows) ** 0.5
    return result


def judge(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is asked of the outliers, each question by the means over the seeds that have all its runs."""

    def mean(name: str, of: Callable[[dict[str, Any]], float], *others: str) -> float | None:
        found = [of(rows[name]) for rows in seeds.values() if {name, *others} <= rows.keys()]
        return statistics.fmean(found) if found else None

    def loss(name: str, *others: str) -> float | None:
        first = mean("original", lambda row: math.log(row["perplexity"]))
        last = mean(name, lambda row: math.log(row["perplexity"]), *others)
        return None if first is None or last is None else last - first

    def kl(name: str, *others: str) -> float | None:
        return mean(name, lambda row: float(row["kl"]), *others)

    plain, structured, unstructured = "plain", "structured 1 %", "unstructured 1 %"
    found: dict[str, Any] = {}
    for label, value in (("perplexity", loss), ("kl", kl)):
        for question, better, worse in (
            ("columns_beat_plain", structured, plain),
            ("weights_beat_columns", unstructured, structured),
            ("same_size_beats_spqr", SAME_SIZE, SPQR),
            ("same_size_beats_damped_spqr", SAME_SIZE, SPQR_DAMPED),
        ):
            one, other = value(better, worse), value(worse, better)
            if one is not None and other is not None:
                found[f"{question}_by_{label}"] = one < other
        for question, base in (("way_of_plain", plain), ("way_of_plain_published", "plain published")):
            # The published run has one seed only.
            one, other = value(unstructured), value(base)
            if one is not None and other:
                found[f"{question}_by_{label}"] = one / other
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="nothing is computed without it")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--windows", type=int, help="of the evaluation; all if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--merge", type=Path, nargs="*", default=[])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/outliers-zoo.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    result: dict[str, Any] = {"models": {}}
    for path in [arguments.json, *arguments.merge]:
        for family, seeds in (json.loads(path.read_text())["models"] if path.is_file() else {}).items():
            for seed, rows in seeds.items():
                result["models"].setdefault(family, {}).setdefault(seed, {}).update(rows)
    result |= {"benchmark": "outliers", "machine": machine_facts(), "device": arguments.device}
    if not arguments.data and arguments.merge:  # nothing is computed here
        first = json.loads(arguments.merge[0].read_text())
        result |= {"machine": first["machine"], "device": first["device"]}
    result["windows"] = arguments.windows

    def save() -> None:
        result["means"] = {family: means(seeds) for family, seeds in result["models"].items()}
        result["judgement"] = {family: judge(seeds) for family, seeds in result["models"].items()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    if arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            text = (arguments.data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")
            evaluation, calibration = Path(folder) / "evaluation.txt", Path(folder) / "calibration.txt"
            evaluation.write_text(text[: len(text) // 2], encoding="utf-8")
            calibration.write_text(text[len(text) // 2 :], encoding="utf-8")
            texts = Texts(str(calibration), str(evaluation), arguments.windows, arguments.device)
            for seed in arguments.seeds.split(","):
                for family in arguments.families.split(","):
                    rows = result["models"].setdefault(family, {}).setdefault(seed, {})
                    compare(arguments.data / "models" / "zoo" / family, rows, int(seed), texts, save)
    save()
    show(result)


def show(result: dict[str, Any]) -> None:
    console = Console(width=200)
    names = ["original", *RUNS, SAME_SIZE]
    table = Table("model", *names, title="perplexity / 1000 KL (stored bits per weight)")
    for family, rows in result["means"].items():
        cells = (
            f"{rows[name]['perplexity']:.2f} / {1000 * rows[name]['kl']:.1f} ({rows[name]['bits_per_weight']:.2f})"
            if name in rows
            else "-"
            for name in names
        )
        table.add_row(family, *cells)
    console.print(table)
    for family, facts in result["judgement"].items():
        console.print(f"{family}: {facts}")


if __name__ == "__main__":
    main()
