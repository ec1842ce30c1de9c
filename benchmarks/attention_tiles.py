"""Forms of the kernel that attends one token (kernels/triton_attention.py), timed: what its usual tiles are taken from.

    python benchmarks/attention_tiles.py --json benchmarks/results/attention-tiles-h100.json

Heads of 128 channels, bfloat16, caches rotated out of the last-level cache, launches in CUDA graphs, medians. Every
result is compared with that of the first form. A row holds microseconds per form, and what reading the keys and values
takes at the memory's full speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from finescale.bench.gemm import CACHE_BYTES, median_microseconds
from finescale.bench.machine import machine_facts
from finescale.kernels.attention import rounded_like
from finescale.kernels.triton_attention import Tiles, attend

WIDTH = 128
ALONE = (
    Tiles(64, 256, 8, 2, True), Tiles(32, 256, 4, 2, True), Tiles(32, 256, 8, 2, True), Tiles(64, 128, 8, 2, True),
    Tiles(64, 256, 4, 2, False),
)  # fmt: skip
SHARED = (
    Tiles(64, 256, 4, 2, False), Tiles(64, 128, 4, 2, False), Tiles(64, 256, 4, 3, False), Tiles(128, 256, 8, 2, False),
    Tiles(64, 64, 4, 2, False),
)  # fmt: skip
SIZES = ((1, 192), (16, 192), (64, 192), (1, 4000))
"""Sequences, and keys of each."""
BYTES_A_MICROSECOND = 3.35e6


def times(batch: int, length: int, kv_heads: int, group: int, forms: tuple[Tiles, ...]) -> dict[str, Any]:
    """Microseconds of every form at one size."""
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    slots, heads = length + 32, kv_heads * group
    shape = (batch, kv_heads, slots, WIDTH)
    count = max(2, min(8, -(-CACHE_BYTES // (4 * batch * kv_heads * slots * WIDTH))))
    caches = [[torch.randn(shape, device=device, dtype=dtype) for _ in range(2)] for _ in range(count)]
    qkv_BC = torch.randn(batch, (heads + 2 * kv_heads) * WIDTH, device=device, dtype=dtype)
    angle = torch.randn(1, WIDTH // 2, device=device).repeat(1, 2)
    given = (qkv_BC, angle.cos().to(dtype), angle.sin().to(dtype), None, None, 0.0, heads, kv_heads)
    slot, rounded, want = torch.tensor(length, device=device), rounded_like(qkv_BC, heads * WIDTH), None
    row: dict[str, Any] = {
        "sequences": batch, "keys": length, "kv_heads": kv_heads, "group": group,
        "reading": 4 * batch * kv_heads * length * WIDTH / BYTES_A_MICROSECOND, "forms": [],
    }  # fmt: skip
    for tiles in forms:

        def call(cache: list[torch.Tensor], tiles: Tiles = tiles) -> torch.Tensor:
            return attend(*given, cache[0], cache[1], slot, None, WIDTH**-0.5, rounded, tiles)

        got = call(caches[0]).float()
        want = got if want is None else want
        row["forms"].append(
            {
                "tiles": list(tiles),
                "microseconds": median_microseconds([lambda c=c: call(c) for c in caches]),  # type: ignore[misc]
                "difference": float((got - want).abs().max()),
            }
        )
    return row


def best(rows: list[dict[str, Any]]) -> list[Any]:
    """The form that loses least over the sizes, in sum of times over the fastest."""
    forms = [form["tiles"] for form in rows[0]["forms"]]
    fastest = [min(form["microseconds"] for form in row["forms"]) for row in rows]

    def loss(index: int) -> float:
        return sum(row["forms"][index]["microseconds"] / least for row, least in zip(rows, fastest, strict=True))

    return list(forms[min(range(len(forms)), key=loss)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {"benchmark": "attention_tiles", "machine": machine_facts(), "best": {}, "rows": []}
    for name, kv_heads, group, forms in (("ONE_HEAD", 32, 1, ALONE), ("SOME_HEADS", 8, 4, SHARED)):
        rows = [times(batch, length, kv_heads, group, forms) for batch, length in SIZES]
        for row in rows:
            cells = "  ".join(f"{form['microseconds']:.1f} {tuple(form['tiles'])}" for form in row["forms"])
            print(f"{row['sequences']:>3} x {row['keys']:<5} group {group}  reading {row['reading']:.1f}  {cells}")
        result["best"][name] = best(rows)
        result["rows"] += rows
        print(f"{name} = Tiles{tuple(result['best'][name])}", flush=True)
    result["command"] = " ".join(["python benchmarks/attention_tiles.py", *sys.argv[1:]])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
