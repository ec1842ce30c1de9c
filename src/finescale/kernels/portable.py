"""Layers on the kernels that are no device's own: Triton, the CPU's int8 products, the exact product in parts.

Shape legend: T tokens, I inputs, O outputs, G groups.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from finescale.grid import ActivationScheme, contiguous_groups, quantize_tokens
from finescale.kernels import cpu_int8
from finescale.kernels.dispatch import Choice
from finescale.kernels.reference import integer_scale_linear

PORTABLE = ("triton", "cpu-int8", "reference")
_log = logging.getLogger("finescale")
_said: set[str] = set()


class PortableProduct(nn.Module):
    """y = x_scale / amplifier * sum_G S (x . codes), float in and out: the exact product of one layer.

    Args:
        choice: the kernel, one of ``PORTABLE``, and why (`finescale.kernels.dispatch`); said once in the log.
        codes_OI: int8.
        integer_scale_OG: int32.
        group_size: inputs of a group, -1 for all.
        group_of_I: the group of each input; None for groups of neighbours. Only ``cpu-int8`` takes others.
        amplifier: the power of two the scales were multiplied by.
        channel_scale_O: float32 [O], multiplies each output, or None.
        activation_bits: of the inputs.
    """

    channel_scale_O: Tensor | None

    def __init__(
        self,
        choice: Choice,
        codes_OI: Tensor,
        integer_scale_OG: Tensor,
        group_size: int,
        amplifier: int,
        channel_scale_O: Tensor | None = None,
        activation_bits: int = 8,
        group_of_I: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kernel, self.why = choice.kernel, choice.why
        self.out_features, self.in_features = codes_OI.shape
        self.group_size, self.amplifier, self.activation_bits = group_size, amplifier, activation_bits
        self.folded = False
        tensors: dict[str, Tensor | None]
        if choice.kernel == "cpu-int8":
            if group_of_I is None:
                group_of_I = contiguous_groups(self.in_features, group_size, codes_OI.device)
            tensors = cpu_int8.pack_weight(codes_OI, integer_scale_OG, group_of_I)._asdict()
        elif choice.kernel == "triton":
            from finescale.kernels import triton_gemm

            self.folded = triton_gemm.is_folded(integer_scale_OG)
            tensors = {**triton_gemm.pack_weight(codes_OI, integer_scale_OG, group_size)._asdict()}
        else:
            tensors = {"codes_OI": codes_OI.contiguous(), "scale_OG": integer_scale_OG.to(torch.int32).contiguous()}
        self._names = tuple(tensors)
        for name, tensor in (tensors | {"channel_scale_O": channel_scale_O}).items():
            self.register_buffer(name, tensor, persistent=False)
        _say_once(choice)

    def forward(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """float [..., I] and float32 bias [O] -> [..., O], in the type of the input."""
        flat_TI = x_TI.reshape(-1, self.in_features)
        out_TO = self._multiply(flat_TI, bias_O, [self._buffers[name] for name in self._names])
        return out_TO.reshape(*x_TI.shape[:-1], self.out_features)

    def _multiply(self, x_TI: Tensor, bias_O: Tensor | None, tensors: list[Any]) -> Tensor:
        if self.kernel == "cpu-int8":
            weight = cpu_int8.CpuWeight(*tensors)
            return cpu_int8.cpu_linear(
                x_TI, weight, bias_O, self.channel_scale_O, self.amplifier, self.activation_bits
            )  # fmt: skip
        if self.kernel == "triton":
            from finescale.kernels.triton_gemm import TritonWeight, triton_linear

            return triton_linear(
                x_TI, TritonWeight(*tensors), self.group_size, self.folded, bias_O, self.channel_scale_O, self.amplifier
            )
        codes_TI, x_scale_T1 = quantize_tokens(x_TI, ActivationScheme(self.activation_bits))
        out_TO = integer_scale_linear(
            codes_TI, x_scale_T1, *tensors, self.group_size, self.amplifier, self.channel_scale_O
        )  # fmt: skip
        return (out_TO if bias_O is None else out_TO + bias_O).to(x_TI.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.kernel}: {self.why}"


def _say_once(choice: Choice) -> None:
    """One line in the log for each kernel and reason."""
    text = f"finescale runs W4A8 layers on {choice.kernel}: {choice.why}."
    if text not in _said:
        _said.add(text)
        _log.warning(text)
