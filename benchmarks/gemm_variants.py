"""Every variant of the Hopper kernel at every size: what the choice in kernels/hopper/gemm.py is fitted to.

    python benchmarks/gemm_variants.py --json benchmarks/results/gemm-variants-h100.json

Weights are rotated out of the cache, inputs are random, launches sit in CUDA graphs, medians count, and each variant's
result is compared with the exact product (bfloat16, bit for bit) before it is timed. Rows hold microseconds of cuBLAS
bfloat16 and, per variant, [microseconds, settings, equal to the exact product, stages].
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from finescale.bench.gemm import AMPLIFIER, GROUP, SHAPES, TOKENS, Layer, median_microseconds
from finescale.bench.machine import machine_facts
from finescale.kernels import layout
from finescale.kernels.hopper.gemm import Variant, capacity, run, variants
from finescale.kernels.jit import compile_all
from finescale.kernels.reference import grouped_int32_product

COLUMNS = "ours: [us, [tokens, warpgroups, groups, folded, out, split, cluster], exact, stages]"


def compile_variants(
    tokens: tuple[int, ...],
    outs: tuple[int, ...] = (0,),
    groups: tuple[int, ...] = (1,),
    forms: tuple[bool, ...] = (False, True),
) -> None:
    """Compile every variant for these numbers of tokens, side by side."""
    found = {
        v.text()
        for count in tokens
        for folded in forms
        for out in outs
        for group in groups
        for v in variants(count, group, folded, out)
    }
    compile_all(found)


def time_size(layer: Layer, count: int, forms: tuple[bool, ...] = (False, True)) -> dict[str, Any]:
    """Microseconds of cuBLAS and of all variants for one layer and number of tokens, fastest first."""
    x_bf16 = torch.randn(count, layer.inputs, device=layer.device, dtype=torch.bfloat16)
    dense = layer.copies(torch.randn(layer.outputs, layer.inputs, device=layer.device, dtype=torch.bfloat16))
    row: dict[str, Any] = {"K": layer.inputs, "N": layer.outputs, "M": count}
    row["bf16"] = median_microseconds([lambda w=w: x_bf16 @ w.T for w in dense])  # type: ignore[misc]
    del dense
    x_TI = torch.randint(-127, 128, (count, layer.inputs), dtype=torch.int8, device=layer.device)
    packed_x, x_sum_T = layout.pack_tokens(x_TI), x_TI.sum(1, dtype=torch.int32)
    x_scale_T = torch.rand(count, device=layer.device)
    scale_OG = layer.small_scale_OG
    sums_TO = grouped_int32_product(x_TI, layer.codes_OI, scale_OG, GROUP)
    expected_TO = (sums_TO.float() * (x_scale_T[:, None] / AMPLIFIER)).bfloat16()
    weights = layer.copies(layout.pack_weight(layer.codes_OI, scale_OG, GROUP))

    def call(weight: torch.Tensor, variant: Variant) -> torch.Tensor:
        return run(
            packed_x, x_scale_T, x_sum_T, weight, count, layer.outputs, AMPLIFIER, None, torch.bfloat16, variant.folded,
            variant,
        )  # fmt: skip

    timings = []
    for variant in (v for folded in forms for v in variants(count, 1, folded, 0)):
        equal = torch.equal(call(weights[0], variant), expected_TO)
        time = median_microseconds([lambda w=w, v=variant: call(w, v) for w in weights])  # type: ignore[misc]
        settings = [
            variant.tokens,
            variant.warpgroups,
            1,
            int(variant.folded),
            0,
            variant.split,
            variant.cluster,
        ]
        timings.append([time, settings, equal, variant.depth])
    return {**row, "ours": sorted(timings)}


def label(timing: list[Any]) -> str:
    """A variant in few letters: tokens x warpgroups, s(plit), cluster / stages."""
    tokens, warpgroups, _, _, _, split, cluster = timing[1]
    return f"{tokens}x{warpgroups}{'s' if split else ''}{cluster}/{timing[3]}{'' if timing[2] else ' WRONG'}"


def text_row(row: dict[str, Any], best: int = 3) -> str:
    """The fastest variants of each form, with speed-ups over bfloat16."""
    parts = [f"{row['K']:>6} {row['N']:>6} {row['M']:>5}  bf16 {row['bf16']:7.1f}"]
    for folded in (0, 1):
        for timing in [t for t in row["ours"] if t[1][3] == folded][:best]:
            ratio = row["bf16"] / timing[0]
            parts.append(f"{'folded' if folded else 'integer'} {timing[0]:.1f} ({ratio:.2f}) {label(timing)}")
    wrong = [timing[1] for timing in row["ours"] if not timing[2]]
    return "  ".join(parts) + (f"  NOT EXACT: {wrong}" if wrong else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", action="append", help="INPUTSxOUTPUTS, may be repeated")
    parser.add_argument("--tokens", help="numbers with commas")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no size is begun")
    parser.add_argument("--folded", action="store_true", help="only the folded form")
    options = parser.parse_args()
    forms = (True,) if options.folded else (False, True)
    shapes = tuple((int(a), int(b)) for a, _, b in (s.partition("x") for s in options.shape or ())) or SHAPES
    tokens = tuple(map(int, options.tokens.split(","))) if options.tokens else TOKENS
    start = time.monotonic()
    compile_variants(tokens, forms=forms)
    print(f"compiled in {time.monotonic() - start:.0f} s; blocks at once by cluster: {capacity(0)}", flush=True)
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine_facts(),
        "command": " ".join(["python", *sys.argv]),
        "columns": COLUMNS,
        "group_size": GROUP,
        "blocks_at_once": capacity(0),
        "rows": rows,
    }
    for inputs, outputs in shapes:
        layer = Layer(inputs, outputs, torch.device("cuda", 0))
        for count in tokens:
            if time.monotonic() - start > options.budget:
                break
            rows.append(time_size(layer, count, forms))
            print(text_row(rows[-1]), flush=True)
            lines = ",\n  ".join(json.dumps(row) for row in rows)
            text = json.dumps({**result, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n  {lines}\n ]')
            options.json.write_text(text + "\n")
        del layer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
