"""What a transform sees of a block, and what it says it did.

Shape legend: O outputs, I inputs, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from finescale.calibration.capture import run_block
from finescale.calibration.statistics import InputRange, collect_ranges
from finescale.grid import ActivationScheme, Gather, InputRule, WeightScheme
from finescale.models.edges import Edge
from finescale.models.graph import Step
from finescale.models.links import Link, trace_links
from finescale.transforms.rotation import Rotation
from finescale.tuning.reconstruction import ReconstructionOptions, Windows


class TransformOptions(BaseModel):
    """Options of a transform: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Target:
    """How one linear will be quantized: scheme of its weight, rounding of its input (None: not at all)."""

    scheme: WeightScheme
    activations: ActivationScheme | None = None

    def search_scheme(self) -> WeightScheme:
        """The weight's scheme without its clipping search, which would make trying many weights slow."""
        return replace(self.scheme, clip="minmax")

    def rule(self, gather: Gather | None = None) -> InputRule:
        """Rounding of the input as far as a search can know it: a static scheme gets its range only afterwards."""
        dynamic = self.activations if self.activations is None or self.activations.dynamic else None
        return InputRule(dynamic, gather=gather)


@dataclass(frozen=True)
class Limits:
    """Ends of the range that the grid of each group covers, float [O, G]; weights beyond them are clipped."""

    low_OG: Tensor
    high_OG: Tensor


@dataclass(frozen=True)
class Learning:
    """What a transform that learns from the block's output needs.

    Attributes:
        windows: inputs and target outputs under the options' rules, for the block as it is now.
        arguments_of: the block's other arguments for a number of windows.
        seed: of the order of the windows.
    """

    windows: Callable[[ReconstructionOptions], Windows]
    arguments_of: Callable[[int], Mapping[str, Any]]
    seed: int


@dataclass(frozen=True)
class BlockView:
    """One block with its weights in memory, which a transform rewrites in place.

    Attributes:
        block: the module; its norms and linears may be changed.
        index: its number.
        targets: how each linear that is quantized will be, by path.
        edges: norms and what they feed.
        steps: linears by shared input, in order of execution.
        batches: inputs [B, T, I] and keyword arguments, out of the already quantized prefix.
        device: where the block lives.
        stored: type of the norms' gains in the file; new gains are rounded to it.
        rearranged: linears whose input an earlier transform gathers or rotates.
        learning: for a transform that learns; None for the others.
        rotation: of the residual stream, for the transform that makes the block fit it; ``batches`` are rotated.
    """

    block: nn.Module
    index: int
    targets: Mapping[str, Target]
    edges: Sequence[Edge]
    steps: Sequence[Step]
    batches: Sequence[tuple[Tensor, dict[str, Any]]]
    device: torch.device
    stored: torch.dtype
    rearranged: Collection[str] = ()
    rotation: Rotation | None = None
    learning: Learning | None = None

    def ranges(self, norms: Iterable[str] = (), linears: Iterable[str] = ()) -> dict[str, InputRange]:
        """Ranges per channel of the outputs of norms and of the inputs of linears, over all batches."""
        return collect_ranges(self.block, tuple(norms), tuple(linears), self.batches, self.device)

    def run_all(self) -> None:
        """Run the block over all batches, for the hooks on it."""
        with torch.no_grad():
            for hidden_BTI, kwargs in self.batches:
                self.block(hidden_BTI.to(self.device), **kwargs)

    def links(self, prepare: Callable[[Tensor], Tensor] | None = None) -> tuple[Link, ...]:
        """Linears whose channels correspond to those of a linear before; ``prepare`` is applied to the input first."""
        hidden_BTI, kwargs = self.some(1)
        return trace_links(self.block, prepare(hidden_BTI) if prepare else hidden_BTI, kwargs, self.steps)

    def in_attention(self, path: str) -> bool:
        """Whether a linear belongs to the attention, by the classes of the modules around it."""
        parents = path.split(".")[:-1]
        around = [self.block.get_submodule(".".join(parents[: depth + 1])) for depth in range(len(parents))]
        return any("attention" in type(module).__name__.lower() for module in around)

    def some(self, sequences: int) -> tuple[Tensor, dict[str, Any]]:
        """The first sequences of the first batch, see `some_of`."""
        return some_of(self.batches[0], sequences, self.device)

    def run_some(self, sequences: int) -> Tensor:
        """The block's output on `some` of its inputs, float [B, T, I]."""
        hidden_BTI, kwargs = self.some(sequences)
        return run_block(self.block, hidden_BTI, kwargs)


def some_of(
    batch: tuple[Tensor, dict[str, Any]], sequences: int, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    """The first sequences of a batch, float [B, T, I], and the block's other arguments.

    What the model passes its blocks may be made for the whole batch: then it is all of the batch.
    """
    hidden_BTI, kwargs = batch
    count = hidden_BTI.shape[0]
    cut = all(_broadcasts(value, count) for value in kwargs.values())
    return hidden_BTI[: sequences if cut else count].to(device), kwargs


def _broadcasts(value: Any, batch: int) -> bool:
    """Whether an argument of a block serves any number of sequences."""
    if isinstance(value, tuple | list):
        return all(_broadcasts(part, batch) for part in value)
    return not isinstance(value, Tensor) or batch == 1 or value.dim() == 0 or value.shape[0] != batch


@dataclass(frozen=True)
class Changes:
    """What a transform did besides rewriting weights.

    Attributes:
        facts: for the report, by path of a norm or linear in the block.
        inputs: gathers and rotations that the runtime must apply to the inputs of linears, by path; their weights
            already expect it.
        activations: linears whose input is to be rounded in another way than the recipe says, by path.
        limits: the range that each group of a weight should cover, by path; it replaces the clipping search.
    """

    facts: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    inputs: Mapping[str, InputRule] = field(default_factory=dict)
    activations: Mapping[str, ActivationScheme | None] = field(default_factory=dict)
    limits: Mapping[str, Limits] = field(default_factory=dict)


Transform = Callable[[BlockView, Any], Changes]
"""``(view, options) -> Changes``; rewrites ``view.block`` in place and keeps its function."""
