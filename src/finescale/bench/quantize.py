"""The fused activation quantizers beside a plain copy of as many bytes on the same GPU, in one run.

The copy is torch's, from one buffer of the GPU to another: of the bytes that the quantizer reads and writes, it reads
half and writes half. What all tokens share (gains, shifts, a gather's table) is not counted. Inputs and the copy's
buffers are rotated so that none is still in the cache, unless tokens are so few that 64 of them fit. All launches
sit in CUDA graphs, medians count, and each result is first compared with what plain torch gives.

Run it alone, without the rest of finescale's dependencies: ``python -m finescale.bench.quantize --json FILE``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finescale.bench.gemm import CACHE_BYTES, SEED, median_microseconds
from finescale.bench.machine import machine_facts
from finescale.errors import InputError, NumericsError
from finescale.grid import ActivationScheme, Gather
from finescale.grid import quantize_tokens as to_codes
from finescale.kernels.gather import GatherTable, apply, gather_table
from finescale.kernels.hopper import quantize
from finescale.kernels.layout import unpack_tokens
from finescale.kernels.plain import before_rounding

SIZES = (
    (4096, 4096),
    (4096, 11008),
    (16384, 8192),
    (16384, 576),
    (4096, 28672),
    (256, 4096),
    (64, 28672),
    (1, 4096),
    (1, 28672),
)
"""Tokens and inputs."""
EPSILON = 1e-5
KINDS = (
    "plain",
    "rms",
    "layer",
    "silu",
    "rms+residual",
    "layer+residual",
    "plain+gather",
    "rms+residual+gather",
)


def bytes_moved(kind: str, tokens: int, inputs: int) -> int:
    """Read and written, with bfloat16 inputs: two bytes an input, one a code, four more for a residual and its sum."""
    return tokens * inputs * ((4 if kind == "silu" else 2) + 1 + (4 if "residual" in kind else 0))


def gather_like_qllm(inputs: int, device: torch.device) -> GatherTable:
    """One channel of 64 is split in two and one pair of 64 merged, and all are moved a little."""
    channel_J = torch.arange(inputs, device=device)
    place_J = channel_J % 64
    index_KJ = torch.stack([torch.where((place_J == 1) | (place_J == 2), channel_J - 1, channel_J), channel_J])
    gain_KJ = torch.stack([torch.where(place_J < 3, 0.5, 1.0), torch.where(place_J == 2, 0.5, 0.0)])
    return gather_table(Gather((index_KJ + 37) % inputs, gain_KJ))


def share_of_other_codes(
    x_TI: Tensor, kind: str, residual_TI: Tensor | None, gain_I: Tensor | None, table: GatherTable | None
) -> float:
    """Part of the codes of the first tokens that differ from plain torch's: sums in another order and another
    exponential may move a value by its last place, and with it a code by one, by two if it moves the token's scale.

    Raises:
        NumericsError: a code that differs by more.
    """
    kept_TI = None if residual_TI is None else residual_TI.clone()
    y_TI = before_rounding(x_TI[:512], kind, None if kept_TI is None else kept_TI[:512].clone(), gain_I, None, EPSILON)
    expected_TJ = to_codes(y_TI if table is None else apply(table, y_TI), ActivationScheme(8))[0]
    packed = quantize.run(x_TI, kind, kept_TI, gain_I, None, EPSILON, gather=table)[0]
    first = packed[:, : -(-expected_TJ.shape[0] // 8)].contiguous()
    distance_TJ = (unpack_tokens(first, *expected_TJ.shape).int() - expected_TJ.int()).abs()
    if int(distance_TJ.max()) > 2:
        raise NumericsError(f"{kind} of {list(x_TI.shape)}: a code is wrong by {int(distance_TJ.max())}.")
    return float((distance_TJ != 0).float().mean())


def bench_quantizers(
    sizes: tuple[tuple[int, int], ...] = SIZES, on_row: Callable[[dict[str, Any]], None] = lambda row: None
) -> dict[str, Any]:
    """Microseconds and bytes a second of every quantizer at every size, beside a copy of as many bytes.

    Raises:
        InputError: no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise InputError("bench quantize needs a CUDA GPU.")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(SEED)
    rows = []
    for tokens, inputs in sizes:
        for kind in KINDS:
            # A gather keeps the token, the residual, the gathered token and its table in shared memory.
            if "gather" in kind and not quantize.gather_fits(inputs, inputs, 2, 2 if "residual" in kind else 1):
                continue
            moved = bytes_moved(kind, tokens, inputs)
            count = min(max(3, CACHE_BYTES // moved), 64)
            width = 2 * inputs if kind == "silu" else inputs
            xs = [torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for _ in range(count)]
            gain = torch.ones(inputs, device=device, dtype=torch.bfloat16) if kind[0] in "rl" else None
            residuals = [torch.zeros_like(x) if "residual" in kind else None for x in xs]
            name = kind.partition("+")[0]
            table = gather_like_qllm(inputs, device) if "gather" in kind else None
            differing = share_of_other_codes(xs[0], name, residuals[0], gain, table)
            calls = [
                functools.partial(quantize.run, x, name, residual, gain, None, EPSILON, gather=table)
                for x, residual in zip(xs, residuals, strict=True)
            ]
            time = median_microseconds(calls)
            buffers = [torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(count + 1)]
            copy = median_microseconds([functools.partial(a.copy_, b) for a, b in itertools.pairwise(buffers)])
            row = {
                "kind": kind,
                "tokens": tokens,
                "inputs": inputs,
                "microseconds": time,
                "copy_microseconds": copy,
                "terabytes_per_second": moved / time / 1e6,
                "share_of_copy": copy / time,
                "other_codes": differing,
            }
            rows.append(row)
            on_row(row)
    return {"benchmark": "quantize", "machine": machine_facts(), "seed": SEED, "rows": rows}


def text_row(row: dict[str, Any]) -> str:
    """One line."""
    return (
        f"{row['kind']:>14} {row['tokens']:>6} x {row['inputs']:>6}  {row['microseconds']:8.2f} us  "
        f"{row['terabytes_per_second']:5.2f} TB/s  {row['share_of_copy']:4.0%} of a copy"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = bench_quantizers(on_row=lambda row: print(text_row(row), flush=True))
    result["command"] = " ".join(["python -m finescale.bench.quantize", *sys.argv[1:]])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
