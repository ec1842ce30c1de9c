"""QuantEase (arXiv 2309.01885): cyclic coordinate descent on the layer's squared output error.

Column j of the quantized weight, all others fixed, has the closed-form best value

    beta_j = W_j + sum_{k != j} (W_k - Q_k) H_kj / H_jj

and its nearest grid point minimizes the error in that coordinate (the paper's Lemma 1). The running targets beta are
kept for all columns; inside a lazy batch of columns only the batch itself is corrected, and all other columns follow
with one matrix product per batch, so that nearly all work is matrix products.

Shape legend: O outputs, I inputs, B columns of one lazy batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from finescale.grid import Grid, QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.solvers.columns import (
    assemble,
    check_finite,
    column_order,
    regroup,
    row_slabs,
    rows_together,
)
from finescale.solvers.descent import descend
from finescale.solvers.gptq import GptqOptions, solve_gptq
from finescale.solvers.outliers import (
    CoordinateSupport,
    GradientSupport,
    Support,
    first_support,
    outlier_count,
    with_outliers,
)
from finescale.solvers.products import HalfRangeError, Kind, Products
from finescale.solvers.refit import refit_scales
from finescale.solvers.solution import Solution, SolverOptions
from finescale.solvers.spqr import SpqrOptions, solve_spqr

REFIT_SWEEPS = 3
"""Sweeps on scales that were fitted anew; they are not relaxed."""
LAST_RELAXED_SWEEP = 25
"""Sweeps after this one (0-based) always end on the grid; the schedule of the authors' code."""


class QuantEaseOptions(SolverOptions):
    """Options of QuantEase.

    Attributes:
        sweeps: passes over all columns.
        relax_every: every n-th sweep leaves the columns unrounded, to escape poor local minima; 0 never does.
        start: ``weight`` starts from the unquantized weight, ``gptq`` from the GPTQ solution, ``spqr`` from SpQR's, on
            its two-level grid and with as many outliers as ``spqr_threshold`` gives.
        act_order: solve columns by falling diagonal of H.
        static_groups: groups of the original column order; off: groups of the solving order.
        damping: fraction of the mean diagonal added to H; 0 as published.
        gptq_damping: damping of the GPTQ or SpQR start.
        spqr_threshold: sensitivity of outliers of the SpQR start.
        block_size: columns of one lazy batch.
        products: ``float32``, or the matrix products as three of parts on tensor cores, whose sum is almost as precise
            and faster: ``3xtf32``, or ``3xfp16`` (not for the gradient support, which gets ``3xtf32``); or ``2xfp16``,
            the fastest, as two of parts, with changes of values that are float16 numbers.
        refits: how often scales are fitted anew to the codes after the sweeps, ``REFIT_SWEEPS`` more sweeps each.
        outliers: weights kept beside the grid: a share below 1, or a number; the grid's range is fitted without them.
        structured: outliers are whole input columns, and ``outliers`` counts these.
        support: how outliers are chosen between sweeps: ``coordinate`` keeps those whose rounding would cost most at
            the current targets; ``gradient`` is the published step, the largest entries after a gradient step of
            length 1 / L on H.
        outlier_bits: of the value of a single outlier: 16, or 8, a float8 number of steps of the grid (a layer that has
            one beyond about a hundred steps keeps 16).
    """

    sweeps: int = Field(default=30, ge=1)
    relax_every: int = Field(default=3, ge=0)
    start: Literal["weight", "gptq", "spqr"] = "weight"
    act_order: bool = False
    static_groups: bool = True
    damping: float = Field(default=0.0, ge=0.0)
    gptq_damping: float = Field(default=0.01, ge=0.0)
    spqr_threshold: float = Field(default=0.2, gt=0.0)
    block_size: int = Field(default=128, ge=1)
    products: Kind = "float32"
    refits: int = Field(default=0, ge=0)
    outliers: float = Field(default=0.0, ge=0.0)
    structured: bool = False
    support: Literal["coordinate", "gradient"] = "coordinate"
    outlier_bits: Literal[8, 16] = 16

    @property
    def keeps_outliers(self) -> bool:
        return self.outliers > 0 or self.start == "spqr"

    @property
    def moves_scales(self) -> bool:
        return self.refits > 0 or not self.static_groups

    @property
    def factorizes(self) -> bool:
        return self.start != "weight"

    @property
    def pass_count(self) -> int:
        return self.sweeps + self.refits * REFIT_SWEEPS + self.factorizes

    @property
    def column_cost(self) -> int:
        return 1024 if self.products == "float32" else 8192  # as an H100 shows

    @model_validator(mode="after")
    def _check(self) -> QuantEaseOptions:
        if self.start == "spqr" and self.refits:
            raise ValueError("start spqr keeps its two-level scales; leave refits out")
        if self.support == "gradient" and self.refits:
            raise ValueError("the published support has no refits; leave refits or support out")
        if self.structured and self.outlier_bits == 8:
            raise ValueError("outliers of 8 bits are single ones; leave structured or outlier_bits out")
        if self.start == "spqr" and (self.outliers or self.structured or self.act_order or self.support == "gradient"):
            raise ValueError("start spqr brings its own outliers; leave outliers, structured, act_order, support out")
        return self

    def check_scheme(self, scheme: WeightScheme) -> None:
        """Raises InputError when the start cannot make such weights."""
        if self.start == "spqr":
            SpqrOptions().check_scheme(scheme)


def is_relaxed(sweep: int, sweeps: int, relax_every: int) -> bool:
    """Whether sweep number ``sweep`` (0-based) leaves the grid: 1, 4, ... 25 of 30; never the last."""
    if relax_every < 1 or sweep == sweeps - 1 or sweep > LAST_RELAXED_SWEEP:
        return False
    return sweep % relax_every == 1 % relax_every


def normalize_columns_(hessian_II: Tensor) -> Tensor:
    """H_kj / H_jj with a zero diagonal, [I, I], in the place of H; a dead input j (H_jj zero, or too small to divide
    by) gets zeros."""
    diagonal_I = hessian_II.diagonal()
    alive_I = diagonal_I >= torch.finfo(hessian_II.dtype).tiny
    inverse_I = torch.where(alive_I, 1 / diagonal_I, torch.zeros_like(diagonal_I))
    return hessian_II.mul_(inverse_I[None, :]).fill_diagonal_(0)


def solve_quantease(weight_OI: Tensor, hessian_II: Tensor, grid: Grid, options: QuantEaseOptions) -> Solution:
    """Coordinate descent with lazy batches of columns.

    Where values leave the grid (relaxed sweeps, outliers) so far that float16 parts do not hold their changes, as with
    a nearly dead input and no damping, the layer is solved with TF32 parts, and has a note.

    Args:
        weight_OI: float [O, I]; computed in float64 if it is float64, else in float32.
        hessian_II: [I, I], sum or mean of x x^T over the calibration tokens.
        grid: scales of the original weight; they stay fixed.
        options: see ``QuantEaseOptions``.

    Raises:
        NumericsError: NaN or Inf in the inputs.
    """
    check_finite(weight_OI, hessian_II)
    try:
        return _solve(weight_OI, hessian_II, grid, options)
    except HalfRangeError:
        solution = _solve(weight_OI, hessian_II, grid, options.model_copy(update={"products": "3xtf32"}))
        note = f"values beyond what {options.products} holds: solved with 3xtf32"
        return replace(solution, notes=(*solution.notes, note))


def _solve(weight_OI: Tensor, hessian_II: Tensor, grid: Grid, options: QuantEaseOptions) -> Solution:
    dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    order_I = column_order(hessian_II, options.act_order)
    if options.start == "spqr":
        return _from_spqr(weight_OI, hessian_II, grid, options, dtype)
    count = outlier_count(options.outliers, (weight_OI.shape[0], weight_OI.shape[1]), options.structured)
    support_OI = first_support(weight_OI, count, options.structured) if count else None
    range_OI = weight_OI if support_OI is None else weight_OI.masked_fill(support_OI, 0.0)
    if not options.static_groups:
        grid = regroup(grid, range_OI, order_I)
    elif support_OI is not None:
        grid = fit_grid(range_OI, grid.scheme, grid.scale_dtype, grid.group_of_I)
    # The start first: its factorization and the matrix of the sweeps are never in memory together.
    start, notes, start_damping = _start(weight_OI, hessian_II, grid, options, support_OI)
    damped_II = hessian_II.to(dtype)[order_I][:, order_I] if options.act_order else hessian_II.to(dtype, copy=True)
    if options.damping:
        damped_II.diagonal().add_(options.damping * float(damped_II.diagonal().mean()))
    diagonal_I = damped_II.diagonal().clone()
    gradient_II = damped_II.clone() if count and options.support == "gradient" else None
    kind: Kind = options.products if gradient_II is None or options.products == "float32" else "3xtf32"
    products = Products(normalize_columns_(damped_II), kind, options.block_size)
    del damped_II  # the largest matrix there is, in its place are its products
    schedule = [is_relaxed(sweep, options.sweeps, options.relax_every) for sweep in range(options.sweeps)]
    group_of_I = grid.group_of_I[order_I].tolist()
    slabs = []
    # Which outliers are kept depends on all rows of the layer: they are solved as one slab.
    most = rows_together(weight_OI.device) if support_OI is None else max(weight_OI.shape[0], 1)
    for rows in row_slabs(weight_OI.shape[0], most):
        part = grid.rows_slice(rows)
        target_IO = weight_OI[rows].to(dtype)[:, order_I].T.contiguous()
        if start is None:
            current_IO = target_IO.clone()
        else:
            current_IO = start.rows_slice(rows).dequantize().to(dtype)[:, order_I].T.contiguous()
        support: Support | None = None
        if support_OI is not None:
            free_IO = support_OI[:, order_I].T.contiguous()
            if gradient_II is not None:
                support = GradientSupport(free_IO, target_IO, count, options.structured, gradient_II)
            else:
                support = CoordinateSupport(free_IO, count, options.structured, diagonal_I, part, group_of_I)
        descend(target_IO, current_IO, products, part, group_of_I, schedule, support)
        solved_OI = torch.empty_like(target_IO.T)
        for _ in range(options.refits):
            solved_OI[:, order_I] = current_IO.T
            kept_OI = None if support is None else _in_place(support.free_IO, order_I)
            part, solved_OI = refit_scales(weight_OI[rows].to(dtype), solved_OI, hessian_II, part, kept_OI)
            current_IO.copy_(solved_OI[:, order_I].T)
            if support is not None:
                free_IO = support.free_IO
                support = CoordinateSupport(free_IO, count, options.structured, diagonal_I, part, group_of_I)
            descend(target_IO, current_IO, products, part, group_of_I, [False] * REFIT_SWEEPS, support)
        solved_OI[:, order_I] = current_IO.T
        if support is None:
            slabs.append(QuantizedWeight(quantize_to_grid(solved_OI, part), part))
        else:
            free_OI = _in_place(support.free_IO, order_I)
            split, more = with_outliers(solved_OI, free_OI, part, options.structured, options.outlier_bits)
            slabs.append(split)
            notes += more
    return Solution(assemble(grid, slabs), options.damping or start_damping, notes)


def _in_place(mask_IO: Tensor, order_I: Tensor) -> Tensor:
    """A mask in solving order as [O, I] in the original order."""
    mask_OI = torch.empty_like(mask_IO.T)
    mask_OI[:, order_I] = mask_IO.T
    return mask_OI


def _from_spqr(
    weight_OI: Tensor, hessian_II: Tensor, grid: Grid, options: QuantEaseOptions, dtype: torch.dtype
) -> Solution:
    """Sweeps over SpQR's solution: its grid and number of outliers stay, codes, values and places of outliers move."""
    chosen = SpqrOptions(threshold=options.spqr_threshold, damping=options.gptq_damping, block_size=options.block_size)
    first = solve_spqr(weight_OI, hessian_II, grid, chosen)
    grid, kept = first.weight.grid, first.weight.outliers
    assert kept is not None
    damped_II = hessian_II.to(dtype, copy=True)
    damped_II.diagonal().add_(options.damping * float(damped_II.diagonal().mean()))
    diagonal_I = damped_II.diagonal().clone()
    products = Products(normalize_columns_(damped_II), options.products, options.block_size)
    schedule = [is_relaxed(sweep, options.sweeps, options.relax_every) for sweep in range(options.sweeps)]
    group_of_I = grid.group_of_I.tolist()
    free_IO = kept.mask().T.contiguous()
    support = CoordinateSupport(free_IO, kept.count, False, diagonal_I, grid, group_of_I) if kept.count else None
    target_IO = weight_OI.to(dtype).T.contiguous()
    current_IO = first.weight.dequantize().to(dtype).T.contiguous()
    descend(target_IO, current_IO, products, grid, group_of_I, schedule, support)
    free_OI = free_IO.T if support is None else support.free_IO.T
    weight, notes = with_outliers(current_IO.T, free_OI, grid, False, options.outlier_bits)
    return Solution(weight, first.damping, first.notes + notes)


def _start(
    weight_OI: Tensor, hessian_II: Tensor, grid: Grid, options: QuantEaseOptions, support_OI: Tensor | None
) -> tuple[QuantizedWeight | None, tuple[str, ...], float]:
    """The starting point (None: the weight itself), notes, and the damping it used.

    GPTQ starts on the same fixed grid; the target of the descent stays the original weight.
    """
    if options.start == "weight":
        return None, (), 0.0
    gptq_options = GptqOptions(damping=options.gptq_damping, act_order=options.act_order, block_size=options.block_size)
    solution = solve_gptq(weight_OI, hessian_II, grid, gptq_options, support_OI)
    return solution.weight, solution.notes, solution.damping
