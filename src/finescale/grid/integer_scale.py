"""Integer scales for fine-grained W4A8 (Integer Scale, arXiv 2405.14597) and the proof that int32 cannot overflow.

With S = round(amplifier * scale) the whole sum over the inputs stays in int32:

    y_TO = x_scale_T / amplifier * sum_G S_OG * (sum over the inputs k of group G of x_Tk * code_Ok)

Folded scales have S of at most 15 and one float factor c per output instead of the amplifier: scale_OG = c_O * S_OG.
A 4-bit code times S then fits int8, so that a kernel can multiply S into the weights and needs no second accumulator.

Shape legend: O outputs, I inputs, G groups, T tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from finescale.errors import InputError, NumericsError

INT32_LIMIT = 2**31
LARGEST_AMPLIFIER = 2**24
LARGEST_INTEGER_SCALE = 2**15 - 1
"""Kernels hold S in 16 bits."""
LARGEST_FOLDED_SCALE = 15
"""4-bit codes, -8 to 7, times S lie in -120 to 105: int8."""

_NOT_FOLDED = (
    f"the scales of an output are not integers up to {LARGEST_FOLDED_SCALE} times one factor; quantize the model again."
)

ELEMENTS_AT_ONCE = 2**20
"""Codes that are widened at a time."""
Amplifier = int | Literal["heuristic", "auto"]


def significand_bits(dtype: torch.dtype) -> int:
    """Bits of precision of a float type, the hidden one included: 24 float32, 11 float16, 8 bfloat16."""
    return 1 - int(math.log2(torch.finfo(dtype).eps))


def check_amplifier(amplifier: int) -> None:
    """Raises InputError unless ``amplifier`` is a power of two from 1 to 2**24."""
    if amplifier < 1 or amplifier > LARGEST_AMPLIFIER or amplifier & (amplifier - 1):
        raise InputError(
            f"integer_scale.amplifier is {amplifier}; use a power of two from 1 to {LARGEST_AMPLIFIER}, "
            "heuristic or auto."
        )


def heuristic_amplifier(scale_OG: Tensor) -> int:
    """The paper's heuristic: the smallest power of two that lifts the smallest scale to at least 1.

    The published loop returns 1/2 when every scale is already at least 1; this one never goes below 1
    (arXiv 2405.14597, section on the adaptive amplifier). Scales that even 2**24 barely lifts belong to groups of zeros
    and do not count.

    Raises:
        NumericsError: a scale that is not positive and finite.
    """
    if not bool((scale_OG > 0).all()) or not bool(torch.isfinite(scale_OG).all()):
        raise NumericsError("group scales must be positive and finite before they become integers.")
    counted = scale_OG[scale_OG > 1 / LARGEST_AMPLIFIER]
    smallest = float(counted.min()) if counted.numel() else 1.0
    exponent = max(0, math.ceil(-math.log2(smallest)))
    while exponent > 0 and smallest * 2.0 ** (exponent - 1) >= 1:
        exponent -= 1
    while smallest * 2.0**exponent < 1:
        exponent += 1
    return int(min(2**exponent, LARGEST_AMPLIFIER))


def integer_scales(scale_OG: Tensor, amplifier: int, scale_dtype: torch.dtype, check: bool = True) -> Tensor:
    """S = round(amplifier * scale), at least 1, as int32 [O, G].

    S is rounded to the significant bits of ``scale_dtype`` so that S / amplifier is stored without error
    (bfloat16 holds 8 bits, float16 11). Without ``check`` the caller knows, or will see, that they fit int32.

    Raises:
        NumericsError: an S of 2**31 or more.
    """
    target_OG = (scale_OG.double() * amplifier).round().clamp(min=1)
    excess_OG = torch.clamp(torch.floor(torch.log2(target_OG)) + 1 - significand_bits(scale_dtype), min=0)
    step_OG = power_of_two(excess_OG)
    # A value like 255.6 rounds up to 256 inside its own binade, which is still representable.
    integer_OG = (target_OG / step_OG).round() * step_OG
    if check and bool((integer_OG >= INT32_LIMIT).any()):
        raise NumericsError(f"an amplifier of {amplifier} lifts a scale over 2^31; use a smaller amplifier or auto.")
    return integer_OG.to(torch.int32)


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to a whole exponent from -1022 to 1023, float64, made of its bits: pow on a GPU is not exact."""
    return (exponent.long() + 1023 << 52).view(torch.float64)


def common_factor(scale_OG: Tensor) -> Tensor:
    """The greatest c_O such that scale_OG = c_O * S_OG with integers S, float32 [O]; exact.

    Floats are integers times a power of two, so that their greatest common divisor always exists. Folded scales are
    stored as they are, and their factor is found again by this.

    Raises:
        NumericsError: in some row S exceeds 15, or a scale is not a positive number: these scales are not folded.
    """
    if not bool((scale_OG > 0).all()) or not bool(torch.isfinite(scale_OG).all()):
        raise NumericsError("folded scales must be positive and finite; quantize the model again.")
    _, exponent_OG = torch.frexp(scale_OG.double())
    # Every scale of a row is a whole number of the last bits of its smallest one.
    least_O1 = exponent_OG.amin(1, keepdim=True) - 24
    whole_OG = scale_OG.double() * power_of_two(-least_O1)
    if bool((whole_OG.amax(1) > LARGEST_FOLDED_SCALE * whole_OG.amin(1)).any()):
        raise NumericsError(_NOT_FOLDED)
    whole_OG = whole_OG.to(torch.int64)
    divisor_O = whole_OG[:, 0]
    for whole_O in whole_OG.unbind(1)[1:]:
        divisor_O = torch.gcd(divisor_O, whole_O)
    if bool((whole_OG > LARGEST_FOLDED_SCALE * divisor_O[:, None]).any()):
        raise NumericsError(_NOT_FOLDED)
    return (divisor_O.double() * power_of_two(least_O1[:, 0])).float()


def group_absolute_sums(codes_OI: Tensor, group_of_I: Tensor, groups: int) -> Tensor:
    """sum over each group of |code|, int64 [O, G]."""
    inputs = codes_OI.shape[1]
    size = inputs // max(groups, 1)
    beside_I = torch.arange(inputs, device=group_of_I.device) // max(size, 1)
    if 0 < size * groups == inputs and torch.equal(group_of_I, beside_I):
        # Groups side by side, as nearly always: three times as fast; 32 bits hold the sums of 2^24 codes. Some rows at
        # a time, so that no wide copy of all codes exists.
        parts = codes_OI.split(max(1, ELEMENTS_AT_ONCE // max(inputs, 1)))
        wide = (part.to(torch.int32).abs_().unflatten(1, (groups, size)).sum(-1, dtype=torch.int32) for part in parts)
        return torch.cat(list(wide)).to(torch.int64)
    sums_OG = torch.zeros(codes_OI.shape[0], groups, dtype=torch.int64, device=codes_OI.device)
    return sums_OG.index_add_(1, group_of_I, codes_OI.to(torch.int64).abs())


def overflow_bound(codes_OI: Tensor, integer_scale_OG: Tensor, group_of_I: Tensor, activation_max: int = 127) -> Tensor:
    """B_j = activation_max * sum_g S_gj * sum_{k in g} |code_kj|, int64 [O].

    No int32 accumulator of output j can exceed B_j in magnitude, whatever the activations in
    [-activation_max, activation_max] and whatever the order of summation.
    """
    sums_OG = group_absolute_sums(codes_OI, group_of_I, integer_scale_OG.shape[1])
    return activation_max * (integer_scale_OG.to(torch.int64) * sums_OG).sum(1)


def auto_amplifier(
    scale_OG: Tensor,
    absolute_sum_OG: Tensor,
    scale_dtype: torch.dtype,
    activation_max: int = 127,
    largest_scale: int = LARGEST_INTEGER_SCALE,
) -> int:
    """The largest power of two whose exact bound stays under 2**31 for every output, with S in 16 bits.

    Args:
        scale_OG: float scales, positive.
        absolute_sum_OG: sums of |code| per group (``group_absolute_sums``).
        scale_dtype: type in which S / amplifier is stored.
        activation_max: largest activation magnitude.
        largest_scale: largest S the kernels hold.

    Raises:
        NumericsError: not even an amplifier of 1 fits.
    """
    amplifier = LARGEST_AMPLIFIER
    while amplifier >= 1:
        if float(scale_OG.max()) * amplifier < INT32_LIMIT / 2:
            integer_OG = integer_scales(scale_OG, amplifier, scale_dtype).to(torch.int64)
            bound = int((activation_max * (integer_OG * absolute_sum_OG).sum(1)).max())
            if bound < INT32_LIMIT and int(integer_OG.max()) <= largest_scale:
                return amplifier
        amplifier //= 2
    raise NumericsError(
        "no integer amplifier keeps this layer inside int32; use float scales (integer_scale.mode off)."
    )


def prove_no_overflow(
    name: str, codes_OI: Tensor, integer_scale_OG: Tensor, group_of_I: Tensor, activation_max: int = 127
) -> int:
    """The largest bound of the layer, max_j B_j.

    Raises:
        NumericsError: the bound reaches 2**31, so that some int8 input would overflow the accumulator.
    """
    bound = int(overflow_bound(codes_OI, integer_scale_OG, group_of_I, activation_max).max()) if codes_OI.numel() else 0
    if bound >= INT32_LIMIT:
        raise NumericsError(
            f"{name}: the int32 bound is {bound / INT32_LIMIT:.2f} times 2^31; "
            "use integer_scale.amplifier auto or a smaller one."
        )
    return bound
