"""Moving a scale per channel from a norm into what reads it.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finescale.errors import NumericsError
from finescale.models.links import Link
from finescale.models.skeleton import set_weight_OI, weight_OI_of


def largest_weight(modules: Sequence[nn.Module]) -> Tensor:
    """Largest magnitude per input channel over all of the modules' weights, float [I]."""
    return torch.stack([weight_OI_of(module).abs().amax(0) for module in modules]).amax(0)


def divide_linear(module: nn.Module, scale_O: Tensor) -> None:
    """Divide a linear's outputs by a scale per channel, float [O]: rows of its weight, and its bias."""
    set_weight_OI(module, weight_OI_of(module).double() / scale_O.double()[:, None])
    bias = module._parameters.get("bias")
    if bias is not None:
        bias.data.copy_(bias.data.double() / scale_O.double())


def divide_link(block: nn.Module, link: Link, scale_O: Tensor) -> None:
    """Divide a linear's outputs by a scale per channel, float [O], and multiply the inputs that follow them by it."""
    divide_linear(block.get_submodule(link.producer), scale_O)
    scale_I = scale_O[link.channel_I.to(scale_O.device)]
    for path in link.consumers:
        module = block.get_submodule(path)
        set_weight_OI(module, weight_OI_of(module) * scale_I)


def shift_norm(norm: nn.Module, consumers: Sequence[nn.Module], shift_I: Tensor, stored: torch.dtype) -> None:
    """Take a shift per channel, float [I], from a norm's output and add what it amounts to, W shift, to the biases of
    all that reads it. The norm's new bias is rounded to the type of the file first, as in `divide_norm`."""
    bias = norm._parameters["bias"]
    assert bias is not None
    old_I = bias.data.double().clone()
    bias.data.copy_((old_I - shift_I.double()).to(stored))
    applied_I = old_I - bias.data.double()
    for module in consumers:
        bias_O = module._parameters["bias"]
        assert bias_O is not None
        bias_O.data.copy_(bias_O.data.double() + weight_OI_of(module).double() @ applied_I)


def divide_norm(norm: nn.Module, consumers: Sequence[nn.Module], scale_I: Tensor, stored: torch.dtype) -> Tensor:
    """Divide a norm's output by a scale per channel and multiply it into the columns of all that reads it.

    The new gain is rounded to the type of the file first and the scale that the consumers get is what this gain truly
    divides by: the function is kept whatever the type.

    Args:
        norm: with ``weight`` [I] and maybe ``bias`` [I].
        consumers: every module that reads its output.
        scale_I: float [I], positive.
        stored: float type of the gain in the file.

    Returns:
        The scale that was applied, float [I].

    Raises:
        NumericsError: the new gain does not fit ``stored``.
    """
    weight = norm._parameters["weight"]
    assert weight is not None
    gain_I = weight.data
    new_I = (gain_I.double() / scale_I.double()).to(stored).to(gain_I.dtype)
    if not bool(torch.isfinite(new_I).all()):
        raise NumericsError(f"a norm's gain does not fit {stored} after scaling; choose a smaller alpha.")
    # A gain that is, or becomes, zero says nothing about the scale; such a channel keeps what it had.
    moved_I = (new_I != 0) & (gain_I != 0)
    new_I = torch.where(moved_I, new_I, gain_I)
    applied_I = torch.where(moved_I, gain_I.double() / new_I.double(), torch.ones_like(gain_I, dtype=torch.float64))
    weight.data.copy_(new_I)
    bias = getattr(norm, "bias", None)
    if isinstance(bias, nn.Parameter):
        bias.data.copy_(bias.data.double() / applied_I)
    for module in consumers:
        set_weight_OI(module, weight_OI_of(module).double() * applied_I)
    return applied_I.to(gain_I.dtype)
