"""QuantEase (arXiv 2309.01885): cyclic coordinate descent on the layer's squared output error.

Column j of the quantized weight, all others fixed, has the closed-form best value

    beta_j = W_j + sum_{k != j} (W_k - Q_k) H_kj / H_jj

and its nearest grid point minimizes the error in that coordinate (the paper's Lemma 1). The running targets beta are
kept for all columns; inside a lazy batch of columns only the batch itself is corrected, and all other columns follow
with one matrix product per batch, so that nearly all work is matrix products.

Shape legend: O outputs, I inputs, B columns of one lazy batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from finescale.grid import Grid, QuantizedWeight, fit_grid, quantize_to_grid
from finescale.solvers.columns import (
    ColumnRounder,
    assemble,
    check_finite,
    column_order,
    one_thread,
    regroup,
    row_slabs,
)
from finescale.solvers.gptq import GptqOptions, solve_gptq
from finescale.solvers.outliers import (
    CoordinateSupport,
    GradientSupport,
    Support,
    first_support,
    outlier_count,
    with_outliers,
)
from finescale.solvers.solution import Solution, SolverOptions

LAST_RELAXED_SWEEP = 25
"""Sweeps after this one (0-based) always end on the grid; the schedule of the authors' code."""
REFRESH_EVERY = 10
"""Sweeps between exact recomputations of the running targets, against drift of float32."""


class QuantEaseOptions(SolverOptions):
    """Options of QuantEase.

    Attributes:
        sweeps: passes over all columns.
        relax_every: every n-th sweep leaves the columns unrounded, to escape poor local minima; 0 never does.
        start: ``weight`` starts from the unquantized weight, ``gptq`` from the GPTQ solution.
        act_order: solve columns by falling diagonal of H.
        static_groups: groups of the original column order; off: groups of the solving order.
        damping: fraction of the mean diagonal added to H; 0 as published.
        gptq_damping: damping of the GPTQ start.
        block_size: columns of one lazy batch.
        outliers: weights kept beside the grid: a share below 1, or a number; the grid's range is fitted without them.
        structured: outliers are whole input columns, and ``outliers`` counts these.
        support: how outliers are chosen between sweeps: ``coordinate`` keeps those whose rounding would cost most at
            the current targets; ``gradient`` is the published step, the largest entries after a gradient step of
            length 1 / L on H.
    """

    sweeps: int = Field(default=30, ge=1)
    relax_every: int = Field(default=3, ge=0)
    start: Literal["weight", "gptq"] = "weight"
    act_order: bool = False
    static_groups: bool = True
    damping: float = Field(default=0.0, ge=0.0)
    gptq_damping: float = Field(default=0.01, ge=0.0)
    block_size: int = Field(default=128, ge=1)
    outliers: float = Field(default=0.0, ge=0.0)
    structured: bool = False
    support: Literal["coordinate", "gradient"] = "coordinate"

    @property
    def keeps_outliers(self) -> bool:
        return self.outliers > 0


def is_relaxed(sweep: int, sweeps: int, relax_every: int) -> bool:
    """Whether sweep number ``sweep`` (0-based) leaves the grid: 1, 4, ... 25 of 30; never the last."""
    if relax_every < 1 or sweep == sweeps - 1 or sweep > LAST_RELAXED_SWEEP:
        return False
    return sweep % relax_every == 1 % relax_every


def normalized_columns(hessian_II: Tensor, dtype: torch.dtype) -> Tensor:
    """H_kj / H_jj with a zero diagonal, [I, I]; a dead input j (H_jj zero, or too small to divide by) gets zeros."""
    diagonal_I = hessian_II.diagonal()
    alive_I = diagonal_I >= torch.finfo(hessian_II.dtype).tiny
    inverse_I = torch.where(alive_I, 1 / diagonal_I, torch.zeros_like(diagonal_I))
    normalized_II = (hessian_II * inverse_I[None, :]).to(dtype).contiguous()
    normalized_II.fill_diagonal_(0)
    return normalized_II


def solve_quantease(weight_OI: Tensor, hessian_II: Tensor, grid: Grid, options: QuantEaseOptions) -> Solution:
    """Coordinate descent with lazy batches of columns.

    Args:
        weight_OI: float [O, I]; computed in float64 if it is float64, else in float32.
        hessian_II: [I, I], sum or mean of x x^T over the calibration tokens.
        grid: scales of the original weight; they stay fixed.
        options: see ``QuantEaseOptions``.

    Raises:
        NumericsError: NaN or Inf in the inputs.
    """
    check_finite(weight_OI, hessian_II)
    dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    order_I = column_order(hessian_II, options.act_order)
    count = outlier_count(options.outliers, (weight_OI.shape[0], weight_OI.shape[1]), options.structured)
    support_OI = first_support(weight_OI, count, options.structured) if count else None
    range_OI = weight_OI if support_OI is None else weight_OI.masked_fill(support_OI, 0.0)
    if not options.static_groups:
        grid = regroup(grid, range_OI, order_I)
    elif support_OI is not None:
        grid = fit_grid(range_OI, grid.scheme, grid.scale_dtype, grid.group_of_I)
    damped_II = hessian_II.to(dtype)[order_I][:, order_I]
    if options.damping:
        damped_II.diagonal().add_(options.damping * float(damped_II.diagonal().mean()))
    normalized_II = normalized_columns(damped_II, dtype)
    start_OI, notes, start_damping = _start(weight_OI, hessian_II, grid, options, support_OI)
    group_of_I = grid.group_of_I[order_I].tolist()
    slabs = []
    # Which outliers are kept depends on all rows of the layer: they are solved as one slab.
    for rows in row_slabs(weight_OI.shape[0]) if support_OI is None else [slice(0, weight_OI.shape[0])]:
        part = grid.rows_slice(rows)
        target_IO = weight_OI[rows].to(dtype)[:, order_I].T.contiguous()
        current_IO = target_IO.clone() if start_OI is None else start_OI[rows].to(dtype)[:, order_I].T.contiguous()
        support: Support | None = None
        if support_OI is not None:
            free_IO = support_OI[:, order_I].T.contiguous()
            if options.support == "gradient":
                support = GradientSupport(free_IO, target_IO, count, options.structured, damped_II)
            else:
                diagonal_I = damped_II.diagonal()
                support = CoordinateSupport(free_IO, count, options.structured, diagonal_I, part, group_of_I)
        _sweep_slab(target_IO, current_IO, normalized_II, part, group_of_I, options, support)
        solved_OI = torch.empty_like(target_IO.T)
        solved_OI[:, order_I] = current_IO.T
        if support is None:
            slabs.append(QuantizedWeight(quantize_to_grid(solved_OI, part), part))
        else:
            free_OI = torch.empty_like(support.free_IO.T)
            free_OI[:, order_I] = support.free_IO.T
            slabs.append(with_outliers(solved_OI, free_OI, part, options.structured))
    return Solution(assemble(grid, slabs), options.damping or start_damping, notes)


def _start(
    weight_OI: Tensor, hessian_II: Tensor, grid: Grid, options: QuantEaseOptions, support_OI: Tensor | None
) -> tuple[Tensor | None, tuple[str, ...], float]:
    """The starting point [O, I] (None: the weight itself), notes, and the damping it used.

    GPTQ starts on the same fixed grid; the target of the descent stays the original weight.
    """
    if options.start == "weight":
        return None, (), 0.0
    gptq_options = GptqOptions(damping=options.gptq_damping, act_order=options.act_order, block_size=options.block_size)
    solution = solve_gptq(weight_OI, hessian_II, grid, gptq_options, support_OI)
    return solution.weight.dequantize(), solution.notes, solution.damping


def _sweep_slab(
    target_IO: Tensor,
    current_IO: Tensor,
    normalized_II: Tensor,
    grid: Grid,
    group_of_I: list[int],
    options: QuantEaseOptions,
    support: Support | None,
) -> None:
    """All sweeps over one slab of rows, in solving order; ``current_IO`` is updated in place."""
    columns, rows = target_IO.shape
    rounder = ColumnRounder(grid, target_IO.dtype)
    change_BO = target_IO.new_zeros(min(options.block_size, columns), rows)
    beta_O, point_O = target_IO.new_empty(2, rows)
    starts = range(0, columns, options.block_size)
    # Column j of a batch needs H_kj for the batch's earlier k as one contiguous vector.
    inner = [normalized_II[s : s + options.block_size, s : s + options.block_size].T.contiguous() for s in starts]
    moved = False
    for sweep in range(options.sweeps):
        relaxed = is_relaxed(sweep, options.sweeps, options.relax_every)
        if sweep % REFRESH_EVERY == 0 or moved:
            beta_IO = torch.addmm(target_IO, normalized_II.T, target_IO - current_IO)
        for index, start in enumerate(starts):
            end = min(start + options.block_size, columns)
            with one_thread():
                for column in range(start, end):
                    done, group = column - start, group_of_I[column]
                    torch.addmv(beta_IO[column], change_BO[:done].T, inner[index][done, :done], out=beta_O)
                    if relaxed:
                        value_O = beta_O
                    elif support is None:
                        value_O = rounder.nearest(beta_O, group, beta_O)
                    else:
                        value_O = support.round(column, beta_O, group, rounder, point_O)
                    torch.sub(current_IO[column], value_O, out=change_BO[done])
                    current_IO[column] = value_O
            beta_IO.addmm_(normalized_II[start:end].T, change_BO[: end - start])
        moved = False
        if support is not None and not relaxed and sweep < options.sweeps - 1:
            moved = support.update(current_IO, beta_IO)
