"""Microseconds of attention of one token (`finescale.kernels.triton_attention`) in several forms, on an H100.

    python benchmarks/attention_tiles.py --json FILE

Each form attends to 32 caches in turn, as the layers of a model do, in a CUDA graph; together they are larger than the
GPU's own cache. ``reading`` is what reading keys and values takes at 3 TB/s. Results are compared with those of the
form in use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from finescale.bench.machine import machine_facts
from finescale.kernels.triton_attention import TILES, Tiles, attend

FORMS = (
    TILES,
    Tiles(32, 528, 4, 2),
    Tiles(32, 1056, 4, 2),
    Tiles(64, 1056, 4, 2),
    Tiles(32, 528, 2, 3),
    Tiles(64, 528, 4, 3),
    Tiles(128, 528, 8, 2),
    Tiles(32, 2112, 2, 2),
)
LAYERS, KEYS, SLOTS, WIDTH = 32, 192, 224, 128


@torch.no_grad()
def microseconds(batch: int, kv_heads: int, group: int, rounded: bool, tiles: Tiles) -> tuple[float, torch.Tensor]:
    """Of one layer, and its result."""
    torch.manual_seed(0)
    shape = (batch, kv_heads, SLOTS, WIDTH)
    heads = kv_heads * group
    qkv_BC = torch.randn(batch, (heads + 2 * kv_heads) * WIDTH, device="cuda", dtype=torch.bfloat16)
    cos_1D, sin_1D = torch.rand(2, 1, WIDTH, device="cuda").bfloat16()
    slot = torch.tensor(KEYS, device="cuda")

    def cache() -> torch.Tensor:
        if rounded:
            return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    scale_BKS = torch.rand(shape[:3], device="cuda") / 73 if rounded else None
    layers = [(cache(), cache()) for _ in range(LAYERS)]

    def step() -> torch.Tensor:
        for keys, values in layers:
            out = attend(
                qkv_BC, cos_1D, sin_1D, None, None, 0.0, heads, kv_heads, keys, values, slot, None, WIDTH**-0.5,
                scale_BKS, scale_BKS, tiles,
            )  # fmt: skip
        return out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = step().clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (4 * LAYERS))
    return statistics.median(times), out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    facts: dict[str, Any] = {"benchmark": "attention_tiles", "machine": machine_facts(), "rows": []}
    batches = [int(n) for n in options.batches.split(",")]
    for (kv_heads, group), rounded, batch in itertools.product(((32, 1), (8, 4)), (False, True), batches):
        values = batch * kv_heads * KEYS * WIDTH * 2
        row: dict[str, Any] = {"batch": batch, "kv_heads": kv_heads, "group": group, "rounded": rounded}
        row |= {"reading": values * (1 if rounded else 2) / 3e6, "forms": []}
        expected = None
        for tiles in FORMS:
            time, out = microseconds(batch, kv_heads, group, rounded, tiles)
            expected = out if expected is None else expected
            difference = float((out.float() - expected.float()).abs().max())
            row["forms"].append({"tiles": tiles, "microseconds": time, "difference": difference})
        facts["rows"].append(row)
        found = "  ".join(f"{'/'.join(map(str, f['tiles']))}: {f['microseconds']:.1f}" for f in row["forms"])
        print(batch, kv_heads, group, "int8" if rounded else "bf16", f"reading {row['reading']:.1f}", found, flush=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
