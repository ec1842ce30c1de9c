"""Round to nearest in given or learned ranges; gradients pass straight through the rounding, exactly through the ends.

Shape legend: O outputs, I inputs, G groups, P columns of one group (the last group is padded with zeros).
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.grid import WeightScheme
from finescale.grid.fit import smallest_scale
from finescale.tuning.moving import grouped


def ranges(weight_OGP: Tensor, scheme: WeightScheme, ends: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Lower and upper end of each group's range, float [O, G] (arXiv 2308.13137, equation 2)."""
    low_OG, high_OG = weight_OGP.amin(2).clamp(max=0), weight_OGP.amax(2).clamp(min=0)
    if scheme.symmetric:
        high_OG = torch.maximum(-low_OG, high_OG)
        high_OG = high_OG * ends[0].sigmoid() if ends else high_OG
        return -high_OG, high_OG
    return (low_OG * ends[0].sigmoid(), high_OG * ends[1].sigmoid()) if ends else (low_OG, high_OG)


def rounded(weight_OI: Tensor, scheme: WeightScheme, ends: tuple[Tensor, ...] = ()) -> Tensor:
    """The weight rounded to nearest in learned ranges, float [O, I], as the grid of `finescale.grid.fit` has it."""
    rows, columns = weight_OI.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    weight_OGP = grouped(weight_OI, -(-columns // size), size)
    low_OG, high_OG = ranges(weight_OGP, scheme, ends)
    # As the grid does it: of a symmetric range the ends lie half way between two codes, where every bit counts.
    steps = 2**scheme.bits - 1
    scale_OG = high_OG * (2.0 / steps) if scheme.symmetric else (high_OG - low_OG) / steps
    scale_OG1 = scale_OG.clamp(min=smallest_scale(torch.float32))[:, :, None]
    zero_OG1 = torch.zeros_like(scale_OG1)
    if not scheme.symmetric:
        zero_OG1 = (scheme.code_min - low_OG[:, :, None] / scale_OG1).round().clamp(scheme.code_min, scheme.code_max)
        zero_OG1 = zero_OG1.detach()
    place_OGP = weight_OGP / scale_OG1
    code_OGP = place_OGP + (place_OGP.round() - place_OGP).detach() + zero_OG1
    value_OGP = (code_OGP.clamp(scheme.code_min, scheme.code_max) - zero_OG1) * scale_OG1
    return value_OGP.reshape(rows, -1)[:, :columns]
