"""Microseconds of attention of one token in several forms, on an H100.

    python benchmarks/attention_tiles.py --json FILE

To a cache in one piece, of 16 or 8 bits (`finescale.kernels.triton_attention`), and to one in pages of 16 tokens, in no
order (`finescale.kernels.triton_page_attention`). Each form attends to 32 caches in turn, as a model's layers do, in a
CUDA graph; together they are larger than the GPU's own cache. ``reading`` is what reading keys and values takes at
3 TB/s. Results are compared with those of the first form.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from finescale.bench.machine import machine_facts
from finescale.kernels.triton_attention import attend
from finescale.kernels.triton_page_attention import attend_pages
from finescale.kernels.triton_softmax import Tiles

TENSOR_CORES = (
    Tiles(64, 528, 4, 2),
    Tiles(64, 528, 4, 3),
    Tiles(64, 128, 4, 3),
    Tiles(64, 256, 4, 3),
    Tiles(32, 528, 4, 3),
)
PLAIN = tuple(Tiles(*form, 1, plain=True) for form in ((32, 528, 4), (16, 528, 4), (32, 256, 2), (64, 528, 8)))
PLAIN_ROUNDED = tuple(Tiles(*form, 1, plain=True) for form in ((32, 528, 4), (64, 528, 4), (32, 256, 2), (64, 256, 2)))
FORMS = {
    ("bf16", 1): (*TENSOR_CORES[:1], *PLAIN),
    ("int8", 1): (Tiles(32, 528, 2, 3), *PLAIN_ROUNDED),
    ("pages", 1): (*TENSOR_CORES[:1], *PLAIN),
    ("bf16", 4): TENSOR_CORES,
    ("pages", 4): TENSOR_CORES,
}
"""By kind of cache and heads of queries for a head of keys."""
LAYERS, KEYS, SLOTS, WIDTH, PAGE = 32, 192, 224, 128, 16


def caches(kind: str, batch: int, kv_heads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of all layers."""
    shape: tuple[int, ...] = (batch, kv_heads, SLOTS, WIDTH)
    if kind == "pages":
        shape = (batch * SLOTS // PAGE, PAGE, kv_heads, WIDTH)

    def cache() -> torch.Tensor:
        if kind == "int8":
            return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    return [(cache(), cache()) for _ in range(LAYERS)]


@torch.no_grad()
def microseconds(
    layers: list[tuple[torch.Tensor, torch.Tensor]], kind: str, batch: int, kv_heads: int, group: int, tiles: Tiles
) -> tuple[float, torch.Tensor]:
    """Of one layer, and its result."""
    torch.manual_seed(0)
    heads = kv_heads * group
    qkv_BC = torch.randn(batch, (heads + 2 * kv_heads) * WIDTH, device="cuda", dtype=torch.bfloat16)
    angle_1D = torch.rand(1, WIDTH // 2, device="cuda").repeat(1, 2)
    cos_1D, sin_1D = angle_1D.cos().bfloat16(), angle_1D.sin().bfloat16()
    slot = torch.tensor(KEYS, device="cuda")
    scale_BKS = torch.full((batch, kv_heads, SLOTS), 1 / 73, device="cuda") if kind == "int8" else None
    # For pages: half of each table, a position for each sequence, pages in no order, lengths with the token itself.
    table_1D = torch.cat((cos_1D[:, : WIDTH // 2], sin_1D[:, : WIDTH // 2]), 1).float().contiguous()
    pages_BM = torch.randperm(batch * SLOTS // PAGE, device="cuda").view(batch, -1).int()
    length_B = torch.full((batch,), KEYS + 1, device="cuda", dtype=torch.int32)
    rotary = (torch.zeros_like(length_B).long(), table_1D, pages_BM[:, KEYS // PAGE].long() * PAGE + KEYS % PAGE)
    query, key, value = qkv_BC.split([heads * WIDTH, kv_heads * WIDTH, kv_heads * WIDTH], -1)
    key, value = (x.unflatten(-1, (kv_heads, WIDTH)) for x in (key, value))

    def step() -> torch.Tensor:
        for keys, values in layers:
            if kind == "pages":
                out = torch.empty_like(query, memory_format=torch.contiguous_format)
                attend_pages(query, key, value, keys, values, pages_BM, length_B, out, WIDTH**-0.5, rotary, tiles)
            else:
                out = attend(
                    qkv_BC, cos_1D, sin_1D, None, None, 0.0, heads, kv_heads, keys, values, slot, None, WIDTH**-0.5,
                    scale_BKS, scale_BKS, True, tiles,
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
    parser.add_argument("--batches", default="1,16,64,128")
    parser.add_argument("--kinds", default=",".join(f"{kind}:{group}" for kind, group in FORMS), help="some of these")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no row is begun")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    facts: dict[str, Any] = {"benchmark": "attention_tiles", "machine": machine_facts(), "rows": []}
    facts["command"] = " ".join(["python benchmarks/attention_tiles.py", *sys.argv[1:]])
    batches = [int(n) for n in options.batches.split(",")]
    kinds = [key for key in FORMS if f"{key[0]}:{key[1]}" in options.kinds.split(",")]
    for (kind, group), batch in itertools.product(kinds, batches):
        if time.monotonic() - started > options.budget:
            break
        kv_heads = 32 // group
        values = batch * kv_heads * KEYS * WIDTH * 2
        row: dict[str, Any] = {"cache": kind, "batch": batch, "kv_heads": kv_heads, "group": group}
        row |= {"reading": values * (1 if kind == "int8" else 2) / 3e6, "forms": []}
        expected, layers = None, caches(kind, batch, kv_heads)
        for tiles in FORMS[kind, group]:
            time_us, out = microseconds(layers, kind, batch, kv_heads, group, tiles)
            expected = out if expected is None else expected
            difference = float((out.float() - expected.float()).abs().max())
            row["forms"].append({"tiles": tiles, "microseconds": time_us, "difference": difference})
        facts["rows"].append(row)
        found = "  ".join(f"{label(f['tiles'])}: {f['microseconds']:.1f} ({f['difference']:.0e})" for f in row["forms"])
        print(f"{kind:5} {batch:4} {kv_heads:3} {group}  reading {row['reading']:.1f}  {found}", flush=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
        del layers
        torch.cuda.empty_cache()


def label(tiles: Tiles) -> str:
    """Keys, programs, warps, stages."""
    return "/".join(map(str, tiles[:4])) + (" plain" if tiles.plain else "")


if __name__ == "__main__":
    main()
