"""The W4A8 product on a CPU beside torch's float32 and bfloat16 products, in one run.

A whole layer is timed, rounding of the tokens included, as a model pays for it too. Weights are rotated as the layers
of a model are, all products take turns in every round, medians count, and every result is checked first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finescale.bench.gemm_products import AMPLIFIER, SEED
from finescale.bench.machine import machine_facts
from finescale.errors import InputError
from finescale.grid import ActivationScheme, contiguous_groups, quantize_tokens
from finescale.kernels import integer_scale_linear
from finescale.kernels.cpu_int8 import cpu_linear, int8_product_is_exact, pack_weight

SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""Inputs and outputs of the products of a block of SmolLM2-135M: layers of one input are one product."""
TOKENS = (1, 8, 128)
NAMES = ("float32", "bf16", "integer", "folded")
_ROTATED_BYTES = 128 * 2**20
"""Copies of a float32 weight fill this much, more than the caches of a core."""
_MOST_COPIES = 320
_GROUP = 64
"""Divides the inputs of all shapes."""


def bench_gemm_cpu(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    rounds: int = 9,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Microseconds of a layer in float32, bfloat16, with integer scales and with folded ones.

    Rows hold ``inputs``, ``outputs``, ``tokens``, a time for each of ``NAMES``, its quartiles (``NAME_quartiles``), and
    whether all bits of ours are those of the exact product (``integer_equal``, ``folded_equal``).

    Raises:
        InputError: a size that is none, or a CPU without exact int8 products.
    """
    if any(min(shape) < 1 for shape in shapes) or min(tokens, default=0) < 1 or rounds < 1:
        raise InputError("inputs, outputs, tokens and rounds must be at least 1.")
    if not int8_product_is_exact():
        raise InputError("this CPU has no int8 dot products, so that layers run in parts here: nothing to compare.")
    rows = []
    for inputs, outputs in shapes:
        for count in tokens:
            row: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "tokens": count}
            with torch.inference_mode():
                row |= _time_size(inputs, outputs, count, rounds)
            rows.append(row)
            on_row(row)
    return {
        "benchmark": "gemm",
        "machine": machine_facts(),
        "base": NAMES[0],
        "names": list(NAMES[1:]),
        "group_size": _GROUP,
        "seed": SEED,
        "rounds": rounds,
        "rows": rows,
    }


def _time_size(inputs: int, outputs: int, count: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    copies = min(max(3, -(-_ROTATED_BYTES // (4 * inputs * outputs))), _MOST_COPIES)
    x_TI = torch.randn(count, inputs, generator=generator)
    dense = [torch.randn(outputs, inputs, generator=generator) for _ in range(copies)]
    calls: dict[str, list[Callable[[], Tensor]]] = {
        "float32": [partial(torch.nn.functional.linear, x_TI, weight) for weight in dense],
        "bf16": [partial(torch.nn.functional.linear, x_TI.bfloat16(), weight.bfloat16()) for weight in dense],
    }
    facts: dict[str, Any] = {}
    groups = -(-inputs // _GROUP)
    group_of_I = contiguous_groups(inputs, _GROUP)
    codes_TI, x_scale_T1 = quantize_tokens(x_TI, ActivationScheme(8))
    for name, least, most in (("integer", 100, 1024), ("folded", 1, 16)):
        calls[name] = []
        for _ in range(copies):
            codes_OI = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
            scale_OG = torch.randint(least, most, (outputs, groups), generator=generator, dtype=torch.int32)
            weight = pack_weight(codes_OI, scale_OG, group_of_I)
            calls[name].append(partial(cpu_linear, x_TI, weight, None, None, AMPLIFIER))
        exact_TO = integer_scale_linear(codes_TI, x_scale_T1, codes_OI, scale_OG, _GROUP, AMPLIFIER)
        facts[f"{name}_equal"] = torch.equal(calls[name][-1](), exact_TO)
    for name, times in _microseconds(calls, rounds).items():
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        facts |= {name: round(middle, 1), f"{name}_quartiles": [round(low, 1), round(high, 1)]}
    return facts


def _microseconds(calls: dict[str, list[Callable[[], Tensor]]], rounds: int) -> dict[str, list[float]]:
    """Time of one call in each round, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for counted in [False, *[True] * rounds]:
        for name, each in calls.items():
            start = time.perf_counter()
            for call in each:
                call()
            if counted:
                times[name].append((time.perf_counter() - start) / len(each) * 1e6)
    return times
