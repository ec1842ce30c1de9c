"""W4A8 layers on a Hopper GPU past torch's operators, for callers that are not traced.

The dispatch of an operator and the checks of its arguments take the host about as long as everything else that a launch
needs. A prompt's step in an engine is as short as its host is, and there shapes and types fit by construction.

Shape legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.kernels.hopper import gemm, quantize
from finescale.kernels.linear import quantize_tokens, w4a8_linear, w4a8_product


def untraced(x: Tensor) -> bool:
    """Whether a call on this tensor may go straight to a kernel."""
    return x.is_cuda and not torch.compiler.is_compiling()


def quantized(
    x_TI: Tensor, kind: str, residual_TI: Tensor | None, gain_I: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear.quantize_tokens`` of contiguous inputs, straight to the kernel where that may be."""
    if untraced(x_TI):
        return quantize.run(x_TI, kind, residual_TI, gain_I, None, epsilon)
    found: tuple[Tensor, Tensor, Tensor] = quantize_tokens(x_TI, kind, residual_TI, gain_I, None, epsilon)
    return found


def product(
    codes: Tensor, scale_T: Tensor, sum_T: Tensor, packed: Tensor, bias_O: Tensor | None, factor_O: Tensor | None,
    outputs: int, folded: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``linear.w4a8_product`` with scales over 1, straight to the kernel where that may be."""
    if untraced(codes):
        return gemm.run(
            codes, scale_T, sum_T, packed, scale_T.shape[0], outputs, 1, bias_O, dtype, folded, None, factor_O
        )  # fmt: skip
    found: Tensor = w4a8_product(codes, scale_T, sum_T, packed, bias_O, factor_O, outputs, 1, folded, dtype)
    return found


def linear(
    x_TI: Tensor, packed: Tensor, bias_O: Tensor | None, factor_O: Tensor | None, outputs: int, folded: bool
) -> Tensor:
    """``linear.w4a8_linear`` of [..., I] with scales over 1, straight to the kernels where that may be."""
    if not untraced(x_TI):
        return w4a8_linear(x_TI, packed, bias_O, factor_O, outputs, 1, folded)
    flat_TI = x_TI if x_TI.dim() == 2 else x_TI.reshape(-1, x_TI.shape[-1])
    codes, scale_T, sum_T = quantize.run(flat_TI.contiguous())
    out_TO = product(codes, scale_T, sum_T, packed, bias_O, factor_O, outputs, folded, x_TI.dtype)
    return out_TO if x_TI.dim() == 2 else out_TO.view(*x_TI.shape[:-1], outputs)
