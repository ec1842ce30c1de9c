"""Per-token activation quantizers.

Shape legend: T tokens (any leading dimensions), I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.grid.scheme import ActivationScheme


def quantize_tokens(x_TI: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic integers, one scale per token.

    Args:
        x_TI: float [..., I].
        scheme: bits; the codes lie in [-(2**(bits-1) - 1), 2**(bits-1) - 1].

    Returns:
        codes int8 [..., I] and scale float32 [..., 1], x ~ codes * scale. A token of zeros has scale 1 and codes 0;
        the scale of a token with NaN or Inf is NaN or Inf, so that its outputs are too.
    """
    x_TI = x_TI.float()
    absmax_T1 = x_TI.abs().amax(-1, keepdim=True)
    scale_T1 = torch.where(absmax_T1 == 0, torch.ones_like(absmax_T1), absmax_T1 / scheme.code_max)
    # A token so small that its scale underflows would divide by zero.
    scale_T1 = scale_T1.clamp(min=torch.finfo(torch.float32).tiny)
    codes_TI = (x_TI / scale_T1).round_().clamp_(-scheme.code_max, scheme.code_max).to(torch.int8)
    return codes_TI, scale_T1


def fake_quantize_tokens(x_TI: Tensor, scheme: ActivationScheme, full_range: bool = False) -> Tensor:
    """``x_TI`` rounded as ``quantize_tokens`` does and converted back, in the dtype of ``x_TI``.

    With ``full_range`` it is rounded as the library compressed-tensors does (what transformers runs): codes down to
    -2**(bits-1), scale absmax / ((2**bits - 1) / 2). finescale's own kernels never use that range: their overflow bound
    counts on 127.
    """
    if not full_range:
        codes_TI, scale_T1 = quantize_tokens(x_TI, scheme)
        return (codes_TI.float() * scale_T1).to(x_TI.dtype)
    absmax_T1 = x_TI.abs().amax(-1, keepdim=True)
    scale_T1 = absmax_T1 / (float(2**scheme.bits - 1) / 2)
    scale_T1 = torch.where(scale_T1 == 0, torch.full_like(scale_T1, torch.finfo(x_TI.dtype).eps), scale_T1)
    low = -(2 ** (scheme.bits - 1))
    return (x_TI / scale_T1).clamp(low, -low - 1).round().mul(scale_T1)
