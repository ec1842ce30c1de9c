"""Where a block of the W4A8 product spends its time, by the clock of its multiprocessor: what binds small products.

    python benchmarks/gemm_phases.py --json benchmarks/results/gemm-phases-h100.json

Blocks of a profiled variant note the time at seven points. Rows hold cycles between them, the median and the largest of
all blocks, the nanoseconds within which all blocks begin, from the first beginning to the last end, and microseconds of
a call (of the same kernel, in a CUDA graph). Calls follow one another on a stream and start early, as in a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finescale.bench.gemm import AMPLIFIER, GROUP, Layer, median_microseconds
from finescale.bench.machine import machine_facts
from finescale.kernels import layout
from finescale.kernels.hopper import gemm
from finescale.kernels.jit import compile_all

CASES = (
    *((4096, 4096, tokens) for tokens in (1, 64, 128, 512)),
    *((11008, 4096, tokens) for tokens in (1, 64, 128, 512)),
    *((14336, 4096, tokens) for tokens in (1, 128)),
    *((4096, 22016, tokens) for tokens in (1, 128, 1024)),
)
"""Inputs, outputs, tokens."""
POINTS = (
    "set up", "wait for the kernel before", "first weights", "all units", "sum or write", "take a sum and write it",
)  # fmt: skip
"""What lies between the points of gemm.cu."""
CALLS, ROUNDS = 6, 12
ON_AN_H100 = ((1, 132), (2, 132), (4, 120))


def chosen(inputs: int, outputs: int, tokens: int, fitting: gemm.Capacity) -> gemm.Variant:
    """The variant that runs a size with folded scales, profiled."""
    return replace(gemm.choose(tokens, outputs, inputs // GROUP, 1, True, 0, fitting), profiled=True)


def time_case(inputs: int, outputs: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """One row."""
    layer = Layer(inputs, outputs, device)
    weights = layer.copies(layout.pack_weight(layer.codes_OI, layer.small_scale_OG, GROUP))
    x_TI = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8, device=device)
    given = layout.pack_tokens(x_TI), torch.rand(tokens, device=device), x_TI.sum(1, dtype=torch.int32)
    variant = chosen(inputs, outputs, tokens, gemm.capacity(torch.cuda.current_device()))
    calls = [
        partial(gemm.run, *given, weight, tokens, outputs, AMPLIFIER, None, torch.bfloat16, True, variant)
        for weight in weights
    ]
    microseconds = median_microseconds(calls, 5)
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    found = []
    for _ in range(ROUNDS):
        for call in calls[:CALLS]:
            call()
        torch.cuda.synchronize()
        space = gemm.zeros_of(device)[gemm.COUNTERS + gemm.PROFILE :][: blocks * 32]
        marks = space.view(torch.int64).reshape(blocks, 16).cpu()
        found.append(marks[marks[:, 0] > 0])
        space.zero_()
    marks = torch.stack(found[2:]).double()
    cycles = (marks[:, :, 1:7] - marks[:, :, :6]).flatten(0, 1)
    begin, end = marks[:, :, 8], marks[:, :, 14]
    return {
        "inputs": inputs, "outputs": outputs, "tokens": tokens, "microseconds": microseconds, "blocks": len(found[0]),
        "variant": [variant.tokens, variant.warpgroups, variant.split, variant.cluster, variant.depth],
        "cycles": {
            name: [float(cycles[:, i].median()), float(cycles[:, i].max())] for i, name in enumerate(POINTS)
        },
        "begin_within_nanoseconds": float((begin.amax(1) - begin.amin(1)).median()),
        "nanoseconds": float((end.amax(1) - begin.amin(1)).median()),
    }  # fmt: skip


def text_row(row: dict[str, Any]) -> str:
    """One line."""
    cycles = ", ".join(f"{name} {median:.0f}" for name, (median, _) in row["cycles"].items())
    return (
        f"{row['inputs']:>6} x {row['outputs']:>6} x {row['tokens']:>5} {row['microseconds']:8.2f} us "
        f"{row['variant']}: {cycles} cycles; begin within {row['begin_within_nanoseconds']:.0f} ns, all in "
        f"{row['nanoseconds']:.0f} ns"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    compile_all(variant.text() for variant in {chosen(*case, ON_AN_H100) for case in CASES})
    device, rows = torch.device("cuda", torch.cuda.current_device()), []
    torch.manual_seed(0)
    for case in CASES:
        rows.append(time_case(*case, device))
        print(text_row(rows[-1]), flush=True)
    result = {"benchmark": "gemm_phases", "machine": machine_facts(), "rows": rows}
    result["command"] = " ".join(["python benchmarks/gemm_phases.py", *sys.argv[1:]])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
