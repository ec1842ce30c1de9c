"""Rotary embedding of new tokens and their way into a paged cache, one Triton kernel.

Shape legend: T tokens, H heads of queries, K heads of keys and values, D channels of a head, P positions of the table,
N pages of S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finescale.errors import InputError
from finescale.kernels.triton_attention import overlapping, supports

HEADS_OF_TILE = 8

# Triton reads the signatures below: annotations other than its own are errors there.


@triton.jit
def _rotate_into_pages(  # type: ignore[no-untyped-def]
    position, table, query, key, value, keys, values, slot_of_token,
    query_stride, key_stride, value_stride, page_stride, slot_stride, head_stride, slots,
    heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
    overlap: tl.constexpr,
):  # fmt: skip
    # The next kernel may not start early: attention of others would not wait for what is written here.
    if overlap:
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    first_tile = tl.program_id(1) * tile
    r_R, d_D, half_D = tl.arange(0, tile), tl.arange(0, width), tl.arange(0, width // 2)
    slot = tl.load(slot_of_token + t)
    target = slot // slots * page_stride + slot % slots * slot_stride
    if first_tile < heads + kv_heads:  # tiles hold either queries, or keys, or values
        row = table + tl.load(position + t) * width
        cos_D, sin_D = tl.load(row + half_D)[None, :], tl.load(row + width // 2 + half_D)[None, :]
        is_query = first_tile < heads
        head_R = tl.where(is_query, first_tile, first_tile - heads) + r_R
        source = tl.where(is_query, query + t * query_stride, key + t * key_stride) + head_R[:, None] * width
        live_RD = (head_R < tl.where(is_query, heads, kv_heads))[:, None] & (half_D >= 0)[None, :]
        first_RD = tl.load(source + half_D[None, :], mask=live_RD, other=0.0)
        second_RD = tl.load(source + width // 2 + half_D[None, :], mask=live_RD, other=0.0)
        x_RD, y_RD = first_RD.to(tl.float32), second_RD.to(tl.float32)
        rotated_RD = (x_RD * cos_D - y_RD * sin_D).to(first_RD.dtype)
        turned_RD = (y_RD * cos_D + x_RD * sin_D).to(first_RD.dtype)
        tl.store(source + half_D[None, :], rotated_RD, mask=live_RD)
        tl.store(source + width // 2 + half_D[None, :], turned_RD, mask=live_RD)
        if (first_tile >= heads) & (slot >= 0):
            place = keys + target + head_R[:, None] * head_stride
            tl.store(place + half_D[None, :], rotated_RD, mask=live_RD)
            tl.store(place + width // 2 + half_D[None, :], turned_RD, mask=live_RD)
    elif slot >= 0:
        head_R = first_tile - heads - kv_heads + r_R
        live_RD = (head_R < kv_heads)[:, None] & (d_D >= 0)[None, :]
        x_RD = tl.load(value + t * value_stride + head_R[:, None] * width + d_D[None, :], mask=live_RD, other=0.0)
        tl.store(values + target + head_R[:, None] * head_stride + d_D[None, :], x_RD, mask=live_RD)


def fits(heads: int, kv_heads: int, width: int) -> bool:
    """Whether the kernel has a form for such heads."""
    return supports(width) and heads % _tile(heads, kv_heads) == 0


def _tile(heads: int, kv_heads: int) -> int:
    """Heads of a tile: a power of two that divides both numbers, so that a tile holds heads of one kind."""
    tile = HEADS_OF_TILE
    while heads % tile or kv_heads % tile:
        tile //= 2
    return tile


def rotate_into_pages(
    position_T: Tensor, table_PD: Tensor, query_TC: Tensor, key_TKD: Tensor, value_TKD: Tensor,
    keys_NSKD: Tensor, values_NSKD: Tensor, slot_T: Tensor,
) -> None:  # fmt: skip
    """Rotates queries and keys in place, halves of a head against each other; keys and values go into their slots.

    Args:
        position_T: int64; of at least as many tokens as have slots. Tokens beyond them are left alone.
        table_PD: float32, contiguous; cosines, then sines, of half a head each.
        query_TC: bfloat16 or float16 [T, H * D], a token's channels side by side.
        key_TKD, value_TKD: in the same type, heads of a token side by side.
        keys_NSKD, values_NSKD: the cache, of equal strides, a head's channels side by side.
        slot_T: int64, page * S + slot; negative for none.

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    tokens, kv_heads, width = slot_T.shape[0], *key_TKD.shape[1:]
    heads = query_TC.shape[1] // width
    values = (query_TC, key_TKD, value_TKD, keys_NSKD, values_NSKD)
    if any(x.dtype != query_TC.dtype or x.stride(-1) != 1 for x in values) or table_PD.dtype != torch.float32:
        raise InputError("queries, keys, values and their cache must be of one type, the table float32.")
    if key_TKD.shape != value_TKD.shape or key_TKD.stride(1) != width or value_TKD.stride(1) != width:
        raise InputError("keys and values must be [T, K, D] with a token's heads side by side.")
    if keys_NSKD.shape[2:] != key_TKD.shape[1:] or keys_NSKD.stride() != values_NSKD.stride():
        raise InputError(f"a cache {tuple(keys_NSKD.shape)} does not fit keys {tuple(key_TKD.shape)}.")
    if table_PD.shape[1] != width or not table_PD.is_contiguous() or not fits(heads, kv_heads, width):
        raise InputError(f"{heads} and {kv_heads} heads of {width} channels have no such kernel.")
    if tokens > min(position_T.shape[0], query_TC.shape[0], key_TKD.shape[0]) or position_T.stride(0) != 1:
        raise InputError(f"{tokens} slots for {position_T.shape[0]} positions.")
    if tokens == 0:
        return
    tile = _tile(heads, kv_heads)
    overlap = overlapping(query_TC.device)
    _rotate_into_pages[(tokens, (heads + 2 * kv_heads) // tile)](
        position_T, table_PD, query_TC, key_TKD, value_TKD, keys_NSKD, values_NSKD, slot_T,
        query_TC.stride(0), key_TKD.stride(0), value_TKD.stride(0), *keys_NSKD.stride()[:3],
        keys_NSKD.shape[1], heads=heads, kv_heads=kv_heads, width=width, tile=tile, num_warps=4, **overlap,
    )  # fmt: skip
