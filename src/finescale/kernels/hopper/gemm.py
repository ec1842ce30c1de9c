"""The W4A8 product on Hopper: which variant runs for which size, and its launch.

Shape legend: O outputs, I inputs, T tokens, S slabs of 64 outputs, B blocks of 128 inputs.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finescale.kernels.hopper.wgmma import wgmma_header
from finescale.kernels.jit import load_kernel, source_text
from finescale.kernels.launch import blocks_at_once, launch, multiprocessors_of, stream_of
from finescale.kernels.workspace import Workspaces

SHARED_BYTES = 227 * 1024
CLUSTERS = (1, 2, 4)
OUT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int32: 3}


@dataclass(frozen=True)
class Variant:
    """One compiled form of the kernel, and how its tiles are shared out.

    Attributes:
        tokens: tokens of a tile, up to 256 if folded, else up to 128.
        warpgroups: computing warpgroups of a block, each of 64 outputs.
        groups: scale groups in 128 inputs.
        folded: scales are multiplied into the weights (all of them at most 15).
        out: index of the output type (``OUT_TYPES``).
        split: tiles that would not fill a last wave are split along the inputs.
        stages: units in flight, 0 for the usual number.
        float_scales: bfloat16 scales and float32 sums, to compare with; never folded.
        experts: weights of a grouped product (kernels/hopper/grouped.py), 0 for one weight.
        cluster: blocks that share a split tile and add up its sums through their shared memory; with 1, a tile is
            split as often as it takes, and sums are added up in device memory.
        checked: each lane hands back a stage for itself, instead of one for its warp: racecheck does not follow
            __syncwarp. Up to 9 % slower.
        profiled: blocks note when they reach which point (benchmarks/gemm_phases.py).
    """

    tokens: int
    warpgroups: int
    groups: int
    folded: bool
    out: int
    split: bool = True
    stages: int = 0
    float_scales: bool = False
    experts: int = 0
    cluster: int = 1
    checked: bool = False
    profiled: bool = False

    @property
    def unit_bytes(self) -> int:
        return self.tokens * 128 + self.warpgroups * (4096 + 128 * self.groups)

    @property
    def fixed_bytes(self) -> int:
        """Shared memory beside the stages, with two chunks of finished tiles for each warpgroup."""
        table = 8 * self.experts + 32 if self.experts else 0
        chunk = 144 * min(self.tokens, 16 if self.warpgroups == 3 or self.tokens % 32 else 32)
        return self.warpgroups * (2 * chunk + self.tokens * 8 + 24) + 16 + table

    @property
    def stage_bytes(self) -> int:
        return self.unit_bytes + (32 if self.experts else 16)

    @property
    def depth(self) -> int:
        return self.stages or min(10, (SHARED_BYTES - self.fixed_bytes - 1024) // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.fixed_bytes + self.depth * self.stage_bytes + 1024

    def settings(self) -> tuple[tuple[str, int], ...]:
        """The macros that make this variant."""
        return (
            ("TOKENS", self.tokens),
            ("WARPGROUPS", self.warpgroups),
            ("GROUPS", self.groups),
            ("FOLDED", int(self.folded)),
            ("FLOAT_SCALE", int(self.float_scales)),
            ("STAGES", self.depth),
            ("OUT", self.out),
            ("GROUPED", int(self.experts > 0)),
            ("EXPERTS", self.experts),
            ("CLUSTER", self.cluster),
            ("ARRIVING", 32 if self.checked else 1),
            ("PROFILE", PROFILE if self.profiled else 0),
        )

    def headers(self) -> tuple[tuple[str, str], ...]:
        """The generated header of this variant."""
        return (("wgmma.cuh", wgmma_header(self.tokens, "u8" if self.folded else "s8")),)

    def text(self) -> str:
        """What is compiled."""
        return source_text("gemm.cu", dict(self.settings()), dict(self.headers()))


@dataclass(frozen=True)
class Schedule:
    """Who computes what.

    Attributes:
        grid: blocks on the GPU, at most one for each multiprocessor.
        token_tiles: tiles along the tokens.
        tiles: all tiles.
        whole_tiles: tiles that one block computes alone.
        splits: parts of each other tile.
    """

    grid: int
    token_tiles: int
    tiles: int
    whole_tiles: int
    splits: int


Capacity = tuple[tuple[int, int], ...]
"""Pairs of a cluster's size and the blocks that fit on the GPU at once in such clusters."""


def schedule(variant: Variant, tokens: int, outputs: int, blocks: int, at_once: int) -> Schedule:
    """How ``variant`` shares out a product of ``tokens`` by ``outputs`` over ``blocks`` times 128 inputs.

    ``at_once`` blocks fit on the GPU in clusters of the variant's size.
    """
    token_tiles = -(-tokens // variant.tokens)
    channel_tiles = -(-outputs // (64 * variant.warpgroups))
    tiles = channel_tiles * token_tiles
    left = tiles % at_once
    splits = min(blocks, at_once // left) if left and variant.split else 1
    if variant.cluster > 1:
        splits = variant.cluster if splits >= variant.cluster else 1
    whole = tiles if splits == 1 else tiles - left
    grid = max((tiles - whole) * splits, min(whole, at_once))
    return Schedule(-(-grid // variant.cluster) * variant.cluster, token_tiles, tiles, whole, splits)


class Arguments(ctypes.Structure):
    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in ("weight", "x", "x_scale", "x_sum", "bias", "channel_scale", "out", "workspace", "counters")
        ],
        *[(name, ctypes.c_int) for name in ("tokens", "channels", "blocks", "slabs")],
        *[(name, ctypes.c_int) for name in ("token_tiles", "whole_tiles", "tiles", "splits")],
        ("factor", ctypes.c_float),
        ("row_end", ctypes.c_void_p),
    ]


@functools.cache
def capacity(device: int) -> Capacity:
    """Of a CUDA device, for every size of clusters that variants have."""
    return tuple((cluster, blocks_at_once(device, cluster)) for cluster in CLUSTERS)


def _zeros(device: torch.device) -> Tensor:
    size = COUNTERS + workspace_sums(multiprocessors_of(device.index))
    return torch.zeros(size, dtype=torch.int32, device=device)


WORKSPACES = Workspaces(_zeros)
"""Zeros that the kernel leaves as zeros, large enough for any product."""


def zeros_of(device: torch.device) -> Tensor:
    """Those of the current stream."""
    return WORKSPACES.of(device, stream_of(device.index))


def workspace_sums(multiprocessors: int) -> int:
    """Most int32 sums that split tiles of any product need: at most half as many tiles as there are multiprocessors."""
    return multiprocessors // 2 * LARGEST_TILE * 64


PROFILE = 2_000_000
"""Where in the workspace a profiled variant notes times; large tiles shared in device memory may reach that far."""
COUNTERS = 8192
LARGEST_TILE = 512
"""Most tokens times warpgroups of a tile."""


SHARING = ((True, 1), (False, 1), (True, 2), (True, 4))
"""Whether tiles of a last wave are split, and the blocks of a cluster."""


def variants(tokens: int, groups: int, folded: bool, out: int) -> list[Variant]:
    """Those worth considering for so many tokens; what is left out spills registers or never won."""
    widths = [next((w for w in (8, 16, 32, 64) if tokens <= w), 128)]
    if tokens > 64:
        widths += [256] if folded and tokens > 128 else [] if folded else [64]
    return [
        Variant(width, warpgroups, groups, folded, out, split, cluster=cluster)
        for width in widths
        for warpgroups in (1, 2, 3)
        for split, cluster in SHARING
        if width < 128 or warpgroups == 2 or (width == 128 and (folded or warpgroups == 1))
        if cluster == 1 or (width >= 64 and not (width == 256 and cluster == groups == 4))
        if (width, warpgroups) != (128, 3) or cluster == 1
    ]


def predicted_microseconds(variant: Variant, tokens: int, outputs: int, blocks: int, at_once: int) -> float:
    """Time of a product on an H100, good enough to rank variants of one number of tokens.

    Fitted to timings of layer shapes by numbers of tokens (benchmarks/gemm_variants.py), tiles of fewer than 64 tokens
    apart from the others, which they never compete with. Times are microseconds, the clock 1700 of its cycles.
    """
    shares = schedule(variant, tokens, outputs, blocks, at_once)
    split_tiles = shares.tiles - shares.whole_tiles
    rounds = -(-shares.whole_tiles // shares.grid)
    units = rounds * blocks + (-(-blocks // shares.splits) if split_tiles else 0)
    weight_bytes = variant.warpgroups * (4096 + 128 * variant.groups)
    multiply = variant.tokens * variant.warpgroups * 2
    shared_sums = split_tiles * shares.splits * variant.warpgroups * variant.tokens * 256
    scaling = (1 + variant.groups) / 2
    megabytes = outputs * blocks * (64 + 2 * variant.groups) / 1e6
    # Cycles of a unit: scaling and adding sums of groups, or only unpacking, beside the tensor cores' work; what the
    # cache delivers; what memory delivers to one multiprocessor.
    if variant.tokens < 64:
        cycles = multiply * 0.2611 + 51.13 if variant.folded else multiply * 0.2576 * scaling + 365.7
        cycles = max(cycles, (variant.tokens * 128 + weight_bytes) / 17.96, weight_bytes / 15.02)
        time = 0.924 + max(units * cycles / 1700, megabytes / 3.2592) + 0.56 * rounds
        return time + (2.808 + shared_sums / 2.953e6 if split_tiles else 0.0)
    cycles = multiply * 0.89161 + 46.32 if variant.folded else multiply * 1.0909 * scaling + 291.4
    cycles = max(cycles, (variant.tokens * 128 + weight_bytes) / 47.92, weight_bytes / 14.35)
    writing = 0.7151 + 0.005122 * variant.tokens * variant.warpgroups
    time = 2.374 + max(units * cycles / 1700, megabytes / 2.6423) + writing * rounds
    if not split_tiles:
        return time
    if variant.cluster > 1:
        return time + 1.8178 + 0.00512 * variant.tokens * variant.warpgroups + writing / variant.cluster
    return time + 0.923 + shared_sums / 2.306e6 + writing


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, outputs: int, blocks: int, groups: int, folded: bool, out: int, capacity: Capacity) -> Variant:
    """The variant predicted to be fastest for a size."""
    at_once = dict(capacity)
    return min(
        variants(tokens, groups, folded, out),
        key=lambda variant: predicted_microseconds(variant, tokens, outputs, blocks, at_once[variant.cluster]),
    )


@functools.cache
def kernel_of(variant: Variant, device: int) -> int:
    """The compiled kernel; its texts are made once, for making them takes as long as a small product."""
    return load_kernel("gemm.cu", variant.settings(), variant.headers(), "w4a8_gemm", device, variant.shared_bytes)


class Plan(NamedTuple):
    """What a product of a size needs to be launched: all that does not change from call to call."""

    function: int
    shares: Schedule
    threads: int
    shared_bytes: int
    cluster: int


@functools.lru_cache(maxsize=4096)
def _plan(
    tokens: int, outputs: int, blocks: int, groups: int, folded: bool, out: int, device: int, variant: Variant | None
) -> Plan:
    fitting = capacity(device)
    variant = variant or choose(tokens, outputs, blocks, groups, folded, out, fitting)
    shares = schedule(variant, tokens, outputs, blocks, dict(fitting)[variant.cluster])
    function, threads = kernel_of(variant, device), variant.warpgroups * 128 + 128
    return Plan(function, shares, threads, variant.shared_bytes, variant.cluster)


def run(
    packed_x: Tensor,
    x_scale_T: Tensor,
    x_sum_T: Tensor,
    packed_weight: Tensor,
    tokens: int,
    outputs: int,
    amplifier: int,
    bias_O: Tensor | None,
    out_dtype: torch.dtype,
    folded: bool,
    variant: Variant | None = None,
    channel_scale_O: Tensor | None = None,
) -> Tensor:
    """Y [T, O] of packed activations and packed weights (kernels/layout.py), all on one Hopper GPU.

    ``channel_scale_O`` (float32) multiplies each output before the bias.
    """
    device = packed_x.device
    _, blocks, slab_bytes = packed_weight.shape
    groups = (slab_bytes - 4096) // 128
    out_TO = torch.empty(tokens, outputs, dtype=out_dtype, device=device)
    if tokens == 0 or outputs == 0:
        return out_TO
    plan = _plan(tokens, outputs, blocks, groups, folded, OUT_TYPES[out_dtype], device.index, variant)
    shares, workspace = plan.shares, zeros_of(device).data_ptr()
    arguments = Arguments(
        packed_weight.data_ptr(),
        packed_x.data_ptr(),
        x_scale_T.data_ptr(),
        x_sum_T.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        None if channel_scale_O is None else channel_scale_O.data_ptr(),
        out_TO.data_ptr(),
        workspace + 4 * COUNTERS,
        workspace,
        tokens,
        outputs,
        blocks,
        packed_x.shape[1],
        shares.token_tiles,
        shares.whole_tiles,
        shares.tiles,
        shares.splits,
        1.0 / amplifier,
        None,
    )
    launch(plan.function, shares.grid, plan.threads, plan.shared_bytes, arguments, device, plan.cluster)
    return out_TO
