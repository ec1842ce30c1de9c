"""Two processes with a GPU each: the same bytes as one process, and how much faster layers are solved.

    python benchmarks/two_gpus.py --json benchmarks/results/two-gpus.json

Layers of large models are solved by one process and by two that share the rows (the Hessian's factorization, where GPTQ
is the start, is made by both), after two sweeps of the same layer to warm up. Then a small Llama with random weights is
quantized by one process and by two, both with --deterministic, and the files are compared byte by byte. --only makes
one of the two parts and keeps the other as the JSON file has it. With --device cpu everything runs on two CPU
processes.
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

import torch
import torch.distributed as dist

from finescale.bench.gpu_solver import large_layer
from finescale.bench.machine import machine_facts
from finescale.bench.random_checkpoint import LlamaShape, write_random_llama
from finescale.grid import WeightScheme, fit_grid
from finescale.pipeline.layers import solve_rows
from finescale.ranks import ALONE, join, leave
from finescale.recipe import Recipe

PROCESSES = 2
SMALL = LlamaShape(512, 1376, 3, 8, 2000)
LAYERS = {  # outputs (layers of one input are solved together), inputs
    "Llama-2-7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "Llama-2-70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
SETTINGS = {
    "quantease, 30 sweeps": ("solver.start=weight", "solver.products=3xfp16"),
    "quantease from gptq, 30 sweeps": ("solver.start=gptq", "solver.products=3xfp16"),
}


def torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), *words]


def compare_bytes(device: str) -> dict[str, Any]:
    """One process against two, file by file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_llama(folder / "model", SMALL, torch.float16)
        words = ["quantize", str(folder / "model"), "--recipe", "quantease", "--deterministic", "--device", device]
        words += ["--samples", "32", "--length", "256"]
        if device == "cuda":
            words += ["--set", "solver.products=3xfp16"]
        starts = {"one": [sys.executable, "-m"], "two": torchrun("-m")}
        digests: dict[str, dict[str, str]] = {}
        for label, start in starts.items():
            done = subprocess.run(
                [*start, "finescale.cli.main", *words, "--out", str(folder / label)], capture_output=True, text=True
            )
            if done.returncode:
                return {"failed": done.stderr[-3000:]}
            digests[label] = {p.name: digest(p) for p in sorted((folder / label).glob("*.safetensors"))}
        return {"files": len(digests["one"]), "same_bytes": digests["one"] == digests["two"], "sha256": digests["one"]}


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def solve_shared(device: str, json_: Path, models: list[str], budget: float) -> None:
    """What each process of torchrun does."""
    ranks, target = join(torch.device(device), False)
    started, rows = time.perf_counter(), []
    for model in models:
        for outputs, inputs in LAYERS[model]:
            if ranks.largest(time.perf_counter() - started) > budget:
                break
            weight_OI, hessian_II = large_layer(outputs, inputs, str(target))
            grid = fit_grid(weight_OI, WeightScheme(3, -1, False))
            for label, settings in SETTINGS.items():
                recipe = Recipe.named("quantease").with_settings(settings)
                row: dict[str, Any] = {"model": model, "shape": [outputs, inputs], "solver": label}
                warm_up = recipe.with_settings(("solver.sweeps=2",))
                for name, used in (("one", ALONE), ("two", ranks)):
                    for run in (warm_up, recipe):
                        dist.barrier()
                        start = time.perf_counter()
                        if used is ranks or ranks.leads:
                            solve_rows(weight_OI, hessian_II, grid, run, used)
                        if target.type == "cuda":
                            torch.cuda.synchronize()
                        dist.barrier()
                        row[f"seconds_{name}"] = time.perf_counter() - start
                row["speedup"] = row["seconds_one"] / row["seconds_two"]
                rows.append(row)
                if ranks.leads:
                    print(row, flush=True)
                    json_.write_text(json.dumps(rows))  # after every row: a limit may end this process
            del weight_OI, hessian_II
    leave()


def sums(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By how much two processes are faster at all layers of a block that were timed."""
    return {
        f"{model}, {label}": sum(r["seconds_one"] for r in found) / sum(r["seconds_two"] for r in found)
        for model in LAYERS
        for label in SETTINGS
        if (found := [r for r in rows if r["model"] == model and r["solver"] == label])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=",".join(LAYERS))
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which no layer is begun")
    parser.add_argument("--limit", type=float, help="seconds after which the layers are left as they are")
    parser.add_argument("--only", choices=("speed", "bytes"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/two-gpus.json"))
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        solve_shared(arguments.device, arguments.json, arguments.models.split(","), arguments.budget)
        return
    result: dict[str, Any] = (
        json.loads(arguments.json.read_text()) if arguments.only and arguments.json.is_file() else {}
    )
    result |= {"benchmark": "two_gpus", "seed": 0, "machine": machine_facts(), "device": arguments.device}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    if arguments.only != "bytes":
        with tempfile.TemporaryDirectory() as name:
            part = Path(name) / "rows.json"
            words = ["--device", arguments.device, "--models", arguments.models, "--budget", str(arguments.budget)]
            try:
                subprocess.run(torchrun(__file__, *words, "--json", str(part)), check=False, timeout=arguments.limit)
            finally:
                result["rows"] = json.loads(part.read_text()) if part.is_file() else []
                result["models"] = sums(result["rows"])
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.only != "speed":
        result["deterministic"] = compare_bytes(arguments.device)
        print(f"deterministic: { ({**result['deterministic'], 'sha256': '...'}) }", flush=True)
    print(result.get("models"))
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
