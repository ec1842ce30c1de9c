"""Norms, silu * up and rotary tables of a decoder on a GPU, one kernel each, for layers that are not rounded.

Every rounding is that of the plain modules: sums, norms and products in the type of the inputs.

Shape legend: T tokens, W width of the hidden states, F width of gate and of up, D channels of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finescale.kernels.triton_attention import overlapping

# Triton reads the signatures below: annotations other than its own are errors there.


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, gain, out, width, epsilon, block: tl.constexpr, add: tl.constexpr, overlap: tl.constexpr
):
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kind = x.dtype.element_ty
    w_W = tl.arange(0, block)
    place_W = tl.program_id(0).to(tl.int64) * width + w_W
    inside_W = w_W < width
    x_W = tl.load(x + place_W, mask=inside_W, other=0.0)
    if add:
        x_W = (x_W.to(tl.float32) + tl.load(residual + place_W, mask=inside_W, other=0.0).to(tl.float32)).to(kind)
        tl.store(residual + place_W, x_W, mask=inside_W)
    wide_W = x_W.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(wide_W * wide_W, 0) / width + epsilon)
    normed_W = (wide_W * inverse).to(kind).to(tl.float32)
    gain_W = tl.load(gain + w_W, mask=inside_W, other=0.0).to(tl.float32)
    tl.store(out + place_W, (normed_W * gain_W).to(kind), mask=inside_W)


@triton.jit
def _silu_kernel(both, out, width, block: tl.constexpr, overlap: tl.constexpr):  # type: ignore[no-untyped-def]
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kind = both.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * block + tl.arange(0, block)
    inside_F = f_F < width
    gate_F = tl.load(both + row * 2 * width + f_F, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(both + row * 2 * width + width + f_F, mask=inside_F, other=0.0).to(tl.float32)
    silu_F = (gate_F / (1.0 + tl.exp(-gate_F))).to(kind).to(tl.float32)
    tl.store(out + row * width + f_F, (silu_F * up_F).to(kind), mask=inside_F)


@triton.jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    position, frequency, cos, sin, factor, width: tl.constexpr, overlap: tl.constexpr
):
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, width)
    angle_D = tl.load(position + row).to(tl.float32) * tl.load(frequency + d_D % (width // 2))
    tl.store(cos + row * width + d_D, (tl.cos(angle_D) * factor).to(cos.dtype.element_ty))
    tl.store(sin + row * width + d_D, (tl.sin(angle_D) * factor).to(sin.dtype.element_ty))


def norm(x_TW: Tensor, residual_TW: Tensor | None, gain_W: Tensor, epsilon: float) -> Tensor:
    """See ``kernels.norms.add_rms_norm``."""
    tokens, width = x_TW.shape
    out_TW = torch.empty_like(x_TW)
    if tokens:
        block = triton.next_power_of_2(width)
        _norm_kernel[(tokens,)](
            x_TW, residual_TW, gain_W, out_TW, width, epsilon,
            block=block, add=residual_TW is not None, num_warps=min(16, max(4, block // 256)),
            **overlapping(x_TW.device),
        )  # fmt: skip
    return out_TW


def silu(both_TF: Tensor) -> Tensor:
    """See ``kernels.norms.silu_product``."""
    tokens, width = both_TF.shape[0], both_TF.shape[1] // 2
    out_TF = both_TF.new_empty(tokens, width)
    if tokens:
        block = 1024
        _silu_kernel[(tokens, triton.cdiv(width, block))](
            both_TF, out_TF, width, block=block, num_warps=4, **overlapping(both_TF.device)
        )
    return out_TF


def rotary(position_T: Tensor, frequency_D: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See ``kernels.norms.rotary_tables``."""
    tokens, width = position_T.shape[0], 2 * frequency_D.shape[0]
    cos_TD, sin_TD = (position_T.new_empty(tokens, width, dtype=dtype) for _ in range(2))
    if tokens:
        _rotary_kernel[(tokens,)](
            position_T, frequency_D, cos_TD, sin_TD, factor, width=width, num_warps=1, **overlapping(position_T.device)
        )
    return cos_TD, sin_TD
