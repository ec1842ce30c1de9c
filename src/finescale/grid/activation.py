"""Activation quantizers: per token with scales that follow the data, per tensor with fixed ones.

Shape legend: T tokens (any leading dimensions), I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finescale.errors import NumericsError
from finescale.grid.scheme import ActivationScheme

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class StaticRange:
    """Scale and zero point that hold for every token: x ~ (code - zero) * scale. Both are exact in float32."""

    scale: float
    zero: int = 0


def static_range(low: float, high: float, scheme: ActivationScheme) -> StaticRange:
    """The range that covers what calibration saw.

    Args:
        low, high: smallest and largest value.
        scheme: bits and symmetry.

    Raises:
        NumericsError: NaN or Inf.
    """
    low_high = torch.tensor([[min(low, 0.0), max(high, 0.0)]])
    if not bool(torch.isfinite(low_high).all()):
        raise NumericsError("the range of an activation is not finite; the model overflows on the calibration text.")
    scale_11, zero_11 = _token_ranges(low_high, scheme)
    return StaticRange(float(scale_11), int(zero_11))


def _token_ranges(x_TI: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each token, float32 [..., 1]."""
    if scheme.symmetric:
        scale_T1 = _symmetric_scale(x_TI, scheme.code_max)
        return scale_T1, torch.zeros_like(scale_T1)
    low_T1 = x_TI.amin(-1, keepdim=True).clamp(max=0)
    high_T1 = x_TI.amax(-1, keepdim=True).clamp(min=0)
    # Each end by itself: their difference can overflow.
    span_T1 = high_T1 / (2**scheme.bits - 1) - low_T1 / (2**scheme.bits - 1)
    scale_T1 = torch.where(span_T1 == 0, torch.ones_like(span_T1), span_T1).clamp(min=_TINY)
    zero_T1 = (scheme.code_min - low_T1 / scale_T1).round().clamp(scheme.code_min, scheme.code_max)
    return scale_T1, zero_T1


def _symmetric_scale(x_TI: Tensor, code_max: int) -> Tensor:
    """Largest magnitude of each token over the largest code, float32 [..., 1]; 1 for a token of zeros."""
    absmax_T1 = x_TI.abs().amax(-1, keepdim=True)
    # By a tensor: CUDA turns division by a number into a product, one rounding away from the kernels and the CPU.
    scale_T1 = absmax_T1 / torch.full_like(absmax_T1, code_max)
    # A token so small that its scale underflows would divide by zero.
    return scale_T1.clamp_(min=_TINY).masked_fill_(absmax_T1 == 0, 1.0)


def quantize_activations(
    x_TI: Tensor, scheme: ActivationScheme, fixed: StaticRange | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, and what they stand for: x ~ (codes - zero) * scale.

    Args:
        x_TI: float [..., I].
        scheme: bits, symmetry, granularity.
        fixed: the range of a static scheme.

    Returns:
        codes int8 [..., I], scale float32 [..., 1], zero float32 [..., 1] (whole numbers; 0 when symmetric). A token
        of zeros has scale 1; the scale of a token with NaN or Inf is NaN or Inf, so that its outputs are too.

    Raises:
        NumericsError: a static scheme without a range.
    """
    x_TI = x_TI.float()
    if scheme.dynamic:
        scale_T1, zero_T1 = _token_ranges(x_TI, scheme)
    else:
        known = _range_of(fixed)
        # Codes have no NaN or Inf: the scale shows them, as it does by itself where it follows the data.
        scale_T1 = known.scale + 0 * x_TI.abs().amax(-1, keepdim=True)
        zero_T1 = torch.full_like(scale_T1, float(known.zero))
    codes_TI = (x_TI / scale_T1).round_().add_(zero_T1)
    return codes_TI.clamp_(scheme.code_min, scheme.code_max).to(torch.int8), scale_T1, zero_T1


def fake_quantize(x_TI: Tensor, scheme: ActivationScheme, fixed: StaticRange | None = None) -> Tensor:
    """``x_TI`` rounded as `quantize_activations` does and converted back, in its own dtype."""
    codes_TI, scale_T1, zero_T1 = quantize_activations(x_TI, scheme, fixed)
    return ((codes_TI.float() - zero_T1) * scale_T1).to(x_TI.dtype)


def quantize_tokens(x_TI: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic integers, one scale per token: what the integer kernels take.

    Args:
        x_TI: float [..., I].
        scheme: bits; the codes lie in [-(2**(bits-1) - 1), 2**(bits-1) - 1].

    Returns:
        codes int8 [..., I] and scale float32 [..., 1], x ~ codes * scale.
    """
    x_TI = x_TI.float()
    scale_T1 = _symmetric_scale(x_TI, scheme.code_max)
    return (x_TI / scale_T1).round_().clamp_(-scheme.code_max, scheme.code_max).to(torch.int8), scale_T1


def fake_quantize_tokens(x_TI: Tensor, scheme: ActivationScheme) -> Tensor:
    """``x_TI`` rounded as ``quantize_tokens`` does and converted back, in the dtype of ``x_TI``."""
    codes_TI, scale_T1 = quantize_tokens(x_TI, scheme)
    return (codes_TI.float() * scale_T1).to(x_TI.dtype)


def fake_quantize_full_range(x_TI: Tensor, scheme: ActivationScheme, fixed: StaticRange | None = None) -> Tensor:
    """``x_TI`` rounded to a symmetric scheme as the library compressed-tensors does (what transformers runs): codes
    down to -2**(bits-1), and per token a scale of absmax / ((2**bits - 1) / 2).

    finescale's own kernels never use that range: their overflow bound counts on 127.
    """
    if scheme.dynamic:
        scale_T1 = x_TI.abs().amax(-1, keepdim=True) / (float(2**scheme.bits - 1) / 2)
        scale_T1 = torch.where(scale_T1 == 0, torch.full_like(scale_T1, torch.finfo(x_TI.dtype).eps), scale_T1)
    else:
        scale_T1 = torch.full_like(x_TI[..., :1], _range_of(fixed).scale)
    return (x_TI / scale_T1).clamp(-scheme.code_max - 1, scheme.code_max).round().mul(scale_T1)


def _range_of(fixed: StaticRange | None) -> StaticRange:
    if fixed is None:
        raise NumericsError("a static activation scheme has no range; calibrate the layer first.")
    return fixed
