"""What a kernel wants of the tensors that it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finescale.errors import InputError

Wanted = tuple[str, Tensor | None, Sequence[int], torch.dtype]
"""What a tensor is called, the tensor, its shape and its type; None is a tensor that may be left out."""


def check_tensors(device: torch.device, *wanted: Wanted) -> None:
    """Raises InputError for a tensor of another shape or type, on another device, or not contiguous."""
    for name, tensor, shape, dtype in wanted:
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != tuple(shape) or not tensor.is_contiguous():
            raise InputError(
                f"{name} must be contiguous {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}."
            )
        if tensor.device != device:
            raise InputError(f"{name} is on {tensor.device}, the other tensors on {device}.")
