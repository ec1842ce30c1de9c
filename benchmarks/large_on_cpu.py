"""Peak host memory of quantizing the first blocks of a model with 3.4 billion parameters.

    python benchmarks/large_on_cpu.py --json benchmarks/results/large-on-cpu.json

Writes a checkpoint of OpenLLaMA-3B's shape (hidden 3200, MLP 8640, 26 blocks, vocabulary 32000, float16, 6.9 GB) with
random weights, the same in all blocks, one shard per block, and quantizes its first four blocks in a process of its
own: round to nearest, and QuantEase from GPTQ with few sweeps on few tokens. The peak is the largest resident memory
that the kernel saw, mapped files included. Needs 14 GB of disk under --folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from finescale.bench.machine import machine_facts
from finescale.bench.random_checkpoint import OPEN_LLAMA_3B, write_random_llama

RUNS = {
    "rtn": ("--recipe", "rtn"),
    "quantease": ("--recipe", "quantease", "--set", "solver.sweeps=2"),
}


def measure(model: Path, out: Path, words: tuple[str, ...], blocks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "finescale.cli.main", "quantize", str(model), "--out", str(out), *words]
    command += ["--samples", "4", "--length", "256", "--set", f"blocks={blocks}"]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    run = json.loads((out / "run.json").read_text())
    return {
        "arguments": words,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": run["peak_rss_bytes"],
        "blocks": run["blocks"][:blocks],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go for the time being")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/large-on-cpu.json"))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "large_on_cpu", "seed": 0, "machine": machine_facts(), "runs": {}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result["parameters"] = write_random_llama(Path(folder) / "model", OPEN_LLAMA_3B, torch.float16)
        for name, words in RUNS.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as out:
                result["runs"][name] = measure(Path(folder) / "model", Path(out) / "q", words, arguments.blocks)
            print(f"{name}: {result['runs'][name]['peak_rss_bytes'] / 1e9:.2f} GB at most, "
                  f"{result['runs'][name]['seconds']:.0f} s", flush=True)  # fmt: skip
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
