"""Mixtures of experts in W4A8: tokens sorted by expert, two grouped products, one sum; no padding to full tiles, no
synchronization with the host.

    out_T = sum over the choices k of token T: weight_Tk * down_e(silu(gate_e(x_T)) * up_e(x_T)),  e = expert_Tk

Rows: every choice of a token has one row. Rows of one expert stand together and begin at a multiple of 8, so that any
tile of them is one piece of the packed layout (kernels/layout.py). On a Hopper GPU that is six kernels: sort, quantize
(once a token), gate and up, silu * up and quantize, down, sum. They work under torch.compile and in CUDA graphs.
Elsewhere the same functions run the exact product expert by expert.

Shape legend: T tokens, K choices of a token, E experts, R rows sorted by expert, I inputs, F width between the two
products, O outputs, S slabs of 64 outputs, B blocks of 128 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finescale.errors import InputError
from finescale.grid import ActivationScheme, quantize_tokens
from finescale.kernels.checks import check_tensors
from finescale.kernels.dispatch import has_hopper_kernels
from finescale.kernels.hopper import grouped, quantize, routing
from finescale.kernels.layout import (
    BLOCK,
    SLAB,
    TOKEN_SLAB,
    empty_tokens,
    groups_in_block,
    pack_weight,
    unpack_weight,
)
from finescale.kernels.linear import OUT_DTYPES
from finescale.kernels.operators import operator
from finescale.kernels.reference import grouped_int32_product


class PackedExperts(NamedTuple):
    """One linear layer of every expert, as ``pack_experts`` makes it.

    Attributes:
        packed: uint8 [E, S, B, ...], each expert's ``layout.pack_weight``.
        factor_EO: float32, what an output's integer scales are to be multiplied by (1 / amplifier, times the output's
            own factor where scales are folded).
        folded: all integer scales of all experts are at most 15.
    """

    packed: Tensor
    factor_EO: Tensor
    folded: bool


def pack_experts(
    codes: Sequence[Tensor], integer_scales: Sequence[Tensor], factor_EO: Tensor, group_size: int, folded: bool
) -> PackedExperts:
    """The layers of all experts in one tensor, on the device of ``factor_EO``.

    Args:
        codes: of each expert int8 [O, I], in [-8, 7]; gate above up for the first of the two products.
        integer_scales: of each expert integers [O, G].
        factor_EO, folded: see ``PackedExperts``.
        group_size: inputs of a group.

    Raises:
        InputError: what has no packed layout (``layout.pack_weight``).
    """
    outputs, inputs = codes[0].shape
    shape = (len(codes), -(-outputs // SLAB), -(-inputs // BLOCK), 4096 + 128 * groups_in_block(group_size))
    packed = torch.empty(shape, dtype=torch.uint8, device=factor_EO.device)
    for expert, (codes_OI, scale_OG) in enumerate(zip(codes, integer_scales, strict=True)):
        packed[expert] = pack_weight(codes_OI.to(packed.device), scale_OG.to(packed.device), group_size)
    return PackedExperts(packed, factor_EO.float().contiguous(), folded)


def w4a8_experts(
    x_TI: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up: PackedExperts, down: PackedExperts
) -> Tensor:
    """The whole feed-forward of a mixture of experts, with silu, as Mixtral and Qwen-MoE have it.

    Args:
        x_TI: bfloat16, float16 or float32.
        expert_TK: int32 or int64, the experts of each token. Those outside [0, E) add nothing: experts of other ranks.
        weight_TK: float of any type, the routing weights.
        gate_up: I -> 2 F, gate first.
        down: F -> O.

    Returns:
        [T, O] in the type of ``x_TI``; sums of a token's experts are float32 and always in the order of its choices.

    Raises:
        InputError: shapes, types or devices that do not fit together.
    """
    if gate_up.factor_EO.shape[1] % 2 or -(-gate_up.factor_EO.shape[1] // 2 // BLOCK) != down.packed.shape[2]:
        raise InputError(
            f"{gate_up.factor_EO.shape[1]} outputs of gate and up do not fit {down.packed.shape[2]} blocks of down."
        )
    if not has_hopper_kernels(x_TI.device):
        return exact_experts(x_TI, expert_TK, weight_TK, gate_up, down)
    tokens, choices = expert_TK.shape
    position_TK, row_end_E = route_tokens(expert_TK.contiguous(), gate_up.packed.shape[0])
    routed = quantize_routed(x_TI.contiguous(), position_TK, "plain", gate_up.packed.shape[0])
    both_RF = w4a8_grouped_product(
        *routed, row_end_E, gate_up.packed, gate_up.factor_EO, tokens, choices, gate_up.folded, x_TI.dtype
    )
    routed = quantize_routed(both_RF, position_TK, "silu", gate_up.packed.shape[0])
    y_RO = w4a8_grouped_product(
        *routed, row_end_E, down.packed, down.factor_EO, tokens, choices, down.folded, x_TI.dtype
    )
    return combine_experts(y_RO, position_TK, weight_TK.float().contiguous())


def exact_experts(
    x_TI: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up: PackedExperts, down: PackedExperts
) -> Tensor:
    """``w4a8_experts`` on any device, expert by expert, with exact products: slow, and what the kernels must equal."""
    y_TKO = x_TI.new_zeros(*expert_TK.shape, down.factor_EO.shape[1])
    for expert in range(gate_up.packed.shape[0]):
        token_n, choice_n = torch.where(expert_TK == expert)
        if token_n.numel() == 0:
            continue
        gate_nF, up_nF = _exact_product(x_TI[token_n], gate_up, expert).chunk(2, -1)
        inner_nF = torch.nn.functional.silu(gate_nF) * up_nF
        y_TKO[token_n, choice_n] = _exact_product(inner_nF, down, expert)
    return combined(y_TKO, weight_TK)


def combined(y_TKO: Tensor, weight_TK: Tensor) -> Tensor:
    """Sum over a token's choices of output times weight, in float32 and in their order; in the type of ``y_TKO``."""
    total_TO = torch.zeros_like(y_TKO[:, 0], dtype=torch.float32)
    for choice in range(y_TKO.shape[1]):
        total_TO += y_TKO[:, choice].float() * weight_TK[:, choice, None].float()
    return total_TO.to(y_TKO.dtype)


def _exact_product(x_nI: Tensor, layer: PackedExperts, expert: int) -> Tensor:
    codes_nI, scale_n1 = quantize_tokens(x_nI, ActivationScheme(8))
    size = BLOCK * 128 // (layer.packed.shape[-1] - 4096)
    codes_OI, scale_OG = unpack_weight(layer.packed[expert], layer.factor_EO.shape[1], x_nI.shape[1], size)
    sums_nO = grouped_int32_product(codes_nI, codes_OI, scale_OG, size)
    return (sums_nO.float() * scale_n1 * layer.factor_EO[expert]).to(x_nI.dtype)


def routed_rows(tokens: int, choices: int, experts: int) -> int:
    """Rows that hold all choices of ``tokens`` tokens whoever gets them, each expert's filled up to a multiple of 8."""
    total = tokens * choices
    return (total + (TOKEN_SLAB - 1) * torch.sym_min(total, experts)) // TOKEN_SLAB * TOKEN_SLAB


def _empty_route_tokens(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return (
        expert_TK.new_empty(expert_TK.shape, dtype=torch.int32),
        expert_TK.new_empty(experts, dtype=torch.int32),
    )


@operator("route_tokens", _empty_route_tokens)
def route_tokens(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sorts the choices of tokens by expert, always in the same way.

    Args:
        expert_TK: int32 or int64, contiguous. Values outside [0, E) belong to no expert.
        experts: E.

    Returns:
        The row of each choice, int32 [T, K], -1 for no expert's; and one past the last row of each expert, int32 [E].
        An expert's first row is the end of the one before, rounded up to a multiple of 8.

    Raises:
        InputError: another type or shape, or too many experts.
    """
    if expert_TK.dim() != 2 or expert_TK.dtype not in (torch.int32, torch.int64) or not expert_TK.is_contiguous():
        raise InputError("the experts of tokens must be contiguous int32 or int64 [T, K].")
    if not 0 < experts <= routing.LARGEST_EXPERTS:
        raise InputError(f"{experts} experts cannot be routed; there may be 1 to {routing.LARGEST_EXPERTS}.")
    return routing.route(expert_TK, experts)


def _empty_quantize_routed(x: Tensor, position_TK: Tensor, kind: str, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = routed_rows(position_TK.shape[0], position_TK.shape[1], experts)
    inputs = x.shape[1] // 2 if kind == "silu" else x.shape[1]
    return empty_tokens(x, rows, inputs)


@operator("quantize_routed", _empty_quantize_routed)
def quantize_routed(x: Tensor, position_TK: Tensor, kind: str, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 rows for ``w4a8_grouped_product``, one scale a row.

    Args:
        x: bfloat16, float16 or float32, contiguous; tokens [T, I] for ``plain``, each rounded once and written to all
            its rows; rows [R, 2 * I] for ``silu``, silu(gate) * up.
        position_TK: as ``route_tokens`` gave it.
        kind: ``plain`` or ``silu``.
        experts: E.

    Returns:
        codes int8 [B, R / 8, 1024] (``layout.pack_tokens``), scales float32 [R], sums of codes int32 [R]. Rows that no
        choice has hold anything.

    Raises:
        InputError: shapes, types or devices that do not fit together.
    """
    if kind not in ("plain", "silu"):
        raise InputError(f"kind is {kind}; use plain or silu.")
    if x.dim() != 2 or x.dtype not in quantize.IN_TYPES or not x.is_contiguous():
        raise InputError("activations must be contiguous bfloat16, float16 or float32 of two dimensions.")
    _check_position(position_TK, x)
    rows = routed_rows(position_TK.shape[0], position_TK.shape[1], experts)
    expected = rows if kind == "silu" else position_TK.shape[0]
    if x.shape[0] != expected or (kind == "silu" and x.shape[1] % 2):
        raise InputError(f"activations {tuple(x.shape)} do not fit {expected} rows of {kind}.")
    return quantize.run(x, kind, position_TK=position_TK, rows=rows)


def _empty_w4a8_grouped_product(
    codes: Tensor,
    x_scale_R: Tensor,
    x_sum_R: Tensor,
    row_end_E: Tensor,
    packed: Tensor,
    factor_EO: Tensor,
    tokens: int,
    choices: int,
    folded: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_scale_R.new_empty(x_scale_R.shape[0], factor_EO.shape[1], dtype=out_dtype)


@operator("w4a8_grouped_product", _empty_w4a8_grouped_product)
def w4a8_grouped_product(
    codes: Tensor,
    x_scale_R: Tensor,
    x_sum_R: Tensor,
    row_end_E: Tensor,
    packed: Tensor,
    factor_EO: Tensor,
    tokens: int,
    choices: int,
    folded: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Y [R, O]: each expert's rows times its weight, one kernel.

    Args:
        codes, x_scale_R, x_sum_R: as ``quantize_routed`` gave them.
        row_end_E: as ``route_tokens`` gave it, by a kernel that is not the one right before this.
        packed, factor_EO, folded: of ``PackedExperts``.
        tokens, choices: T and K; the variant is chosen for them.
        out_dtype: bfloat16, float16 or float32.

    Raises:
        InputError: shapes, types or devices that do not fit together.
    """
    if packed.dim() != 4 or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise InputError("the packed weights must be contiguous uint8 of four dimensions (pack_experts).")
    experts, slabs, blocks = packed.shape[:3]
    if not 0 < experts <= routing.LARGEST_EXPERTS:
        raise InputError(f"{experts} experts cannot be multiplied; there may be 1 to {routing.LARGEST_EXPERTS}.")
    outputs = factor_EO.shape[-1]
    if not (slabs - 1) * SLAB < outputs <= slabs * SLAB:
        raise InputError(f"{outputs} outputs do not fit packed weights of {slabs} slabs of {SLAB}.")
    rows = routed_rows(tokens, choices, experts)
    if tuple(codes.shape) != (blocks, rows // TOKEN_SLAB, BLOCK * TOKEN_SLAB):
        raise InputError(f"codes {tuple(codes.shape)} do not fit {rows} rows and weights of {blocks} blocks of inputs.")
    check_tensors(
        packed.device,
        ("codes", codes, codes.shape, torch.int8),
        ("scales of rows", x_scale_R, (rows,), torch.float32),
        ("sums of codes", x_sum_R, (rows,), torch.int32),
        ("ends of rows", row_end_E, (experts,), torch.int32),
        ("factors", factor_EO, (experts, outputs), torch.float32),
    )
    if out_dtype not in OUT_DTYPES:
        raise InputError(f"out_dtype is {out_dtype}; use bfloat16, float16 or float32.")
    return grouped.run(
        codes, x_scale_R, x_sum_R, row_end_E, packed, factor_EO, outputs, tokens, choices, out_dtype, folded
    )


def _empty_combine_experts(y_RO: Tensor, position_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return y_RO.new_empty(position_TK.shape[0], y_RO.shape[1])


@operator("combine_experts", _empty_combine_experts)
def combine_experts(y_RO: Tensor, position_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """``combined`` of the rows of each token's choices.

    Args:
        y_RO: bfloat16, float16 or float32, contiguous.
        position_TK: as ``route_tokens`` gave it.
        weight_TK: float32, contiguous.

    Raises:
        InputError: shapes, types or devices that do not fit together.
    """
    if y_RO.dim() != 2 or y_RO.dtype not in OUT_DTYPES or not y_RO.is_contiguous():
        raise InputError("rows must be contiguous bfloat16, float16 or float32 [R, O].")
    _check_position(position_TK, y_RO)
    check_tensors(y_RO.device, ("routing weights", weight_TK, position_TK.shape, torch.float32))
    return routing.combine(y_RO, position_TK, weight_TK)


def _check_position(position_TK: Tensor, other: Tensor) -> None:
    if position_TK.dim() != 2:
        raise InputError("rows of choices must be int32 [T, K], as route_tokens gives them.")
    check_tensors(other.device, ("rows of choices", position_TK, position_TK.shape, torch.int32))
