"""The Hopper kernels' operators on a CPU, slow and plain, so that what surrounds them runs in a real vLLM without a GPU.

Importing this module makes the plugin take the fused path. Shape legend: T tokens, I inputs, O outputs, G groups.
"""

import torch

from finescale.grid import ActivationScheme
from finescale.grid import quantize_tokens as to_integers
from finescale.kernels import grouped_int32_product, layout, linear
from finescale.kernels.dispatch import Choice
from finescale.runtime import vllm_linear


@linear.quantize_tokens.register_kernel("cpu")
def quantize_tokens(x_TI, kind, residual_TI, gain_I, shift_I, epsilon):
    if kind == "silu":
        gate_TI, up_TI = x_TI.chunk(2, -1)
        x_TI = torch.nn.functional.silu(gate_TI) * up_TI
    if kind == "rms":
        if residual_TI is not None:
            residual_TI += x_TI
            x_TI = residual_TI
        wide_TI = x_TI.float()
        x_TI = (wide_TI * torch.rsqrt(wide_TI.square().mean(-1, keepdim=True) + epsilon)).to(x_TI.dtype) * gain_I
    codes_TI, scale_T1 = to_integers(x_TI, ActivationScheme(8))
    return layout.pack_tokens(codes_TI), scale_T1[:, 0].contiguous(), codes_TI.sum(1, dtype=torch.int32)


@linear.w4a8_product.register_kernel("cpu")
def w4a8_product(codes, x_scale_T, x_sum_T, packed, bias_O, factor_O, outputs, amplifier, folded, out_dtype):
    inputs, in_block = packed.shape[1] * layout.BLOCK, (packed.shape[2] - 4096) // 128
    codes_OI, scale_OG = layout.unpack_weight(packed, outputs, inputs, layout.BLOCK // in_block)
    x_TI = layout.unpack_tokens(codes, x_scale_T.shape[0], inputs)
    sums_TO = grouped_int32_product(x_TI, codes_OI, scale_OG, layout.BLOCK // in_block)
    out_TO = sums_TO.float() * (x_scale_T[:, None] / amplifier)
    out_TO = out_TO if factor_O is None else out_TO * factor_O
    return (out_TO if bias_O is None else out_TO + bias_O).to(out_dtype)


vllm_linear.choose_kernel = lambda layer, device: Choice("hopper", "emulated")
