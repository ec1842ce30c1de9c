"""The W4A8 product beside what else multiplies on the same GPU, in one run.

Weights are rotated so that none is still in the cache, inputs are random, launches sit in CUDA graphs, medians count,
and every timed result is compared with the exact product first.

Run it alone, without the rest of finescale's dependencies: ``python -m finescale.bench.gemm --json FILE``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finescale.bench.machine import machine_facts
from finescale.errors import InputError
from finescale.kernels import layout
from finescale.kernels.hopper import gemm
from finescale.kernels.jit import compile_source, source_text
from finescale.kernels.reference import grouped_int32_product

SHAPES = ((4096, 22016), (4096, 4096), (11008, 4096), (8192, 28672), (14336, 4096))
"""Inputs and outputs of layers of Llama-2-7B, Llama-2-70B and Llama-3-8B."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 128
AMPLIFIER = 1024
CACHE_BYTES = 300 * 2**20
"""Copies of a weight together fill the last-level cache several times over."""
SEED = 0


def median_microseconds(calls: Sequence[Callable[[], Any]], repeats: int = 7) -> float:
    """Time of one call: all of them in a CUDA graph, replayed, the median over the number of calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


class Layer:
    """Random weights of one shape, in as many copies as it takes to leave the cache."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.inputs, self.outputs, self.device = inputs, outputs, device
        generator = torch.Generator(device).manual_seed(SEED)
        shape = (outputs, inputs)
        self.codes_OI = torch.randint(-8, 8, shape, dtype=torch.int8, device=device, generator=generator)
        groups = (outputs, inputs // GROUP)
        self.scale_OG = torch.randint(100, 1024, groups, dtype=torch.int32, device=device, generator=generator)
        self.small_scale_OG = torch.randint(1, 16, groups, dtype=torch.int32, device=device, generator=generator)

    def copies(self, weight: Tensor) -> list[Tensor]:
        count = max(3, -(-CACHE_BYTES // (weight.numel() * weight.element_size())))
        return [weight, *(weight.clone() for _ in range(count - 1))]


def _ours(layer: Layer, x_TI: Tensor, folded: bool, float_scales: bool = False) -> tuple[float, float]:
    """Microseconds and the largest difference to the exact product after one rounding."""
    scale_OG = layer.small_scale_OG if folded else layer.scale_OG
    tokens, outputs = x_TI.shape[0], layer.outputs
    sums_TO = grouped_int32_product(x_TI, layer.codes_OI, scale_OG, GROUP)
    x_scale_T = torch.rand(tokens, device=layer.device) + 0.5
    expected_TO = (sums_TO.float() * (x_scale_T[:, None] / AMPLIFIER)).bfloat16()
    if float_scales:
        bits_OG = scale_OG.bfloat16().view(torch.int16).to(torch.int32)
        sums_TO = grouped_int32_product(x_TI, layer.codes_OI, scale_OG.bfloat16().to(torch.int32), GROUP)
        expected_TO = (sums_TO.float() * (x_scale_T[:, None] / AMPLIFIER)).bfloat16()
        scale_OG = bits_OG
    packed = layout.pack_weight(layer.codes_OI, scale_OG, GROUP)
    packed_x = layout.pack_tokens(x_TI)
    x_sum_T = x_TI.sum(1, dtype=torch.int32)
    capacity = gemm.capacity(layer.device.index)
    variant = gemm.choose(tokens, outputs, packed.shape[1], 1, folded, 0, capacity)
    variant = replace(variant, float_scales=float_scales)

    def call(weight: Tensor) -> Tensor:
        return gemm.run(
            packed_x, x_scale_T, x_sum_T, weight, tokens, outputs, AMPLIFIER, None, torch.bfloat16, folded, variant
        )

    difference = float((call(packed).float() - expected_TO.float()).abs().max() / expected_TO.float().abs().max())
    return median_microseconds([lambda w=w: call(w) for w in layer.copies(packed)]), difference  # type: ignore[misc]


def _bf16(layer: Layer, x_TI: Tensor) -> float:
    weight_OI = torch.randn(layer.outputs, layer.inputs, device=layer.device, dtype=torch.bfloat16)
    x = torch.randn(x_TI.shape, device=layer.device, dtype=torch.bfloat16)
    return median_microseconds([lambda w=w: x @ w.T for w in layer.copies(weight_OI)])  # type: ignore[misc]


def _int8(layer: Layer, x_TI: Tensor) -> float | None:
    if x_TI.shape[0] <= 16:  # torch refuses fewer rows
        x_TI = torch.cat([x_TI, x_TI.new_zeros(32 - x_TI.shape[0], layer.inputs)])
    return median_microseconds(
        [lambda w=w: torch._int_mm(x_TI, w.T) for w in layer.copies(layer.codes_OI)]  # type: ignore[misc]
    )


def _fp8(layer: Layer, x_TI: Tensor) -> float | None:
    one = torch.ones((), device=layer.device)
    weight_OI = torch.randn(layer.outputs, layer.inputs, device=layer.device).to(torch.float8_e4m3fn)
    x = torch.randn(x_TI.shape, device=layer.device).to(torch.float8_e4m3fn)
    return median_microseconds(
        [
            lambda w=w: torch._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16)  # type: ignore[misc]
            for w in layer.copies(weight_OI)
        ]
    )


def _tinygemm(layer: Layer, x_TI: Tensor) -> float | None:
    if x_TI.shape[0] > 64:  # far behind from here on
        return None
    packed = torch.randint(0, 256, (layer.outputs, layer.inputs // 2), dtype=torch.uint8, device=layer.device)
    weight = torch._convert_weight_to_int4pack(packed, 8)
    scales = torch.rand(layer.inputs // GROUP, layer.outputs, 2, device=layer.device).bfloat16()
    x = torch.randn(x_TI.shape, device=layer.device, dtype=torch.bfloat16)
    return median_microseconds(
        [lambda w=w: torch._weight_int4pack_mm(x, w, GROUP, scales) for w in layer.copies(weight)]  # type: ignore[misc]
    )


PEERS: dict[str, Callable[[Layer, Tensor], float | None]] = {"int8": _int8, "fp8": _fp8, "tinygemm": _tinygemm}


def bench_gemm(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    peers: bool = True,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Microseconds of every product at every size, and the differences to the exact one.

    Raises:
        InputError: a size that is none, or no Hopper GPU.
    """
    if any(inputs < GROUP or inputs % GROUP or outputs < 1 for inputs, outputs in shapes) or min(tokens, default=0) < 1:
        raise InputError(f"inputs must be multiples of the group, {GROUP}; outputs and tokens at least 1.")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise InputError("bench gemm needs a Hopper GPU (compute capability 9.0).")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(SEED)
    _compile_all(shapes, tokens, device)
    rows = []
    for inputs, outputs in shapes:
        layer = Layer(inputs, outputs, device)
        for count in tokens:
            x_TI = torch.randint(-127, 128, (count, inputs), dtype=torch.int8, device=device)
            row: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "tokens": count, "bf16": _bf16(layer, x_TI)}
            row["integer"], row["integer_difference"] = _ours(layer, x_TI, False)
            row["folded"], row["folded_difference"] = _ours(layer, x_TI, True)
            row["float_scale"], row["float_scale_difference"] = _ours(layer, x_TI, False, True)
            for name, peer in PEERS.items() if peers else ():
                try:
                    row[name] = peer(layer, x_TI)
                except RuntimeError as error:
                    row[name] = None
                    row[f"{name}_error"] = str(error).splitlines()[0]
            rows.append(row)
            on_row(row)
        del layer
        torch.cuda.empty_cache()
    return {
        "machine": machine_facts(),
        "group_size": GROUP,
        "seed": SEED,
        "rows": rows,
    }


def _compile_all(shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], device: torch.device) -> None:
    """Compile every variant that will run, side by side."""
    capacity = gemm.capacity(device.index)
    chosen = {
        replace(gemm.choose(count, outputs, inputs // 128, 1, folded, 0, capacity), float_scales=floats)
        for inputs, outputs in shapes
        for count in tokens
        for folded, floats in ((False, False), (True, False), (False, True))
    }
    with ThreadPoolExecutor() as pool:
        list(
            pool.map(
                lambda v: compile_source(source_text("gemm.cu", dict(v.settings()), dict(v.headers())), "sm_90a"),
                chosen,
            )
        )


def text_row(row: dict[str, Any]) -> str:
    """One line: microseconds, and speed-ups over bfloat16."""
    parts = [f"{row['inputs']:>6} {row['outputs']:>6} {row['tokens']:>5}  bf16 {row['bf16']:>7.1f}"]
    for name in ("integer", "folded", "float_scale", *PEERS):
        if row.get(name):
            parts.append(f"{name} {row[name]:.1f} ({row['bf16'] / row[name]:.2f})")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shape", action="append", help="INPUTSxOUTPUTS, may be repeated")
    parser.add_argument("--tokens", help="numbers with commas")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    shapes = tuple((int(a), int(b)) for a, _, b in (s.partition("x") for s in options.shape or ())) or SHAPES
    tokens = tuple(map(int, options.tokens.split(","))) if options.tokens else TOKENS
    result = bench_gemm(shapes, tokens, not options.no_peers, lambda row: print(text_row(row), flush=True))
    result["command"] = " ".join(["python -m finescale.bench.gemm", *sys.argv[1:]])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
