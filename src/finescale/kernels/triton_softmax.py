"""Softmax over keys, tile by tile, and over the parts of several programs: what the attention kernels share.

Shape legend: R rows of a tile (heads), N keys of a tile, D channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finescale.kernels.launch import stream_of
from finescale.kernels.workspace import Workspaces


class Tiles(NamedTuple):
    """How attention of one token is shared out.

    Attributes:
        keys: of a tile.
        programs: wanted of one launch; keys of a sequence and head are shared out until there are so many.
        warps, stages: of a program.
        plain: products without tensor cores, for a head of keys that serves one head of queries: keys and values go
            from memory to registers, those of the next tile while this one is worked on.
    """

    keys: int
    programs: int
    warps: int
    stages: int
    plain: bool = False


def splits_of(pairs: int, capacity: int, tiles: Tiles) -> int:
    """Programs that share a sequence and head, of which there are ``pairs``; one where these have warps enough."""
    if pairs * tiles.warps >= 3 * tiles.programs:
        return 1
    return max(1, min(triton.cdiv(tiles.programs, pairs), triton.cdiv(capacity, tiles.keys), 64))


def rows_of_tile(group: int, plain: bool) -> int:
    """Heads of a tile; the tensor cores want sixteen."""
    return 1 if plain else max(16, triton.next_power_of_2(group))


# Triton reads the signatures below: annotations other than its own are errors there.


@triton.jit
def tile_offsets(  # type: ignore[no-untyped-def]
    key_N, inside_N, pages, slots, page_stride, slot_stride, paged: tl.constexpr
):  # fmt: skip
    """Where keys lie behind the first of their head; ``pages`` are those of the sequence."""
    if paged:
        page_N = tl.load(pages + key_N // slots, mask=inside_N, other=0).to(tl.int64)
        return page_N * page_stride + (key_N % slots) * slot_stride
    else:
        return key_N.to(tl.int64) * slot_stride


@triton.jit
def load_tile(rows, offset_N, inside_N, d_D):  # type: ignore[no-untyped-def]
    return tl.load(rows + offset_N[:, None] + d_D[None, :], mask=inside_N[:, None], other=0.0)


@triton.jit
def bring_near(rows, offset_N, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Has rows fetched into the GPU's cache, whole lines of 128 bytes, without waiting for them."""
    lines: tl.constexpr = (width * rows.dtype.element_ty.primitive_bitwidth + 1023) // 1024
    step: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    place_NL = rows + offset_N[:, None] + (tl.arange(0, lines) * step)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place_NL.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def attend_tile(  # type: ignore[no-untyped-def]
    q_RD, keys, values, offset_N, inside_N, counted_N, k_scale_N, v_scale_N, scaling, largest_R, sum_R, acc_RD,
    width: tl.constexpr, rounded: tl.constexpr,
):  # fmt: skip
    """A tile of keys added to largest scores, sums of weights and weighted values, on the tensor cores."""
    d_D = tl.arange(0, width)
    kind = q_RD.dtype
    k_DN = tl.load(keys + offset_N[None, :] + d_D[:, None], mask=inside_N[None, :], other=0.0)
    score_RN = tl.dot(q_RD, k_DN.to(kind), input_precision="ieee") * scaling
    if rounded:
        score_RN *= k_scale_N[None, :]
    score_RN = tl.where(counted_N[None, :], score_RN, float("-inf"))
    higher_R = tl.maximum(largest_R, tl.max(score_RN, 1))
    # Until some key counts, the largest score is -inf, and -inf less -inf would be NaN.
    base_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
    weight_RN = tl.exp(score_RN - base_R[:, None])
    shrink_R = tl.exp(largest_R - base_R)
    sum_R = sum_R * shrink_R + tl.sum(weight_RN, 1)
    v_ND = tl.load(values + offset_N[:, None] + d_D[None, :], mask=inside_N[:, None], other=0.0)
    acc_RD = acc_RD * shrink_R[:, None]
    if rounded:
        weight_RN *= v_scale_N[None, :]
    acc_RD += tl.dot(weight_RN.to(kind), v_ND.to(kind), input_precision="ieee")
    return higher_R, sum_R, acc_RD


@triton.jit
def _wide(x, rounded: tl.constexpr):  # type: ignore[no-untyped-def]
    """In float32; int8 without the conversion, which runs at a quarter of the speed of what replaces it."""
    if rounded:
        bits = x.to(tl.int32) + 0x4B400000  # 1.5 * 2^23, and the number in its last places
        return bits.to(tl.float32, bitcast=True) - 12582912.0
    else:
        return x.to(tl.float32)


@triton.jit
def attend_plainly(  # type: ignore[no-untyped-def]
    q_1D, k_ND, v_ND, keys, values, key_scale, value_scale, valid, pages, slots, page_stride, slot_stride,
    start, end, scaling,
    width: tl.constexpr, block: tl.constexpr, masked: tl.constexpr, rounded: tl.constexpr, paged: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights and weighted values of one query over keys from ``start`` to ``end``; ``k_ND`` and
    ``v_ND`` hold the first tile. Each row of the tile keeps sums of its own until the end."""
    n_N, d_D = tl.arange(0, block), tl.arange(0, width)
    largest_N = tl.full((block,), float("-inf"), dtype=tl.float32)
    sum_N = tl.zeros((block,), dtype=tl.float32)
    acc_ND = tl.zeros((block, width), dtype=tl.float32)
    for first in range(start, end, block):
        key_N = first + n_N
        inside_N = key_N < end
        next_N = key_N + block
        offset_N = tile_offsets(next_N, next_N < end, pages, slots, page_stride, slot_stride, paged)
        next_k_ND = load_tile(keys, offset_N, next_N < end, d_D)
        next_v_ND = load_tile(values, offset_N, next_N < end, d_D)
        score_N = tl.sum(q_1D.to(tl.float32) * _wide(k_ND, rounded), 1) * scaling
        if rounded:
            score_N *= tl.load(key_scale + key_N, mask=inside_N, other=0.0)
        if masked:
            inside_N = inside_N & (tl.load(valid + key_N, mask=inside_N, other=0) != 0)
        score_N = tl.where(inside_N, score_N, float("-inf"))
        higher_N = tl.maximum(largest_N, score_N)
        # Until some key counts, the largest score is -inf, and -inf less -inf would be NaN.
        base_N = tl.where(higher_N == float("-inf"), 0.0, higher_N)
        weight_N, shrink_N = tl.exp(score_N - base_N), tl.exp(largest_N - base_N)
        sum_N = sum_N * shrink_N + weight_N
        if rounded:
            weight_N *= tl.load(value_scale + key_N, mask=key_N < end, other=0.0)
        acc_ND = acc_ND * shrink_N[:, None] + weight_N[:, None] * _wide(v_ND, rounded)
        largest_N = higher_N
        k_ND, v_ND = next_k_ND, next_v_ND
    largest = tl.max(largest_N, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    share_N = tl.exp(largest_N - base)
    one_1 = tl.zeros((1,), dtype=tl.float32)
    acc_1D = tl.sum(acc_ND * share_N[:, None], 0)[None, :]
    return one_1 + largest, one_1 + tl.sum(sum_N * share_N, 0), acc_1D


@triton.jit
def merged(largest_R, sum_R, acc_RD, other_largest_R, other_sum_R, other_RD):  # type: ignore[no-untyped-def]
    """Attention to two sets of keys together."""
    higher_R = tl.maximum(largest_R, other_largest_R)
    base_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
    mine_R, theirs_R = tl.exp(largest_R - base_R), tl.exp(other_largest_R - base_R)
    return (
        higher_R,
        sum_R * mine_R + other_sum_R * theirs_R,
        acc_RD * mine_R[:, None] + other_RD * theirs_R[:, None],
    )


@triton.jit
def put_together(  # type: ignore[no-untyped-def]
    target_RD, partial, counters, pair, split, splits, active, acc_RD, largest_R, sum_R,
    group: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Writes the heads of one sequence and head of keys (``pair``), of which ``active`` programs have a part each; the
    last of them to come here adds the parts up."""
    r_R, d_D = tl.arange(0, rows), tl.arange(0, width)
    live_RD = (r_R < group)[:, None] & (d_D >= 0)[None, :]
    if active == 1:
        tl.store(target_RD, (acc_RD / sum_R[:, None]).to(target_RD.dtype.element_ty), mask=live_RD)
    else:
        size: tl.constexpr = group * (width + 2)
        parts = partial + pair * splits * size
        part = parts + split * size
        tl.store(part + r_R[:, None] * width + d_D[None, :], acc_RD, mask=live_RD)
        tl.store(part + group * width + r_R, largest_R, mask=r_R < group)
        tl.store(part + group * width + group + r_R, sum_R, mask=r_R < group)
        tl.debug_barrier()  # all parts of this program are written before it is counted
        done = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
        if done == active - 1:
            tl.debug_barrier()
            largest_R = tl.full((rows,), float("-inf"), dtype=tl.float32)
            sum_R = tl.zeros((rows,), dtype=tl.float32)
            acc_RD = tl.zeros((rows, width), dtype=tl.float32)
            for other in range(active):
                part = parts + other * size
                place = part + r_R[:, None] * width + d_D[None, :]
                other_RD = tl.load(place, mask=live_RD, other=0.0, cache_modifier=".cg")
                high_R = tl.load(
                    part + group * width + r_R, mask=r_R < group, other=float("-inf"), cache_modifier=".cg"
                )
                other_sum_R = tl.load(
                    part + group * width + group + r_R, mask=r_R < group, other=0.0, cache_modifier=".cg"
                )
                largest_R, sum_R, acc_RD = merged(largest_R, sum_R, acc_RD, high_R, other_sum_R, other_RD)
            tl.store(target_RD, (acc_RD / sum_R[:, None]).to(target_RD.dtype.element_ty), mask=live_RD)
            tl.store(counters + pair, 0)


Room = list[tuple[Tensor, Tensor]]
"""Room for parts of sums, and counters that the kernel leaves at zero. One that has become too small is kept."""


PARTS, PAIRS = 2**21, 2**14


def _room(device: torch.device, parts: int = PARTS, pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    room = torch.empty(parts, dtype=torch.float32, device=device)
    return room, torch.zeros(pairs, dtype=torch.int32, device=device)


WORKSPACES: Workspaces[Room] = Workspaces(lambda device: [_room(device)])


def parts_of_rows(pairs: int, group: int, width: int) -> int:
    """Parts of each pair of a sequence and head of keys for which there is room without making more."""
    return PARTS // (pairs * group * (width + 2)) if pairs <= PAIRS else 1


def workspace(device: torch.device, parts: int, pairs: int) -> tuple[Tensor, Tensor]:
    """That of the current stream."""
    found = WORKSPACES.of(device, stream_of(device.index) if device.type == "cuda" else 0)
    if found[-1][0].numel() < parts or found[-1][1].numel() < pairs:
        found.append(_room(device, max(parts, found[-1][0].numel()), max(pairs, found[-1][1].numel())))
    return found[-1]
