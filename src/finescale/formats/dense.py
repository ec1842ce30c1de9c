"""Dequantized weights in the model's own type: loads everywhere, no gain in size.

For engines and layers that no quantized layout fits, and to measure a quantized model in any tool.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finescale.errors import InputError, NumericsError
from finescale.grid import ActivationScheme, QuantizedWeight, WeightScheme

NAME = "dense"
SUFFIXES = ("weight",)


def check(
    scheme: WeightScheme,
    activations: ActivationScheme | None,
    shape_OI: tuple[int, int],
    layer_class: str = "Linear",
) -> None:
    """Every layer can be stored dense. That its inputs were to be quantized is lost, which `engines` remarks on."""
    del scheme, activations, shape_OI, layer_class


def pack(weight: QuantizedWeight, dtype: torch.dtype | None = None, transposed: bool = False) -> dict[str, Tensor]:
    """``{"weight": tensor}``: the dequantized weight, rounded to ``dtype``.

    Args:
        weight: the solved layer.
        dtype: type of the original weight; the type of the scales if None.
        transposed: True for a layer that keeps its weight as [I, O] (GPT-2's Conv1D).

    Raises:
        NumericsError: a weight is too large for ``dtype``.
    """
    dense_OI = weight.dequantize().to(dtype or weight.grid.scale_dtype)
    if not bool(torch.isfinite(dense_OI).all()):
        raise NumericsError(
            f"some dequantized weights do not fit {dense_OI.dtype}; save with dtype bfloat16 or float32."
        )
    return {"weight": (dense_OI.t() if transposed else dense_OI).contiguous()}


def unpack(tensors: Mapping[str, Tensor], scheme: WeightScheme, amplifier: int | None = None) -> QuantizedWeight:
    """Refuse: codes and scales cannot be told from a dense weight.

    Raises:
        InputError: always.
    """
    del tensors, scheme, amplifier
    raise InputError("a dense checkpoint holds no codes and scales; convert from a quantized checkpoint instead.")


def quantization_config(
    schemes: Mapping[str, WeightScheme],
    activations: ActivationScheme | None,
    ignore: Sequence[str],
    finescale: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """None: a dense checkpoint must not carry a `quantization_config`, or readers would look for packed tensors."""
    del schemes, activations, ignore, finescale
    return None
