"""The W4A8 product beside what else multiplies on the same GPU, in one run.

Weights are rotated so that none is still in the cache, inputs are random, launches sit in CUDA graphs, medians count,
and every timed result is compared with the exact product first.

Run it alone, without the rest of finescale's dependencies: ``python -m finescale.bench.gemm --json FILE``.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from finescale.bench.gemm_products import (
    AMPLIFIER,
    CACHE_BYTES,
    GROUP,
    OURS,
    PEERS,
    SEED,
    Layer,
    Product,
    Tokens,
    bf16,
    hopper_variant,
    tokens_of,
)
from finescale.bench.machine import machine_facts
from finescale.bench.plot import speedup_figure
from finescale.errors import InputError
from finescale.kernels.dispatch import has_hopper_kernels
from finescale.kernels.jit import compile_all

__all__ = [
    "AMPLIFIER",
    "CACHE_BYTES",
    "GROUP",
    "SEED",
    "SHAPES",
    "TOKENS",
    "Layer",
    "bench_gemm",
    "median_microseconds",
]

SHAPES = ((4096, 22016), (4096, 4096), (11008, 4096), (8192, 28672), (14336, 4096))
"""Inputs and outputs of layers of Llama-2-7B, Llama-2-70B and Llama-3-8B."""
_REFUSALS = (RuntimeError, AssertionError, TypeError, ValueError, AttributeError, ImportError)
"""What torch and other packages raise for what they cannot do."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


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


def bench_gemm(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    names: Collection[str] = (*OURS, *PEERS),
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    repeats: int = 7,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Microseconds of bfloat16 and the products of these names, and the differences to what they should give.

    A product that is wrong, or that the GPU or torch refuses, has the reason (``NAME_error``) instead of a time. After
    ``seconds`` no row is begun.

    Raises:
        InputError: a size that is none, or no GPU.
    """
    if any(inputs < GROUP or inputs % GROUP or outputs < 1 for inputs, outputs in shapes) or min(tokens, default=0) < 1:
        raise InputError(f"inputs must be multiples of the group, {GROUP}; outputs and tokens at least 1.")
    if not torch.cuda.is_available():
        raise InputError("bench gemm of these shapes needs a CUDA device; without one, give --device cpu.")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(SEED)
    if has_hopper_kernels(device):
        _compile_all(shapes, tokens, device)
    rows, left_out, end = [], {}, time.monotonic() + seconds
    for inputs, outputs in shapes:
        layer = Layer(inputs, outputs, device)
        makers = {"bf16": bf16, **{name: make for name, make in {**OURS, **PEERS}.items() if name in names}}
        products = {}
        for name, make in makers.items():
            try:
                product = make(layer)
            except _REFUSALS as error:
                left_out[name] = _reason(error)
                continue
            if product is not None:
                products[name] = product
        for count in tokens:
            if time.monotonic() > end:
                break
            row: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "tokens": count}
            given = tokens_of(layer, count)
            for name, product in products.items():
                if count <= product.most_tokens:
                    row |= time_product(name, product, given, repeats)
            rows.append(row)
            on_row(row)
        del layer, products
        torch.cuda.empty_cache()
    return {
        "benchmark": "gemm",
        "machine": machine_facts(),
        "base": "bf16",
        "names": [name for name in names if any(name in row for row in rows)],
        "group_size": GROUP,
        "seed": SEED,
        "left_out": left_out,
        "rows": rows,
    }


def time_product(name: str, product: Product, tokens: Tokens, repeats: int) -> dict[str, Any]:
    """Its microseconds, if its result is right."""
    try:
        difference = product.difference(tokens)
        if not difference <= product.tolerance:
            return {f"{name}_difference": difference, f"{name}_error": f"wrong by {difference:.2g}"}
        calls = [functools.partial(product.call, weight, tokens) for weight in product.weights]
        return {name: median_microseconds(calls, repeats), f"{name}_difference": difference}
    except _REFUSALS as error:
        return {f"{name}_error": _reason(error)}


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _compile_all(shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], device: torch.device) -> None:
    """Compile every variant of the Hopper kernel that will run, side by side."""
    chosen = {
        hopper_variant(inputs, outputs, device, count, folded, floats)
        for inputs, outputs in shapes
        for count in tokens
        for folded, floats in ((False, False), (True, False), (False, True))
    }
    compile_all(variant.text() for variant in chosen)


def text_row(row: dict[str, Any]) -> str:
    """One line: microseconds, and speed-ups over bfloat16."""
    base = row.get("bf16", float("nan"))
    parts = [f"{row['inputs']:>6} {row['outputs']:>6} {row['tokens']:>5}  bf16 {base:>7.1f}"]
    for name in (*OURS, *PEERS):
        if name in row:
            parts.append(f"{name} {row[name]:.1f} ({base / row[name]:.2f})")
        elif f"{name}_error" in row:
            parts.append(f"{name}: {row[f'{name}_error'][:60]}")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shape", action="append", help="INPUTSxOUTPUTS, may be repeated")
    parser.add_argument("--tokens", help="numbers with commas")
    parser.add_argument("--plot", type=Path, help="SVG file")
    parser.add_argument("--only", help=f"names with commas, of {', '.join((*OURS, *PEERS))}")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after so many, no row is begun")
    options = parser.parse_args()
    shapes = tuple((int(a), int(b)) for a, _, b in (s.partition("x") for s in options.shape or ())) or SHAPES
    tokens = tuple(map(int, options.tokens.split(","))) if options.tokens else TOKENS
    names = options.only.split(",") if options.only else (*OURS, *PEERS)
    names = options.only.split(",") if options.only else (*OURS, *PEERS)
    result = bench_gemm(
        shapes,
        tokens,
        names,
        lambda row: print(text_row(row), flush=True),
        options.repeats,
        options.seconds,
    )
    result["command"] = " ".join(["python -m finescale.bench.gemm", *sys.argv[1:]])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        options.plot.write_text(speedup_figure(result["rows"], "bf16", names))


if __name__ == "__main__":
    main()
