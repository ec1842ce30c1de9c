"""Quality with and without outliers at 3 bits, one row per model as in the README of QuantEase.

    python benchmarks/outliers.py --data ../shared --json benchmarks/results/outliers-zoo.json

The small trained models of ``--data`` (models/zoo), calibrated on the second half of data/books/books_valid.txt and
evaluated on all windows of its first half and of as much of WikiText-2's test text and of LAMBADA's passages (novels
too): perplexity and KL divergence from the original's next tokens. Options were chosen by the books; the other texts
confirm them. Runs: the original; QuantEase per channel on the min/max grid as published, and on ours (clipping
search) with the options of the outlier recipes; 1 % structured and 1 % unstructured outliers, of 8 bits (the recipe)
and of 16; all but the last with the moments themselves too, not with their root. SpQR at two sizes: that of the
recipe, in groups of 64 with outliers of 8 bits (in groups of 32 its scales alone take more), and that of 16-bit
outliers, in groups of 32 with outliers of 16 bits and of 8; with the published damping and, "as ours", with what our
recipe makes of the moments. Its threshold is fitted to the size, and for the second one so is the number of the
recipe's outliers. QuantEase from SpQR on SpQR's grid, of SpQR's size. On the books alone, for three seeds, and with
the moments themselves: SpQR as published in groups of 16, QuantEase from there, and QuantEase per channel with as many
outliers as make its size SpQR's.

Every run is made for several seeds of the choice of calibration windows; the table has means (of log perplexities),
since the difference of two runs is about as large as that of two seeds where a model of 7 million parameters loses 3 %.
``error`` is the standard error over the seeds, ``text_error`` over parts of the text; ``all`` is the mean of the four
models with the error of theirs. ``way`` is the share of the way from the original to a plain 3-bit model in log
perplexity. Rows that the JSON file has, made by the same settings, are not computed again; --merge takes them from
other files too. ``--model smollm2=FOLDER`` makes rows of another model on the same texts.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from outlier_table import (
    ALL,
    FAMILIES,
    FROM_SPQR,
    FROM_SPQR_16,
    ORIGINAL,
    OTHERS,
    PLAIN,
    PLAIN_NO_ROOT,
    PLAIN_PUBLISHED,
    SPQR,
    SPQR_32,
    SPQR_32_BYTES,
    SPQR_32_OURS,
    SPQR_64,
    SPQR_64_OURS,
    STRUCTURED,
    STRUCTURED_NO_ROOT,
    UNSTRUCTURED,
    UNSTRUCTURED_LIKE_16,
    UNSTRUCTURED_LIKE_32,
    UNSTRUCTURED_NO_ROOT,
    UNSTRUCTURED_WIDE,
    judge,
    means,
    pooled,
    show,
)
from torch import Tensor
from transformers import PreTrainedModel

from finescale.api import quantize
from finescale.bench.machine import machine_facts
from finescale.calibration.data import encode, open_tokenizer, read_text
from finescale.cli.common import quiet_libraries
from finescale.evaluate.perplexity import cut_windows, evaluate_windows
from finescale.evaluate.reference import Reference, capture_reference
from finescale.runtime.load import load

BITS = "weights.bits=3"
LENGTH = 512
"""Tokens of a window, calibrated or evaluated."""
PARTS = 8
"""Of an evaluated text, for the error that is due to it."""
MOMENTS = ("calibration.power=0.5", "solver.damping=0.01")
"""What the outlier recipes make of the second moments."""
DAMPED = ("solver.damping=0.1", "solver.gptq_damping=0.1")
"""What is best for the moments themselves."""
NO_ROOT = ("calibration.power=1.0", *DAMPED, "solver.refits=2")
"""The moments themselves in the place of ``LIKE_THEM``."""
LIKE_THEM = (*MOMENTS, "solver.gptq_damping=0.01", "solver.refits=2")
"""All that the outlier recipes have beside the outliers."""
WIDE, BYTES, IN_64, IN_32 = (
    "solver.outlier_bits=16",
    "solver.outlier_bits=8",
    "weights.group_size=64",
    "weights.group_size=32",
)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    PLAIN_PUBLISHED: ("quantease-published", (BITS,)),
    PLAIN: ("quantease", (BITS, *LIKE_THEM)),
    STRUCTURED: ("quantease-structured-outliers", (BITS, *LIKE_THEM)),
    UNSTRUCTURED: ("quantease-outliers", (BITS, *LIKE_THEM)),
    SPQR_64: ("spqr", (BITS, IN_64, BYTES)),
    UNSTRUCTURED_WIDE: ("quantease-outliers", (BITS, *LIKE_THEM, WIDE)),
    SPQR_32: ("spqr", (BITS, IN_32)),
    UNSTRUCTURED_LIKE_32: ("quantease-outliers", (BITS, *LIKE_THEM)),
    SPQR_64_OURS: ("spqr", (BITS, IN_64, BYTES, *MOMENTS)),
    FROM_SPQR: ("spqr-quantease", (BITS, IN_64, BYTES, *MOMENTS, "solver.gptq_damping=0.01")),
    PLAIN_NO_ROOT: ("quantease", (BITS, *NO_ROOT)),
    STRUCTURED_NO_ROOT: ("quantease-structured-outliers", (BITS, *NO_ROOT)),
    UNSTRUCTURED_NO_ROOT: ("quantease-outliers", (BITS, *NO_ROOT)),
    SPQR_32_BYTES: ("spqr", (BITS, IN_32, BYTES)),
    SPQR_32_OURS: ("spqr", (BITS, IN_32, BYTES, *MOMENTS)),
    SPQR: ("spqr", (BITS,)),
    FROM_SPQR_16: ("spqr-quantease", (BITS, *DAMPED)),
    UNSTRUCTURED_LIKE_16: ("quantease-outliers", (BITS, *NO_ROOT, WIDE)),
}
FITTED = {
    SPQR_64: (UNSTRUCTURED, 0.47),
    SPQR_64_OURS: (UNSTRUCTURED, 0.47),
    SPQR_32: (UNSTRUCTURED_WIDE, 0.85),
    SPQR_32_BYTES: (UNSTRUCTURED_WIDE, 0.8),
    SPQR_32_OURS: (UNSTRUCTURED_WIDE, 0.8),
}
"""SpQR of the size of another run, and the threshold to begin with."""
LOUD = {
    "opt": {SPQR_64: 1.0, SPQR_64_OURS: 1.0, SPQR_32: 1.33, SPQR_32_BYTES: 1.13, SPQR_32_OURS: 1.13},
    "smollm2": {SPQR_64: 0.67, SPQR_64_OURS: 0.67},
}
"""The same for models with loud inputs."""
STARTS = {FROM_SPQR: SPQR_64_OURS}
"""QuantEase with as many outliers as another run, and so of its size."""
COUNTED = {UNSTRUCTURED_LIKE_32: (UNSTRUCTURED_WIDE, UNSTRUCTURED), UNSTRUCTURED_LIKE_16: (SPQR, UNSTRUCTURED_WIDE)}
"""As many outliers as make the size of one run, by those of another."""
ON_BOOKS = (SPQR, FROM_SPQR_16, UNSTRUCTURED_LIKE_16)
"""Runs of 4 bits and more: the first three seeds, the books alone."""
SEEDS_ON_BOOKS = 3
PASSAGES = 1000
"""Of LAMBADA, the first ones: about as much text as the others have."""
TOLERANCE = 0.0015
"""Bits a weight, relative, by which a fitted size may differ."""


@dataclass(frozen=True)
class Texts:
    """What models are calibrated and evaluated on, and where."""

    calibration: str
    evaluation: dict[str, str]
    windows: int | None
    device: str


@lru_cache(maxsize=4)
def windows_of(model: Path, text: str, most: int | None) -> Tensor:
    tokens_T = encode(open_tokenizer(model), read_text(text))
    return cut_windows(tokens_T, most, LENGTH, None)


@lru_cache(maxsize=4)
def reference(model: Path, text: str, most: int | None, device: str) -> PreTrainedModel | Reference:
    original = load(model, device=device, dtype=torch.float32)
    return capture_reference(original, windows_of(model, text, most)) or original


def evaluate_on(texts: Texts, folder: Path, model: Path, names: Iterable[str]) -> dict[str, Any]:
    """Of a checkpoint of ``model``, in float32: by text, the books' beside the rest."""
    loaded = load(folder, device=texts.device, dtype=torch.float32)
    row: dict[str, Any] = {}
    for name in names:
        text = texts.evaluation[name]
        original = reference(model, text, texts.windows, texts.device)
        found = evaluate_windows(loaded, windows_of(model, text, texts.windows), original)
        losses = torch.tensor(found.window_losses, dtype=torch.float64)
        parts = [round(float(part.mean()), 6) for part in losses.tensor_split(min(PARTS, len(losses)))]
        facts = {"perplexity": found.perplexity, "kl": found.kl, "tokens": found.tokens, "parts": parts}
        row |= {name: facts} if name in OTHERS else facts
    return row


def all_settings(settings: tuple[str, ...]) -> tuple[str, ...]:
    """With windows as long as those evaluated: some models have learned their positions."""
    return ("calibration.samples=128", f"calibration.length={LENGTH}", *settings)


def quantized(
    model: Path, recipe: str, settings: tuple[str, ...], texts: Texts, seed: int, out: Path
) -> dict[str, Any]:
    """Quantize; stored bits per weight, share of outliers and the layers' mean relative error."""
    settings = all_settings(settings)
    report = quantize(
        model, recipe, out=out, calibration=texts.calibration, settings=settings, seed=seed, device=texts.device,
        fresh=True,
    )  # fmt: skip
    layers = report["layers"]
    return {
        "recipe": recipe,
        "settings": settings,
        "bits_per_weight": report["size"]["bits_per_weight"],
        "outlier_share": sum(layer["outliers"] or 0 for layer in layers)
        / sum(math.prod(layer["shape"]) for layer in layers),
        "relative_error": sum(layer["relative_error"] for layer in layers) / len(layers),
    }


def fit(
    model: Path, recipe: str, settings: tuple[str, ...], texts: Texts, seed: int, out: Path, target: float,
    key: str, value: float,
) -> dict[str, Any]:  # fmt: skip
    """With the threshold or share of outliers (``key``) that makes it ``target`` bits a weight."""
    bits = 9 + (8 if BYTES in settings or (key == "outliers" and WIDE not in settings) else 16)
    slope, last = 1.0, (0.0, 0.0)  # of the logarithm of the share, which falls as that of the threshold grows
    for _ in range(8):
        row = quantized(model, recipe, (*settings, f"solver.{key}={value:.6f}"), texts, seed, out) | {key: value}
        share, over = row["outlier_share"], row["bits_per_weight"] - target
        if abs(over) <= TOLERANCE * target:
            break
        if key == "outliers":
            value -= over / bits
            continue
        here = (math.log(value), math.log(max(share, 1e-6)))
        if last[0] and here[0] != last[0]:
            slope = min(max((last[1] - here[1]) / (here[0] - last[0]), 0.3), 4.0)
        last = here
        value *= math.exp(min(max((here[1] - math.log(max(share - over / bits, share / 4, 1e-6))) / slope, -1.5), 1.5))
    return row


def is_of(name: str, row: dict[str, Any]) -> bool:
    """Whether a row was made by the recipe and settings of a run; of fitted ones the last setting is left out."""
    recipe, settings = RUNS.get(name, ("", ()))
    wanted = [*all_settings(settings)]
    return bool(row["recipe"] == recipe and list(row["settings"])[: len(wanted)] == wanted)


def compare(
    model: Path, seeds: dict[str, dict[str, Any]], seed: int, texts: Texts, names: list[str], save: Callable[[], None]
) -> None:
    """Those of the runs called ``names`` that a seed should have and has not yet."""
    rows = seeds.setdefault(str(seed), {})
    if not set(OTHERS) <= rows.get(ORIGINAL, {}).keys():
        rows[ORIGINAL] = evaluate_on(texts, model, model, texts.evaluation) | {"kl": 0.0, "bits_per_weight": 16.0}
        save()
    for name in names:
        large = name in ON_BOOKS
        done = name in rows and is_of(name, rows[name]) and (large or OTHERS[0] in rows[name])
        if done or (large and seed >= SEEDS_ON_BOOKS):
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "q"
            facts = _of_its_size(name, model, seeds, rows, seed, texts, out)
            rows[name] = facts | evaluate_on(texts, out, model, list(texts.evaluation)[: 1 if large else None])
        save()


def _of_its_size(
    name: str, model: Path, seeds: dict[str, dict[str, Any]], rows: dict[str, Any], seed: int, texts: Texts, out: Path
) -> dict[str, Any]:
    recipe, settings = RUNS[name]
    if name in STARTS:
        same = f"solver.spqr_threshold={rows[STARTS[name]]['threshold']:.6f}"
        return quantized(model, recipe, (*settings, same), texts, seed, out)
    if name in FITTED:
        of, first = FITTED[name]
        known = [other[name]["threshold"] for other in seeds.values() if "threshold" in other.get(name, {})]
        first = LOUD.get(model.name, {}).get(name, first)
        target = rows[of]["bits_per_weight"]
        return fit(model, recipe, settings, texts, seed, out, target, "threshold", known[-1] if known else first)
    if name in COUNTED:
        of, by = COUNTED[name]
        target, known_row = rows[of]["bits_per_weight"], rows[by]
        share = known_row["outlier_share"] + (target - known_row["bits_per_weight"]) / (24 if WIDE in settings else 16)
        return fit(model, recipe, settings, texts, seed, out, target, "outliers", share)
    return quantized(model, recipe, settings, texts, seed, out)


def _other_texts(data: Path) -> tuple[str, str]:
    """WikiText-2's test text, and the passages of novels that LAMBADA asks about."""
    lines = (data / "tasks" / "lambada_openai.jsonl").read_text(encoding="utf-8").splitlines()[:PASSAGES]
    passages = [json.loads(line) for line in lines]
    novels = "\n\n".join(f"{passage['context']} {passage['continuation']}" for passage in passages)
    return (data / "wikitext2" / "wiki.test.joined.txt").read_text(encoding="utf-8"), novels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="nothing is computed without it")
    parser.add_argument("--families", default=",".join(FAMILIES), help="of the small models")
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER of another model, instead of them")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), help="only these; all if not given")
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
                known = {name: row for name, row in rows.items() if name == ORIGINAL or is_of(name, row)}
                result["models"].setdefault(family, {}).setdefault(seed, {}).update(known)
    result |= {"benchmark": "outliers", "machine": machine_facts(), "device": arguments.device}
    if not arguments.data and arguments.merge:  # nothing is computed here
        first = json.loads(arguments.merge[0].read_text())
        result |= {"machine": first["machine"], "device": first["device"]}
    result["windows"] = arguments.windows

    def save() -> None:
        result["means"] = {family: means(seeds) for family, seeds in result["models"].items()}
        judgement = {family: judge(seeds) for family, seeds in result["models"].items()}
        result["judgement"] = judgement | {ALL: pooled(judgement)}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    if arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            text = (arguments.data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")
            evaluation, calibration = Path(folder) / "evaluation.txt", Path(folder) / "calibration.txt"
            evaluation.write_text(text[: len(text) // 2], encoding="utf-8")
            calibration.write_text(text[len(text) // 2 :], encoding="utf-8")
            evaluated = {"books": str(evaluation)}
            for name, other in zip(OTHERS, _other_texts(arguments.data / "data"), strict=True):
                evaluated[name] = str(Path(folder) / f"{name}.txt")
                Path(evaluated[name]).write_text(other[: len(text) // 2], encoding="utf-8")
            texts = Texts(str(calibration), evaluated, arguments.windows, arguments.device)
            zoo = {family: arguments.data / "models" / "zoo" / family for family in arguments.families.split(",")}
            models = {name: Path(path) for name, _, path in (one.partition("=") for one in arguments.model)} or zoo
            for seed in arguments.seeds.split(","):
                for name, folder_of in models.items():
                    seeds = result["models"].setdefault(name, {})
                    compare(folder_of, seeds, int(seed), texts, arguments.runs, save)
    save()
    show(result)


if __name__ == "__main__":
    main()
