"""Ways to share out tokens in the rounding kernels: what the choice in kernels/hopper/quantize.py rests on.

    python benchmarks/quantize_variants.py --json benchmarks/results/quantize-variants-h100.json

Timed as `finescale bench quantize` times, beside a copy of as many bytes. Rows hold the copy's microseconds and, for
each way, [microseconds, [threads, pieces, blocks, stages, kept], whether it is the chosen one], fastest first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from finescale.bench.gemm import CACHE_BYTES, SEED, median_microseconds
from finescale.bench.machine import machine_facts
from finescale.bench.quantize import EPSILON, KINDS, bytes_moved, gather_like_qllm
from finescale.bench.quantize import SIZES as BENCHED
from finescale.kernels.hopper import quantize
from finescale.kernels.hopper.quantize import LARGEST_BYTES, RESERVED_BYTES, SHARED_BYTES, Block, Facts, block_shape
from finescale.kernels.jit import compile_source, source_text

SIZES = ((4096, 4096), (16384, 576), (4096, 28672), (4096, 11008), (16384, 8192), (16, 4096), (64, 28672), (256, 4096))
MULTIPROCESSORS = 132


def facts_of(kind: str, inputs: int) -> Facts:
    """What a kind of `finescale bench quantize` computes."""
    gathered = inputs if "gather" in kind else None
    return Facts(kind.partition("+")[0], "residual" in kind, torch.bfloat16, inputs, gathered)


def ways(facts: Facts, tokens: int) -> list[Block]:
    """The chosen one first, then others that fit."""
    others = few_tokens(facts) if tokens <= 2 * MULTIPROCESSORS else many_tokens(facts)
    return list(dict.fromkeys([block_shape(facts, tokens, MULTIPROCESSORS), *others]))


def few_tokens(facts: Facts) -> Iterator[Block]:
    """Where threads load tokens themselves."""
    shared_bytes = 0 if facts.gathered is None else facts.slot_bytes + facts.table_bytes
    for threads in (128, 256, 512, 1024):
        pieces = -(-facts.pieces // threads)
        if pieces <= 8 and threads <= facts.pieces:
            for kept in (2, 0) if facts.kind == "layer" else (2,):
                yield Block(threads, pieces, 1, 0, kept, shared_bytes)


def many_tokens(facts: Facts) -> Iterator[Block]:
    """Where bulk copies bring them."""
    narrow = facts.inputs < 1024
    for wanted, at_once, most in product(
        (3, 2) if narrow else (4, 2, 6, 8), (896, 768, 640, 1024), (1, 2) if narrow else (1, 4)
    ):
        threads = max(32, min(1024, -(-facts.pieces // (wanted * 32)) * 32))
        pieces = -(-facts.pieces // threads)
        wide_pieces = {6: 8192, 8: 11008}.get(wanted, 0)
        if pieces > wanted or facts.inputs < wide_pieces or (at_once in (640, 1024) and wanted not in (3, 4)):
            continue
        for kept in (1, 2, 0) if facts.kind == "layer" else (1, 2) if facts.parameter_bytes else (2,):
            fixed = facts.table_bytes + (facts.parameter_bytes if kept == 1 else 0)
            if facts.slot_bytes + fixed > LARGEST_BYTES or (kept == 2 and pieces > 2 and facts.kind == "layer"):
                continue
            fitting = SHARED_BYTES // (facts.slot_bytes + fixed + RESERVED_BYTES)
            blocks = max(1, min(32, at_once // threads, fitting))
            stages = max(1, min(most, (SHARED_BYTES // blocks - fixed - RESERVED_BYTES) // facts.slot_bytes))
            yield Block(threads, pieces, blocks, stages, kept, stages * facts.slot_bytes + fixed)


def compile_one(task: tuple[Facts, Block]) -> None:
    settings = dict(quantize.settings_of(*task))
    compile_source(source_text("quantize.cu", settings, {}), "sm_90a")


def compile_all(tasks: set[tuple[Facts, Block]]) -> None:
    """Side by side, in processes that know nothing of the GPU."""
    with multiprocessing.get_context("fork").Pool() as pool:
        pool.map(compile_one, sorted(tasks, key=str), chunksize=1)


def time_size(kind: str, tokens: int, inputs: int) -> dict[str, Any]:
    """Microseconds of a copy and of all ways for one size."""
    facts, device = facts_of(kind, inputs), torch.device("cuda", torch.cuda.current_device())
    moved = bytes_moved(kind, tokens, inputs)
    count = min(max(3, CACHE_BYTES // moved), 16)
    width = 2 * inputs if kind == "silu" else inputs
    xs = [torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for _ in range(count)]
    gain = torch.ones(inputs, device=device, dtype=torch.bfloat16) if facts.kind in ("rms", "layer") else None
    residuals = [torch.zeros_like(x) if facts.add else None for x in xs]
    table = None if facts.gathered is None else gather_like_qllm(inputs, device)
    buffers = [torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(count + 1)]
    copy = median_microseconds([partial(a.copy_, b) for a, b in pairwise(buffers)], 5)
    chosen, *others = ways(facts, tokens)
    ours: list[list[Any]] = []
    for block in (chosen, *others):
        calls = [
            partial(quantize.run, x, facts.kind, residual, gain, None, EPSILON, gather=table, block=block)
            for x, residual in zip(xs, residuals, strict=True)
        ]
        ours.append([median_microseconds(calls, 5), list(astuple(block)[:5]), block == chosen])
    return {"kind": kind, "tokens": tokens, "inputs": inputs, "copy": copy, "ours": sorted(ours)}


def text_row(row: dict[str, Any]) -> str:
    """The fastest, and the chosen one."""
    shown = [*row["ours"][:4], *(each for each in row["ours"] if each[2])]
    cells = "; ".join(f"{row['copy'] / us:.0%} {way}{' chosen' if chosen else ''}" for us, way, chosen in shown)
    return f"{row['kind']:>20} {row['tokens']:>6} x {row['inputs']:>6}  copy {row['copy']:7.2f} us: {cells}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", choices=("chosen", "all"), help="only compile, those that are chosen or all")
    parser.add_argument("--seconds", type=float, default=600, help="no size is begun after so many")
    options = parser.parse_args()
    fitting = [
        (kind, tokens, inputs)
        for tokens, inputs in SIZES
        for kind in sorted(KINDS, key=lambda kind: ("gather" not in kind, "layer" not in kind))
        if "gather" not in kind or quantize.gather_fits(inputs, inputs, 2, 2 if "residual" in kind else 1)
    ]
    tasks = {(facts_of(k, i), ways(facts_of(k, i), t)[0]) for t, i in BENCHED for k in KINDS}
    if options.compile != "chosen":
        tasks |= {(facts_of(k, i), way) for k, t, i in fitting for way in ways(facts_of(k, i), t)}
    start = time.monotonic()
    compile_all(tasks)
    print(f"{len(tasks)} kernels compiled in {time.monotonic() - start:.0f} s", flush=True)
    if options.compile:
        return
    torch.manual_seed(SEED)
    rows, end = [], time.monotonic() + options.seconds
    for size in fitting:
        if time.monotonic() > end:
            break
        rows.append(time_size(*size))
        print(text_row(rows[-1]), flush=True)
    result = {"benchmark": "quantize_variants", "machine": machine_facts(), "seed": SEED, "rows": rows}
    result["command"] = " ".join(["python benchmarks/quantize_variants.py", *sys.argv[1:]])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
