"""Scales that are quantized themselves (SpQR, arXiv 2306.03078, section 4.1).

The scales of consecutive rows in one group of columns share a step and a base: scale = base + step * code.

Shape legend: O outputs, G groups along the inputs, Q = ceil(O / rows) second-level groups, S scales of one of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Bilevel:
    """How the scales of a layer are stored.

    Attributes:
        bits: of a scale's code.
        rows: consecutive rows that share a step and a base.
        code_OG: int8 [O, G], 0 to 2^bits - 1 less 2^(bits-1).
        step_QG: float [Q, G] in the type of the file, not negative.
        base_QG: float [Q, G] in the type of the file, positive: the smallest scale.
    """

    bits: int
    rows: int
    code_OG: Tensor
    step_QG: Tensor
    base_QG: Tensor

    def scale_OG(self) -> Tensor:
        """The scales, float32 [O, G]."""
        row_O = torch.arange(self.code_OG.shape[0], device=self.code_OG.device) // self.rows
        level_OG = self.code_OG.float() + 2 ** (self.bits - 1)
        return self.base_QG.float()[row_O] + self.step_QG.float()[row_O] * level_OG

    @property
    def stored_bits(self) -> int:
        """Bits of codes, steps and bases."""
        return self.bits * self.code_OG.numel() + 16 * self.step_QG.element_size() * self.step_QG.numel()


def quantize_scales(scale_O: Tensor, bits: int, rows: int, dtype: torch.dtype, smallest: float) -> Bilevel:
    """Min/max grids for the scales [O] of one group of columns.

    Args:
        scale_O: float32, positive.
        bits: of a code.
        rows: scales that share a step and a base; the last such group may be smaller.
        dtype: type of steps and bases.
        smallest: lower limit of a base.
    """
    count = scale_O.shape[0]
    padded = -(-count // rows) * rows
    # The padding repeats the last scale, which leaves every minimum and maximum as it is.
    scale_QS = torch.cat([scale_O, scale_O[-1:].expand(padded - count)]).view(-1, rows)
    base_Q = scale_QS.amin(1).clamp(min=smallest).to(dtype)
    step_Q = ((scale_QS.amax(1) - base_Q.float()).clamp(min=0) / (2**bits - 1)).to(dtype)
    divisor_Q = torch.where(step_Q > 0, step_Q.float(), torch.ones_like(scale_QS[:, 0]))
    level_QS = ((scale_QS - base_Q.float()[:, None]) / divisor_Q[:, None]).round().clamp(0, 2**bits - 1)
    code_O = (level_QS.flatten()[:count] - 2 ** (bits - 1)).to(torch.int8)
    return Bilevel(bits, rows, code_O[:, None], step_Q[:, None], base_Q[:, None])


def join_groups(parts: list[Bilevel]) -> Bilevel:
    """The groups of columns side by side."""
    first = parts[0]
    return Bilevel(
        first.bits,
        first.rows,
        torch.cat([part.code_OG for part in parts], 1),
        torch.cat([part.step_QG for part in parts], 1),
        torch.cat([part.base_QG for part in parts], 1),
    )
