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
        codes int8 [..., I] and scale float32 [..., 1], x ~ codes * scale. A token of zeros has scale 1 and codes 0.
    """
    x_TI = x_TI.float()
    absmax_T1 = x_TI.abs().amax(-1, keepdim=True)
    scale_T1 = torch.where(absmax_T1 > 0, absmax_T1 / scheme.code_max, torch.ones_like(absmax_T1))
    # A token so small that its scale underflows would divide by zero.
    scale_T1 = scale_T1.clamp(min=torch.finfo(torch.float32).tiny)
    codes_TI = (x_TI / scale_T1).round_().clamp_(-scheme.code_max, scheme.code_max).to(torch.int8)
    return codes_TI, scale_T1


def fake_quantize_tokens(x_TI: Tensor, scheme: ActivationScheme) -> Tensor:
    """``x_TI`` rounded as ``quantize_tokens`` does and converted back, in the dtype of ``x_TI``."""
    codes_TI, scale_T1 = quantize_tokens(x_TI, scheme)
    return (codes_TI.float() * scale_T1).to(x_TI.dtype)
