"""Attention between the products of a decoder block on a GPU: rotary embedding, cache and softmax in one kernel each.

`rotate` takes what the query, key and value product gave, rotates queries and keys (after a norm of each head, where
the family has one) and puts keys and values into the cache: one kernel for any number of tokens. `attend` does the same
for one token a sequence and attends to the cache at once. The keys of a sequence are shared out over several programs
(flash decoding); the last of them to finish adds their parts up.

Every rounding is that of the plain modules: products, sums and norms in the type of the inputs.

Shape legend: B sequences, T tokens, C channels of all heads, H heads of queries, K heads of keys and values, D channels
of a head, S slots of a cache, R rows of a tile (heads), N keys of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finescale.kernels.triton_softmax import (
    Tiles,
    attend_plainly,
    attend_tile,
    bring_near,
    load_tile,
    merged,
    put_together,
    rows_of_tile,
    splits_of,
    tile_offsets,
    workspace,
)

HEADS_OF_TILE = 8


TILES = Tiles(64, 528, 4, 2)
"""Four programs for each multiprocessor of an H100 (benchmarks/attention_tiles.py)."""
SHARED_TILES = Tiles(64, 528, 4, 3)
"""The same for heads of keys that serve several heads of queries, while programs are shared out and not very few."""
ROUNDED_TILES = Tiles(32, 528, 2, 3)
"""The same for a cache of int8, where a head of keys serves several heads of queries."""
PLAIN_ROUNDED_TILES = Tiles(32, 528, 4, 1, plain=True)
"""The same where it serves one."""


# Triton reads the signatures below: annotations other than its own are errors there.


@triton.jit
def _normed(x, partner, gain, gain_partner, epsilon, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """RMS norm of rows, as the modules of transformers round it; ``partner`` holds the same rows in another order."""
    kind = x.dtype
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x.to(tl.float32) * x.to(tl.float32), 1) / width + epsilon)
    normed = (x.to(tl.float32) * inverse[:, None]).to(kind)
    normed_partner = (partner.to(tl.float32) * inverse[:, None]).to(kind)
    return (
        (normed.to(tl.float32) * gain.to(tl.float32)[None, :]).to(kind),
        (normed_partner.to(tl.float32) * gain_partner.to(tl.float32)[None, :]).to(kind),
    )


@triton.jit
def _rotated(x, partner, cos, sin, first_half):  # type: ignore[no-untyped-def]
    """x * cos + rotate_half(x) * sin, each step in the type of x; ``partner`` is x with its halves exchanged."""
    kind = x.dtype
    straight = (x.to(tl.float32) * cos.to(tl.float32)[None, :]).to(kind)
    turned = partner.to(tl.float32)
    turned = tl.where(first_half[None, :], -turned, turned)
    crossed = (turned * sin.to(tl.float32)[None, :]).to(kind)
    return (straight.to(tl.float32) + crossed.to(tl.float32)).to(kind)


@triton.jit
def _codes(x_RD):  # type: ignore[no-untyped-def]
    """Rows as int8 codes, still float32, and their scales: what ``grid.quantize_tokens`` gives."""
    x_RD = x_RD.to(tl.float32)
    largest_R = tl.max(tl.abs(x_RD), 1)
    scale_R = tl.where(largest_R == 0.0, 1.0, tl.maximum(tl.div_rn(largest_R, 127.0), 1.1754943508222875e-38))
    shift: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest whole number
    codes_RD = tl.div_rn(x_RD, scale_R[:, None]) + shift - shift
    return tl.minimum(tl.maximum(codes_RD, -127.0), 127.0), scale_R


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, q_gain, k_gain, keys, values, key_scale, value_scale, slot, query,
    tokens, capacity, table_stride, epsilon,
    heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
    normed: tl.constexpr, rounded: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    b, t = row // tokens, row % tokens
    head_R = tl.program_id(1) * tile + tl.arange(0, tile)
    d_D = tl.arange(0, width)
    partner_D = tl.where(d_D < width // 2, d_D + width // 2, d_D - width // 2)
    live_RD = (head_R < heads + 2 * kv_heads)[:, None] & (d_D >= 0)[None, :]
    source = qkv + row * (heads + 2 * kv_heads) * width + head_R[:, None] * width
    x_RD = tl.load(source + d_D[None, :], mask=live_RD, other=0.0)
    partner_RD = tl.load(source + partner_D[None, :], mask=live_RD, other=0.0)
    plain_RD = x_RD
    is_query_R, is_value_R = head_R < heads, head_R >= heads + kv_heads
    if normed:
        q_RD, q_partner_RD = _normed(
            x_RD, partner_RD, tl.load(q_gain + d_D), tl.load(q_gain + partner_D), epsilon, width
        )
        k_RD, k_partner_RD = _normed(
            x_RD, partner_RD, tl.load(k_gain + d_D), tl.load(k_gain + partner_D), epsilon, width
        )
        x_RD = tl.where(is_query_R[:, None], q_RD, k_RD)
        partner_RD = tl.where(is_query_R[:, None], q_partner_RD, k_partner_RD)
    table = b * table_stride + t * width
    x_RD = _rotated(x_RD, partner_RD, tl.load(cos + table + d_D), tl.load(sin + table + d_D), d_D < width // 2)
    out_RD = query + row * heads * width + head_R[:, None] * width + d_D[None, :]
    tl.store(out_RD, x_RD, mask=live_RD & is_query_R[:, None])
    place = tl.load(slot) + t
    fits_RD = live_RD & (place < capacity)
    key_head_R = b * kv_heads + head_R - heads
    value_head_R = key_head_R - kv_heads
    key_RD, value_RD = fits_RD & (~is_query_R & ~is_value_R)[:, None], fits_RD & is_value_R[:, None]
    key_target = (key_head_R[:, None] * capacity + place) * width + d_D[None, :]
    value_target = (value_head_R[:, None] * capacity + place) * width + d_D[None, :]
    if rounded:
        codes_RD, scale_R = _codes(tl.where(is_value_R[:, None], plain_RD, x_RD))
        tl.store(keys + key_target, codes_RD.to(tl.int8), mask=key_RD)
        tl.store(values + value_target, codes_RD.to(tl.int8), mask=value_RD)
        fits_R = (head_R < heads + 2 * kv_heads) & (place < capacity)
        tl.store(key_scale + key_head_R * capacity + place, scale_R, mask=fits_R & ~is_query_R & ~is_value_R)
        tl.store(value_scale + value_head_R * capacity + place, scale_R, mask=fits_R & is_value_R)
    else:
        tl.store(keys + key_target, x_RD, mask=key_RD)
        tl.store(values + value_target, plain_RD, mask=value_RD)


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, q_gain, k_gain, keys, values, key_scale, value_scale, slot, valid, out, partial, counters,
    capacity, table_stride, scaling, epsilon,
    kv_heads: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    splits: tl.constexpr, normed: tl.constexpr, masked: tl.constexpr, rounded: tl.constexpr, overlap: tl.constexpr,
    plain: tl.constexpr, settled: tl.constexpr,
):  # fmt: skip
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        if not settled:
            tl.extra.cuda.gdc_wait()
    b, h, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(slot).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(length, splits), block) * block
    active = tl.maximum(tl.cdiv(length, tl.maximum(chunk, 1)), 1)
    if split < active:
        start = split * chunk
        end = tl.minimum(start + chunk, length)
        d_D, r_R, n_N = tl.arange(0, width), tl.arange(0, rows), tl.arange(0, block)
        partner_D = tl.where(d_D < width // 2, d_D + width // 2, d_D - width // 2)
        first_half_D = d_D < width // 2
        cache = (b * kv_heads + h) * capacity
        if plain:  # on their way before anything is computed, if settled even while the kernel before this one ends
            offset_N = tile_offsets(start + n_N, start + n_N < end, 0, 0, 0, width, False)
            k_ND = load_tile(keys + cache * width, offset_N, start + n_N < end, d_D)
            v_ND = load_tile(values + cache * width, offset_N, start + n_N < end, d_D)
        elif overlap and settled:
            near_N = (cache + tl.minimum(start + n_N, capacity - 1)) * width
            bring_near(keys, near_N, width)
            bring_near(values, near_N, width)
        if overlap and settled:
            tl.extra.cuda.gdc_wait()
        cos_D, sin_D = tl.load(cos + b * table_stride + d_D), tl.load(sin + b * table_stride + d_D)
        live_RD = (r_R < group)[:, None] & (d_D >= 0)[None, :]
        token = qkv + b * (kv_heads * (group + 2)) * width
        source = token + (h * group + r_R)[:, None] * width
        q_RD = tl.load(source + d_D[None, :], mask=live_RD, other=0.0)
        partner_RD = tl.load(source + partner_D[None, :], mask=live_RD, other=0.0)
        # The key of the token itself, as a tile of one row.
        one_1 = tl.arange(0, 1)
        source = token + (kv_heads * group + h + one_1)[:, None] * width
        k_1D, k_partner_1D = tl.load(source + d_D[None, :]), tl.load(source + partner_D[None, :])
        if normed:
            q_RD, partner_RD = _normed(
                q_RD, partner_RD, tl.load(q_gain + d_D), tl.load(q_gain + partner_D), epsilon, width
            )
            k_1D, k_partner_1D = _normed(
                k_1D, k_partner_1D, tl.load(k_gain + d_D), tl.load(k_gain + partner_D), epsilon, width
            )
        q_RD = _rotated(q_RD, partner_RD, cos_D, sin_D, first_half_D)
        k_1D = _rotated(k_1D, k_partner_1D, cos_D, sin_D, first_half_D)
        v_1D = tl.load(token + (kv_heads * (group + 1) + h + one_1)[:, None] * width + d_D[None, :])

        largest_R = tl.full((rows,), float("-inf"), dtype=tl.float32)
        sum_R = tl.zeros((rows,), dtype=tl.float32)
        acc_RD = tl.zeros((rows, width), dtype=tl.float32)
        if split == 0:
            fits_1 = (one_1 < 1) & (length < capacity)
            fits_1D = fits_1[:, None] & (d_D >= 0)[None, :]
            place_1D = (cache + length) * width + one_1[:, None] + d_D[None, :]
            own_key_1D, own_value_1D = k_1D.to(tl.float32), v_1D.to(tl.float32)
            if rounded:
                own_key_1D, k_scale_1 = _codes(own_key_1D)
                own_value_1D, v_scale_1 = _codes(own_value_1D)
                tl.store(key_scale + cache + length + one_1, k_scale_1, mask=fits_1)
                tl.store(value_scale + cache + length + one_1, v_scale_1, mask=fits_1)
                tl.store(keys + place_1D, own_key_1D.to(tl.int8), mask=fits_1D)
                tl.store(values + place_1D, own_value_1D.to(tl.int8), mask=fits_1D)
                own_key_1D, own_value_1D = own_key_1D * k_scale_1[:, None], own_value_1D * v_scale_1[:, None]
            else:
                tl.store(keys + place_1D, k_1D, mask=fits_1D)
                tl.store(values + place_1D, v_1D, mask=fits_1D)
            largest_R = tl.sum(q_RD.to(tl.float32) * own_key_1D, 1) * scaling
            sum_R += 1.0
            acc_RD += own_value_1D
            # A token without a place makes itself known instead of going missing.
            acc_RD += tl.where(length < capacity, 0.0, float("nan"))
        if plain:
            others = attend_plainly(
                q_RD, k_ND, v_ND, keys + cache * width, values + cache * width, key_scale + cache if rounded else 0,
                value_scale + cache if rounded else 0, valid + b * capacity if masked else 0, 0, 0, 0, width,
                start, end, scaling, width, block, masked, rounded, False,
            )  # fmt: skip
            largest_R, sum_R, acc_RD = merged(largest_R, sum_R, acc_RD, others[0], others[1], others[2])
        else:
            for first in range(start, end, block):
                key_N = first + n_N
                inside_N = key_N < end
                offset_N = (cache + key_N) * width
                counted_N = inside_N
                if masked:
                    counted_N = inside_N & (tl.load(valid + b * capacity + key_N, mask=inside_N, other=0) != 0)
                k_scale_N = tl.load(key_scale + cache + key_N, mask=inside_N, other=0.0) if rounded else 1.0
                v_scale_N = tl.load(value_scale + cache + key_N, mask=inside_N, other=0.0) if rounded else 1.0
                largest_R, sum_R, acc_RD = attend_tile(
                    q_RD, keys, values, offset_N, inside_N, counted_N, k_scale_N, v_scale_N, scaling,
                    largest_R, sum_R, acc_RD, width, rounded,
                )  # fmt: skip

        target = out + (b * kv_heads + h) * group * width + r_R[:, None] * width + d_D[None, :]
        put_together(
            target, partial, counters, b * kv_heads + h, split, splits, active, acc_RD, largest_R, sum_R,
            group, rows, width,
        )  # fmt: skip


def _power_of_two(width: int) -> bool:
    return width >= 16 and width & (width - 1) == 0


def supports(width: int) -> bool:
    """Whether heads of so many channels have these kernels."""
    return _power_of_two(width)


def overlapping(device: torch.device) -> dict[str, bool]:
    """Programmatic dependent launch, where the GPU has it: the kernel starts while the one before it ends."""
    overlap = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"overlap": overlap, "launch_pdl": True} if overlap else {"overlap": False}


def rotate(
    qkv_BTC: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, q_gain_D: Tensor | None, k_gain_D: Tensor | None, epsilon: float,
    heads: int, kv_heads: int, keys_BKSD: Tensor, values_BKSD: Tensor, slot: Tensor,
    key_scale_BKS: Tensor | None = None, value_scale_BKS: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``kernels.attention.rotate_heads``."""
    batch, tokens, _ = qkv_BTC.shape
    width = keys_BKSD.shape[3]
    query_BTHD = qkv_BTC.new_empty(batch, tokens, heads, width)
    if batch * tokens == 0:
        return query_BTHD
    grid = (batch * tokens, triton.cdiv(heads + 2 * kv_heads, HEADS_OF_TILE))
    _rotate_kernel[grid](
        qkv_BTC, cos_BTD, sin_BTD, q_gain_D, k_gain_D, keys_BKSD, values_BKSD, key_scale_BKS, value_scale_BKS, slot,
        query_BTHD,
        tokens, keys_BKSD.shape[2], cos_BTD.stride(0) if cos_BTD.shape[0] > 1 else 0, epsilon,
        heads=heads, kv_heads=kv_heads, width=width, tile=HEADS_OF_TILE, normed=q_gain_D is not None,
        rounded=key_scale_BKS is not None,
        num_warps=4, **overlapping(qkv_BTC.device),
    )  # fmt: skip
    return query_BTHD


def _usual_tiles(pairs: int, group: int, capacity: int, rounded: bool) -> Tiles:
    """The fastest form of those that were timed on an H100."""
    if rounded:
        return PLAIN_ROUNDED_TILES if group == 1 else ROUNDED_TILES
    return SHARED_TILES if group > 1 and pairs >= 64 and splits_of(pairs, capacity, SHARED_TILES) > 1 else TILES


def attend(
    qkv_BC: Tensor, cos_BD: Tensor, sin_BD: Tensor, q_gain_D: Tensor | None, k_gain_D: Tensor | None, epsilon: float,
    heads: int, kv_heads: int, keys_BKSD: Tensor, values_BKSD: Tensor, slot: Tensor, valid_BS: Tensor | None,
    scaling: float, key_scale_BKS: Tensor | None = None, value_scale_BKS: Tensor | None = None,
    settled: bool = False, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """See ``kernels.attention.attend_token``."""
    batch, (capacity, width) = qkv_BC.shape[0], keys_BKSD.shape[2:]
    out_BC = qkv_BC.new_empty(batch, heads * width)
    if batch == 0:
        return out_BC
    pairs, group = batch * kv_heads, heads // kv_heads
    tiles = tiles or _usual_tiles(pairs, group, capacity, key_scale_BKS is not None)
    splits, plain = splits_of(pairs, capacity, tiles), tiles.plain and group == 1
    partial, counters = workspace(qkv_BC.device, pairs * splits * group * (width + 2), pairs)
    _attend_kernel[(batch, kv_heads, splits)](
        qkv_BC, cos_BD, sin_BD, q_gain_D, k_gain_D, keys_BKSD, values_BKSD, key_scale_BKS, value_scale_BKS, slot,
        valid_BS, out_BC, partial, counters,
        capacity, cos_BD.stride(0) if cos_BD.shape[0] > 1 else 0, scaling, epsilon,
        kv_heads=kv_heads, group=group, rows=rows_of_tile(group, plain), width=width, block=tiles.keys, splits=splits,
        normed=q_gain_D is not None, masked=valid_BS is not None,
        rounded=key_scale_BKS is not None, plain=plain, settled=settled,
        num_warps=tiles.warps, num_stages=tiles.stages, **overlapping(qkv_BC.device),
    )  # fmt: skip
    return out_BC
