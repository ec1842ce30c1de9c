"""Choose the scales and zero points of a layer from its weights.

Shape legend: O outputs, I inputs, G groups, P inputs of one group, R rows of several groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from finescale.errors import NumericsError
from finescale.finite import all_finite
from finescale.grid.integer_scale import (
    Amplifier,
    auto_amplifier,
    check_amplifier,
    group_absolute_sums,
    heuristic_amplifier,
    integer_scales,
)
from finescale.grid.scheme import (
    Grid,
    WeightScheme,
    contiguous_groups,
    number_of_groups,
    quantize_to_grid,
    row_pieces,
)

CLIP_CANDIDATES = 40
"""Shrink factors tried by the clipping search: 1.0, 0.98, ... down to 0.22 of the range. Twice as many, or the exponent
2.4 of other tools' searches, were measured to give no lower layer errors and cost up to six times as much."""
CLIP_STEP = 0.02
MOST_TOGETHER = 1 << 26
"""Weights whose groups a GPU fits at a time."""


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest step that is stored; all-zero groups get it.

    float16 goes down to its subnormals: the step of an 8-bit group whose weights stay below 0.008 is one already.
    """
    facts = torch.finfo(dtype)
    return float(facts.tiny * facts.eps if dtype == torch.float16 else facts.tiny)


def fit_grid(
    weight_OI: Tensor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype = torch.float32,
    group_of_I: Tensor | None = None,
) -> Grid:
    """Float-scale grid of a weight.

    Args:
        weight_OI: float [O, I], finite.
        scheme: bits, groups, symmetry, clipping.
        scale_dtype: float type in which the scales will be stored; the grid holds exactly the stored values.
        group_of_I: group of each column when groups are not consecutive.

    Raises:
        NumericsError: NaN or Inf in the weight, or a scale that ``scale_dtype`` cannot hold.
    """
    weight_OI = weight_OI.float()
    if not all_finite(weight_OI):
        raise NumericsError("the weight holds NaN or Inf; repair or re-download the checkpoint.")
    columns = weight_OI.shape[1]
    groups = number_of_groups(columns, scheme.group_size)
    scale_OG = weight_OI.new_empty(weight_OI.shape[0], groups)
    zero_OG = None if scheme.symmetric else torch.empty_like(scale_OG, dtype=torch.int8)
    together = 0
    if group_of_I is None:
        group_of_I = contiguous_groups(columns, scheme.group_size, weight_OI.device)
        together = columns // scheme.group_size if groups > 1 and _many_together(weight_OI.device) else 0
    step = max(1, MOST_TOGETHER // columns)
    for start in range(0, weight_OI.shape[0], step) if together else ():
        rows = slice(start, start + step)
        part_RP = weight_OI[rows, : together * scheme.group_size].reshape(-1, scheme.group_size)
        scale_R, zero_R = fit_group(part_RP, scheme, scale_dtype)
        scale_OG[rows, :together] = scale_R.view(-1, together)
        if zero_OG is not None and zero_R is not None:
            zero_OG[rows, :together] = zero_R.view(-1, together)
    for group in range(together, groups):
        # A single group is all of the weight: no copy of it then.
        members_OI = weight_OI[:, group_of_I == group] if groups > 1 else weight_OI
        for rows in row_pieces(members_OI):
            scale_O, zero_O = fit_group(members_OI[rows], scheme, scale_dtype)
            scale_OG[rows, group] = scale_O
            if zero_OG is not None and zero_O is not None:
                zero_OG[rows, group] = zero_O
    return Grid(scheme, scale_OG, zero_OG, group_of_I, scale_dtype)


def _many_together(device: torch.device) -> bool:
    """A processor's cache holds the columns of one group; a GPU has launches to save."""
    return device.type == "cuda"


def fit_group(weight_OI: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale float32 [O] and zero int8 [O] (None when symmetric) for the columns of one group, ``weight_OI`` [O, I].

    The asymmetric range always includes zero, so that a zero weight stays exactly zero.
    """
    weight_OI = weight_OI.float()
    low_O = weight_OI.amin(1).clamp(max=0)
    high_O = weight_OI.amax(1).clamp(min=0)
    if scheme.clip == "minmax":
        return _range_to_grid(low_O, high_O, scheme, scale_dtype)
    best_scale_O, best_zero_O = _range_to_grid(low_O, high_O, scheme, scale_dtype)  # smaller ranges fit if this does
    best_error_O = rounding_error(weight_OI, best_scale_O, best_zero_O, scheme)
    for candidate in range(1, CLIP_CANDIDATES if scheme.clip == "mse" else 2 * CLIP_CANDIDATES):
        shrink = 1.0 - candidate % CLIP_CANDIDATES * CLIP_STEP
        scale_O, zero_O = _range_to_grid(low_O * shrink, high_O * shrink, scheme, scale_dtype, check=False)
        if candidate >= CLIP_CANDIDATES:
            scale_O = -scale_O
        error_O = rounding_error(weight_OI, scale_O, zero_O, scheme)
        better_O = error_O < best_error_O
        best_error_O = torch.where(better_O, error_O, best_error_O)
        best_scale_O = torch.where(better_O, scale_O, best_scale_O)
        if best_zero_O is not None and zero_O is not None:
            best_zero_O = torch.where(better_O, zero_O, best_zero_O)
    return best_scale_O, best_zero_O


def _range_to_grid(
    low_O: Tensor, high_O: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, check: bool = True
) -> tuple[Tensor, Tensor | None]:
    if scheme.symmetric:
        scale_O = torch.maximum(-low_O, high_O) * (2.0 / (2**scheme.bits - 1))
    else:
        scale_O = (high_O - low_O) / (2**scheme.bits - 1)
    scale_O = _stored(scale_O, scale_dtype, check)
    if scheme.symmetric:
        return scale_O, None
    zero_O = (scheme.code_min - low_O / scale_O).round().clamp(scheme.code_min, scheme.code_max).to(torch.int8)
    return scale_O, zero_O


def _stored(scale_O: Tensor, scale_dtype: torch.dtype, check: bool) -> Tensor:
    """Round to what the file will hold; a group of zeros gets the smallest step."""
    stored_O = scale_O.clamp(min=smallest_scale(scale_dtype)).to(scale_dtype).float()
    if check and not bool(torch.isfinite(stored_O).all()):
        raise NumericsError(f"a group scale does not fit {scale_dtype}; give the model as bfloat16 or float32.")
    return stored_O


def rounding_error(weight_OI: Tensor, scale_O: Tensor, zero_O: Tensor | None, scheme: WeightScheme) -> Tensor:
    """Squared error [O] of the nearest codes of one group, ``weight_OI`` [O, columns of the group]."""
    value_OI = weight_OI / scale_O[:, None]
    zero_O1 = 0.0 if zero_O is None else zero_O.float()[:, None]
    rounded_OI = (value_OI + zero_O1).round_().clamp_(scheme.code_min, scheme.code_max).sub_(zero_O1)
    return rounded_OI.sub_(value_OI).square_().sum(1) * scale_O.square()


def with_integer_scales(grid: Grid, weight_OI: Tensor, amplifier: Amplifier, activation_max: int = 127) -> Grid:
    """The same grid with scales S / amplifier, S integer (Integer Scale, arXiv 2405.14597).

    Args:
        grid: symmetric grid with float scales.
        weight_OI: the weights the grid was fitted to; ``auto`` takes the bound from their nearest codes.
        amplifier: a power of two, ``heuristic`` (the paper's rule) or ``auto`` (the largest whose exact int32 bound
            holds for the nearest codes; the codes a solver picks must be proved again afterwards).
        activation_max: largest activation magnitude.

    Raises:
        InputError: an amplifier that is no power of two up to 2**24.
        NumericsError: an asymmetric grid, or no amplifier with which the sums stay in int32.
    """
    if not grid.scheme.symmetric:
        raise NumericsError("integer scales need symmetric weights; set weights.symmetric true.")
    if amplifier == "heuristic":
        amplifier = heuristic_amplifier(grid.scale_OG)
    elif amplifier == "auto":
        codes_OI = quantize_to_grid(weight_OI.float(), grid)
        sums_OG = group_absolute_sums(codes_OI, grid.group_of_I, grid.scale_OG.shape[1])
        amplifier = auto_amplifier(grid.scale_OG, sums_OG, grid.scale_dtype, activation_max)
    check_amplifier(amplifier)
    return integerized(grid, amplifier)


def integerized(grid: Grid, amplifier: int) -> Grid:
    """``grid`` with its scales replaced by round(scale * amplifier) / amplifier."""
    integer_OG = integer_scales(grid.scale_OG, amplifier, grid.scale_dtype)
    return replace(grid, scale_OG=(integer_OG.double() / amplifier).float(), amplifier=amplifier, folded=False)


def refit_group(grid: Grid, weight_OI: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of one group fitted to ``weight_OI`` [O, columns of the group], under the rules of ``grid``:
    its scheme, its stored type and, when it has one, its amplifier. Raises NumericsError for folded scales: they depend
    on each other and are never fitted one by one."""
    if grid.folded:
        raise NumericsError("folded scales cannot be fitted group by group; set solver.static_groups true.")
    scale_O, zero_O = fit_group(weight_OI, grid.scheme, grid.scale_dtype)
    if grid.amplifier is not None:
        integer_O1 = integer_scales(scale_O[:, None], grid.amplifier, grid.scale_dtype)
        scale_O = (integer_O1[:, 0].double() / grid.amplifier).float()
    return scale_O, zero_O
