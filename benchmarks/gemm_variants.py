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
from pathlib import Path
from typing import Any

import torch

from finescale.bench.gemm import AMPLIFIER, GROUP, SHAPES, TOKENS, Layer, median_microseconds
from finescale.bench.machine import machine_facts
from finescale.kernels import layout
from finescale.kernels.hopper.gemm import Variant, run, variants
from finescale.kernels.reference import grouped_int32_product


def time_size(layer: Layer, count: int) -> dict[str, Any]:
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
    for variant in (v for folded in (False, True) for v in variants(count, 1, folded, 0)):
        equal = torch.equal(call(weights[0], variant), expected_TO)
        time = median_microseconds([lambda w=w, v=variant: call(w, v) for w in weights])  # type: ignore[misc]
        settings = [variant.tokens, variant.warpgroups, 1, int(variant.folded), 0, variant.split]
        timings.append([time, settings, equal, variant.depth])
    return {**row, "ours": sorted(timings)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for inputs, outputs in SHAPES:
        layer = Layer(inputs, outputs, torch.device("cuda", 0))
        for count in TOKENS:
            row = time_size(layer, count)
            rows.append(row)
            best = {folded: min((t for t in row["ours"] if t[1][3] == folded), default=None) for folded in (0, 1)}
            print(
                inputs, outputs, count, f"bf16 {row['bf16']:.1f}", *(f"{b[0]:.1f} {b[1]}" for b in best.values() if b)
            )
    command = " ".join(["python", *sys.argv])
    options.json.write_text(json.dumps({"machine": machine_facts(), "command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
