"""A quantized weight whose codes and scales can move under gradients.

The weight of a layer is, with the current offsets V and scale factors r,

    w = s * clamp(round(p * s0 / s + V)),      s = stored(s0 * r)

where s0 are the scales it started from and p is its starting position in steps of s0, counted from the zero point. The
rounding passes gradients straight through, so that

    dL/dV = s * dL/dw                          where the code is not clipped, else 0
    dL/ds = sum over the group of dL/dw * (code - p * s0 / s)      (without the second term where it is clipped)

Both are written out here instead of being traced: a step over a layer is then one pass over its weights in pieces that
fit the processor's cache. Scales are always those a file can hold, integers over the amplifier if the grid has one:
what is tuned is what will be stored.

Shape legend: O outputs, I inputs, G groups, P columns of one group (the last group is padded with zeros).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finescale.errors import InputError
from finescale.grid import Grid, QuantizedWeight
from finescale.grid.fit import smallest_scale
from finescale.grid.integer_scale import integer_scales

PIECE = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Weights handled at a time: on a CPU a few float32 arrays of this size stay in the second-level cache; a GPU has its
launches to save, and memory for a few."""
EDGE = 0.45
"""How far from its code's centre a starting position may lie; at 0.5 the first step would turn the code."""


@dataclass
class MovingWeight:
    """The state of one layer while it is tuned; tensors are updated in place.

    Attributes:
        grid: the grid it started from.
        position_OGP: starting weights in steps of the starting scales, zero points taken off, float32.
        offset_OGP: the tuned offsets V, float32.
        factor_OG: the tuned factors r of the scales, float32.
        columns: inputs of the layer, without padding.
    """

    grid: Grid
    position_OGP: Tensor
    offset_OGP: Tensor
    factor_OG: Tensor
    columns: int

    @property
    def rows(self) -> int:
        return self.position_OGP.shape[0]


def start_from(weight: QuantizedWeight, target_OI: Tensor) -> MovingWeight:
    """The state that renders to exactly ``weight``.

    Args:
        weight: a solver's result; groups of consecutive columns.
        target_OI: float [O, I], the values that the codes are thought to be roundings of: each starting position is the
            target's, moved to within ``EDGE`` of its code where it lies elsewhere.

    Raises:
        InputError: groups of scattered columns.
    """
    grid = weight.grid
    if not grid.groups_are_contiguous:
        raise InputError("tuning needs groups of consecutive columns; set solver.static_groups true.")
    rows, columns = weight.codes_OI.shape
    groups = grid.scale_OG.shape[1]
    width = columns if grid.scheme.group_size == -1 else grid.scheme.group_size
    code_OGP = grouped(weight.codes_OI.float(), groups, width)
    if grid.zero_OG is not None:
        code_OGP = code_OGP - grid.zero_OG.float()[:, :, None]
    position_OGP = grouped(target_OI.float(), groups, width) / grid.scale_OG[:, :, None]
    position_OGP = torch.minimum(torch.maximum(position_OGP, code_OGP - EDGE), code_OGP + EDGE)
    if groups * width != columns:
        position_OGP.view(rows, -1)[:, columns:] = 0
    factor_OG = torch.ones_like(grid.scale_OG)
    return MovingWeight(grid, position_OGP.contiguous(), torch.zeros_like(position_OGP), factor_OG, columns)


def grouped(value_OI: Tensor, groups: int, width: int) -> Tensor:
    """Columns by groups, the last one padded with zeros, [O, G, P]."""
    padding = groups * width - value_OI.shape[1]
    padded = functional.pad(value_OI, (0, padding)) if padding else value_OI
    return padded.reshape(value_OI.shape[0], groups, width)


def stored_scales(grid: Grid, factor_OG: Tensor, check: bool = True) -> Tensor:
    """The scales ``grid.scale_OG * factor_OG`` as a file will hold them, float32; with ``check`` that int32 does."""
    if grid.folded:  # steps so coarse, and tied to each other, that small moves mean nothing: they stay
        return grid.scale_OG
    scale_OG = grid.scale_OG * factor_OG
    if grid.amplifier is not None:
        return (integer_scales(scale_OG, grid.amplifier, grid.scale_dtype, check).double() / grid.amplifier).float()
    sign_OG = _signs(grid)
    magnitude_OG = (scale_OG * sign_OG).clamp(min=smallest_scale(grid.scale_dtype)).to(grid.scale_dtype).float()
    return magnitude_OG * sign_OG


def _signs(grid: Grid) -> Tensor | float:
    """Of the scales [O, G]; 1 where none can be negative."""
    return grid.scale_OG.sign() if grid.scheme.clip == "signed" else 1.0


def _clipped(rounded_OGP: Tensor, grid: Grid, rows: slice) -> Tensor:
    """Codes counted from the zero point, kept to the grid's range."""
    low, high = grid.scheme.code_min, grid.scheme.code_max
    if grid.zero_OG is None:
        return rounded_OGP.clamp(low, high)
    zero_OG1 = grid.zero_OG[rows].float()[:, :, None]
    return rounded_OGP.clamp(low - zero_OG1, high - zero_OG1)


def _pieces(state: MovingWeight) -> list[slice]:
    position_OGP = state.position_OGP
    step = max(1, PIECE[position_OGP.device.type] // max(1, position_OGP[0].numel()))
    return [slice(start, min(start + step, state.rows)) for start in range(0, state.rows, step)]


def render(state: MovingWeight, out_OI: Tensor) -> None:
    """Write the current weight into ``out_OI`` [O, I], rounded to its type."""
    for rows in _pieces(state):
        _render_rows(state, rows, out_OI)


def _render_rows(state: MovingWeight, rows: slice, out_OI: Tensor) -> None:
    scale_OG = _scales(state, rows)
    _, _, code_OGP = _codes(state, rows, scale_OG)
    _write(code_OGP.mul_(scale_OG[:, :, None]), out_OI[rows], state.columns)


def _scales(state: MovingWeight, rows: slice) -> Tensor:
    return stored_scales(state.grid.rows_slice(rows), state.factor_OG[rows], check=False)


def _codes(state: MovingWeight, rows: slice, scale_OG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Position in steps of the current scales [rows, G, P], its rounding, and the clipped code; from the zero point."""
    ratio_OG1 = (state.grid.scale_OG[rows] / scale_OG)[:, :, None]
    place_OGP = state.position_OGP[rows] * ratio_OG1
    rounded_OGP = (place_OGP + state.offset_OGP[rows]).round_()
    return place_OGP, rounded_OGP, _clipped(rounded_OGP, state.grid, rows)


def _write(value_OGP: Tensor, out_OI: Tensor, columns: int) -> None:
    flat = value_OGP.view(value_OGP.shape[0], -1)
    out_OI.copy_(flat if flat.shape[1] == columns else flat[:, :columns])


def step(state: MovingWeight, gradient_OI: Tensor, out_OI: Tensor, rate: Any, scale_rate: Any, bound: float) -> None:
    """One step of signed gradient descent on offsets and scale factors, and the weight as it then is.

    Args:
        state: changed in place.
        gradient_OI: dL/dw, float [O, I]; only its sign matters for the offsets.
        out_OI: gets the new weight, as by ``render``, while its rows are in the cache.
        rate: how far every offset moves, in steps of the grid; a number, or a tensor of one.
        scale_rate: how far every factor moves; the number 0 keeps the scales.
        bound: offsets stay within [-bound, bound].
    """
    groups, width = state.position_OGP.shape[1:]
    for rows in _pieces(state):
        gradient_OGP = grouped(gradient_OI[rows].float(), groups, width)
        scale_OG = _scales(state, rows)
        place_OGP, rounded_OGP, code_OGP = _codes(state, rows, scale_OG)
        inside_OGP = rounded_OGP.eq_(code_OGP)  # as float32: products with booleans would convert them again
        # Offsets and factors count along the scale, which may be negative.
        sign_OG = _signs(state.grid.rows_slice(rows))
        if isinstance(scale_rate, Tensor) or scale_rate:
            slope_OG = code_OGP.addcmul_(place_OGP, inside_OGP, value=-1).mul_(gradient_OGP).sum(2)
            state.factor_OG[rows] -= scale_rate * (slope_OG * sign_OG).sign_()
        move_OG1 = -rate * sign_OG[:, :, None] if isinstance(sign_OG, Tensor) else -rate
        offset_OGP = state.offset_OGP[rows]
        offset_OGP.addcmul_(gradient_OGP.sign(), inside_OGP.mul_(move_OG1)).clamp_(-bound, bound)
        _render_rows(state, rows, out_OI)


def finish(state: MovingWeight) -> QuantizedWeight:
    """The weight as it now stands: int8 codes on a grid with the tuned scales."""
    grid = replace(state.grid, scale_OG=stored_scales(state.grid, state.factor_OG))
    codes_OI = torch.empty(state.rows, state.columns, dtype=torch.int8, device=state.position_OGP.device)
    for rows in _pieces(state):
        _, _, code_OGP = _codes(state, rows, grid.scale_OG[rows])
        if grid.zero_OG is not None:
            code_OGP = code_OGP + grid.zero_OG[rows].float()[:, :, None]
        _write(code_OGP, codes_OI[rows], state.columns)
    return QuantizedWeight(codes_OI, grid)


def rounded_values(weight_OI: Tensor, quantized_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """The values that a solver's codes are roundings of, [O, I] in the type of the Hessian.

    Each is the best value of its weight for the layer's output error, all other weights fixed as they are quantized:
    W_j + sum over k != j of (W_k - Q_k) H_kj / H_jj (QuantEase, arXiv 2309.01885, Lemma 1). How far it lies from the
    edge of its code tells how little it would cost to turn the code.
    """
    diagonal_I = hessian_II.diagonal()
    alive_I = diagonal_I > torch.finfo(torch.float32).eps * diagonal_I.max()
    inverse_I = torch.where(alive_I, 1 / diagonal_I, torch.zeros_like(diagonal_I))
    error_OI = weight_OI.to(hessian_II.dtype) - quantized_OI.to(hessian_II.dtype)
    return weight_OI.to(hessian_II.dtype) + (error_OI @ hessian_II - error_OI * diagonal_I) * inverse_I
