"""Integers of a few bits in int32 words, as checkpoints store them.

Values are packed along the last dimension, little-endian: the first value sits in the lowest bits of the first word.
Two layouts exist for widths that do not divide 32 (they are one and the same for 2, 4 and 8 bits):

* ``dense``: a continuous bit stream, values may straddle two words (GPTQ, and compressed-tensors since 0.18);
* ``aligned``: ``32 // bits`` values per word, the high bits of each word stay empty (compressed-tensors before that).

The last word is padded with zero bits.
"""

from __future__ import annotations

from math import lcm
from typing import Literal

import torch
from torch import Tensor

from finescale.errors import InputError

Layout = Literal["dense", "aligned"]


def _period(bits: int, layout: Layout) -> tuple[int, int]:
    """(values, words) after which the pattern of a layout repeats."""
    if not 1 <= bits <= 8:
        raise InputError(f"cannot pack {bits}-bit values; choose a width from 1 to 8 bits.")
    if layout == "aligned":
        return 32 // bits, 1
    if layout == "dense":
        return lcm(32, bits) // bits, lcm(32, bits) // 32
    raise InputError(f"unknown packing layout {layout!r}; choose dense or aligned.")


def packed_words(count: int, bits: int, layout: Layout = "dense") -> int:
    """Number of int32 words that ``count`` values take along the packed dimension."""
    values, words = _period(bits, layout)
    return -(-count * bits // 32) if layout == "dense" else -(-count // values) * words


def pack_rows(codes: Tensor, bits: int, layout: Layout = "dense") -> Tensor:
    """Pack unsigned values along the last dimension.

    Args:
        codes: integers in ``[0, 2**bits - 1]``, any shape ``[..., n]`` and integer dtype; higher bits are ignored.
        bits: width of a value, 1 to 8.
        layout: see the head of this file.

    Returns:
        int32 ``[..., packed_words(n, bits, layout)]``, contiguous.
    """
    values, words = _period(bits, layout)
    count = codes.shape[-1]
    periods = -(-count // values)
    padded = torch.nn.functional.pad(codes, (0, periods * values - count)).unflatten(-1, (periods, values))
    packed = torch.zeros(*codes.shape[:-1], periods, words, dtype=torch.int32, device=codes.device)
    # One strided pass per position in the period, so that no int32 copy of all values ever exists.
    for position in range(values):
        word, offset = divmod(position * bits, 32)
        value = padded[..., position].to(torch.int32) & ((1 << bits) - 1)
        packed[..., word] |= value << offset
        if offset + bits > 32:
            packed[..., word + 1] |= value >> (32 - offset)
    return packed.flatten(-2)[..., : packed_words(count, bits, layout)].contiguous()


def unpack_rows(words: Tensor, bits: int, count: int, layout: Layout = "dense") -> Tensor:
    """The first ``count`` values of each row of int32 words, uint8 ``[..., count]``; inverse of `pack_rows`.

    Raises:
        InputError: the rows hold fewer than ``count`` values.
    """
    values, words_per_period = _period(bits, layout)
    have, need = words.shape[-1], packed_words(count, bits, layout)
    if have < need:
        raise InputError(f"{count} values of {bits} bits need {need} words a row but there are {have}.")
    periods = -(-count // values)
    grouped = torch.nn.functional.pad(words[..., :need], (0, periods * words_per_period - need))
    grouped = grouped.unflatten(-1, (periods, words_per_period))
    unpacked = torch.empty(*words.shape[:-1], periods, values, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for position in range(values):
        word, offset = divmod(position * bits, 32)
        # The shift of a negative int32 drags the sign bit in from the left; the mask removes what it dragged in,
        # except for a value that straddles two words, whose low part is masked to its own width first.
        value = grouped[..., word] >> offset
        if offset + bits > 32:
            low = 32 - offset
            value = (value & ((1 << low) - 1)) | (grouped[..., word + 1] << low)
        unpacked[..., position] = (value & mask).to(torch.uint8)
    return unpacked.flatten(-2)[..., :count].contiguous()


def to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``code + 2**(bits-1)`` for signed codes on the range of ``bits``."""
    return (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def to_signed(values: Tensor, bits: int) -> Tensor:
    """int8 ``value - 2**(bits-1)``; inverse of `to_unsigned`."""
    if values.dtype == torch.uint8:  # modulo 256: no wider copy
        return (values - (1 << (bits - 1))).view(torch.int8)
    return (values.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
