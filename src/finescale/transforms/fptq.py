"""FPTQ (arXiv 2308.15987): each layer's activations by their range: one fixed scale, an equalized one, or a scale per
token.

    range <= low:          one scale per tensor, fixed by calibration
    low < range < high:    logarithmic equalization of the norm's output, then the same
    high <= range:         one scale per token

    s_j = max|x_j| / log2(2 + max|x_j|)      x'_j = x_j / s_j      W'_j = W_j s_j

As published, a norm's output beyond ``high`` is not equalized, though nothing speaks against it: a scale per token does
not help a token whose other channels are hundreds of times smaller. ``equalize: all`` does both.

Shape legend: I inputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from finescale.grid import ActivationScheme
from finescale.transforms.scaling import divide_norm
from finescale.transforms.view import BlockView, Changes, TransformOptions


class FptqOptions(TransformOptions):
    """The thresholds on max|x|, published: 15 and 150. Layers without a norm before them (attention output, down
    projection) cannot be equalized: in the middle range they get one scale per token. ``equalize: all`` also equalizes
    norms' outputs beyond ``high``, before their scale per token."""

    low: float = Field(default=15.0, ge=0)
    high: float = Field(default=150.0, gt=0)
    equalize: Literal["middle", "all"] = "middle"

    @model_validator(mode="after")
    def _check(self) -> FptqOptions:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


def logarithmic_scale(absmax_I: Tensor) -> Tensor:
    """s = m / log2(2 + m), float [I]; 1 for channels that are always zero (arXiv 2308.15987, logarithmic activation
    equalization)."""
    scale_I = absmax_I.double() / torch.log2(2 + absmax_I.double())
    return torch.where(absmax_I == 0, torch.ones_like(scale_I), scale_I).to(absmax_I.dtype)


def apply_fptq(view: BlockView, options: FptqOptions) -> Changes:
    """Choose each layer's activation scheme, equalizing norms' outputs in the middle range."""
    norm_of = {path: edge for edge in view.edges for path in edge.consumers}
    leaders = [step.linears[0] for step in view.steps if step.linears[0] not in norm_of]
    ranges = view.ranges(norms=[edge.norm for edge in view.edges], linears=leaders)
    facts: dict[str, dict[str, Any]] = {}
    choices: dict[str, bool] = {}
    for edge in view.edges:
        absmax_I = ranges[edge.norm].absmax_I
        largest = float(absmax_I.max())
        if options.low < largest and (largest < options.high or options.equalize == "all"):
            consumers = [view.block.get_submodule(path) for path in edge.consumers]
            divide_norm(view.block.get_submodule(edge.norm), consumers, logarithmic_scale(absmax_I), view.stored)
        choices |= dict.fromkeys(edge.consumers, largest < options.high)
        policy = "equalized" if largest > options.low else "tensor"
        if largest >= options.high:
            policy = "token" if options.equalize == "middle" else "equalized token"
        facts[edge.norm] = {"range": largest, "policy": policy}
    for step in view.steps:
        if step.linears[0] in ranges:
            largest = float(ranges[step.linears[0]].absmax_I.max())
            choices |= dict.fromkeys(step.linears, largest <= options.low)
            facts[step.linears[0]] = {"range": largest, "policy": "tensor" if largest <= options.low else "token"}
    activations = {}
    for path, is_static in choices.items():
        scheme = view.targets[path].activations if path in view.targets else None
        if scheme is not None:
            activations[path] = ActivationScheme(
                scheme.bits, "tensor" if is_static else "token", not is_static, scheme.symmetric
            )
    return Changes(facts, activations=activations)
