"""The exact W4A8 product on any device: what every other kernel is compared with, bit for bit.

    y_TO = x_scale_T / amplifier * sum_G S_OG * (sum over the inputs k of group G of x_Tk * code_Ok)

and, where scales are folded (`finescale.grid.folded`), times the factor of each output.

Everything up to the one conversion at the end is int32 (Integer Scale, arXiv 2405.14597).
Shape legend: T tokens, I inputs, O outputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.errors import InputError

_EXACT_FLOAT32 = 2**24
"""Integers up to here add up in float32 without rounding, in any order."""
_LARGEST_PRODUCT = 127 * 128


def grouped_int32_product(x_TI: Tensor, codes_OI: Tensor, integer_scale_OG: Tensor, group_size: int) -> Tensor:
    """The int32 accumulator [T, O], exact as long as the layer's overflow bound holds.

    The product of one group runs in floating point where that is exact: float32 up to 1032 inputs a group
    (127 * 128 * 1032 < 2^24), float64 above. int32 sums wrap around, as they do in hardware.
    """
    columns = codes_OI.shape[1]
    size = columns if group_size == -1 else group_size
    dtype = torch.float32 if size * _LARGEST_PRODUCT <= _EXACT_FLOAT32 else torch.float64
    total_TO = torch.zeros(x_TI.shape[0], codes_OI.shape[0], dtype=torch.int32, device=x_TI.device)
    for group, start in enumerate(range(0, columns, max(size, 1))):
        part = slice(start, min(start + size, columns))
        with torch.autocast(x_TI.device.type, enabled=False):  # which would round the codes' sums
            partial_TO = (x_TI[:, part].to(dtype) @ codes_OI[:, part].to(dtype).T).to(torch.int32)
        total_TO += partial_TO * integer_scale_OG[:, group]
    return total_TO


@torch.library.custom_op("finescale::integer_scale_linear", mutates_args=())
def integer_scale_linear(
    x_TI: Tensor,
    x_scale_T1: Tensor,
    codes_OI: Tensor,
    integer_scale_OG: Tensor,
    group_size: int,
    amplifier: int,
    channel_scale_O: Tensor | None = None,
) -> Tensor:
    """The quantized product, float32 [T, O].

    Args:
        x_TI: int8 [T, I] activation codes in [-127, 127].
        x_scale_T1: float32 [T, 1] token scales.
        codes_OI: int8 [O, I] weight codes.
        integer_scale_OG: int32 [O, G] scales times the amplifier.
        group_size: inputs of a group, -1 for all; the last group may be ragged.
        amplifier: the power of two the scales were multiplied by.
        channel_scale_O: float32 [O], multiplies each output, or None.

    Raises:
        InputError: shapes or types that do not fit together.
    """
    _check(x_TI, x_scale_T1, codes_OI, integer_scale_OG, group_size, amplifier, channel_scale_O)
    total_TO = grouped_int32_product(x_TI, codes_OI, integer_scale_OG, group_size)
    # A power of two divides without rounding; one conversion and one product are all the floating point there is.
    out_TO = total_TO.to(torch.float32) * (x_scale_T1 / amplifier)
    return out_TO if channel_scale_O is None else out_TO * channel_scale_O


@integer_scale_linear.register_fake
def _(
    x_TI: Tensor,
    x_scale_T1: Tensor,
    codes_OI: Tensor,
    integer_scale_OG: Tensor,
    group_size: int,
    amplifier: int,
    channel_scale_O: Tensor | None = None,
) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], codes_OI.shape[0], dtype=torch.float32)


def _check(
    x_TI: Tensor,
    x_scale_T1: Tensor,
    codes_OI: Tensor,
    integer_scale_OG: Tensor,
    group_size: int,
    amplifier: int,
    channel_scale_O: Tensor | None,
) -> None:
    if x_TI.dim() != 2 or codes_OI.dim() != 2 or x_TI.shape[1] != codes_OI.shape[1]:
        raise InputError(
            f"activations {tuple(x_TI.shape)} and codes {tuple(codes_OI.shape)} must be [T, I] and [O, I] with one I."
        )
    if x_TI.dtype != torch.int8 or codes_OI.dtype != torch.int8 or integer_scale_OG.dtype != torch.int32:
        raise InputError("integer_scale_linear takes int8 activations, int8 codes and int32 scales.")
    columns = codes_OI.shape[1]
    if group_size != -1 and group_size < 1:
        raise InputError(f"group_size is {group_size}; use -1 (all inputs) or a positive number.")
    groups = 1 if group_size == -1 else -(-columns // group_size)
    if tuple(integer_scale_OG.shape) != (codes_OI.shape[0], groups):
        raise InputError(
            f"scales {tuple(integer_scale_OG.shape)} must be [{codes_OI.shape[0]}, {groups}] "
            f"for groups of {group_size}."
        )
    if tuple(x_scale_T1.shape) != (x_TI.shape[0], 1) or x_scale_T1.dtype != torch.float32:
        raise InputError(
            f"token scales {tuple(x_scale_T1.shape)} of {x_scale_T1.dtype} must be float32 [{x_TI.shape[0]}, 1]."
        )
    if amplifier < 1 or amplifier & (amplifier - 1):
        raise InputError(f"the amplifier {amplifier} must be a power of two.")
    if channel_scale_O is not None and (
        tuple(channel_scale_O.shape) != (codes_OI.shape[0],) or channel_scale_O.dtype != torch.float32
    ):
        raise InputError(f"channel scales {tuple(channel_scale_O.shape)} must be float32 [{codes_OI.shape[0]}].")
