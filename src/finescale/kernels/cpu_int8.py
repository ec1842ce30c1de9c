"""The exact integer-scale product on a CPU, by its int8 instructions through torch (oneDNN).

Two ways to have scales of groups and one int8 product without groups; both add in int32 modulo 2^32, and the proof that
the whole sum fits int32 makes the result exact:

- few tokens: the inputs of each group, the others zero, are a column of their own, so that the product gives the sums
  of groups, which scales then multiply. Codes are read once, a byte each.
- many tokens, and small layers: code times scale is written in balanced digits to base 256, each an int8 matrix, once
  at load; y = sum over digits d of 256^d * (x @ digit_d). One digit where all products fit int8, as with folded scales.

The weight is the left operand, so that it is read as it lies in memory, without reordering. Calls into torch are few,
since each costs microseconds, a small layer some tens of them.

Shape legend: T tokens, I inputs, O outputs, G groups, D digits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finescale.errors import InputError

FEW_COLUMNS = 48
"""Tokens times groups up to which columns of groups beat digits (576 to 4096 inputs, AMX)."""
SMALL_LAYER = 2**18
"""Weights up to which digits, with fewer calls into torch, are as fast for few tokens too."""
MANY_TOKENS = 64
"""From here on the weight is the right operand: reordering it costs less than turning the result."""
_TINY = torch.finfo(torch.float32).tiny


class CpuWeight(NamedTuple):
    """What a layer keeps; ``codes_OI``, ``scale_OG`` and ``member_GI`` (1 where an input belongs to a group) for few
    tokens, ``digit_DOI`` for many. One of the two ways is None where the other is as good for all.
    """

    codes_OI: Tensor | None
    scale_OG: Tensor | None
    member_GI: Tensor | None
    digit_DOI: Tensor | None


@functools.cache
def int8_product_is_exact() -> bool:
    """Whether torch's int8 product adds in 32 bits here.

    It does on processors with int8 dot products (AVX-VNNI, AVX512-VNNI, AMX). On older ones oneDNN adds pairs in 16
    bits, which saturate; hence this test at the bounds, over sizes that take different ways through the library.
    """
    for tokens, outputs, inputs in ((1, 576, 576), (2, 3, 37), (16, 64, 128), (70, 130, 260)):
        weight_OI = torch.full((outputs, inputs), -128, dtype=torch.int8)
        weight_OI[::2] = 127
        for code in (127, -127):
            x_TI = torch.full((tokens, inputs), code, dtype=torch.int8)
            expected_OT = code * weight_OI.to(torch.int32).sum(1, keepdim=True).expand(-1, tokens)
            try:
                product_OT = torch._int_mm(weight_OI, x_TI.T)
            except RuntimeError:
                return False
            if not torch.equal(product_OT, expected_OT.to(torch.int32)):
                return False
    return True


def pack_weight(codes_OI: Tensor, integer_scale_OG: Tensor, group_of_I: Tensor) -> CpuWeight:
    """A layer for ``product``.

    Args:
        codes_OI: int8.
        integer_scale_OG: integers whose overflow bound is proved.
        group_of_I: the group of each input, in any order.

    Raises:
        InputError: shapes that do not fit together.
    """
    outputs, inputs = codes_OI.shape
    groups = integer_scale_OG.shape[1]
    if integer_scale_OG.shape[0] != outputs or tuple(group_of_I.shape) != (inputs,):
        raise InputError(
            f"codes [{outputs}, {inputs}], scales {list(integer_scale_OG.shape)} and groups of "
            f"{list(group_of_I.shape)} inputs must be [O, I], [O, G] and [I]."
        )
    codes_OI, scale_OG = codes_OI.to(torch.int8).contiguous(), integer_scale_OG.to(torch.int32).contiguous()
    member_GI = (group_of_I == torch.arange(groups)[:, None]).to(torch.int8)
    if groups == 1:
        return CpuWeight(codes_OI, scale_OG, member_GI, None)
    digit_DOI = _digits(codes_OI.to(torch.int32) * scale_OG[:, group_of_I])
    if digit_DOI.shape[0] == 1:
        return CpuWeight(None, None, None, digit_DOI)
    return CpuWeight(codes_OI, scale_OG, member_GI, digit_DOI)


def joined(weights: Sequence[CpuWeight]) -> CpuWeight | None:
    """Layers of one input as one, their outputs one after the other; None if they have no way to multiply in common."""
    digits = [weight.digit_DOI for weight in weights if weight.digit_DOI is not None]
    digit_DOI = None
    if len(digits) == len(weights):
        most = max(each.shape[0] for each in digits)
        digit_DOI = torch.cat([torch.cat([d, d.new_zeros(most - d.shape[0], *d.shape[1:])]) for d in digits], 1)
    members = [weight.member_GI for weight in weights if weight.member_GI is not None]
    if len(members) == len(weights) and all(torch.equal(each, members[0]) for each in members[1:]):
        codes_OI = torch.cat([weight.codes_OI for weight in weights if weight.codes_OI is not None])
        scale_OG = torch.cat([weight.scale_OG for weight in weights if weight.scale_OG is not None])
        return CpuWeight(codes_OI, scale_OG, members[0], digit_DOI)
    return None if digit_DOI is None else CpuWeight(None, None, None, digit_DOI)


def rows_of(weight: CpuWeight, rows: slice) -> CpuWeight:
    """Some outputs of a layer."""
    codes_OI, scale_OG, member_GI, digit_DOI = weight
    return CpuWeight(
        None if codes_OI is None else codes_OI[rows],
        None if scale_OG is None else scale_OG[rows],
        member_GI,
        None if digit_DOI is None else digit_DOI[:, rows],
    )


def _digits(wide_OI: Tensor) -> Tensor:
    """Balanced digits to base 256, from -128 to 127, the lowest first, int8 [D, O, I]."""
    digits: list[Tensor] = []
    while not digits or bool(wide_OI.any()):
        low_OI = ((wide_OI + 128) & 255) - 128
        digits.append(low_OI.to(torch.int8))
        wide_OI = (wide_OI - low_OI) >> 8
    return torch.stack(digits)


def _multiply(left_AI: Tensor, right_BI: Tensor) -> Tensor:
    """int8 by int8, int32 [A, B]."""
    if left_AI.shape[1] == 1:  # torch 2.13 returns memory it never wrote
        return left_AI.to(torch.int32) * right_BI.T.to(torch.int32)
    return torch._int_mm(left_AI, right_BI.T)


def product(x_TI: Tensor, weight: CpuWeight) -> Tensor:
    """The int32 sums [T, O] of int8 activations, T at least 1."""
    tokens, inputs = x_TI.shape
    codes_OI, scale_OG, member_GI, digit_DOI = weight
    if codes_OI is not None and scale_OG is not None and member_GI is not None:
        groups = scale_OG.shape[1]
        if groups == 1:
            return _multiply(codes_OI, x_TI).mul_(scale_OG).T
        if digit_DOI is None or (tokens * groups <= FEW_COLUMNS and codes_OI.numel() > SMALL_LAYER):
            columns_GTI = x_TI * member_GI[:, None]
            sums_OGT = _multiply(codes_OI, columns_GTI.view(-1, inputs)).view(-1, groups, tokens)
            return sums_OGT.mul_(scale_OG[:, :, None]).sum(1, dtype=torch.int32).T
    assert digit_DOI is not None
    return _by_digits(x_TI, digit_DOI)


def _by_digits(x_TI: Tensor, digit_DOI: Tensor) -> Tensor:
    """int32 [T, O]."""
    outputs = digit_DOI.shape[1]
    stacked = digit_DOI.reshape(-1, x_TI.shape[1])
    if x_TI.shape[0] >= MANY_TOKENS:
        *lower, total = _multiply(x_TI, stacked).split(outputs, 1)
    else:
        *lower, total = _multiply(stacked, x_TI).split(outputs)
    for digit in reversed(lower):
        total = digit.add_(total, alpha=256)  # in place: new memory costs more than the sum
    return total if x_TI.shape[0] >= MANY_TOKENS else total.T


def _quantize(x_TI: Tensor, code_max: int) -> tuple[Tensor, Tensor | float]:
    """`quantize_tokens` in fewer calls: the same codes, the same scales but for tokens of zeros, where none counts.

    The scale of a single token is a number: a float64 quotient that torch rounds to float32 is what a float32 division
    gives.
    """
    scale: Tensor | float
    if x_TI.shape[0] == 1:
        scale = max(x_TI.abs().amax().item() / code_max, _TINY)
    else:
        scale = x_TI.abs().amax(-1, keepdim=True).div_(code_max).clamp_(min=_TINY)
    return x_TI.div(scale).round_().to(torch.int8), scale


torch.library.define(
    "finescale::cpu_int8_linear",
    "(Tensor x_TI, Tensor? codes_OI, Tensor? scale_OG, Tensor? member_GI, Tensor? digit_DOI, Tensor? bias_O, "
    "Tensor? channel_scale_O, int amplifier, int bits) -> Tensor",
)


def _linear(
    x_TI: Tensor,
    codes_OI: Tensor | None,
    scale_OG: Tensor | None,
    member_GI: Tensor | None,
    digit_DOI: Tensor | None,
    bias_O: Tensor | None,
    channel_scale_O: Tensor | None,
    amplifier: int,
    bits: int,
) -> Tensor:
    weight = CpuWeight(codes_OI, scale_OG, member_GI, digit_DOI)
    outputs, inputs = _shape(weight)
    if x_TI.dim() != 2 or x_TI.shape[1] != inputs or not x_TI.is_floating_point():
        raise InputError(f"activations {list(x_TI.shape)} of {x_TI.dtype} must be float [T, {inputs}].")
    for name, tensor in (("bias", bias_O), ("channel scale", channel_scale_O)):
        if tensor is not None and (tuple(tensor.shape) != (outputs,) or tensor.dtype != torch.float32):
            raise InputError(f"the {name} must be float32 [{outputs}].")
    if x_TI.shape[0] == 0 or outputs == 0:
        return x_TI.new_empty(x_TI.shape[0], outputs)
    codes_TI, scale = _quantize(x_TI.float(), 2 ** (bits - 1) - 1)
    # As in the reference: a power of two divides without rounding, then one conversion to float32 and one product.
    out_TO = product(codes_TI, weight).mul(scale / amplifier)
    if channel_scale_O is not None:
        out_TO *= channel_scale_O
    if bias_O is not None:
        out_TO += bias_O
    return out_TO.to(x_TI.dtype).contiguous()


torch.library.impl("finescale::cpu_int8_linear", "cpu", _linear)


@torch.library.register_fake("finescale::cpu_int8_linear")
def _(
    x_TI: Tensor,
    codes_OI: Tensor | None,
    scale_OG: Tensor | None,
    member_GI: Tensor | None,
    digit_DOI: Tensor | None,
    bias_O: Tensor | None,
    channel_scale_O: Tensor | None,
    amplifier: int,
    bits: int,
) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], _shape(CpuWeight(codes_OI, scale_OG, member_GI, digit_DOI))[0])


def _shape(weight: CpuWeight) -> tuple[int, int]:
    """Outputs and inputs."""
    tensor = weight.codes_OI if weight.codes_OI is not None else weight.digit_DOI
    if tensor is None:
        raise InputError("a layer without weights; make it with cpu_int8.pack_weight.")
    return tensor.shape[-2], tensor.shape[-1]


def cpu_linear(
    x_TI: Tensor,
    weight: CpuWeight,
    bias_O: Tensor | None = None,
    channel_scale_O: Tensor | None = None,
    amplifier: int = 1,
    bits: int = 8,
) -> Tensor:
    """A whole layer: tokens are rounded, multiplied, and come back in their type.

    Args:
        x_TI: float [T, I].
        weight: from ``pack_weight``.
        bias_O: float32 [O] or None, added last.
        channel_scale_O: float32 [O] or None, multiplies each output.
        amplifier: the power of two the scales were multiplied by.
        bits: of the activations.

    Returns:
        [T, O], the same bits as ``integer_scale_linear`` of the same codes.

    Raises:
        InputError: shapes or types that do not fit together.
    """
    # A sixth of the time of a small layer is torch's own when an operator is written in Python.
    if torch.compiler.is_compiling() or x_TI.requires_grad:
        return torch.ops.finescale.cpu_int8_linear.default(x_TI, *weight, bias_O, channel_scale_O, amplifier, bits)
    return _linear(x_TI, *weight, bias_O, channel_scale_O, amplifier, bits)
