"""Norms, silu * up and rotary tables of a decoder as torch custom ops for any device, where no rounding follows.

What rounding follows is part of the kernel that rounds (``kernels.linear.quantize_tokens``). Opaque to torch.compile,
so that a compiled model computes bit for bit what the eager one does. One Triton kernel each on a GPU
(`kernels.triton_norms`), plain torch elsewhere.

Shape legend: T tokens, W width of the hidden states, F width of gate and of up, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.errors import InputError
from finescale.kernels.operators import EVERYWHERE, operator
from finescale.kernels.plain import before_rounding


def _empty_add_rms_norm(x_TW: Tensor, residual_TW: Tensor | None, gain_W: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x_TW)


@operator("add_rms_norm", _empty_add_rms_norm, mutates=("residual_TW",), devices=EVERYWHERE)
def add_rms_norm(x_TW: Tensor, residual_TW: Tensor | None, gain_W: Tensor, epsilon: float) -> Tensor:
    """RMS norm of x, or of its sum with the residual, which is replaced by that sum; [T, W] in the type of x.

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    for name, tensor, shape in (
        ("x", x_TW, None),
        ("residual", residual_TW, x_TW.shape),
        ("gain", gain_W, x_TW.shape[1:]),
    ):
        if tensor is None:
            continue
        fits = tensor.dtype == x_TW.dtype and tensor.device == x_TW.device and tensor.is_contiguous()
        if not fits or x_TW.dim() != 2 or (shape is not None and tensor.shape != shape):
            raise InputError(f"{name} must be contiguous, of the type, the device and the width of x [T, W].")
    if x_TW.is_cuda:
        from finescale.kernels import triton_norms

        return triton_norms.norm(x_TW, residual_TW, gain_W, epsilon)
    return before_rounding(x_TW, "rms", residual_TW, gain_W, None, epsilon)


def _empty_silu_product(both_TF: Tensor) -> Tensor:
    return both_TF.new_empty(both_TF.shape[0], both_TF.shape[1] // 2)


@operator("silu_product", _empty_silu_product, devices=EVERYWHERE)
def silu_product(both_TF: Tensor) -> Tensor:
    """silu(gate) * up of gate, then up, [T, 2 * F] -> [T, F].

    Raises:
        InputError: not contiguous, or of another shape.
    """
    if both_TF.dim() != 2 or both_TF.shape[1] % 2 or not both_TF.is_contiguous():
        raise InputError("gate and up must be contiguous [T, 2 * F].")
    if both_TF.is_cuda:
        from finescale.kernels import triton_norms

        return triton_norms.silu(both_TF)
    return before_rounding(both_TF, "silu", None, None, None, 0.0)


def _empty_rotary_tables(
    position_T: Tensor, frequency_D: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (position_T.shape[0], 2 * frequency_D.shape[0])
    return position_T.new_empty(shape, dtype=dtype), position_T.new_empty(shape, dtype=dtype)


@operator("rotary_tables", _empty_rotary_tables, devices=EVERYWHERE)
def rotary_tables(position_T: Tensor, frequency_D: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * frequency, twice side by side, times a factor: [T, 2 * D] in ``dtype``.

    Args:
        position_T: integers, contiguous.
        frequency_D: float32, contiguous.
        factor: multiplies both.
        dtype: of the result.

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    if position_T.dim() != 1 or position_T.is_floating_point() or not position_T.is_contiguous():
        raise InputError("positions must be contiguous integers [T].")
    if frequency_D.dim() != 1 or frequency_D.dtype != torch.float32 or not frequency_D.is_contiguous():
        raise InputError("rotary frequencies must be contiguous float32 [D].")
    if position_T.is_cuda:
        from finescale.kernels import triton_norms

        return triton_norms.rotary(position_T, frequency_D, factor, dtype)
    angle = position_T[:, None].float() * frequency_D
    angle = torch.cat((angle, angle), -1)
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
