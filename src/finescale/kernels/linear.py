"""W4A8 linear layers as torch custom ops, for layers packed once (kernels/layout.py) on a Hopper GPU.

They work under torch.compile and in CUDA graphs, on any stream, and validate what they are given. On a CPU they run in
plain torch (`kernels.plain`), to compare with.

Shape legend: T tokens, I inputs, O outputs, S slabs of 64 outputs, B blocks of 128 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.errors import InputError
from finescale.kernels import plain
from finescale.kernels.checks import check_tensors
from finescale.kernels.gather import GatherTable, quantize_gathered
from finescale.kernels.hopper import gemm, quantize
from finescale.kernels.layout import BLOCK, SLAB, empty_tokens, packed_tokens_shape
from finescale.kernels.operators import operator

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _empty_tokens(
    x_TI: Tensor,
    kind: str,
    residual_TI: Tensor | None,
    gain_I: Tensor | None,
    shift_I: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_tokens(x_TI, x_TI.shape[0], x_TI.shape[1] // 2 if kind == "silu" else x_TI.shape[1])


@operator("quantize_tokens", _empty_tokens, mutates=("residual_TI",), cpu=plain.quantize_tokens)
def quantize_tokens(
    x_TI: Tensor,
    kind: str,
    residual_TI: Tensor | None,
    gain_I: Tensor | None,
    shift_I: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 activations for ``w4a8_product``, one scale a token, with what stands before them in the same kernel.

    Args:
        x_TI: bfloat16, float16 or float32 [T, I], contiguous; [T, 2 * I] for ``silu`` (gate, then up).
        kind: ``plain``; ``rms`` or ``layer``, a norm; ``silu``, silu(gate) * up.
        residual_TI: added to x before the norm, and replaced by the sum; None for nothing.
        gain_I: of the norm, in the type of x.
        shift_I: of the layer norm, or None.
        epsilon: of the norm.

    Returns:
        codes int8 [B, ceil(T / 8), 1024] (``layout.pack_tokens``), scales float32 [T], sums of codes int32 [T].

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    check_tokens(x_TI, kind, residual_TI, gain_I, shift_I)
    return quantize.run(x_TI, kind, residual_TI, gain_I, shift_I, epsilon)


def check_tokens(
    x_TI: Tensor, kind: str, residual_TI: Tensor | None, gain_I: Tensor | None, shift_I: Tensor | None
) -> None:
    """Raises InputError where arguments of ``quantize_tokens`` do not fit together."""
    inputs = x_TI.shape[1] // 2 if kind == "silu" else x_TI.shape[1]
    if kind not in quantize.KINDS:
        raise InputError(f"kind is {kind}; use one of {', '.join(quantize.KINDS)}.")
    if x_TI.dim() != 2 or x_TI.dtype not in quantize.IN_TYPES or not x_TI.is_contiguous():
        raise InputError("activations must be contiguous bfloat16, float16 or float32 [T, I].")
    if (gain_I is None) != (kind not in ("rms", "layer")):
        raise InputError(f"a gain belongs to a norm, not to {kind}.")
    check_tensors(
        x_TI.device,
        ("a residual", residual_TI, (x_TI.shape[0], inputs), x_TI.dtype),
        ("a gain", gain_I, (inputs,), x_TI.dtype),
        ("a shift", shift_I, (inputs,), x_TI.dtype),
    )


def _empty_product(
    codes: Tensor,
    x_scale_T: Tensor,
    x_sum_T: Tensor,
    packed_weight: Tensor,
    bias_O: Tensor | None,
    channel_scale_O: Tensor | None,
    outputs: int,
    amplifier: int,
    folded: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_scale_T.new_empty(x_scale_T.shape[0], outputs, dtype=out_dtype)


@operator("w4a8_product", _empty_product, cpu=plain.w4a8_product)
def w4a8_product(
    codes: Tensor,
    x_scale_T: Tensor,
    x_sum_T: Tensor,
    packed_weight: Tensor,
    bias_O: Tensor | None,
    channel_scale_O: Tensor | None,
    outputs: int,
    amplifier: int,
    folded: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Y [T, O] of what ``quantize_tokens`` gave and a packed weight, one kernel.

    Args:
        codes, x_scale_T, x_sum_T: quantized activations.
        packed_weight: uint8 [S, B, ...] (``layout.pack_weight``).
        bias_O: float32 or None.
        channel_scale_O: float32, multiplies each output before the bias; None for ones.
        outputs: O.
        amplifier: what scales were multiplied by.
        folded: all integer scales are at most 15, and may be multiplied into the weights.
        out_dtype: bfloat16, float16 or float32.

    Raises:
        InputError: shapes, types or devices that do not fit together.
    """
    if packed_weight.dim() != 3 or packed_weight.dtype != torch.uint8 or not packed_weight.is_contiguous():
        raise InputError("the packed weight must be contiguous uint8 of three dimensions (layout.pack_weight).")
    if codes.dim() != 3 or codes.shape[0] != packed_weight.shape[1]:
        raise InputError(
            f"activations of {codes.shape[0] * BLOCK} inputs do not fit a weight of {packed_weight.shape[1] * BLOCK}."
        )
    if not (packed_weight.shape[0] - 1) * SLAB < outputs <= packed_weight.shape[0] * SLAB:
        raise InputError(f"{outputs} outputs do not fit a packed weight of {packed_weight.shape[0]} slabs of {SLAB}.")
    if out_dtype not in OUT_DTYPES:
        raise InputError(f"out_dtype is {out_dtype}; use bfloat16, float16 or float32.")
    tokens = x_scale_T.numel()
    check_tensors(
        packed_weight.device,
        ("token scales", x_scale_T, (tokens,), torch.float32),
        ("sums of codes", x_sum_T, (tokens,), torch.int32),
        (f"codes of {tokens} tokens", codes, packed_tokens_shape(tokens, codes.shape[0] * BLOCK), torch.int8),
        ("a bias", bias_O, (outputs,), torch.float32),
        ("a channel scale", channel_scale_O, (outputs,), torch.float32),
    )
    return gemm.run(
        codes,
        x_scale_T,
        x_sum_T,
        packed_weight,
        tokens,
        outputs,
        amplifier,
        bias_O,
        out_dtype,
        folded,
        channel_scale_O=channel_scale_O,
    )


def w4a8_linear(
    x_TI: Tensor,
    packed_weight: Tensor,
    bias_O: Tensor | None,
    channel_scale_O: Tensor | None,
    outputs: int,
    amplifier: int,
    folded: bool,
    gather: GatherTable | None = None,
) -> Tensor:
    """A whole layer: inputs of any float type are rounded, multiplied, and come back in their type.

    Args:
        x_TI: [..., I].
        packed_weight, bias_O, channel_scale_O, outputs, amplifier, folded: see ``w4a8_product``.
        gather: what channels the weight meets, made of those of x (``kernels.gather``); None for x itself.

    Returns:
        [..., O].
    """
    flat_TI = x_TI.reshape(-1, x_TI.shape[-1]).contiguous()
    before = ("plain", None, None, None, 0.0)
    if gather is None:
        codes, scale_T, sum_T = quantize_tokens(flat_TI, *before)
    else:
        codes, scale_T, sum_T = quantize_gathered(flat_TI, *before, *gather.tensors())
    out_TO = w4a8_product(
        codes, scale_T, sum_T, packed_weight, bias_O, channel_scale_O, outputs, amplifier, folded, x_TI.dtype
    )
    return out_TO.reshape(*x_TI.shape[:-1], outputs)
