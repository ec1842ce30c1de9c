"""SmoothQuant (arXiv 2211.10438): moves the activations' outliers into the weights, half way.

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)      x'_j = x_j / s_j      W'_j = W_j s_j

Only where a norm feeds linears; the division goes into the norm's gain. Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from finescale.transforms.scaling import divide_norm, largest_weight
from finescale.transforms.view import BlockView, Changes, TransformOptions

_SMALLEST = 1e-5


class SmoothQuantOptions(TransformOptions):
    """``alpha`` 0 leaves the activations as they are, 1 makes all their channels equally large. Published: 0.5;
    0.85 for Llama-2 and 3, 0.8 for Mistral and Mixtral, 0.6 for Falcon."""

    alpha: float = Field(default=0.5, ge=0, le=1)


def smoothing_scale(absmax_I: Tensor, weight_absmax_I: Tensor, alpha: float) -> Tensor:
    """The scale per channel, float [I]; 1 where activations or weights are all zero (arXiv 2211.10438, eq. 4).

    Args:
        absmax_I: largest |x| per channel over the calibration tokens.
        weight_absmax_I: largest |W| per input channel over all consumers.
        alpha: share of the difficulty that moves into the weights.
    """
    scale_I = absmax_I.double() ** alpha / weight_absmax_I.double() ** (1 - alpha)
    dead_I = (absmax_I == 0) | (weight_absmax_I == 0)
    return torch.where(dead_I, torch.ones_like(scale_I), scale_I.clamp(min=_SMALLEST)).to(absmax_I.dtype)


def apply_smoothquant(view: BlockView, options: SmoothQuantOptions) -> Changes:
    """Smooth the output of every norm that feeds linears."""
    ranges = view.ranges(norms=[edge.norm for edge in view.edges])
    facts = {}
    for edge in view.edges:
        consumers = [view.block.get_submodule(path) for path in edge.consumers]
        scale_I = smoothing_scale(ranges[edge.norm].absmax_I, largest_weight(consumers), options.alpha)
        applied_I = divide_norm(view.block.get_submodule(edge.norm), consumers, scale_I, view.stored)
        facts[edge.norm] = {"scale_min": float(applied_I.min()), "scale_max": float(applied_I.max())}
    return Changes(facts)
