"""The exact W4A8 product in Triton: for CUDA GPUs from Ampere on that have no kernel of their own.

Weights are the left operand, outputs high, and stay 4 bits wide in memory. A byte holds the codes of input k (low half)
and k + H (high half) of a chunk of 2 H inputs, so that both halves are whole operands and nothing is interleaved; H is
the longest of 64 and 32 that divides the group, so that a half has one scale. int32 sums of a half, or of both where
they share a group, are multiplied by the scale and added in int32; scales up to 15 are multiplied into int8 codes
instead. Few tiles are split along the inputs, and their int32 sums are added by a second kernel: exact in any order.

Shape legend: T tokens, I inputs, O outputs, G groups, C chunks of 2 H inputs, H inputs of half a chunk, P parts.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finescale.errors import InputError
from finescale.kernels.layout import LARGEST_FOLDED_SCALE, LARGEST_SCALE
from finescale.kernels.operators import EVERYWHERE, operator

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZE_BLOCK = 2048
"""Inputs that the quantizer takes at once; a constant, so that all sizes share one kernel."""

# Triton reads the signatures below: annotations other than its own are errors there.


@triton.jit
def _quantize_kernel(x_TI, codes_TI, scale_T, inputs, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * inputs
    k = tl.arange(0, block)
    largest_k = tl.zeros((block,), dtype=tl.float32)
    nan_k = tl.zeros((block,), dtype=tl.int32)
    for start in range(0, inputs, block):
        x_k = tl.load(x_TI + row + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
        largest_k = tl.maximum(largest_k, tl.abs(x_k))
        nan_k = nan_k | (x_k != x_k).to(tl.int32)
    largest = tl.max(largest_k, axis=0)
    scale = tl.div_rn(largest, 127.0)
    scale = tl.where(largest == 0.0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))
    scale = tl.where(tl.max(nan_k, axis=0) > 0, float("nan"), scale)
    tl.store(scale_T + tl.program_id(0), scale)
    for start in range(0, inputs, block):
        live_k = start + k < inputs
        x_k = tl.load(x_TI + row + start + k, mask=live_k, other=0.0).to(tl.float32)
        code_k = tl.div_rn(x_k, scale + tl.zeros_like(x_k))
        code_k = tl.where(tl.abs(code_k) <= 128.0, code_k, 0.0)  # NaN: its scale is NaN too
        # Adding and taking off 1.5 * 2^23 rounds to the nearest integer, ties to even.
        code_k = tl.minimum(tl.maximum((code_k + 12582912.0) - 12582912.0, -127.0), 127.0)
        tl.store(codes_TI + row + start + k, code_k.to(tl.int8), mask=live_k)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    sum_OT,
    t_T,
    o_O,
    live_OT,
    x_scale_T,
    bias_O,
    channel_scale_O,
    out_TO,
    tokens,
    outputs,
    factor,
    has_bias: tl.constexpr,
    has_channel: tl.constexpr,
):
    scale_T = tl.load(x_scale_T + t_T, mask=t_T < tokens, other=0.0) * factor
    y_OT = sum_OT.to(tl.float32) * scale_T[None, :]
    if has_channel:
        y_OT = y_OT * tl.load(channel_scale_O + o_O, mask=o_O < outputs, other=0.0)[:, None]
    if has_bias:
        y_OT = y_OT + tl.load(bias_O + o_O, mask=o_O < outputs, other=0.0)[:, None]
    at_OT = t_T[None, :].to(tl.int64) * outputs + o_O[:, None]
    tl.store(out_TO + at_OT, y_OT.to(out_TO.dtype.element_ty), mask=live_OT)


@triton.jit(do_not_specialize=["tokens", "chunks", "chunks_of_part", "groups", "halves_of_group"])
def _product_kernel(  # type: ignore[no-untyped-def]
    x_TI,
    x_scale_T,
    packed_COH,
    scale_GO,
    bias_O,
    channel_scale_O,
    out,
    tokens,
    outputs,
    inputs,
    chunks,
    chunks_of_part,
    groups,
    halves_of_group,
    factor,
    half: tl.constexpr,
    two_groups: tl.constexpr,
    folded: tl.constexpr,
    whole_chunks: tl.constexpr,
    raw: tl.constexpr,
    has_bias: tl.constexpr,
    has_channel: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    token_tiles = tl.cdiv(tokens, tile_tokens)
    t_T = (tl.program_id(0) % token_tiles) * tile_tokens + tl.arange(0, tile_tokens)
    o_O = (tl.program_id(0) // token_tiles) * tile_outputs + tl.arange(0, tile_outputs)
    # What lies outside reads row 0 and is never stored.
    t_safe_T = tl.where(t_T < tokens, t_T, 0).to(tl.int64)
    o_safe_O = tl.where(o_O < outputs, o_O, 0)
    k_H = tl.arange(0, half)
    sum_OT = tl.zeros((tile_outputs, tile_tokens), dtype=tl.int32)
    first = tl.program_id(1) * chunks_of_part
    for chunk in range(first, tl.minimum(first + chunks_of_part, chunks)):
        both_OH = tl.load(packed_COH + (chunk * outputs + o_safe_O[:, None]).to(tl.int64) * half + k_H[None, :])
        low_OH = (both_OH << 4) >> 4
        high_OH = both_OH >> 4
        at_H = chunk * 2 * half + k_H
        x_HT = x_TI + t_safe_T[None, :] * inputs + at_H[:, None]
        if whole_chunks:
            x_low_HT = tl.load(x_HT)
            x_high_HT = tl.load(x_HT + half)
        else:
            x_low_HT = tl.load(x_HT, mask=at_H[:, None] < inputs, other=0)
            x_high_HT = tl.load(x_HT + half, mask=at_H[:, None] + half < inputs, other=0)
        group = tl.minimum((2 * chunk) // halves_of_group, groups - 1)
        scale_O = tl.load(scale_GO + group * outputs + o_safe_O)
        scale_high_O = scale_O
        if two_groups:
            group = tl.minimum((2 * chunk + 1) // halves_of_group, groups - 1)
            scale_high_O = tl.load(scale_GO + group * outputs + o_safe_O)
        if folded:
            low_OH = low_OH * scale_O.to(tl.int8)[:, None]
            high_OH = high_OH * scale_high_O.to(tl.int8)[:, None]
            sum_OT = tl.dot(low_OH, x_low_HT, sum_OT, out_dtype=tl.int32)
            sum_OT = tl.dot(high_OH, x_high_HT, sum_OT, out_dtype=tl.int32)
        elif two_groups:
            sum_OT += tl.dot(low_OH, x_low_HT, out_dtype=tl.int32) * scale_O.to(tl.int32)[:, None]
            sum_OT += tl.dot(high_OH, x_high_HT, out_dtype=tl.int32) * scale_high_O.to(tl.int32)[:, None]
        else:
            part_OT = tl.dot(low_OH, x_low_HT, out_dtype=tl.int32)
            part_OT = tl.dot(high_OH, x_high_HT, part_OT, out_dtype=tl.int32)
            sum_OT += part_OT * scale_O.to(tl.int32)[:, None]
    live_OT = (o_O[:, None] < outputs) & (t_T[None, :] < tokens)
    if raw:
        at_OT = (tl.program_id(1) * tokens + t_T[None, :].to(tl.int64)) * outputs + o_O[:, None]
        tl.store(out + at_OT, sum_OT, mask=live_OT)
    else:
        _finish(
            sum_OT, t_T, o_O, live_OT, x_scale_T, bias_O, channel_scale_O, out, tokens, outputs, factor, has_bias,
            has_channel,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "parts"])
def _finish_kernel(  # type: ignore[no-untyped-def]
    sums_PTO,
    x_scale_T,
    bias_O,
    channel_scale_O,
    out_TO,
    tokens,
    outputs,
    parts,
    factor,
    has_bias: tl.constexpr,
    has_channel: tl.constexpr,
    tile_outputs: tl.constexpr,
):
    t_T = tl.program_id(0) + tl.arange(0, 1)
    o_O = tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)
    live_OT = (o_O[:, None] < outputs) & (t_T[None, :] < tokens)
    sum_OT = tl.zeros((tile_outputs, 1), dtype=tl.int32)
    for part in range(parts):
        at_OT = (part * tokens + t_T[None, :].to(tl.int64)) * outputs + o_O[:, None]
        sum_OT += tl.load(sums_PTO + at_OT, mask=live_OT, other=0)
    _finish(
        sum_OT, t_T, o_O, live_OT, x_scale_T, bias_O, channel_scale_O, out_TO, tokens, outputs, factor, has_bias,
        has_channel,
    )  # fmt: skip


class TritonWeight(NamedTuple):
    """A packed layer: codes int8 [C, O, H], scales int16 or int32 [G, O]."""

    packed_COH: Tensor
    scale_GO: Tensor


def half_chunk(group_size: int) -> int:
    """Inputs of half a chunk.

    Raises:
        InputError: groups that are no multiple of 32.
    """
    if group_size == -1 or (group_size > 0 and group_size % 64 == 0):
        return 64
    if group_size > 0 and group_size % 32 == 0:
        return 32
    raise InputError(f"groups of {group_size} have no Triton kernel; use a multiple of 32, or -1.")


def pack_weight(codes_OI: Tensor, integer_scale_OG: Tensor, group_size: int) -> TritonWeight:
    """Codes two a byte, and scales with outputs side by side.

    Args:
        codes_OI: int8 in [-8, 7].
        integer_scale_OG: int32.
        group_size: a multiple of 32, or -1; the last group may be ragged.

    Raises:
        InputError: another group size, codes out of range, shapes that do not fit.
    """
    half = half_chunk(group_size)
    outputs, inputs = codes_OI.shape
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    if tuple(integer_scale_OG.shape) != (outputs, groups):
        raise InputError(f"scales {tuple(integer_scale_OG.shape)} must be [{outputs}, {groups}].")
    if codes_OI.numel() and (int(codes_OI.min()) < -8 or int(codes_OI.max()) > 7):
        raise InputError("only 4-bit codes, from -8 to 7, can be packed for the W4A8 kernels.")
    padded_OI = torch.nn.functional.pad(codes_OI, (0, -inputs % (2 * half)))
    halves_CSOH = padded_OI.view(outputs, -1, 2, half).permute(1, 2, 0, 3)
    packed_COH = (halves_CSOH[:, 0] & 15) | (halves_CSOH[:, 1] << 4)
    largest = int(integer_scale_OG.abs().max()) if integer_scale_OG.numel() else 0
    scale_dtype = torch.int16 if largest <= LARGEST_SCALE else torch.int32
    return TritonWeight(packed_COH.contiguous(), integer_scale_OG.T.to(scale_dtype).contiguous())


def is_folded(integer_scale_OG: Tensor) -> bool:
    """Whether scales are small enough to be multiplied into the codes."""
    return integer_scale_OG.numel() == 0 or int(integer_scale_OG.abs().max()) <= LARGEST_FOLDED_SCALE


@dataclass(frozen=True)
class Tile:
    """How a product is cut: outputs and tokens of a tile, parts along the inputs, warps, stages of the pipeline."""

    outputs: int
    tokens: int
    parts: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=4096)
def choose_tile(tokens: int, outputs: int, chunks: int, multiprocessors: int) -> Tile:
    """Tiles that keep all multiprocessors busy; for few tokens also parts, so that enough bytes are in flight."""
    wide = next((width for width in (16, 32, 64) if tokens <= width), 128)
    high = 64 if wide <= 32 else 128
    tiles = -(-outputs // high) * -(-tokens // wide)
    parts = max(1, min(chunks // 4, 2 * multiprocessors // tiles, 16)) if wide <= 64 else 1
    return Tile(high, wide, parts, 4 if wide <= 64 else 8, 5 if wide <= 32 else 3)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def quantize(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [T, I] and scales float32 [T] as `finescale.grid.quantize_tokens` makes them for 8 bits.

    A token with NaN has scale NaN, as there.
    """
    tokens, inputs = x_TI.shape
    codes_TI = torch.empty(tokens, inputs, dtype=torch.int8, device=x_TI.device)
    scale_T = torch.empty(tokens, dtype=torch.float32, device=x_TI.device)
    if tokens:
        _quantize_kernel[(tokens,)](x_TI, codes_TI, scale_T, inputs, block=QUANTIZE_BLOCK, num_warps=4)
    return codes_TI, scale_T


def product(
    codes_TI: Tensor,
    x_scale_T: Tensor,
    weight: TritonWeight,
    group_size: int,
    folded: bool,
    amplifier: int,
    bias_O: Tensor | None,
    channel_scale_O: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Y [T, O] of quantized activations; the bare int32 sums for ``torch.int32``. Tensors contiguous, on one device."""
    tokens, inputs = codes_TI.shape
    chunks, outputs, half = weight.packed_COH.shape
    out_TO = torch.empty(tokens, outputs, dtype=out_dtype, device=codes_TI.device)
    if tokens == 0 or outputs == 0:
        return out_TO
    tile = tile or choose_tile(tokens, outputs, chunks, _multiprocessors(codes_TI.device))
    chunks_of_part = -(-chunks // tile.parts)
    parts = -(-chunks // max(1, chunks_of_part)) or 1
    raw = parts > 1 or out_dtype == torch.int32
    sums = torch.empty(parts, tokens, outputs, dtype=torch.int32, device=codes_TI.device) if raw else out_TO
    ends = (
        out_TO if bias_O is None else bias_O,
        out_TO if channel_scale_O is None else channel_scale_O,
    )
    has = {"has_bias": bias_O is not None, "has_channel": channel_scale_O is not None}
    tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(tokens, tile.tokens)
    # Fused multiply-add would round the bias another way than the exact product does.
    _product_kernel[(tiles, parts)](
        codes_TI, x_scale_T, weight.packed_COH, weight.scale_GO, *ends, sums, tokens, outputs, inputs, chunks,
        chunks_of_part, weight.scale_GO.shape[0], 2**30 if group_size == -1 else group_size // half, 1.0 / amplifier,
        half=half, two_groups=group_size != -1 and group_size % (2 * half) != 0, folded=folded,
        whole_chunks=inputs % (2 * half) == 0, raw=raw, **has, tile_outputs=tile.outputs, tile_tokens=tile.tokens,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if out_dtype == torch.int32:
        return sums[0] if parts == 1 else sums.sum(0, dtype=torch.int32)
    if parts > 1:
        _finish_kernel[(tokens, triton.cdiv(outputs, 1024))](
            sums, x_scale_T, *ends, out_TO, tokens, outputs, parts, 1.0 / amplifier, **has, tile_outputs=1024,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out_TO


def _empty_triton_linear(
    x_TI: Tensor,
    packed_COH: Tensor,
    scale_GO: Tensor,
    bias_O: Tensor | None,
    channel_scale_O: Tensor | None,
    group_size: int,
    folded: bool,
    amplifier: int,
) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], packed_COH.shape[1])


@operator("triton_linear", _empty_triton_linear, devices=EVERYWHERE)
def _linear(
    x_TI: Tensor,
    packed_COH: Tensor,
    scale_GO: Tensor,
    bias_O: Tensor | None,
    channel_scale_O: Tensor | None,
    group_size: int,
    folded: bool,
    amplifier: int,
) -> Tensor:
    chunks, outputs, half = packed_COH.shape
    inputs = x_TI.shape[-1]
    if x_TI.dim() != 2 or x_TI.dtype not in OUT_DTYPES or not 2 * half * (chunks - 1) < inputs <= 2 * half * chunks:
        raise InputError(
            f"activations {list(x_TI.shape)} of {x_TI.dtype} must be bfloat16, float16 or float32 [T, I] with the "
            "weight's number of inputs."
        )
    if half != half_chunk(group_size):
        raise InputError(f"the weight was not packed for groups of {group_size}.")
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    if tuple(scale_GO.shape) != (groups, outputs):
        raise InputError(f"scales {list(scale_GO.shape)} must be [{groups}, {outputs}].")
    for name, tensor in (("bias", bias_O), ("channel scale", channel_scale_O)):
        if tensor is not None and (tuple(tensor.shape) != (outputs,) or tensor.dtype != torch.float32):
            raise InputError(f"the {name} must be float32 [{outputs}].")
    given = [tensor for tensor in (packed_COH, scale_GO, bias_O, channel_scale_O) if tensor is not None]
    if any(tensor.device != x_TI.device for tensor in given):
        raise InputError(f"activations are on {x_TI.device}, the weight on {packed_COH.device}.")
    if not all(tensor.is_contiguous() for tensor in given):
        raise InputError("the packed weight, its scales and the bias must be contiguous.")
    # Triton launches on the current device, whatever device its tensors are on.
    with torch.cuda.device(x_TI.device) if x_TI.device.type == "cuda" else nullcontext():
        codes_TI, x_scale_T = quantize(x_TI.contiguous())
        weight = TritonWeight(packed_COH, scale_GO)
        return product(
            codes_TI, x_scale_T, weight, group_size, folded, amplifier, bias_O, channel_scale_O, x_TI.dtype
        )  # fmt: skip


def triton_linear(
    x_TI: Tensor,
    weight: TritonWeight,
    group_size: int,
    folded: bool,
    bias_O: Tensor | None = None,
    channel_scale_O: Tensor | None = None,
    amplifier: int = 1,
) -> Tensor:
    """A whole layer: tokens are rounded to 8 bits, multiplied, and come back in their type.

    Args:
        x_TI: bfloat16, float16 or float32 [T, I].
        weight: from ``pack_weight``.
        group_size: as packed.
        folded: all scales are at most 15, and are multiplied into the codes.
        bias_O: float32 [O] or None, added last.
        channel_scale_O: float32 [O] or None, multiplies each output.
        amplifier: the power of two the scales were multiplied by.

    Returns:
        [T, O], the same bits as ``integer_scale_linear`` of the same codes.

    Raises:
        InputError: shapes, types or devices that do not fit together.
    """
    return _linear(x_TI, *weight, bias_O, channel_scale_O, group_size, folded, amplifier)
