"""Quantized linear layers on the kernels that are no device's own (``kernels/portable.py``).

Shape legend: T tokens (any leading dimensions), O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finescale.errors import InputError
from finescale.grid import InputRule, QuantizedWeight
from finescale.kernels.dispatch import choose_kernel, layer_facts
from finescale.kernels.portable import PORTABLE, PortableProduct


class PortableLinear(nn.Module):
    """A layer with integer scales on a CPU, on a GPU through Triton, or in parts.

    Args:
        weight: codes and a grid with integer scales; moved to ``device`` and packed there.
        bias: float [O] or None.
        inputs: rounding of the inputs, with what stands before it.
        device: where it runs.

    Raises:
        InputError: a layer that none of these kernels runs; says why.
    """

    bias_O: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, inputs: InputRule, device: torch.device) -> None:
        super().__init__()
        choice = choose_kernel(layer_facts(weight, inputs), device)
        grid = weight.grid
        if choice.kernel not in PORTABLE or grid.amplifier is None or inputs.scheme is None:
            raise InputError(f"this layer runs on none of {', '.join(PORTABLE)} here: {choice.why}.")
        self.inputs = inputs.to(device)
        own_O = grid.channel_scale_O
        self.product = PortableProduct(
            choice,
            weight.codes_OI.to(device),
            grid.integer_scale_OG().to(device),
            grid.scheme.group_size,
            grid.amplifier,
            None if own_O is None else own_O.to(device, torch.float32),
            inputs.scheme.bits,
            grid.group_of_I.to(device),
        )
        self.register_buffer("bias_O", None if bias is None else bias.to(device, torch.float32), persistent=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        """float [..., I] -> [..., O], in the type of the input."""
        return self.product(self.inputs.rearrange(x_TI), self.bias_O)
