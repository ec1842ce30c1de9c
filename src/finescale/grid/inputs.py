"""What becomes of a layer's input before the product: a gather with gains, a rotation, rounding.

Shape legend: T tokens (any leading dimensions), I channels of the input, J channels that the layer multiplies, K
channels that are summed into one, M merged channels with so many members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from finescale.errors import CheckpointError
from finescale.grid.activation import StaticRange, fake_quantize, fake_quantize_full_range
from finescale.grid.hadamard import rotate
from finescale.grid.scheme import ActivationScheme

SUFFIXES = ("input_scale", "input_zero_point", "input_index", "input_gain")
"""Tensors that describe a layer's input in a file, after its name and a dot; the first two are the standard's."""

MOST_OF_A_MATRIX = 1 << 24
"""Elements of a gather's matrix beyond which gradients go back channel by channel."""
MOST_PASSES = 8
"""Channels merged into one up to which a GPU that learns makes a pass for each."""


@dataclass(frozen=True)
class Gather:
    """x'_j = sum over k of gain_kj * x_(index_kj): splits, merges and permutes channels in one pass over the token.

    Attributes:
        index_KJ: int64 [K, J], channels of the input.
        gain_KJ: float32 [K, J]; zero where fewer than K channels are summed.
        further_members: of the second, third ... members of merged channels: their channels afterwards and before, and
            gains, [M] each. Found once: a GPU must not be asked in every call which gains are zero.
    """

    index_KJ: Tensor
    gain_KJ: Tensor
    further_members: tuple[tuple[Tensor, Tensor, Tensor], ...] = field(init=False, repr=False, compare=False)
    _matrices: dict[int, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        found = []
        for index_J, gain_J in zip(self.index_KJ[1:], self.gain_KJ[1:], strict=True):
            some_M = gain_J.nonzero().squeeze(1)
            found.append((some_M, index_J[some_M], gain_J[some_M]))
        object.__setattr__(self, "further_members", tuple(found))

    def apply(self, x_TI: Tensor) -> Tensor:
        """float [..., I] -> [..., J]."""
        learns = x_TI.requires_grad and torch.is_grad_enabled()
        if learns and self.index_KJ.shape[1] * x_TI.shape[-1] <= MOST_OF_A_MATRIX:
            gathered: Tensor = _Gathered.apply(x_TI, self)
            return gathered
        return self.values(x_TI)

    def matrix(self, channels: int) -> Tensor:
        """The gather as a matrix, float32 [J, I], made once."""
        if channels not in self._matrices:
            row_J = torch.arange(self.index_KJ.shape[1], device=self.index_KJ.device)
            matrix_JI = torch.zeros(row_J.shape[0], channels, device=self.index_KJ.device)
            for index_J, gain_J in zip(self.index_KJ, self.gain_KJ, strict=True):
                matrix_JI[row_J, index_J] += gain_J
            self._matrices[channels] = matrix_JI
        return self._matrices[channels]

    def values(self, x_TI: Tensor) -> Tensor:
        """`apply` as it is written, without a thought of gradients."""
        out_TJ = x_TI[..., self.index_KJ[0]] * self.gain_KJ[0].to(x_TI.dtype)
        for some_M, index_M, gain_M in self.further_members:
            out_TJ[..., some_M] += x_TI[..., index_M] * gain_M.to(x_TI.dtype)
        return out_TJ

    def values_in_passes(self, x_TI: Tensor) -> Tensor:
        """The same values by as many passes as channels are merged into one, where nothing is scattered: a GPU that is
        asked for a fixed order sorts what it scatters."""
        out_TJ = x_TI[..., self.index_KJ[0]] * self.gain_KJ[0].to(x_TI.dtype)
        for index_J, gain_J in zip(self.index_KJ[1:], self.gain_KJ[1:], strict=True):
            out_TJ += x_TI[..., index_J] * gain_J.to(x_TI.dtype)
        return out_TJ

    def folded(self, norm_gain_I: Tensor) -> Gather:
        """The same after a norm without its gain: the gain rides along in the gather."""
        return Gather(self.index_KJ, self.gain_KJ * norm_gain_I.to(self.gain_KJ.dtype)[self.index_KJ])


class _Gathered(torch.autograd.Function):
    """A gather whose gradients are one product with its matrix. Added up channel by channel, a GPU must sort them to
    get the same sums each time, which took most of a step of tuning."""

    @staticmethod
    def forward(context: Any, x_TI: Tensor, gather: Gather) -> Tensor:
        context.gather, context.channels = gather, x_TI.shape[-1]
        few = x_TI.is_cuda and gather.index_KJ.shape[0] <= MOST_PASSES
        return gather.values_in_passes(x_TI) if few else gather.values(x_TI)

    @staticmethod
    def backward(context: Any, gradient_TJ: Tensor) -> tuple[Tensor, None]:
        return gradient_TJ @ context.gather.matrix(context.channels).to(gradient_TJ.dtype), None


@dataclass(frozen=True)
class InputRule:
    """All that happens to the input of one layer, in this order: gather, rotation, rounding.

    Attributes:
        scheme: how it is rounded; None leaves it in floating point.
        fixed: the range of a static scheme.
        gather: channel reassembly (QLLM), or None.
        rotation: (size, inner) of an online Hadamard rotation, see `finescale.grid.hadamard.rotate`, or None.
    """

    scheme: ActivationScheme | None = None
    fixed: StaticRange | None = None
    gather: Gather | None = None
    rotation: tuple[int, int] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether rounding is all there is, as every engine does it."""
        return self.gather is None and self.rotation is None

    def rearrange(self, x_TI: Tensor) -> Tensor:
        """Gather and rotation, float [..., I] -> [..., J]."""
        if self.gather is not None:
            x_TI = self.gather.apply(x_TI)
        return x_TI if self.rotation is None else rotate(x_TI, *self.rotation)

    def round(self, x_TI: Tensor, full_range: bool = False) -> Tensor:
        """Rounded and converted back; ``full_range``: symmetric schemes as by `fake_quantize_full_range`."""
        if self.scheme is None:
            return x_TI
        if full_range and self.scheme.symmetric:
            return fake_quantize_full_range(x_TI, self.scheme, self.fixed)
        return fake_quantize(x_TI, self.scheme, self.fixed)

    def to(self, device: torch.device) -> InputRule:
        """The same with its tensors on a device."""
        if self.gather is None:
            return self
        gather = Gather(self.gather.index_KJ.to(device), self.gather.gain_KJ.to(device))
        return InputRule(self.scheme, self.fixed, gather, self.rotation)

    def describe(self) -> dict[str, Any]:
        """What is no tensor, as plain values."""
        return {
            "scheme": None if self.scheme is None else asdict(self.scheme),
            "gather": self.gather is not None,
            "rotation": None if self.rotation is None else list(self.rotation),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by suffix."""
        tensors: dict[str, Tensor] = {}
        if self.fixed is not None:
            tensors["input_scale"] = torch.tensor([self.fixed.scale], dtype=torch.float32)
            if self.scheme is not None and not self.scheme.symmetric:
                tensors["input_zero_point"] = torch.tensor([self.fixed.zero], dtype=torch.int8)
        if self.gather is not None:
            tensors["input_index"] = self.gather.index_KJ.to(torch.int32).cpu().contiguous()
            tensors["input_gain"] = self.gather.gain_KJ.cpu().clone(memory_format=torch.contiguous_format)
        return tensors


def input_rule(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> InputRule:
    """The rule that `InputRule.describe` and `InputRule.tensors` tell of.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape; names the layer.
    """
    scheme = None if facts.get("scheme") is None else ActivationScheme(**facts["scheme"])
    fixed = gather = None
    if scheme is not None and not scheme.dynamic:
        if "input_scale" not in tensors or tensors["input_scale"].numel() != 1:
            raise CheckpointError(f"{name} has static activations and no input_scale; the checkpoint is incomplete.")
        if not 0 < float(tensors["input_scale"]) < float("inf"):
            raise CheckpointError(f"the input_scale of {name} is no positive number; the checkpoint is damaged.")
        zero = tensors.get("input_zero_point")
        fixed = StaticRange(float(tensors["input_scale"]), 0 if zero is None or scheme.symmetric else int(zero))
    if facts.get("gather"):
        index_KJ, gain_KJ = tensors.get("input_index"), tensors.get("input_gain")
        if index_KJ is None or gain_KJ is None or index_KJ.dim() != 2 or index_KJ.shape != gain_KJ.shape:
            raise CheckpointError(f"{name} lacks its gather (input_index, input_gain); the checkpoint is incomplete.")
        if bool((index_KJ < 0).any()) or not bool(torch.isfinite(gain_KJ).all()):
            raise CheckpointError(f"the gather of {name} is no choice of channels; the checkpoint is damaged.")
        gather = Gather(index_KJ.to(torch.int64), gain_KJ.to(torch.float32))
    rotation = facts.get("rotation")
    return InputRule(scheme, fixed, gather, None if rotation is None else (int(rotation[0]), int(rotation[1])))
