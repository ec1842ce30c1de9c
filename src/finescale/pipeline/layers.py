"""What a layer is solved from, what becomes of its solution, and what the report says of it.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from finescale.errors import NumericsError
from finescale.finite import all_finite
from finescale.grid import (
    Grid,
    QuantizedWeight,
    contiguous_groups,
    fit_grid,
    integerized,
    quantize_to_grid,
    row_pieces,
    with_folded_scales,
    with_integer_scales,
)
from finescale.grid.integer_scale import (
    INT32_LIMIT,
    auto_amplifier,
    group_absolute_sums,
    heuristic_amplifier,
    integer_scales,
    overflow_bound,
)
from finescale.pipeline.plan import LayerPlan
from finescale.recipe import Recipe
from finescale.solvers import Solution, relative_error

CURVE = tuple(2**exponent for exponent in range(6, 21))
"""Amplifiers of the curve amplifier against error."""
FEW_TOKENS_DAMPING = 0.01
HISTOGRAM_BINS = 40
NO_LOWEST_ZERO = "gptq"
"""The format that cannot store a zero point on the lowest code: it stores zero points less one, unsigned."""


PlannedWeight = tuple[LayerPlan, Tensor]
"""A layer's plan with its weight, float [O, I]."""


@dataclass(frozen=True)
class Solved:
    """What a layer was solved from, for those who go on from its solution."""

    weight_OI: Tensor
    hessian_II: Tensor
    solution: Solution
    tokens: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LayerResult:
    """A solved layer and its line in the report; ``solved`` when the recipe tunes."""

    plan: LayerPlan
    weight: QuantizedWeight
    record: dict[str, Any]
    solved: Solved | None = None


def with_tuned_weight(result: LayerResult, tuned: QuantizedWeight, recipe: Recipe) -> LayerResult:
    """The result with a tuned weight, its record anew, and the proof that int32 holds.

    Where tuned codes sum to more than int32 holds, an ``auto`` amplifier is halved and the codes kept; with a fixed one
    the layer goes back to the solver's weight.
    """
    plan, solved = result.plan, result.solved
    assert solved is not None
    notes = solved.notes
    while tuned.grid.amplifier is not None and _bound(plan, tuned) >= INT32_LIMIT:
        if recipe.integer_scale.amplifier == "auto" and tuned.grid.amplifier > 1:
            tuned = QuantizedWeight(tuned.codes_OI, integerized(tuned.grid, tuned.grid.amplifier // 2))
        else:
            tuned, notes = result.weight, (*notes, "the tuned codes could overflow int32: the solver's were kept")
    block = result.record["block"]
    error = relative_error(solved.weight_OI, tuned.dequantize(), solved.hessian_II)
    record = record_of(plan, solved.weight_OI, tuned, error, solved.solution, recipe, block, solved.tokens, notes)
    record["relative_error_before_tuning"] = result.record["relative_error"]
    return LayerResult(plan, tuned, record)


def check_weight(plan: LayerPlan, weight_OI: Tensor) -> None:
    """Raises NumericsError, with the name of the layer, when the weight holds NaN or Inf."""
    if not all_finite(weight_OI):
        raise NumericsError(f"{plan.name} holds NaN or Inf in its weight; repair or re-download the checkpoint.")


def by_scheme(layers: Sequence[PlannedWeight], recipe: Recipe) -> list[list[PlannedWeight]]:
    """Layers that may be stacked. A solver that moves scales needs each layer's own amplifier, and outliers are
    counted by layer, so these stay alone."""
    options = recipe.solver.options()
    refits_alone = recipe.integer_scale.mode == "before" and options.moves_scales
    if refits_alone or options.keeps_outliers:
        return [[layer] for layer in layers]
    groups: dict[Any, list[PlannedWeight]] = {}
    for layer in layers:
        groups.setdefault(layer[0].scheme, []).append(layer)
    return list(groups.values())


def fit_layer_grid(plan: LayerPlan, weight_OI: Tensor, scale_dtype: torch.dtype) -> Grid:
    """The float-scale grid of a layer; ranges stop at the limits that a transform found."""
    return fit_grid(_limited(plan, weight_OI), plan.scheme, scale_dtype)


def _limited(plan: LayerPlan, weight_OI: Tensor) -> Tensor:
    if plan.limits is None:
        return weight_OI
    group_of_I = contiguous_groups(weight_OI.shape[1], plan.scheme.group_size, weight_OI.device)
    low_OG, high_OG = plan.limits.low_OG.to(weight_OI), plan.limits.high_OG.to(weight_OI)
    return weight_OI.clamp(low_OG[:, group_of_I], high_OG[:, group_of_I])


def initial_grid(plan: LayerPlan, weight_OI: Tensor, recipe: Recipe, scale_dtype: torch.dtype) -> Grid:
    """The grid a solver starts from: float scales, or integer ones when the recipe wants them before the solver."""
    grid = fit_layer_grid(plan, weight_OI, scale_dtype)
    if recipe.integer_scale.mode == "before":
        return with_integer_scales(grid, weight_OI, recipe.integer_scale.amplifier, activation_max(plan))
    if recipe.integer_scale.mode == "folded":
        return with_folded_scales(grid, _limited(plan, weight_OI))
    return _without_lowest_zero(grid) if recipe.format == NO_LOWEST_ZERO else grid


def rows_fit_apart(plan: LayerPlan, recipe: Recipe) -> bool:
    """Whether ``initial_grid`` of some rows is that of the layer in these rows: not with an amplifier or limits of the
    whole layer."""
    return recipe.integer_scale.mode != "before" and plan.limits is None


def _without_lowest_zero(grid: Grid) -> Grid:
    """Zero points one above the lowest code where they are the lowest (groups without negative weights, dead rows), the
    step a little longer, so that the range of the group stays covered."""
    if grid.zero_OG is None:
        return grid
    lowest_OG = grid.zero_OG == grid.scheme.code_min
    steps = 2**grid.scheme.bits - 1
    longer_OG = (grid.scale_OG * (steps / (steps - 1))).to(grid.scale_dtype).float()
    return replace(
        grid,
        scale_OG=torch.where(lowest_OG, longer_OG, grid.scale_OG),
        zero_OG=torch.where(lowest_OG, grid.zero_OG + 1, grid.zero_OG),
    )


def finished(
    plan: LayerPlan,
    weight_OI: Tensor,
    weight: QuantizedWeight,
    recipe: Recipe,
    scale_dtype: torch.dtype,
    again: Callable[[Grid], QuantizedWeight],
) -> QuantizedWeight:
    """Integer scales after the solver if asked, and the proof that int32 holds.

    Before the solver, ``auto`` can only guess by the rounded weight; where the solved codes sum to more than those, it
    steps down until the bound holds. That is what ``auto`` means, and so no fallback worth a note: the record
    has the amplifier and how much of int32 it uses.

    Args:
        plan: of the layer.
        weight_OI: the original.
        weight: the solved one.
        recipe: integer scales.
        scale_dtype: type in which scales are stored.
        again: solves the layer on another grid.

    Raises:
        NumericsError: a fixed amplifier, or folded scales, could overflow int32; names the layer.
    """
    mode = recipe.integer_scale.mode
    if mode == "off":
        return weight
    if mode == "after":
        weight = QuantizedWeight(weight.codes_OI, integerized(weight.grid, _amplifier_after(plan, weight, recipe)))
    while _bound(plan, weight) >= INT32_LIMIT:
        amplifier = weight.grid.amplifier
        if weight.grid.folded:
            raise NumericsError(
                f"{plan.name}: folded scales could overflow int32 with so many inputs; set integer_scale.mode before."
            )
        if recipe.integer_scale.amplifier != "auto" or amplifier is None or amplifier == 1:
            raise NumericsError(
                f"{plan.name}: an amplifier of {amplifier} could overflow int32 (bound "
                f"{_bound(plan, weight) / INT32_LIMIT:.2f} times 2^31); set integer_scale.amplifier auto or a "
                "smaller one."
            )
        weight = again(integerized(fit_layer_grid(plan, weight_OI, scale_dtype), amplifier // 2))
    return weight


def activation_max(plan: LayerPlan) -> int:
    """Largest magnitude of an activation code, which the overflow bound counts with."""
    return plan.activations.code_max if plan.activations else 127


def _amplifier_after(plan: LayerPlan, weight: QuantizedWeight, recipe: Recipe) -> int:
    choice, grid = recipe.integer_scale.amplifier, weight.grid
    if isinstance(choice, int):
        return choice
    if choice == "heuristic":
        return heuristic_amplifier(grid.scale_OG)
    sums_OG = group_absolute_sums(weight.codes_OI, grid.group_of_I, grid.scale_OG.shape[1])
    return auto_amplifier(grid.scale_OG, sums_OG, grid.scale_dtype, activation_max(plan))


def _bound(plan: LayerPlan, weight: QuantizedWeight) -> int:
    grid = weight.grid
    return int(overflow_bound(weight.codes_OI, grid.integer_scale_OG(), grid.group_of_I, activation_max(plan)).max())


def record_of(
    plan: LayerPlan,
    weight_OI: Tensor,
    weight: QuantizedWeight,
    error: float,
    solution: Solution,
    recipe: Recipe,
    block: int,
    tokens: int,
    notes: tuple[str, ...],
) -> dict[str, Any]:
    """A layer's line in the report.

    Args:
        plan: of the layer.
        weight_OI: the original.
        weight: what is written.
        error: ``relative_error`` of that.
        solution: what it came from.
        recipe: its solver.
        block: number of the block.
        tokens: how many the Hessian was made of.
        notes: all there are.
    """
    value_OI = weight.dequantize()
    grid = weight.grid
    scale_OG = grid.scale_OG.abs() if grid.amplifier is None else grid.integer_scale_OG().float()
    bound = None if grid.amplifier is None else _bound(plan, weight)
    return {
        "name": plan.name,
        "block": block,
        "shape": list(plan.shape_OI),
        "bits": plan.scheme.bits,
        "group_size": plan.scheme.group_size,
        "symmetric": plan.scheme.symmetric,
        "solver": recipe.solver.name,
        "relative_error": error,
        "weight_mse": _mean_square(weight_OI, value_OI),
        "amplifier": grid.amplifier,
        "folded": grid.folded,
        "bound": bound,
        "overflow_use": None if bound is None else bound / INT32_LIMIT,
        "scale_min": float(scale_OG.min()),
        "scale_max": float(scale_OG.max()),
        "scale_histogram": _histogram(scale_OG),
        "amplifier_curve": None if grid.amplifier is None or grid.folded else _curve(plan, weight_OI),
        "sha256": weight.sha256(),
        "tokens": tokens,
        "outliers": None if weight.outliers is None else weight.outliers.count,
        "bits_per_weight": weight.stored_bits() / weight.codes_OI.numel(),
        "damping": solution.damping,
        "notes": list(notes),
    }


def _mean_square(weight_OI: Tensor, value_OI: Tensor) -> float:
    """Of the difference, in float64, piece by piece."""
    squares = ((value_OI[rows] - weight_OI[rows].float()).double().square().sum() for rows in row_pieces(value_OI))
    return float(sum(squares)) / value_OI.numel()


def _histogram(scale_OG: Tensor) -> dict[str, list[float]]:
    top = float(scale_OG.max())
    counts = torch.histc(scale_OG.flatten().cpu(), bins=HISTOGRAM_BINS, min=0.0, max=top)
    edges = torch.linspace(0.0, top, HISTOGRAM_BINS + 1)
    return {"edges": edges.tolist(), "counts": [int(count) for count in counts]}


def _curve(plan: LayerPlan, weight_OI: Tensor) -> list[dict[str, float]]:
    """Weight error of the paper's conversion (same codes, rounded scales) and use of int32, by amplifier."""
    grid = fit_grid(weight_OI, plan.scheme)
    codes_OI = quantize_to_grid(weight_OI.float(), grid)
    sums_OG = group_absolute_sums(codes_OI, grid.group_of_I, grid.scale_OG.shape[1])
    squares_OG = torch.zeros_like(grid.scale_OG).index_add_(1, grid.group_of_I, codes_OI.float().square())
    points = []
    for amplifier in CURVE:
        integer_OG = integer_scales(grid.scale_OG, amplifier, torch.float32)
        change_OG = integer_OG.double() / amplifier - grid.scale_OG.double()
        mse = float((change_OG.square() * squares_OG).sum()) / weight_OI.numel()
        bound = int((activation_max(plan) * (integer_OG.to(torch.int64) * sums_OG).sum(1)).max())
        points.append({"amplifier": amplifier, "weight_mse": mse, "overflow_use": bound / INT32_LIMIT})
    return points
