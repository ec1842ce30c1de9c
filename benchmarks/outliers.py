"""Quality with and without outliers at 3 bits, one row per model as in the README of QuantEase.

    python benchmarks/outliers.py --data ../shared --json benchmarks/results/outliers-zoo.json

The small trained models of ``--data`` (models/zoo), calibrated on the second half of data/books/books_valid.txt and
evaluated on all windows of its first half, perplexity and KL divergence from the original's next tokens. Columns: the
original; QuantEase per channel on the min/max grid as published, and on ours (clipping search), with the options of the
outlier recipes and with its own; 1 % structured and 1 % unstructured outliers; the published outlier algorithm;
SpQR in groups of 32 with as many outliers as make its size that of 1 % unstructured (in groups of 16 its scales alone
take more), with the published damping and with ours, and QuantEase from the latter on its grid; 1 % of the weights with
values of 8 bits, the recipe, and SpQR with such values, in groups of 64, at that size (in groups of 32 its scales alone
take more), and QuantEase on its grid; SpQR as published
(groups of 16) and with our damping; QuantEase from SpQR on SpQR's grid, of SpQR's size; and QuantEase per channel with
as many outliers as make its size SpQR's.

Every run is made for several seeds of the choice of calibration windows, the three in question for more of them; the
table has means (of log perplexities), since the difference of two runs is about as large as that of two seeds where a
model of 7 million parameters loses 3 %. ``way`` is the share of the way from the original to a plain 3-bit model in log
perplexity. Rows that the JSON file has, made by the same recipe, are not computed again; --merge takes them from other
files too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
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

FAMILIES = ("llama", "opt", "bloom", "falcon")
BITS = "weights.bits=3"
LENGTH = 512
"""Tokens of a window, calibrated or evaluated."""
DAMPED = "solver.damping=0.1"
"""The damping of the outlier recipes."""
LIKE_THEM = (DAMPED, "solver.gptq_damping=0.1", "solver.refits=2")
"""All that the outlier recipes have beside the outliers."""
ORIGINAL, PLAIN, STRUCTURED, UNSTRUCTURED = "original", "plain", "structured 1 %", "unstructured 1 %"
PLAIN_PUBLISHED, SPQR, SPQR_QUANTEASE = "plain published", "spqr", "spqr-quantease"
SPQR_SMALL, SAME_SIZE = "spqr of unstructured's size", "unstructured of spqr's size"
SPQR_SMALL_DAMPED, SPQR_QUANTEASE_SMALL = SPQR_SMALL + ", damping 0.1", "spqr-quantease of unstructured's size"
SPQR_DAMPED = SPQR + ", damping 0.1"
NARROW = "unstructured 1 %, 8 bits"
SPQR_NARROW, SPQR_NARROW_DAMPED = "spqr of that size, 8 bits", "spqr of that size, 8 bits, damping 0.1"
SPQR_QUANTEASE_NARROW = "spqr-quantease of that size, 8 bits"
WIDE, BYTES, IN_64 = "solver.outlier_bits=16", "solver.outlier_bits=8", "weights.group_size=64"
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    PLAIN_PUBLISHED: ("quantease-published", (BITS,)),
    PLAIN: ("quantease", (BITS, *LIKE_THEM)),
    STRUCTURED: ("quantease-structured-outliers", (BITS, *LIKE_THEM)),
    UNSTRUCTURED: ("quantease-outliers", (BITS, *LIKE_THEM, WIDE)),
    NARROW: ("quantease-outliers", (BITS, *LIKE_THEM)),
    SPQR_NARROW: ("spqr", (BITS, IN_64, BYTES)),
    SPQR_NARROW_DAMPED: ("spqr", (BITS, IN_64, BYTES, DAMPED)),
    SPQR_QUANTEASE_NARROW: ("spqr-quantease", (BITS, IN_64, BYTES, DAMPED, "solver.gptq_damping=0.1")),
    SPQR_SMALL: ("spqr", (BITS, "weights.group_size=32")),
    SPQR_SMALL_DAMPED: ("spqr", (BITS, "weights.group_size=32", DAMPED)),
    SPQR_QUANTEASE_SMALL: ("spqr-quantease", (BITS, "weights.group_size=32", DAMPED, "solver.gptq_damping=0.1")),
    SPQR: ("spqr", (BITS,)),
    SPQR_DAMPED: ("spqr", (BITS, DAMPED)),
    SPQR_QUANTEASE: ("spqr-quantease", (BITS, DAMPED, "solver.gptq_damping=0.1")),
    SAME_SIZE: ("quantease-outliers", (BITS, *LIKE_THEM, WIDE)),
    "plain, its own options": ("quantease", (BITS,)),
    "unstructured 1 % published": ("quantease-outliers-published", (BITS,)),
}
ALL_SEEDS = (PLAIN_PUBLISHED, PLAIN, STRUCTURED, UNSTRUCTURED)
"""Runs that are made for every seed, the others for the first three."""
SEEDS_OF_THE_OTHERS = 3
FITTED = {
    SPQR_SMALL: (UNSTRUCTURED, 0.9, 0.2),
    SPQR_SMALL_DAMPED: (UNSTRUCTURED, 0.9, 0.2),
    SPQR_NARROW: (NARROW, 0.4, 0.11),
    SPQR_NARROW_DAMPED: (NARROW, 0.4, 0.11),
}
"""SpQR of the size of another run, the threshold to begin with, and how fast the bits fall with its logarithm."""
STARTS = {SPQR_QUANTEASE_SMALL: SPQR_SMALL_DAMPED, SPQR_QUANTEASE_NARROW: SPQR_NARROW_DAMPED}
"""QuantEase with as many outliers as another run, and so of its size."""
ONE_SEED = ("plain, its own options", "unstructured 1 % published")
"""Runs that are made for the first seed only."""


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


@lru_cache(maxsize=1)
def original(model: Path, device: str) -> PreTrainedModel:
    return load(model, device=device, dtype=torch.float32)


def all_settings(settings: tuple[str, ...]) -> tuple[str, ...]:
    """With windows as long as those evaluated: some models have learned their positions."""
    return ("calibration.samples=128", f"calibration.length={LENGTH}", *settings)


def run(model: Path, recipe: str, settings: tuple[str, ...], texts: Texts, seed: int = 0) -> dict[str, Any]:
    """Quantize and evaluate; perplexity, KL, stored bits per weight and the layers' mean relative error."""
    with tempfile.TemporaryDirectory() as folder:
        settings = all_settings(settings)
        out = Path(folder) / "q"
        report = quantize(
            model, recipe, out=out, calibration=texts.calibration, settings=settings, seed=seed, device=texts.device
        )
        found = evaluate_on(texts, out, original(model, texts.device))
    layers = report["layers"]
    return {
        "recipe": recipe,
        "settings": settings,
        "perplexity": found.perplexity,
        "kl": found.kl,
        "tokens": found.tokens,
        "bits_per_weight": report["size"]["bits_per_weight"],
        "outlier_share": sum(layer["outliers"] or 0 for layer in layers)
        / sum(math.prod(layer["shape"]) for layer in layers),
        "relative_error": sum(layer["relative_error"] for layer in layers) / len(layers),
    }


def fit_threshold(
    model: Path, settings: tuple[str, ...], target: float, texts: Texts, seed: int, threshold: float, slope: float
) -> dict[str, Any]:
    """SpQR with the threshold that makes it ``target`` bits per weight, up to 0.3 %."""
    for _ in range(8):
        row = run(model, "spqr", (*settings, f"solver.threshold={threshold:.4f}"), texts, seed)
        over = row["bits_per_weight"] - target
        if abs(over) <= 0.003 * target:
            break
        threshold *= math.exp(min(max(over / slope, -1.0), 1.0))
    return row | {"threshold": threshold}


def fit_size(model: Path, rows: dict[str, Any], texts: Texts, seed: int) -> dict[str, Any]:
    """QuantEase with as many unstructured outliers as make it as large as SpQR: one more takes 24 bits."""
    known, target = rows[UNSTRUCTURED], rows[SPQR]["bits_per_weight"]
    share = known["outlier_share"] + (target - known["bits_per_weight"]) / 24
    recipe, settings = RUNS[SAME_SIZE]
    return run(model, recipe, (*settings, f"solver.outliers={share:.6f}"), texts, seed)


def is_done(row: dict[str, Any] | None, recipe: str, settings: tuple[str, ...]) -> bool:
    """Whether a row was made by this recipe; of fitted ones the last setting is left out."""
    wanted = [*all_settings(settings)]
    return row is not None and row["recipe"] == recipe and list(row["settings"])[: len(wanted)] == wanted


def compare(
    model: Path, seeds: dict[str, dict[str, Any]], seed: int, texts: Texts, names: list[str], save: Callable[[], None]
) -> None:
    """Those of the runs called ``names`` that a seed should have and has not yet."""
    rows = seeds.setdefault(str(seed), {})
    if ORIGINAL not in rows:
        found = evaluate_on(texts, model, None)
        rows[ORIGINAL] = {"perplexity": found.perplexity, "kl": 0.0, "tokens": found.tokens, "bits_per_weight": 16.0}
        save()
    for name in names:
        recipe, settings = RUNS[name]
        wanted = seed == 0 if name in ONE_SEED else seed < SEEDS_OF_THE_OTHERS or name in ALL_SEEDS
        if not wanted or is_done(rows.get(name), recipe, settings):
            continue
        if name in STARTS:
            same = f"solver.spqr_threshold={rows[STARTS[name]]['threshold']:.4f}"
            rows[name] = run(model, recipe, (*settings, same), texts, seed)
        elif name in FITTED:
            of, first, slope = FITTED[name]
            known = [other[name]["threshold"] for other in seeds.values() if name in other]
            target = rows[of]["bits_per_weight"]
            rows[name] = fit_threshold(model, settings, target, texts, seed, known[0] if known else first, slope)
        elif name == SAME_SIZE:
            rows[name] = fit_size(model, rows, texts, seed)
        else:
            rows[name] = run(model, recipe, settings, texts, seed)
        save()


def means(seeds: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each run over its seeds: perplexity (its logarithm's mean), KL, bits; and the deviation of both means."""
    result = {}
    for name in (ORIGINAL, *RUNS):
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
        if len(rows) > 1 and name != ORIGINAL:
            result[name]["log_deviation"] = statistics.stdev(logs) / len(rows) ** 0.5
            result[name]["kl_deviation"] = statistics.stdev(kls) / len(rows) ** 0.5
    return result


QUESTIONS = {
    "columns_beat_plain": (STRUCTURED, PLAIN),
    "columns_beat_plain_published": (STRUCTURED, PLAIN_PUBLISHED),
    "weights_beat_columns": (UNSTRUCTURED, STRUCTURED),
    "unstructured_8_bits_beats_spqr_of_its_size": (NARROW, SPQR_NARROW),
    "unstructured_8_bits_beats_damped_spqr_of_its_size": (NARROW, SPQR_NARROW_DAMPED),
    "unstructured_8_bits_beats_larger_spqr": (NARROW, SPQR_SMALL),
    "unstructured_8_bits_beats_columns": (NARROW, STRUCTURED),
    "unstructured_8_bits_beats_16": (NARROW, UNSTRUCTURED),
    "spqr_quantease_beats_spqr_of_8_bits": (SPQR_QUANTEASE_NARROW, SPQR_NARROW),
    "unstructured_beats_spqr_of_its_size": (UNSTRUCTURED, SPQR_SMALL),
    "unstructured_beats_damped_spqr_of_its_size": (UNSTRUCTURED, SPQR_SMALL_DAMPED),
    "spqr_quantease_beats_spqr_of_unstructureds_size": (SPQR_QUANTEASE_SMALL, SPQR_SMALL),
    "spqr_quantease_beats_damped_spqr_of_unstructureds_size": (SPQR_QUANTEASE_SMALL, SPQR_SMALL_DAMPED),
    "unstructured_of_its_size_beats_spqr": (SAME_SIZE, SPQR),
    "spqr_quantease_beats_spqr": (SPQR_QUANTEASE, SPQR),
    "spqr_quantease_beats_damped_spqr": (SPQR_QUANTEASE, SPQR_DAMPED),
}


def judge(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is asked of the outliers, each question by the seeds that have both of its runs.

    ``difference``: mean over the seeds of the logarithm of the first run's perplexity (or KL) over the second one's,
    with its standard ``error``; ``holds`` when it is below zero.
    """
    found: dict[str, Any] = {}
    for label in ("perplexity", "kl"):
        for question, (better, worse) in QUESTIONS.items():
            logs = [
                math.log(rows[better][label] / rows[worse][label])
                for rows in seeds.values()
                if {better, worse} <= rows.keys()
            ]
            if logs:
                mean = statistics.fmean(logs)
                error = statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else None
                facts = {"holds": mean < 0, "difference": mean, "error": error, "seeds": len(logs)}
                found[f"{question}_by_{label}"] = facts
        for question, of, base in (
            ("way_of_plain_published", UNSTRUCTURED, PLAIN_PUBLISHED),
            ("way_of_plain_published_with_8_bits", NARROW, PLAIN_PUBLISHED),
            ("way_of_plain", UNSTRUCTURED, PLAIN),
        ):
            ways = [_losses(rows, label, of, base) for rows in seeds.values() if {of, base} <= rows.keys()]
            if ways:
                found[f"{question}_by_{label}"] = sum(one for one, _ in ways) / sum(other for _, other in ways)
    return found


def _losses(rows: dict[str, Any], label: str, of: str, base: str) -> tuple[float, float]:
    """What two runs lose: log perplexity beyond the original's, or KL."""
    if label == "kl":
        return rows[of]["kl"], rows[base]["kl"]
    original = math.log(rows[ORIGINAL]["perplexity"])
    return math.log(rows[of]["perplexity"]) - original, math.log(rows[base]["perplexity"]) - original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="nothing is computed without it")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--seeds", default="0,1,2,3,4,5")
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
            others = [name for name in RUNS if name not in ALL_SEEDS]
            for names in (list(ALL_SEEDS), others):  # the essential ones of all seeds first
                for seed in arguments.seeds.split(","):
                    for family in arguments.families.split(","):
                        seeds = result["models"].setdefault(family, {})
                        model = arguments.data / "models" / "zoo" / family
                        compare(model, seeds, int(seed), texts, names, save)
    save()
    show(result)


def show(result: dict[str, Any]) -> None:
    console = Console(width=200)
    names = [ORIGINAL, *RUNS]
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
