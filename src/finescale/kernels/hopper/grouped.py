"""The W4A8 product of rows sorted by expert on Hopper: which variant runs for which size, and its launch.

How many rows each expert has is known on the device alone; the variant is chosen for what uniform routing would give.

Shape legend: T tokens, K choices of a token, E experts, R rows sorted by expert, O outputs, S slabs of 64 outputs,
B blocks of 128 inputs.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from finescale.kernels.hopper.gemm import (
    COUNTERS,
    OUT_TYPES,
    Arguments,
    Variant,
    kernel_of,
    zeros_of,
)
from finescale.kernels.launch import launch, multiprocessors_of

WIDTHS = (8, 16, 32, 48, 64, 80, 96, 128)
FOLDED_WIDTHS = (*WIDTHS, 144, 160, 192, 256)


def variants(tokens: int, groups: int, folded: bool, out: int, experts: int) -> list[Variant]:
    """Those worth considering when no expert has more than ``tokens`` rows; none of them spills registers."""
    widths = FOLDED_WIDTHS if folded else WIDTHS
    widest = next((w for w in widths if tokens <= w), widths[-1])
    return [
        Variant(width, warpgroups, groups, folded, out, experts=experts)
        for width in widths
        if width <= widest
        for warpgroups in (1, 2, 3)
        if width < 96 or warpgroups == 2 or (folded and width <= 128)
    ]


@functools.lru_cache(maxsize=4096)
def expected_tiles(tokens: int, choices: int, experts: int, width: int) -> tuple[float, float]:
    """Experts with any rows, and tiles of ``width`` rows, on average over uniform routing.

    The rows of one expert are then binomially distributed: ``tokens`` trials of probability choices / experts.
    """
    share = min(choices / experts, 1.0)
    if share == 1.0:
        return float(experts), float(experts * -(-tokens // width))
    mean, deviation = tokens * share, math.sqrt(tokens * share * (1 - share))
    low, high = max(0, int(mean - 8 * deviation)), min(tokens, int(mean + 8 * deviation) + 1)
    log_share, log_rest = math.log(share), math.log1p(-share)
    tiles = 0.0
    for rows in range(max(low, 1), high + 1):
        ways = math.lgamma(tokens + 1) - math.lgamma(rows + 1) - math.lgamma(tokens - rows + 1)
        tiles += math.exp(ways + rows * log_share + (tokens - rows) * log_rest) * -(-rows // width)
    return experts * -math.expm1(tokens * log_rest), experts * tiles


UNIT_CYCLES = {
    False: ((180, 3.4), (300, 4.6), (400, 6.4)),
    True: ((150, 2.3), (250, 3.6), (330, 5.2)),
}
"""What 128 inputs of a tile cost when memory is no limit, by folded and warpgroups: cycles, and cycles a token."""
TILE_CYCLES = 1000
"""What the end of a tile costs."""


def predicted_microseconds(
    variant: Variant, tokens: int, choices: int, outputs: int, blocks: int, multiprocessors: int
) -> float:
    """Time of a product on an H100 under uniform routing, good enough to rank variants.

    Fitted to timings of dense products that are bound by computing (benchmarks/results/gemm-variants-h100.json) and of
    grouped ones that are bound by memory (benchmarks/results/moe-h100.json).
    """
    clock = 1700.0  # cycles a microsecond
    memory, cache, stream = 2.95e6, 20e6, 18e3  # bytes a microsecond; of one warpgroup's stages, on one multiprocessor
    active, token_tiles = expected_tiles(tokens, choices, variant.experts, variant.tokens)
    tiles = max(1, round(token_tiles * -(-outputs // (64 * variant.warpgroups))))
    left = tiles % multiprocessors
    splits = min(blocks, multiprocessors // left) if left else 1
    whole = tiles if splits == 1 else tiles - left
    units = -(-whole // multiprocessors) * blocks + (-(-blocks // splits) if splits > 1 else 0)
    weight_bytes = -(-outputs // 64) * blocks * (4096 + 128 * variant.groups)
    x_bytes = tokens * choices * blocks * 128 * -(-outputs // (64 * variant.warpgroups))
    fixed, each = UNIT_CYCLES[variant.folded][variant.warpgroups - 1]
    cycles = fixed + each * variant.tokens * (1 if variant.folded else (1 + variant.groups) / 2)
    computing = (units * cycles + units / blocks * TILE_CYCLES) / clock
    fetching = weight_bytes * active / memory + (weight_bytes * (token_tiles - active) + x_bytes) / cache
    if variant.warpgroups == 1:
        fetching = max(fetching, units * (4096 + 128 * variant.groups) / stream)
    # Adding up the sums of split tiles; with one token, two warpgroups without it are faster than three with it.
    sums = 0.9 + left * splits * variant.warpgroups * variant.tokens * 256 / 1.3e6 if splits > 1 else 0.0
    return 3.5 + sums + (computing**4.5 + fetching**4.5) ** (1 / 4.5)


@functools.lru_cache(maxsize=4096)
def ranked(
    tokens: int,
    choices: int,
    experts: int,
    outputs: int,
    blocks: int,
    groups: int,
    folded: bool,
    out: int,
    multiprocessors: int,
) -> list[Variant]:
    """Variants for ``tokens`` tokens of ``choices`` experts each, those predicted to be fastest first."""
    return sorted(
        variants(tokens, groups, folded, out, experts),
        key=lambda variant: predicted_microseconds(variant, tokens, choices, outputs, blocks, multiprocessors),
    )


def rounded(tokens: int) -> int:
    """``tokens``, up by at most an eighth: so that only few numbers are ever chosen for."""
    step = max(1, 1 << max(tokens - 1, 1).bit_length() >> 4)
    return -(-tokens // step) * step


def run(
    packed_x: Tensor,
    x_scale_R: Tensor,
    x_sum_R: Tensor,
    row_end_E: Tensor,
    packed_weight: Tensor,
    factor_EO: Tensor,
    outputs: int,
    tokens: int,
    choices: int,
    out_dtype: torch.dtype,
    folded: bool,
    variant: Variant | None = None,
) -> Tensor:
    """Y [R, O] of packed rows sorted by expert and packed weights, all on one Hopper GPU (kernels/experts.py).

    Rows that belong to no expert are left as they are.
    """
    device = packed_x.device
    experts, _, blocks, slab_bytes = packed_weight.shape
    rows = x_scale_R.shape[0]
    y_RO = torch.empty(rows, outputs, dtype=out_dtype, device=device)
    if rows == 0 or outputs == 0:
        return y_RO
    multiprocessors = multiprocessors_of(device.index)
    groups = (slab_bytes - 4096) // 128
    expected = rounded(tokens)
    out = OUT_TYPES[out_dtype]
    if variant is None:
        variant = ranked(expected, choices, experts, outputs, blocks, groups, folded, out, multiprocessors)[0]
    workspace = zeros_of(device)
    function = kernel_of(variant, device.index)
    active, token_tiles = expected_tiles(expected, choices, experts, variant.tokens)
    reused = token_tiles > 1.5 * active
    arguments = Arguments(
        packed_weight.data_ptr(),
        packed_x.data_ptr(),
        x_scale_R.data_ptr(),
        x_sum_R.data_ptr(),
        None,
        factor_EO.data_ptr(),
        y_RO.data_ptr(),
        workspace.data_ptr() + 4 * COUNTERS,
        workspace.data_ptr(),
        rows,
        outputs,
        blocks,
        packed_x.shape[1],
        1 + int(reused),
        0,
        0,
        int(variant.split),
        1.0,
        row_end_E.data_ptr(),
    )
    launch(function, multiprocessors, variant.warpgroups * 128 + 128, variant.shared_bytes, arguments, device)
    return y_RO
