"""What making group scales integers changes by itself: the scales, by the type they are stored in, and layers' errors.

    python benchmarks/scale_rounding.py --data ../shared --json benchmarks/results/scale-rounding-smollm2.json

Scales: of all linears of the blocks, groups of 64, symmetric, the share that changes when they become S / amplifier
with the ``auto`` amplifier, and by how much. Errors: round to nearest and GPTQ on the first blocks' statistics, with
integer scales over float ones, both stored as float32, where most scales change. Whole runs differ by more, since every
block is solved on what those before it put out. CPU, about two minutes.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from layer_errors import LayerAt, calibration_of, layers_of, smollm2_parser
from rich.console import Console

from finescale.bench.machine import machine_facts
from finescale.cli.common import quiet_libraries
from finescale.demo import find_demo_model
from finescale.formats.gguf import unpack_gguf
from finescale.grid import WeightScheme, fit_grid
from finescale.grid.fit import with_integer_scales
from finescale.pipeline.quantize import resolve_model
from finescale.recipe import Recipe
from finescale.solvers import relative_error

GROUP, SAMPLES, LENGTH, BLOCKS = 64, 16, 512, 6
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SOLVED = {
    "rtn, whole range": ("rtn", "minmax"),
    "gptq, whole range": ("gptq", "minmax"),
    "gptq, clipped": ("gptq", "mse"),
}


def changed_scales(model: Path) -> list[dict[str, Any]]:
    """Rows by bits and type: scales, the share that changes, the largest and the root mean square relative change, and
    the smallest integer."""
    source = resolve_model(str(model))
    names = [name for name in source.files if name.endswith("_proj.weight")]
    rows = []
    for bits in (4, 8):
        for label, dtype in TYPES.items():
            ratios, smallest = [], math.inf
            for name in names:
                weight_OI = source.read(name).float()
                grid = fit_grid(weight_OI, WeightScheme(bits, GROUP, True), dtype)
                whole = with_integer_scales(grid, weight_OI, "auto")
                ratios.append((whole.scale_OG / grid.scale_OG - 1).abs().flatten())
                smallest = min(smallest, int(whole.integer_scale_OG().min()))
            ratio_G = torch.cat(ratios)
            rows.append(
                {
                    "bits": bits,
                    "stored": label,
                    "scales": ratio_G.numel(),
                    "changed": float((ratio_G > 0).double().mean()),
                    "largest_change": float(ratio_G.max()),
                    "rms_change": float(ratio_G.double().square().mean().sqrt()),
                    "smallest_integer": smallest,
                }
            )
    return rows


def change_of(layer: LayerAt, solver: str, clip: Any) -> float:
    """Logarithm of the layer's relative output error with integer scales over that with float ones."""
    part = Recipe.named(solver).solver
    grid = fit_grid(layer.weight_OI, WeightScheme(4, GROUP, True, clip), torch.float32)
    errors = []
    for tried in (grid, with_integer_scales(grid, layer.weight_OI, "auto")):
        solution = part.entry().solve(layer.weight_OI, layer.hessian_II, tried, part.options())
        errors.append(relative_error(layer.weight_OI, solution.weight.dequantize(), layer.hessian_II))
    return math.log(errors[1] / errors[0])


def main() -> None:
    arguments = smollm2_parser(__doc__, "scale-rounding").parse_args()
    quiet_libraries()
    model = unpack_gguf(Path(arguments.smollm2 or find_demo_model()), arguments.work, torch.float32)
    scales = changed_scales(model)
    text = arguments.data / "data" / "wikitext2" / "wiki.valid.raw"
    data = calibration_of(str(model), str(text), SAMPLES, LENGTH)
    changes: dict[str, list[float]] = {label: [] for label in SOLVED}
    for layer in layers_of(str(model), data, blocks=BLOCKS):
        for label, (solver, clip) in SOLVED.items():
            changes[label].append(change_of(layer, solver, clip))
    errors = {
        label: {
            "layers": len(found),
            "mean_log_change": statistics.mean(found),
            "standard_error": statistics.stdev(found) / math.sqrt(len(found)),
        }
        for label, found in changes.items()
    }
    facts = {"benchmark": "scale_rounding", "model": "smollm2", "machine": machine_facts(), "group_size": GROUP}
    arguments.json.write_text(json.dumps(facts | {"scales": scales, "errors": errors}, indent=1) + "\n")
    console = Console()
    for row in scales:
        console.print(
            f"{row['bits']} bits, {row['stored']}: {row['changed']:.3%} of {row['scales']} scales change, at most by "
            f"{row['largest_change']:.3%}, rms {row['rms_change']:.4%}; smallest S {row['smallest_integer']}"
        )
    for label, found in errors.items():
        console.print(f"{label}: error {found['mean_log_change']:+.3%} ± {found['standard_error']:.3%}")


if __name__ == "__main__":
    main()
