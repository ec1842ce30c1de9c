"""How the Hopper kernels want weights and activations to lie in memory.

Everything is cut into blocks of 128 inputs; the last one is filled up with zeros.

Weights: slabs of 64 outputs. The bytes of one slab and one block stand together, first 4096 bytes of codes, then the
scales of the block, and one bulk copy fetches them. Codes lie in the order in which the 128 threads of a warpgroup
hold the left operand of ``wgmma.m64nNk32``: thread t takes 16 bytes at 16 * t and 16 more at 2048 + 16 * t. A 32-bit
word holds eight codes of one output as ``code + 8``: bytes are four neighbouring inputs, low halves the inputs k, high
halves the inputs k + 16.

Activations: slabs of 8 tokens; 8 tokens by 128 inputs are 1024 bytes, the 16-byte pieces of token t at place
``piece xor t`` (the 128-byte swizzle). Any number of neighbouring slabs is one bulk copy.

Shape legend: O outputs, I inputs, G groups, T tokens, S slabs, B blocks of 128 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.errors import InputError

BLOCK = 128
"""Inputs of a block."""
SLAB = 64
"""Outputs of a weight slab."""
TOKEN_SLAB = 8
LARGEST_SCALE = 2**15 - 1
LARGEST_FOLDED_SCALE = 15


def groups_in_block(group_size: int) -> int:
    """Scale groups in a block of 128 inputs: 4, 2 or 1 for groups of 32, 64, or any multiple of 128 (or -1).

    Raises:
        InputError: another group size.
    """
    if group_size == -1 or (group_size > 0 and group_size % BLOCK == 0):
        return 1
    if group_size in (32, 64):
        return BLOCK // group_size
    raise InputError(f"groups of {group_size} have no packed layout; use 32, 64, a multiple of 128, or -1.")


def _padded(tensor: Tensor, dim: int, multiple: int, value: int = 0) -> Tensor:
    missing = -tensor.shape[dim] % multiple
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, value)], dim)


def pack_weight(codes_OI: Tensor, integer_scale_OG: Tensor, group_size: int) -> Tensor:
    """Codes and scales in one tensor, uint8 [S, B, 4096 + 128 * groups in a block].

    Args:
        codes_OI: int8 in [-8, 7].
        integer_scale_OG: integers in [-32767, 32767].
        group_size: inputs of a group; the last one may be ragged.

    Raises:
        InputError: a group size without this layout, values out of range, shapes that do not fit.
    """
    in_block = groups_in_block(group_size)
    outputs, inputs = codes_OI.shape
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    if tuple(integer_scale_OG.shape) != (outputs, groups):
        raise InputError(f"scales {tuple(integer_scale_OG.shape)} must be [{outputs}, {groups}].")
    if codes_OI.numel() and (int(codes_OI.min()) < -8 or int(codes_OI.max()) > 7):
        raise InputError("only 4-bit codes, from -8 to 7, can be packed for the W4A8 kernels.")
    if integer_scale_OG.numel() and int(integer_scale_OG.abs().max()) > LARGEST_SCALE:
        raise InputError(f"a scale exceeds {LARGEST_SCALE}, what the kernels hold; use a smaller amplifier or auto.")
    nibbles = _padded(_padded(codes_OI, 1, BLOCK), 0, SLAB).to(torch.int16) + 8
    slabs, blocks = nibbles.shape[0] // SLAB, nibbles.shape[1] // BLOCK
    # slab, warp, row half, row, block, step pair, step, k + 16, thread of four, byte
    nibbles = nibbles.view(slabs, 4, 2, 8, blocks, 2, 2, 2, 4, 4)
    both = (nibbles[:, :, :, :, :, :, :, 0] | nibbles[:, :, :, :, :, :, :, 1] << 4).to(torch.uint8)
    codes_SB = both.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(slabs, blocks, 4096)

    group_of_block = torch.arange(blocks * in_block, device=codes_OI.device) * (BLOCK // in_block)
    group_of_block = (group_of_block // (inputs if group_size == -1 else group_size)).clamp(max=groups - 1)
    scale = _padded(integer_scale_OG.to(torch.int16)[:, group_of_block], 0, SLAB)
    scale = scale.view(slabs, 4, 2, 8, blocks, in_block).permute(0, 4, 5, 1, 3, 2).contiguous()
    scale_SB = scale.view(torch.uint8).reshape(slabs, blocks, 128 * in_block)
    return torch.cat([codes_SB, scale_SB], -1).contiguous()


def unpack_weight(packed: Tensor, outputs: int, inputs: int, group_size: int) -> tuple[Tensor, Tensor]:
    """``pack_weight`` undone: codes int8 [O, I] and integer scales int32 [O, G]."""
    in_block = groups_in_block(group_size)
    slabs, blocks = packed.shape[:2]
    both = packed[..., :4096].reshape(slabs, blocks, 2, 4, 8, 4, 2, 2, 4).permute(0, 3, 7, 4, 1, 2, 6, 5, 8)
    nibbles = torch.stack([both & 15, both >> 4], 7)
    codes_OI = (nibbles.to(torch.int8) - 8).reshape(slabs * SLAB, blocks * BLOCK)[:outputs, :inputs]
    scale = packed[..., 4096:].contiguous().view(torch.int16).reshape(slabs, blocks, in_block, 4, 8, 2)
    scale = scale.permute(0, 3, 5, 4, 1, 2).reshape(slabs * SLAB, blocks * in_block)[:outputs].to(torch.int32)
    size = inputs if group_size == -1 else group_size
    first = torch.arange(0, inputs, size, device=packed.device) // (BLOCK // in_block)
    return codes_OI.contiguous(), scale[:, first].contiguous()


def packed_tokens_shape(tokens: int, inputs: int) -> tuple[int, int, int]:
    """[B, slabs of 8 tokens, 1024]."""
    return -(-inputs // BLOCK), -(-tokens // TOKEN_SLAB), TOKEN_SLAB * BLOCK


def empty_tokens(x: Tensor, tokens: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room on x's device for rounded tokens: packed codes int8, scales float32 [T], sums of codes int32 [T]."""
    return (
        x.new_empty(packed_tokens_shape(tokens, inputs), dtype=torch.int8),
        x.new_empty(tokens, dtype=torch.float32),
        x.new_empty(tokens, dtype=torch.int32),
    )


def pack_tokens(codes_TI: Tensor) -> Tensor:
    """int8 [T, I] activations as int8 [B, slabs, 1024], missing tokens and inputs filled with zeros."""
    padded = _padded(_padded(codes_TI, 1, BLOCK), 0, TOKEN_SLAB)
    slabs, blocks = padded.shape[0] // TOKEN_SLAB, padded.shape[1] // BLOCK
    pieces = padded.view(slabs, 8, blocks, 8, 16)
    place = torch.arange(8, device=padded.device)
    # Place p of token t holds piece p xor t.
    swizzled = pieces.gather(3, (place[None, :] ^ place[:, None]).view(1, 8, 1, 8, 1).expand(slabs, 8, blocks, 8, 16))
    return swizzled.permute(2, 0, 1, 3, 4).reshape(blocks, slabs, 1024).contiguous()


def unpack_tokens(packed: Tensor, tokens: int, inputs: int) -> Tensor:
    """``pack_tokens`` undone: int8 [T, I]."""
    blocks, slabs = packed.shape[:2]
    places = packed.view(blocks, slabs, 8, 8, 16)
    place = torch.arange(8, device=packed.device)
    pieces = places.gather(3, (place[None, :] ^ place[:, None]).view(1, 1, 8, 8, 1).expand(blocks, slabs, 8, 8, 16))
    return pieces.permute(1, 2, 0, 3, 4).reshape(slabs * 8, blocks * BLOCK)[:tokens, :inputs].contiguous()
