"""Quantized linear layers on the fused kernels of a GPU: packed once, no dequantized copy.

Shape legend: T tokens (any leading dimensions), O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finescale.errors import InputError
from finescale.grid import InputRule, QuantizedWeight
from finescale.kernels.dispatch import choose_kernel, layer_facts
from finescale.kernels.gather import gather_table
from finescale.kernels.hopper import gemm
from finescale.kernels.layout import LARGEST_FOLDED_SCALE, SLAB, pack_weight
from finescale.kernels.linear import w4a8_linear

ELEMENTS_AT_ONCE = 2**21


class PackedLinear(nn.Module):
    """A W4A8 layer as a Hopper GPU multiplies it (``kernels/linear.py``).

    Args:
        weight: codes and a grid with integer scales; moved to ``device`` and packed there.
        bias: float [O] or None.
        inputs: rounding of the inputs, with what stands before it.
        device: a Hopper GPU.

    Raises:
        InputError: a layer that the fused kernels cannot run; says why.
    """

    packed: Tensor
    bias_O: Tensor | None
    channel_scale_O: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, inputs: InputRule, device: torch.device) -> None:
        super().__init__()
        choice = choose_kernel(layer_facts(weight, inputs), device)
        if choice.kernel not in ("hopper", "hopper-folded") or weight.grid.amplifier is None:
            raise InputError(f"this layer has no fused kernel here: {choice.why}.")
        self.why = choice.why
        self.inputs = inputs.to(device)
        # A rotation has no place in the kernel that rounds: with one, the gather stays outside too.
        gather = self.inputs.gather if self.inputs.rotation is None else None
        self.gather = None if gather is None else gather_table(gather)
        self.amplifier = weight.grid.amplifier
        self.scheme = weight.grid.scheme
        self.out_features, self.in_features = weight.codes_OI.shape
        integer_scale_OG = weight.grid.integer_scale_OG()
        self.folded = int(integer_scale_OG.abs().max()) <= LARGEST_FOLDED_SCALE
        # In parts, so that loading a model takes little more memory on the GPU than the model itself.
        rows = max(SLAB, ELEMENTS_AT_ONCE // max(self.in_features, 1) // SLAB * SLAB)
        parts = zip(weight.codes_OI.split(rows), integer_scale_OG.split(rows), strict=True)
        size = self.scheme.group_size
        packed = torch.cat([pack_weight(codes.to(device), scale.to(device), size) for codes, scale in parts])
        self.register_buffer("packed", packed, persistent=False)
        gemm.WORKSPACES.reserve(packed.device)
        own_O = weight.grid.channel_scale_O
        own_O = None if own_O is None else own_O.to(device, torch.float32)
        self.register_buffer("channel_scale_O", own_O, persistent=False)
        self.register_buffer("bias_O", None if bias is None else bias.to(device, torch.float32), persistent=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        """float [..., I] -> [..., O], in the type of the input."""
        return w4a8_linear(
            x_TI if self.gather is not None else self.inputs.rearrange(x_TI),
            self.packed,
            self.bias_O,
            self.channel_scale_O,
            self.out_features,
            self.amplifier,
            self.folded,
            self.gather,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, groups of {self.scheme.group_size}, "
            f"integer scales over {self.amplifier}, {self.why}"
        )
