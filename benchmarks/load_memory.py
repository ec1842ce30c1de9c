"""Memory of a GPU while a W4A8 checkpoint of a named shape is loaded, and afterwards.

    python benchmarks/load_memory.py --shape llama-2-13b --json benchmarks/results/load-memory-h100.json

Writes a checkpoint of random weights (the same in every block), loads it by `finescale.load` on the fused kernels, and
generates some tokens. Needs a Hopper GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from serving_models import SHAPES, write_model

import finescale
from finescale.bench.machine import machine_facts
from finescale.bench.random_model import weight_bytes
from finescale.runtime.fused import FusedDecoder


def measured(folder: Path) -> dict[str, Any]:
    """Loads the checkpoint of a folder onto the GPU; gigabytes and seconds."""
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    model = finescale.load(folder, dtype=torch.bfloat16, device="cuda", path="kernel")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    assert any(isinstance(module, FusedDecoder) for module in model.modules())
    ids = torch.arange(3, 19, device="cuda")[None]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return {
        "weights_gb": weight_bytes(model) / 1e9,
        "allocated_gb": kept / 1e9,
        "peak_gb": peak / 1e9,
        "peak_over_weights": peak / weight_bytes(model),
        "seconds": seconds,
        "host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "checkpoint_gb": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9,
        "generated": tokens[0, ids.shape[1] :].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--form", default="integer", choices=("integer", "folded"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    facts: dict[str, Any] = {
        "benchmark": "load_memory",
        "machine": machine_facts(),
        "command": " ".join(["python benchmarks/load_memory.py", *sys.argv[1:]]),
        "rows": [],
    }
    for shape in options.shape or ["llama-2-13b"]:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            write_model(Path(folder), shape, options.form, "bfloat16")
            torch.cuda.empty_cache()
            row = {"model": shape, "form": options.form} | measured(Path(folder))
        facts["rows"].append(row)
        print(json.dumps(row), flush=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
