"""Two processes with a GPU each: the same bytes as one process, and how much faster the layers of a block are solved.

    python benchmarks/two_gpus.py --json benchmarks/results/two-gpus.json

All layers of a block of a large model are solved as the pipeline solves a round, from the fit of the grids to the
records of the report: by one process, and by two that share the layers; each after two sweeps to warm up. Then a small
Llama with random weights is quantized by one process and by two, both with --deterministic, with and without outliers,
and the files are compared byte by byte. --only makes one of the two parts and keeps the other as the JSON file has it.
With --device cpu everything runs on two CPU processes, with --models small.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from finescale.bench.gpu_solver import large_layer
from finescale.bench.machine import machine_facts
from finescale.bench.random_checkpoint import LlamaShape, write_random_llama
from finescale.grid import WeightScheme
from finescale.pipeline.layers import PlannedWeight
from finescale.pipeline.plan import LayerPlan
from finescale.pipeline.rounds import Stack, dealt, solve_round
from finescale.ranks import ALONE, join, leave
from finescale.recipe import Recipe

PROCESSES = 2
SMALL = LlamaShape(512, 1376, 3, 8, 2000)
Layers = tuple[tuple[tuple[int, ...], int], ...]
LAYERS: dict[str, Layers] = {  # outputs of the layers of one input, inputs
    "Llama-2-7B": (((4096, 4096, 4096), 4096), ((4096,), 4096), ((11008, 11008), 4096), ((4096,), 11008)),
    "Llama-2-70B": (((8192, 1024, 1024), 8192), ((8192,), 8192), ((28672, 28672), 8192), ((8192,), 28672)),
    "small": (((256, 256, 256), 256), ((256,), 256), ((704, 704), 256), ((256,), 704)),
}
SETTINGS = {
    f"{products}, {label}": (f"solver.products={products}", f"solver.start={start}")
    for products in ("2xfp16", "3xfp16")
    for label, start in (("30 sweeps from gptq", "gptq"), ("30 sweeps from the weight", "weight"))
}
RECIPES = ("quantease", "quantease-outliers")
COMPILED: Layers = (((1024,), 256), ((8192,), 256))
"""Few rows and many, for which there are kernels of their own."""


def torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), *words]


def compare_bytes(device: str) -> dict[str, dict[str, Any]]:
    """One process against two, file by file, for each recipe; all runs at once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_llama(folder / "model", SMALL, torch.float16)
        running = {}
        for number, recipe in enumerate(RECIPES):
            words = ["quantize", str(folder / "model"), "--recipe", recipe, "--deterministic", "--device", device]
            words += ["--samples", "16", "--length", "256"]
            if device == "cuda":
                words += ["--set", "solver.products=2xfp16"]
            for label, start in (("one", [sys.executable, "-m"]), ("two", torchrun("-m"))):
                out = folder / f"{recipe}-{label}"
                environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(number)} if label == "one" else {})
                command = [*start, "finescale.cli.main", *words, "--out", str(out)]
                with out.with_suffix(".log").open("w") as log:
                    running[out] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        failed = {out: out.with_suffix(".log").read_text()[-3000:] for out, run in running.items() if run.wait()}
        found: dict[str, dict[str, Any]] = {}
        for recipe in RECIPES:
            one, two = (folder / f"{recipe}-{label}" for label in ("one", "two"))
            if one in failed or two in failed:
                found[recipe] = {"failed": failed.get(one, "") + failed.get(two, "")}
                continue
            digests = [{p.name: digest(p) for p in sorted(out.glob("*.safetensors"))} for out in (one, two)]
            found[recipe] = {
                "files": len(digests[0]), "same_bytes": digests[0] == digests[1], "sha256": digests[0]
            }  # fmt: skip
        return found


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def block_of(layers: Layers, device: str) -> tuple[list[list[PlannedWeight]], list[torch.Tensor]]:
    """Layers by input, and the Hessians."""
    steps, hessians = [], []
    for number, (outputs, inputs) in enumerate(layers):
        weight_OI, hessian_II = large_layer(sum(outputs), inputs, device)
        plans = [
            LayerPlan(f"{number}.{n}", f"{number}.{n}", (o, inputs), WeightScheme(4, -1, False, "mse"))
            for n, o in enumerate(outputs)
        ]
        steps.append(list(zip(plans, weight_OI.split(outputs), strict=True)))
        hessians.append(hessian_II)
    return steps, hessians


def solve_shared(device: str, json_: Path, models: list[str], products: list[str], budget: float) -> None:
    """What each process of torchrun does."""
    ranks, target = join(torch.device(device), False)
    started, rows = time.perf_counter(), []
    wanted = {label: settings for label, settings in SETTINGS.items() if label.partition(",")[0] in products}
    for settings in wanted.values() if target.type == "cuda" else ():
        steps, hessians = block_of(COMPILED, str(target))
        recipe = Recipe.named("quantease").with_settings((*settings, "solver.sweeps=2"))
        solve_round(steps, [(hessian_II, 256) for hessian_II in hessians], recipe, torch.float16, 0)
    for model in models:
        steps, hessians = block_of(LAYERS[model], str(target))
        for label, settings in wanted.items():
            if ranks.largest(time.perf_counter() - started) > budget:
                break
            recipe = Recipe.named("quantease").with_settings(settings)
            shared = dealt([Stack(n, tuple(layers)) for n, layers in enumerate(steps)], recipe, ranks)
            row: dict[str, Any] = {
                "model": model,
                "solver": label,
                "shares": [
                    {"shape": [s.rows, s.members[0][1].shape[1]], "rows": [r.stop - r.start for r in s.shares]}
                    for s in shared
                ],
            }
            for name, used in (("one", ALONE), ("two", ranks)):
                for run in (recipe.with_settings(("solver.sweeps=2",)), recipe):
                    moments = [(hessian_II.clone(), hessian_II.shape[0]) for hessian_II in hessians]
                    dist.barrier()
                    start = time.perf_counter()
                    results = []
                    if used is ranks or ranks.leads:
                        results = solve_round(steps, moments, run, torch.float16, 0, used)
                    if target.type == "cuda":
                        torch.cuda.synchronize()
                    dist.barrier()
                    row[f"seconds_{name}"] = time.perf_counter() - start
                row[f"errors_{name}"] = [result.record["relative_error"] for result in results]
                del moments, results
            row["speedup"] = row["seconds_one"] / row["seconds_two"]
            rows.append(row)
            if ranks.leads:
                shown = {key: value for key, value in row.items() if "errors" not in key}
                print(f"{time.perf_counter() - started:.0f} s:", shown, flush=True)
                json_.with_suffix(".new").write_text(json.dumps(rows))  # after every row: a limit may end this process
                json_.with_suffix(".new").replace(json_)
        del steps, hessians
    leave()


def timed(device: str, models: str, products: str, budget: float, limit: float | None) -> list[dict[str, Any]]:
    """Rows of two processes; those that are there when the limit ends these."""
    with tempfile.TemporaryDirectory() as name:
        part = Path(name) / "rows.json"
        words = ["--device", device, "--models", models, "--products", products, "--budget", str(budget)]
        words += ["--json", str(part)]
        process = subprocess.Popen(torchrun(__file__, *words))
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            print(f"ended after {limit:g} s", flush=True)
            of_run = psutil.Process(process.pid)
            for each in (*of_run.children(recursive=True), of_run):  # asked to end they would wait for each other
                each.kill()
            process.wait()
        return json.loads(part.read_text()) if part.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default="Llama-2-7B,Llama-2-70B")
    parser.add_argument("--products", default="2xfp16,3xfp16")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds after which no block is begun")
    parser.add_argument("--limit", type=float, help="seconds after which the layers are left as they are")
    parser.add_argument("--only", choices=("speed", "bytes"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/two-gpus.json"))
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        lists = arguments.models.split(","), arguments.products.split(",")
        solve_shared(arguments.device, arguments.json, *lists, arguments.budget)
        return
    result: dict[str, Any] = (
        json.loads(arguments.json.read_text()) if arguments.only and arguments.json.is_file() else {}
    )
    result |= {"benchmark": "two_gpus", "seed": 0, "machine": machine_facts(), "device": arguments.device}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    if arguments.only != "bytes":
        result["rows"] = timed(
            arguments.device, arguments.models, arguments.products, arguments.budget, arguments.limit
        )
        result["models"] = {f"{row['model']}, {row['solver']}": row["speedup"] for row in result["rows"]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.only != "speed":
        result["deterministic"] = compare_bytes(arguments.device)
        for recipe, found in result["deterministic"].items():
            print(f"deterministic, {recipe}: { ({**found, 'sha256': '...'}) }", flush=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(result.get("models"))


if __name__ == "__main__":
    main()
