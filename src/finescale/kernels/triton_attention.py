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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS_OF_TILE = 8
PROGRAMS = 528
"""Programs wanted of one launch: four for each multiprocessor of an H100."""


class Tiles(NamedTuple):
    """How a program of ``attend`` goes through its keys.

    Attributes:
        keys: of a tile.
        least: keys of a program at least, a multiple of ``keys``: fewer are not worth the adding up.
        warps, stages: see Triton.
        alone: without tensor cores, for heads that do not share their keys.
    """

    keys: int
    least: int
    warps: int
    stages: int
    alone: bool


ONE_HEAD = Tiles(64, 256, 8, 2, True)
SOME_HEADS = Tiles(64, 256, 4, 2, False)

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
def _rotate_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, q_gain, k_gain, keys, values, slot, query,
    tokens, capacity, table_stride, epsilon,
    heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
    normed: tl.constexpr, overlap: tl.constexpr,
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
    key_head_R = head_R - heads
    target = ((b * kv_heads + key_head_R[:, None]) * capacity + place) * width + d_D[None, :]
    tl.store(keys + target, x_RD, mask=fits_RD & (~is_query_R & ~is_value_R)[:, None])
    target = ((b * kv_heads + key_head_R[:, None] - kv_heads) * capacity + place) * width + d_D[None, :]
    tl.store(values + target, plain_RD, mask=fits_RD & is_value_R[:, None])


@triton.jit
def _some_heads(  # type: ignore[no-untyped-def]
    q_RD, keys, values, valid, row, cache, start, end, scaling,
    rows: tl.constexpr, width: tl.constexpr, block: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights and weighted values over keys ``start`` to ``end``, for heads that share them."""
    d_D, n_N = tl.arange(0, width), tl.arange(0, block)
    largest_R = tl.full((rows,), float("-inf"), dtype=tl.float32)
    sum_R = tl.zeros((rows,), dtype=tl.float32)
    acc_RD = tl.zeros((rows, width), dtype=tl.float32)
    for first in range(start, end, block):
        key_N = first + n_N
        inside_N = key_N < end
        k_DN = tl.load(keys + (cache + key_N)[None, :] * width + d_D[:, None], mask=inside_N[None, :], other=0.0)
        score_RN = tl.dot(q_RD, k_DN, input_precision="ieee") * scaling
        if masked:
            inside_N = inside_N & (tl.load(valid + row + key_N, mask=inside_N, other=0) != 0)
        score_RN = tl.where(inside_N[None, :], score_RN, float("-inf"))
        higher_R = tl.maximum(largest_R, tl.max(score_RN, 1))
        # Until some key counts, the largest score is -inf, and -inf less -inf would be NaN.
        base_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
        weight_RN = tl.exp(score_RN - base_R[:, None])
        shrink_R = tl.exp(largest_R - base_R)
        sum_R = sum_R * shrink_R + tl.sum(weight_RN, 1)
        v_ND = tl.load(values + (cache + key_N)[:, None] * width + d_D[None, :], mask=inside_N[:, None], other=0.0)
        acc_RD = acc_RD * shrink_R[:, None]
        acc_RD += tl.dot(weight_RN.to(q_RD.dtype), v_ND, input_precision="ieee")
        largest_R = higher_R
    return largest_R, sum_R, acc_RD


@triton.jit
def _one_head(  # type: ignore[no-untyped-def]
    q_1D, keys, values, valid, row, cache, start, end, scaling,
    width: tl.constexpr, block: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """The same for a single head: every place of the tile keeps a softmax of its own, added up at the end only."""
    d_D, n_N = tl.arange(0, width), tl.arange(0, block)
    largest_N = tl.full((block,), float("-inf"), dtype=tl.float32)
    sum_N = tl.zeros((block,), dtype=tl.float32)
    acc_ND = tl.zeros((block, width), dtype=tl.float32)
    for first in range(start, end, block):
        key_N = first + n_N
        inside_N = key_N < end
        place_ND = (cache + key_N)[:, None] * width + d_D[None, :]
        k_ND = tl.load(keys + place_ND, mask=inside_N[:, None], other=0.0)
        v_ND = tl.load(values + place_ND, mask=inside_N[:, None], other=0.0)
        score_N = tl.sum(k_ND.to(tl.float32) * q_1D.to(tl.float32), 1) * scaling
        if masked:
            inside_N = inside_N & (tl.load(valid + row + key_N, mask=inside_N, other=0) != 0)
        score_N = tl.where(inside_N, score_N, float("-inf"))
        higher_N = tl.maximum(largest_N, score_N)
        base_N = tl.where(higher_N == float("-inf"), 0.0, higher_N)
        weight_N, shrink_N = tl.exp(score_N - base_N), tl.exp(largest_N - base_N)
        sum_N = sum_N * shrink_N + weight_N
        acc_ND = acc_ND * shrink_N[:, None] + weight_N[:, None] * v_ND.to(tl.float32)
        largest_N = higher_N
    largest = tl.max(largest_N, 0)
    weight_N = tl.exp(largest_N - tl.where(largest == float("-inf"), 0.0, largest))
    return (
        tl.full((1,), 0.0, dtype=tl.float32) + largest,
        tl.full((1,), 0.0, dtype=tl.float32) + tl.sum(sum_N * weight_N, 0),
        tl.sum(acc_ND * weight_N[:, None], 0)[None, :],
    )


@triton.jit
def _round_row(out, codes, scale, total, b, channels: tl.constexpr, row: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 codes of a finished token, its scale and the sum of its codes, as ``linear.quantize_tokens`` gives them."""
    c_C = tl.arange(0, row)
    y_C = tl.load(out + b * channels + c_C, mask=c_C < channels, other=0.0, cache_modifier=".cg").to(tl.float32)
    # As bits, so that a NaN is the largest of all and reaches the scale.
    largest = tl.max(y_C.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    divided = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    step = tl.where(largest == 0, 1.0, tl.where(divided < 1.17549435e-38, 1.17549435e-38, divided))
    code_C = tl.div_rn(y_C, step + tl.zeros((row,), dtype=tl.float32))
    # Adding and taking off 1.5 * 2^23 rounds to the nearest integer, ties to even.
    code_C = (code_C + 12582912.0) - 12582912.0
    code_C = tl.where(code_C == code_C, tl.minimum(tl.maximum(code_C, -127.0), 127.0), 0.0).to(tl.int32)
    slabs, place = tl.cdiv(tl.num_programs(0), 8), b % 8
    # kernels/layout.py, pack_tokens: the 16-byte pieces of token t stand at place ``piece xor t``.
    target_C = (c_C // 128 * slabs + b // 8) * 1024 + place * 128 + ((c_C % 128 // 16) ^ place) * 16 + c_C % 16
    tl.store(codes + target_C, code_C.to(tl.int8), mask=c_C < (channels + 127) // 128 * 128)
    tl.store(scale + b, step)
    tl.store(total + b, tl.sum(code_C, 0))


@triton.jit(do_not_specialize=["splits"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, q_gain, k_gain, keys, values, slot, valid, out, partial, counters, codes, scale, total,
    capacity, table_stride, scaling, epsilon, splits,
    kv_heads: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    least: tl.constexpr, normed: tl.constexpr, masked: tl.constexpr, rounded: tl.constexpr, row: tl.constexpr,
    overlap: tl.constexpr,
):  # fmt: skip
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b, h, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kind = qkv.dtype.element_ty
    length = tl.load(slot).to(tl.int32)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, splits), block) * block, least)
    active = tl.maximum(tl.cdiv(length, chunk), 1)
    if split < active:
        start = split * chunk
        end = tl.minimum(start + chunk, length)
        d_D, r_R = tl.arange(0, width), tl.arange(0, rows)
        partner_D = tl.where(d_D < width // 2, d_D + width // 2, d_D - width // 2)
        first_half_D = d_D < width // 2
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
        v_D = tl.load(token + (kv_heads * (group + 1) + h) * width + d_D)

        cache = (b * kv_heads + h) * capacity
        if rows == 1:
            largest_R, sum_R, acc_RD = _one_head(
                q_RD, keys, values, valid, b * capacity, cache, start, end, scaling, width, block, masked
            )
        else:
            largest_R, sum_R, acc_RD = _some_heads(
                q_RD, keys, values, valid, b * capacity, cache, start, end, scaling, rows, width, block, masked
            )
        if split == 0:
            fits_1D = ((one_1 < 1) & (length < capacity))[:, None] & (d_D >= 0)[None, :]
            tl.store(keys + (cache + length) * width + one_1[:, None] + d_D[None, :], k_1D, mask=fits_1D)
            tl.store(values + (cache + length) * width + d_D, v_D, mask=(d_D >= 0) & (length < capacity))
            own_R = tl.sum(q_RD.to(tl.float32) * k_1D.to(tl.float32), 1) * scaling
            higher_R = tl.maximum(largest_R, own_R)
            shrink_R, weight_R = tl.exp(largest_R - higher_R), tl.exp(own_R - higher_R)
            sum_R = sum_R * shrink_R + weight_R
            acc_RD = acc_RD * shrink_R[:, None] + weight_R[:, None] * v_D.to(tl.float32)[None, :]
            largest_R = higher_R
            # A token without a place makes itself known instead of going missing.
            acc_RD += tl.where(length < capacity, 0.0, float("nan"))
        target = out + (b * kv_heads + h) * group * width + r_R[:, None] * width + d_D[None, :]
        complete = active == 1
        if active == 1:
            tl.store(target, (acc_RD / sum_R[:, None]).to(kind), mask=live_RD)
        else:
            pair = (b * kv_heads + h) * splits
            size: tl.constexpr = group * (width + 2)
            part = partial + (pair + split) * size
            tl.store(part + r_R[:, None] * width + d_D[None, :], acc_RD, mask=live_RD)
            tl.store(part + group * width + r_R, largest_R, mask=r_R < group)
            tl.store(part + group * width + group + r_R, sum_R, mask=r_R < group)
            tl.debug_barrier()  # all parts of this program are written before it is counted
            done = tl.atomic_add(counters + b * kv_heads + h, 1, sem="acq_rel", scope="gpu")
            complete = done == active - 1
            if complete:
                tl.debug_barrier()
                first = partial + pair * size
                for other in tl.range(active, loop_unroll_factor=4):
                    place = first + other * size + group * width + r_R
                    high_R = tl.load(place, mask=r_R < group, other=float("-inf"), cache_modifier=".cg")
                    largest_R = tl.maximum(largest_R, high_R)
                sum_R = tl.zeros((rows,), dtype=tl.float32)
                acc_RD = tl.zeros((rows, width), dtype=tl.float32)
                for other in tl.range(active, loop_unroll_factor=4):
                    part = first + other * size
                    high_R = tl.load(
                        part + group * width + r_R, mask=r_R < group, other=float("-inf"), cache_modifier=".cg"
                    )
                    other_sum_R = tl.load(
                        part + group * width + group + r_R, mask=r_R < group, other=0.0, cache_modifier=".cg"
                    )
                    place = part + r_R[:, None] * width + d_D[None, :]
                    other_RD = tl.load(place, mask=live_RD, other=0.0, cache_modifier=".cg")
                    # Some part has counted the token itself: the largest is finite.
                    weight_R = tl.exp(high_R - largest_R)
                    sum_R += other_sum_R * weight_R
                    acc_RD += other_RD * weight_R[:, None]
                tl.store(target, (acc_RD / sum_R[:, None]).to(kind), mask=live_RD)
                tl.store(counters + b * kv_heads + h, 0)
        if rounded:  # noqa: SIM102 (known at compile time, the other at run time)
            if complete:
                rows_done = counters + tl.num_programs(0) * kv_heads + b
                tl.debug_barrier()
                heads_before = tl.atomic_add(rows_done, 1, sem="acq_rel", scope="gpu")
                if heads_before == kv_heads - 1:
                    tl.debug_barrier()
                    _round_row(out, codes, scale, total, b, kv_heads * group * width, row)
                    tl.store(rows_done, 0)


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
) -> Tensor:  # fmt: skip
    """See ``kernels.attention.rotate_heads``."""
    batch, tokens, _ = qkv_BTC.shape
    width = keys_BKSD.shape[3]
    query_BTHD = qkv_BTC.new_empty(batch, tokens, heads, width)
    if batch * tokens == 0:
        return query_BTHD
    grid = (batch * tokens, triton.cdiv(heads + 2 * kv_heads, HEADS_OF_TILE))
    _rotate_kernel[grid](
        qkv_BTC, cos_BTD, sin_BTD, q_gain_D, k_gain_D, keys_BKSD, values_BKSD, slot, query_BTHD,
        tokens, keys_BKSD.shape[2], cos_BTD.stride(0) if cos_BTD.shape[0] > 1 else 0, epsilon,
        heads=heads, kv_heads=kv_heads, width=width, tile=HEADS_OF_TILE, normed=q_gain_D is not None,
        num_warps=4, **overlapping(qkv_BTC.device),
    )  # fmt: skip
    return query_BTHD


_workspaces: dict[tuple[torch.device, int], list[tuple[Tensor, Tensor]]] = {}


def _workspace(device: torch.device, parts: int, counters: int) -> tuple[Tensor, Tensor]:
    """Room for parts of sums, and counters that the kernel leaves at zero; one for each stream.

    One that has become too small is kept: CUDA graphs hold on to its address.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _workspaces.setdefault((device, stream), [])
    if not found or found[-1][0].numel() < parts or found[-1][1].numel() < counters:
        parts, counters = max(parts, 2**20), max(counters, 2**15)
        room = torch.empty(parts, dtype=torch.float32, device=device)
        found.append((room, torch.zeros(counters, dtype=torch.int32, device=device)))
    return found[-1]


def attend(
    qkv_BC: Tensor, cos_BD: Tensor, sin_BD: Tensor, q_gain_D: Tensor | None, k_gain_D: Tensor | None, epsilon: float,
    heads: int, kv_heads: int, keys_BKSD: Tensor, values_BKSD: Tensor, slot: Tensor, valid_BS: Tensor | None,
    scaling: float, rounded: tuple[Tensor, Tensor, Tensor] | None = None, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """See ``kernels.attention.attend_token``.

    Args:
        rounded: codes, scales and sums of the tokens, written as ``linear.quantize_tokens`` would; None for none.
        tiles: None for the usual ones.
    """
    batch, (capacity, width) = qkv_BC.shape[0], keys_BKSD.shape[2:]
    out_BC = qkv_BC.new_empty(batch, heads * width)
    if batch == 0:
        return out_BC
    pairs, group = batch * kv_heads, heads // kv_heads
    tiles = tiles or (ONE_HEAD if group == 1 else SOME_HEADS)
    splits = max(1, min(triton.cdiv(PROGRAMS, pairs), triton.cdiv(capacity, tiles.least), 64))
    parts = pairs * splits * group * (width + 2) if splits > 1 else 0
    partial, counters = _workspace(qkv_BC.device, parts, pairs + batch)
    table_stride = cos_BD.stride(0) if cos_BD.shape[0] > 1 else 0
    _attend_kernel[(batch, kv_heads, splits)](
        qkv_BC, cos_BD, sin_BD, q_gain_D, k_gain_D, keys_BKSD, values_BKSD, slot, valid_BS, out_BC, partial, counters,
        *(rounded or (None, None, None)), capacity, table_stride, scaling, epsilon, splits,
        kv_heads=kv_heads, group=group, rows=1 if tiles.alone else max(16, triton.next_power_of_2(group)), width=width,
        block=tiles.keys, least=tiles.least, normed=q_gain_D is not None, masked=valid_BS is not None,
        rounded=rounded is not None, row=triton.next_power_of_2(heads * width),
        num_warps=tiles.warps, num_stages=tiles.stages, **overlapping(qkv_BC.device),
    )  # fmt: skip
    return out_BC
