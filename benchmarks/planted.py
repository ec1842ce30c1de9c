"""Planted outliers of known size: what each equalizing method recovers of plain W4A8's loss.

    python benchmarks/planted.py --data ../shared
    python benchmarks/planted.py --data ../shared --device cuda --rows 'QLLM*'

Some channels of every norm's output of the zoo's Llama are made ``--size`` times the rest, the function kept
(`finescale.bench.outliers`). Weights in symmetric groups of 64 by GPTQ, int8 per token. ``recovered`` is the share of
the loss in log perplexity, plain W4A8 of the planted model against that of the model as it was. ``--rows`` makes only
the methods that match a pattern (and both references); others stay as the file has them for the same sizes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from finescale.api import evaluate, quantize
from finescale.bench.machine import machine_facts
from finescale.bench.outliers import plant_outliers
from finescale.cli.common import quiet_libraries
from finescale.recipe import Recipe
from finescale.runtime.load import load


def part(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "options": options}


def corrected(**options: Any) -> dict[str, Any]:
    """QLLM with its correction of four blocks at a time, for GPTQ unless said otherwise."""
    correction = part("low_rank", iterations=160, batch_size=4, **options)
    return {"transforms": [part("qllm")], "tuning": [correction]}


METHODS: dict[str, dict[str, Any]] = {
    "SmoothQuant": {"transforms": [part("smoothquant")]},
    "FPTQ": {"transforms": [part("fptq")]},
    "FPTQ, all equalized": {"transforms": [part("fptq", equalize="all")]},
    "AWQ": {"transforms": [part("awq")]},
    "QuaRot, fused": {"transforms": [part("quarot")]},
    "OmniQuant": {"transforms": [part("omniquant", iterations=80)]},
    "QLLM, a fifth more channels": {"transforms": [part("qllm", max_expansion=0.2)]},
    "QLLM, 0.3 more channels": {"transforms": [part("qllm", max_expansion=0.3)]},
    "QLLM": {"transforms": [part("qllm")]},
    "QLLM with correction": corrected(),
    "QLLM with correction, round to nearest": corrected() | {"solver": {"name": "rtn"}},
    "QLLM with correction of nearest rounding": corrected(forward="merged"),
    "QLLM with correction, balanced loss, unseen windows": corrected(loss="balanced", unseen=True),
}


def kept(file: Path, setting: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Rows of methods that an earlier run of the same sizes left."""
    if not file.is_file():
        return {}
    entry = json.loads(file.read_text(encoding="utf-8"))["models"]["zoo-llama"]
    rows: dict[str, dict[str, float]] = entry["rows"]["W4A8"] if entry["setting"] == setting else {}
    return {name: row for name, row in rows.items() if name in METHODS}


def write(file: Path, setting: dict[str, Any], rows: dict[str, Any]) -> None:
    """The file with what is there so far."""
    entry = {"setting": setting, "rows": {"W4A8": rows}}
    result = {"benchmark": "planted", "machine": machine_facts(), "seed": 0, "models": {"zoo-llama": entry}}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--size", type=float, default=50.0)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", default="*", help="shell pattern of the methods")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/planted-zoo-llama.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    console = Console()
    length = 256
    setting = {key: getattr(arguments, key) for key in ("size", "channels", "samples", "windows")} | {"length": length}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        books = (arguments.data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")[:900_000]
        calibration, evaluation = work / "calibration.txt", work / "evaluation.txt"
        calibration.write_text(books[450_000:], encoding="utf-8")
        evaluation.write_text(books[:450_000], encoding="utf-8")
        model = arguments.data / "models" / "zoo" / "llama"
        plant_outliers(model, work / "planted", arguments.size, arguments.channels)

        def run(values: dict[str, Any], source: Path) -> dict[str, Any]:
            recipe = Recipe.from_dict({
                "weights": {"bits": 4, "group_size": 64, "symmetric": True}, "activations": {"bits": 8},
                "solver": {"name": "gptq"}, "calibration": {"samples": arguments.samples, "length": length},
            } | values)  # fmt: skip
            start, out = time.perf_counter(), work / "out"
            quantize(source, recipe, out=out, calibration=str(calibration), fresh=True, device=arguments.device)
            seconds = time.perf_counter() - start
            sizes = {"windows": arguments.windows, "length": length}
            result = evaluate(load(out, device=arguments.device), str(evaluation), tokenizer_from=source, **sizes)
            return {"perplexity": result.perplexity, "seconds": seconds}

        rows = {"not planted": run({}, model), "planted": run({}, work / "planted")}
        rows |= kept(arguments.json, setting)
        clean, plain = (math.log(rows[name]["perplexity"]) for name in ("not planted", "planted"))
        for name in fnmatch.filter(METHODS, arguments.rows):
            values = METHODS[name]
            rows[name] = run(values, work / "planted")
            rows[name]["recovered"] = (plain - math.log(rows[name]["perplexity"])) / (plain - clean)
            console.print(f"{name}: {rows[name]}")
            write(arguments.json, setting, rows)
    table = Table("method", "perplexity", "recovered", title="zoo llama, W4A8, planted outliers")
    for name, row in rows.items():
        table.add_row(name, f"{row['perplexity']:.2f}", f"{row['recovered']:.1%}" if "recovered" in row else "")
    console.print(table)
    write(arguments.json, setting, rows)
    console.print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
