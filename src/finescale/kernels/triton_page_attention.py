"""Attention of one token a sequence to a paged cache: rotary embedding, the cache's update and softmax in one kernel.

As `kernels.triton_attention` does it for a cache in one piece, but that sequences have lengths of their own, and that
queries and keys are rotated in float32.

Shape legend: B sequences, C channels, H heads of queries, K heads of keys and values, D channels of a head, R rows of a
tile (heads), N keys of a tile, P positions of the table, M pages of a sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finescale.errors import InputError
from finescale.kernels.triton_attention import overlapping, supports
from finescale.kernels.triton_softmax import (
    Tiles,
    attend_plainly,
    attend_tile,
    bring_near,
    load_tile,
    merged,
    parts_of_rows,
    put_together,
    rows_of_tile,
    splits_of,
    tile_offsets,
    workspace,
)

TILES = Tiles(64, 528, 4, 2)
"""Of a GPU that is full (benchmarks/attention_tiles.py)."""
FEW_TILES = Tiles(32, 528, 4, 1, plain=True)
"""Where a sequence and head are shared out, one head of queries for a head of keys."""
LONG = 4096
"""Keys that one program takes where there are programs enough."""


# Triton reads the signatures below: annotations other than its own are errors there.


@triton.jit
def _turned(source_RD, cos_D, sin_D, live_RD, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Heads with their halves rotated against each other."""
    d_D = tl.arange(0, width)
    first_half_D = d_D < width // 2
    partner_D = tl.where(first_half_D, d_D + width // 2, d_D - width // 2)
    x_RD = tl.load(source_RD + d_D[None, :], mask=live_RD, other=0.0)
    partner_RD = tl.load(source_RD + partner_D[None, :], mask=live_RD, other=0.0).to(tl.float32)
    partner_RD = tl.where(first_half_D[None, :], -partner_RD, partner_RD)
    return (x_RD.to(tl.float32) * cos_D[None, :] + partner_RD * sin_D[None, :]).to(x_RD.dtype)


@triton.jit(
    do_not_specialize=["pages_stride", "splits", "least"],
    do_not_specialize_on_alignment=["position", "pages", "length", "slot_of_sequence"],
)
def _attend_pages_kernel(  # type: ignore[no-untyped-def]
    query, key, value, table, position, keys, values, pages, length, slot_of_sequence, out, partial, counters,
    query_stride, key_stride, value_stride, page_stride, slot_stride, head_stride, slots, pages_stride, splits, least,
    scaling,
    kv_heads: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    rotating: tl.constexpr, plain: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        if not rotating:  # the token's own key comes from the kernel before this one
            tl.extra.cuda.gdc_wait()
    # Heads are neighbours in memory and programs next to each other: these read at the same time.
    h, b, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    d_D, r_R, n_N, one_1 = tl.arange(0, width), tl.arange(0, rows), tl.arange(0, block), tl.arange(0, 1)
    own_keys = tl.load(length + b)
    if rotating:
        own_keys = tl.maximum(own_keys - 1, 0)  # the token itself is not yet in the cache
    chunk = tl.maximum(tl.cdiv(tl.cdiv(own_keys, splits), block) * block, least)
    active = tl.maximum(tl.cdiv(own_keys, chunk), 1)
    if split < active:
        start = split * chunk
        end = tl.minimum(start + chunk, own_keys)
        head_keys, head_values, own_pages = keys + h * head_stride, values + h * head_stride, pages + b * pages_stride
        if plain:  # on their way before anything is computed, also by the kernel before this one
            inside_N = start + n_N < end
            offset_N = tile_offsets(start + n_N, inside_N, own_pages, slots, page_stride, slot_stride, True)
            k_ND = load_tile(head_keys, offset_N, inside_N, d_D)
            v_ND = load_tile(head_values, offset_N, inside_N, d_D)
        elif overlap and rotating:
            offset_N = tile_offsets(start + n_N, start + n_N < end, own_pages, slots, page_stride, slot_stride, True)
            bring_near(head_keys, offset_N, width)
            bring_near(head_values, offset_N, width)
        if overlap and rotating:
            tl.extra.cuda.gdc_wait()
        live_RD = (r_R < group)[:, None] & (d_D >= 0)[None, :]
        live_1D = (one_1 < 1)[:, None] & (d_D >= 0)[None, :]
        q_source_RD = query + b * query_stride + (h * group + r_R)[:, None] * width
        largest_R = tl.full((rows,), float("-inf"), dtype=tl.float32)
        sum_R = tl.zeros((rows,), dtype=tl.float32)
        acc_RD = tl.zeros((rows, width), dtype=tl.float32)
        if rotating:
            row = table + tl.load(position + b) * width
            cos_D, sin_D = tl.load(row + d_D % (width // 2)), tl.load(row + width // 2 + d_D % (width // 2))
            q_RD = _turned(q_source_RD, cos_D, sin_D, live_RD, width)
            if split == 0:
                k_1D = _turned(key + b * key_stride + h * width + one_1[:, None], cos_D, sin_D, live_1D, width)
                v_1D = tl.load(value + b * value_stride + h * width + one_1[:, None] + d_D[None, :])
                slot = tl.load(slot_of_sequence + b)
                if slot >= 0:
                    place_1D = slot // slots * page_stride + slot % slots * slot_stride + one_1[:, None] + d_D[None, :]
                    tl.store(head_keys + place_1D, k_1D)
                    tl.store(head_values + place_1D, v_1D)
                largest_R = tl.sum(q_RD.to(tl.float32) * k_1D.to(tl.float32), 1) * scaling
                sum_R += 1.0
                acc_RD += v_1D.to(tl.float32)
        else:
            q_RD = tl.load(q_source_RD + d_D[None, :], mask=live_RD, other=0.0)
        if plain:
            others = attend_plainly(
                q_RD, k_ND, v_ND, head_keys, head_values, 0, 0, 0, own_pages, slots, page_stride, slot_stride,
                start, end, scaling, width, block, False, False, True,
            )  # fmt: skip
            largest_R, sum_R, acc_RD = merged(largest_R, sum_R, acc_RD, others[0], others[1], others[2])
        else:
            for first in range(start, end, block):
                inside_N = first + n_N < end
                offset_N = tile_offsets(first + n_N, inside_N, own_pages, slots, page_stride, slot_stride, True)
                largest_R, sum_R, acc_RD = attend_tile(
                    q_RD, head_keys, head_values, offset_N, inside_N, inside_N, 1.0, 1.0, scaling,
                    largest_R, sum_R, acc_RD, width, False,
                )  # fmt: skip
        if not rotating:  # a sequence without any key
            sum_R = tl.where(sum_R == 0.0, 1.0, sum_R)
        target_RD = out + (b * kv_heads + h) * group * width + r_R[:, None] * width + d_D[None, :]
        put_together(
            target_RD, partial, counters, b * kv_heads + h, split, splits, active, acc_RD, largest_R, sum_R,
            group, rows, width,
        )  # fmt: skip


def fits(heads: int, kv_heads: int, width: int) -> bool:
    """Whether the kernel has a form for such heads."""
    return supports(width) and width <= 256 and heads % kv_heads == 0


def sharing(pairs: int, capacity: int, group: int, width: int, tiles: Tiles) -> tuple[int, int]:
    """Programs that may share a sequence and head, of which there are ``pairs``, and the keys that each takes at least.

    Few pairs are shared out until the GPU is full. Many fill it by themselves; there only a sequence much longer than
    others is, so that these need not wait for it.
    """
    splits = splits_of(pairs, capacity, tiles)
    least = tiles.keys
    if splits == 1:
        splits, least = triton.cdiv(capacity, LONG), LONG
    return max(1, min(splits, parts_of_rows(pairs, group, width))), least


def attend_pages(
    query_BC: Tensor, key_BKD: Tensor, value_BKD: Tensor, keys: Tensor, values: Tensor, pages_BM: Tensor,
    length_B: Tensor, out_BC: Tensor, scaling: float,
    rotary: tuple[Tensor, Tensor, Tensor] | None = None, tiles: Tiles | None = None,
) -> None:  # fmt: skip
    """Attention of one token of each sequence to its keys and to itself, written to ``out_BC``.

    Args:
        query_BC: bfloat16 or float16 [B, H * D], a sequence's channels side by side.
        key_BKD, value_BKD: of the tokens, in the same type, heads side by side.
        keys, values: the cache [pages, slots of a page, K, D], of equal strides, a head's channels side by side.
        pages_BM: int32: the pages of each sequence, in order.
        length_B: int32: keys of each sequence, that of the token itself included.
        out_BC: [B, H * D], contiguous, in the same type.
        scaling: what scores are multiplied by.
        rotary: if queries and keys are still to be rotated and the cache to be updated: positions of the tokens
            (int64), a float32 table [P, D] of cosines, then sines, of half a head each, and slots (int64, page * slots
            + slot, negative for none: such a token attends to itself alone).
        tiles: another form than the usual one.

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    batch, kv_heads, width = key_BKD.shape
    heads = query_BC.shape[1] // width
    values_of_type = (query_BC, key_BKD, value_BKD, keys, values, out_BC)
    if any(x.dtype != query_BC.dtype or x.stride(-1) != 1 for x in values_of_type) or not out_BC.is_contiguous():
        raise InputError(
            "queries, keys, values, their cache and the result must be of one type, channels side by side."
        )
    if key_BKD.shape != value_BKD.shape or key_BKD.stride(1) != width or value_BKD.stride(1) != width:
        raise InputError("keys and values must be [B, K, D] with a token's heads side by side.")
    if keys.shape[2:] != key_BKD.shape[1:] or keys.stride() != values.stride():
        raise InputError(f"a cache {tuple(keys.shape)} does not fit keys {tuple(key_BKD.shape)}.")
    if not fits(heads, kv_heads, width) or query_BC.shape[0] != batch or out_BC.shape != (batch, heads * width):
        raise InputError(f"{heads} and {kv_heads} heads of {width} channels have no such kernel.")
    if length_B.shape != (batch,) or pages_BM.shape[0] != batch or pages_BM.stride(1) != 1:
        raise InputError(f"lengths and pages of {batch} sequences are wanted.")
    if batch == 0:
        return
    position_B, table_PD, slot_B = rotary or (length_B, query_BC, length_B)
    if rotary is not None and (
        table_PD.dtype != torch.float32 or table_PD.shape[1] != width or not table_PD.is_contiguous()
        or slot_B.shape != (batch,) or position_B.shape[0] < batch or position_B.stride(0) != 1
    ):  # fmt: skip
        raise InputError("positions and slots of each sequence are wanted, and a contiguous float32 table.")
    pairs, group = batch * kv_heads, heads // kv_heads
    few = group == 1 and splits_of(pairs, pages_BM.shape[1] * keys.shape[1], FEW_TILES) > 1
    tiles = tiles or (FEW_TILES if few else TILES)
    plain = tiles.plain and group == 1
    splits, least = sharing(pairs, pages_BM.shape[1] * keys.shape[1], group, width, tiles)
    partial, counters = workspace(query_BC.device, pairs * splits * group * (width + 2) if splits > 1 else 1, pairs)
    _attend_pages_kernel[(kv_heads, batch, splits)](
        query_BC, key_BKD, value_BKD, table_PD, position_B, keys, values, pages_BM, length_B, slot_B, out_BC,
        partial, counters,
        query_BC.stride(0), key_BKD.stride(0), value_BKD.stride(0), *keys.stride()[:3], keys.shape[1],
        pages_BM.stride(0), splits, least, scaling,
        kv_heads=kv_heads, group=group, rows=rows_of_tile(group, plain), width=width, block=tiles.keys,
        rotating=rotary is not None, plain=plain, num_warps=tiles.warps, num_stages=tiles.stages,
        **overlapping(query_BC.device),
    )  # fmt: skip
