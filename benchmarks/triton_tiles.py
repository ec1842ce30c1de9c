"""Tiles of the Triton kernel at several sizes: what the choice in kernels/triton_gemm.py rests on.

    python benchmarks/triton_tiles.py --json benchmarks/results/triton-tiles-h100.json

Timed as `finescale bench gemm` times; every tile's result is compared with the exact product first. Rows hold
microseconds of cuBLAS bfloat16 and, per tile, [microseconds, [outputs, tokens, parts, warps, stages]], fastest first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finescale.bench.gemm import median_microseconds
from finescale.bench.gemm_products import AMPLIFIER, GROUP, Layer, Tokens, bf16, exact_output, tokens_of
from finescale.bench.machine import machine_facts
from finescale.kernels import triton_gemm
from finescale.kernels.triton_gemm import Tile, TritonWeight, choose_tile

SHAPES = ((4096, 22016), (4096, 4096))
TOKENS = (1, 16, 64, 256, 1024)


def tiles_for(count: int) -> list[Tile]:
    """Those worth a try for so many tokens."""
    if count <= 16:
        shapes = [
            *itertools.product((32, 64, 128), (16,), (1, 2, 4, 8), (4,), (5,)),
            (64, 16, 4, 4, 3),
            (64, 16, 4, 8, 5),
        ]
    elif count <= 64:
        shapes = [
            *itertools.product((64, 128), (32, 64), (1, 2, 4), (4,), (3,)),
            (128, 64, 1, 8, 3),
            (128, 64, 1, 4, 4),
        ]
    else:
        shapes = [
            *((128, wide, 1, warps, 3) for wide, warps in ((128, 8), (128, 4), (256, 8), (64, 4))),
            *((64, wide, 1, 4, stages) for wide, stages in ((64, 4), (128, 3), (128, 4), (256, 3))),
            *((128, 128, 2, 8, 3), (128, 128, 1, 8, 4), (256, 128, 1, 8, 3)),
        ]  # fmt: skip
    return [Tile(*shape) for shape in shapes]


def call(weight: TritonWeight, given: Tokens, tile: Tile) -> torch.Tensor:
    return triton_gemm.product(
        given.x_TI, given.scale_T, weight, GROUP, False, AMPLIFIER, None, None, torch.bfloat16, tile
    )


def runs(weight: TritonWeight, given: Tokens, tile: Tile) -> bool:
    """Whether a tile can run at all: it may need too much shared memory, for instance. Compiles it."""
    try:
        call(weight, given, tile)
    except Exception:  # Triton has no common base of its errors.
        return False
    return True


def time_size(layer: Layer, count: int) -> dict[str, Any]:
    """Microseconds of cuBLAS and of all tiles for one layer and number of tokens, fastest first."""
    given, base = tokens_of(layer, count), bf16(layer)
    first = triton_gemm.pack_weight(layer.codes_OI, layer.scale_OG, GROUP)
    weights = [TritonWeight(packed, first.scale_GO.clone()) for packed in layer.copies(first.packed_COH)]
    expected = exact_output(layer, layer.scale_OG, given)
    multiprocessors = torch.cuda.get_device_properties(layer.device).multi_processor_count
    chosen = choose_tile(count, layer.outputs, first.packed_COH.shape[0], multiprocessors)
    tiles = [chosen, *(tile for tile in tiles_for(count) if tile != chosen)]
    with ThreadPoolExecutor() as pool:
        possible = list(pool.map(partial(runs, first, given), tiles))
    row: dict[str, Any] = {"inputs": layer.inputs, "outputs": layer.outputs, "tokens": count, "ours": [], "wrong": []}
    row["bf16"] = median_microseconds([partial(base.call, weight, given) for weight in base.weights], 5)
    for tile in (tile for tile, can_run in zip(tiles, possible, strict=True) if can_run):
        if torch.equal(call(first, given, tile), expected):
            time = median_microseconds([partial(call, weight, given, tile) for weight in weights], 5)
            row["ours"].append([time, list(astuple(tile))])
        else:
            row["wrong"].append(list(astuple(tile)))
    row["chosen"] = row["ours"][0] if row["ours"] else None
    row["ours"].sort()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300, help="no size is begun after so many")
    options = parser.parse_args()
    device, rows, end = torch.device("cuda", 0), [], time.monotonic() + options.seconds
    torch.manual_seed(0)
    for count, (inputs, outputs) in itertools.product((1, 64, 1024, 16, 256), SHAPES):
        if time.monotonic() > end:
            break
        row = time_size(Layer(inputs, outputs, device), count)
        rows.append(row)
        best = ", ".join(f"{t:.1f} {s}" for t, s in row["ours"][:3])
        wrong = f", {len(row['wrong'])} WRONG" if row["wrong"] else ""
        print(inputs, outputs, count, f"bf16 {row['bf16']:.1f}, chosen {row['chosen']}, best {best}{wrong}", flush=True)
    result = {"benchmark": "triton_tiles", "machine": machine_facts(), "group_size": GROUP, "rows": rows}
    result["command"] = " ".join(["python benchmarks/triton_tiles.py", *sys.argv[1:]])
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
