"""The fused W4A8 kernels in plain torch, on packed tensors: what the custom ops run where there is no Hopper GPU.

Slow (weights are unpacked in every call) and obviously right: the oracle of models that were packed and fused.

Shape legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.grid import ActivationScheme
from finescale.grid import quantize_tokens as to_codes
from finescale.kernels.layout import BLOCK, pack_tokens, unpack_tokens, unpack_weight
from finescale.kernels.reference import grouped_int32_product


def before_rounding(
    x_TI: Tensor,
    kind: str,
    residual_TI: Tensor | None,
    gain_I: Tensor | None,
    shift_I: Tensor | None,
    epsilon: float,
) -> Tensor:
    """What the codes of ``linear.quantize_tokens`` round, in the type of x; the residual is replaced by the sum."""
    if kind == "silu":
        gate_TI, up_TI = x_TI.chunk(2, -1)
        return torch.nn.functional.silu(gate_TI) * up_TI
    if residual_TI is not None:
        residual_TI += x_TI
        x_TI = residual_TI
    if kind == "layer":
        return torch.nn.functional.layer_norm(x_TI, x_TI.shape[-1:], gain_I, shift_I, epsilon)
    if kind == "rms":
        assert gain_I is not None
        return rms_norm(x_TI, gain_I, epsilon)
    return x_TI


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """The norm of Llama and its kin over the last dimension, with their roundings; [..., I] to [..., I]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return gain * normed.to(x.dtype)


def quantize_tokens(
    x_TI: Tensor,
    kind: str,
    residual_TI: Tensor | None,
    gain_I: Tensor | None,
    shift_I: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``linear.quantize_tokens``."""
    y_TI = before_rounding(x_TI, kind, residual_TI, gain_I, shift_I, epsilon)
    codes_TI, scale_T1 = to_codes(y_TI, ActivationScheme(8))
    return pack_tokens(codes_TI), scale_T1[:, 0].contiguous(), codes_TI.sum(1, dtype=torch.int32)


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
    """See ``linear.w4a8_product``."""
    inputs = codes.shape[0] * BLOCK
    group_size = BLOCK // ((packed_weight.shape[2] - 4096) // 128)
    codes_OI, integer_scale_OG = unpack_weight(packed_weight, outputs, inputs, group_size)
    x_TI = unpack_tokens(codes, x_scale_T.shape[0], inputs)
    sums_TO = grouped_int32_product(x_TI, codes_OI, integer_scale_OG, group_size)
    out_TO = sums_TO.float() * (x_scale_T / amplifier)[:, None]
    if channel_scale_O is not None:
        out_TO = out_TO * channel_scale_O
    return (out_TO if bias_O is None else out_TO + bias_O).to(out_dtype)
