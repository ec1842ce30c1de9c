"""A whole quantization of a model of Llama-2-7B's shape on one GPU, and a second one that is killed and resumed.

    python benchmarks/large_on_gpu.py --folder /tmp/large --json benchmarks/results/large-on-gpu.json

Writes a checkpoint with random bfloat16 weights shard by shard (13.5 GB), quantizes it with the recipe quantease on
128 x 2048 tokens in a process of its own, and records the seconds of each phase, the peak memory of GPU and host, and
what was written. Then the first --again blocks are quantized again: the process is killed (SIGKILL) when half of them
are done and started anew; the shards must be those of the first run, byte for byte. The result is written after every
part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from finescale.bench.machine import machine_facts
from finescale.bench.random_checkpoint import SHAPES, write_random_llama
from finescale.calibration.data import builtin_text
from finescale.pipeline.walk import PHASES

RECIPE = ("--recipe", "quantease", "--set", "solver.products=3xfp16")


def command(model: Path, out: Path, arguments: argparse.Namespace, *more: str) -> list[str]:
    text = model.parent / "text.txt"
    if not text.is_file():
        text.write_text(builtin_text() * 3, encoding="utf-8")
    words = ["quantize", str(model), *RECIPE, "--out", str(out), "--device", arguments.device, *more]
    words += ["--calibration", str(text), "--samples", str(arguments.samples), "--length", str(arguments.length)]
    return [sys.executable, "-m", "finescale.cli.main", *words]


def shards(out: Path) -> dict[str, str]:
    """SHA-256 of each shard."""
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        with path.open("rb") as stream:
            found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def whole_run(model: Path, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    part = ("--set", f"blocks={arguments.blocks}") if arguments.blocks else ()
    done = subprocess.run(command(model, out, arguments, *part), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"quantize failed: {done.stdout[-2000:]} {done.stderr[-3000:]}")
    run, report = (json.loads((out / name).read_text()) for name in ("run.json", "report.json"))
    errors = [layer["relative_error"] for layer in report["layers"]]
    return {
        "seconds": seconds,
        "seconds_of_run": run["seconds"],
        "phases": {phase: sum(block.get(phase, 0.0) for block in run["blocks"]) for phase in PHASES},
        "blocks": run["blocks"],
        "peak_gpu_bytes": run["peak_gpu_bytes"],
        "peak_host_bytes": run["peak_rss_bytes"],
        "machine": run["machine"],
        "versions": run["versions"],
        "layers": len(report["layers"]),
        "relative_error": sum(errors) / len(errors),
        "bits_per_weight": report["size"]["bits_per_weight"],
        "report_page_bytes": (out / "report.html").stat().st_size,
        "fallbacks": len(report["fallbacks"]),
        "output_tail": done.stdout[-1500:],
    }


def killed_run(model: Path, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill a run of some blocks when half of them are done, and run it again."""
    words = command(model, out, arguments, "--set", f"blocks={arguments.again}")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = out / ".finescale"
    try:
        while process.poll() is None and len(list(journal.glob("block-*.json"))) < arguments.again // 2:
            time.sleep(0.02)
        killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    done_before = len(list(journal.glob("block-*.json")))
    start = time.perf_counter()
    again = subprocess.run(words, capture_output=True, text=True)
    if again.returncode:
        raise SystemExit(f"the resumed run failed: {again.stdout[-2000:]} {again.stderr[-3000:]}")
    return {
        "killed": killed,
        "blocks": arguments.again,
        "blocks_done_when_killed": done_before,
        "resumed_from_block": json.loads((out / "run.json").read_text())["resumed_from_block"],
        "seconds_after_resuming": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/finescale-large"), help="is emptied; 24 GB")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--blocks", type=int, help="only the first ones, and no killed run")
    parser.add_argument("--again", type=int, default=4, help="blocks of the run that is killed, two or more")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/large-on-gpu.json"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    result: dict[str, Any] = {"benchmark": "large_on_gpu", "shape": arguments.shape, "seed": 0}
    result |= {"machine": machine_facts(), "samples": arguments.samples, "length": arguments.length}
    result["first_blocks_only"] = arguments.blocks
    result["arguments"] = list(RECIPE)

    def save() -> None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    model, first, second = (arguments.folder / name for name in ("model", "whole", "killed"))
    start = time.perf_counter()
    result["parameters"] = write_random_llama(model, SHAPES[arguments.shape], torch.bfloat16, arguments.device)
    result["seconds_of_writing_the_model"] = time.perf_counter() - start
    print(f"{result['parameters'] / 1e9:.2f} billion parameters in {time.perf_counter() - start:.0f} s", flush=True)
    result["whole"] = whole_run(model, first, arguments)
    save()
    whole = result["whole"]
    print(f"whole: {whole['seconds']:.0f} s, phases {whole['phases']}, GPU {(whole['peak_gpu_bytes'] or 0) / 1e9:.1f} "
          f"GB, host {whole['peak_host_bytes'] / 1e9:.1f} GB", flush=True)  # fmt: skip
    if arguments.blocks:
        shutil.rmtree(arguments.folder)
        return
    result["killed"] = killed_run(model, second, arguments)
    blocks = [name for name in shards(second) if 2 <= int(name[6:11]) <= arguments.again + 1]
    same = shards(first)
    result["killed"]["same_bytes"] = all(shards(second)[name] == same[name] for name in blocks)
    save()
    print(f"killed and resumed: {result['killed']}", flush=True)
    shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
