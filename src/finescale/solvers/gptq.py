"""GPTQ (arXiv 2210.17323): one pass over the columns, each rounding error carried to the columns still to come.

Shape legend: O outputs, I inputs, B columns of one lazy batch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from finescale.grid import Grid, QuantizedWeight
from finescale.grid.fit import refit_group
from finescale.grid.outliers import single_outliers
from finescale.solvers.columns import (
    ColumnRounder,
    assemble,
    check_finite,
    column_order,
    one_thread,
    regroup,
    row_slabs,
    rows_together,
)
from finescale.solvers.factor import inverse_factor
from finescale.solvers.products import LARGEST_BATCH, has_triton, tf32_products
from finescale.solvers.solution import Solution, SolverOptions


class GptqOptions(SolverOptions):
    """Options of GPTQ.

    Attributes:
        damping: fraction of the mean diagonal added to H; raised tenfold, and recorded, when the factorization fails.
        act_order: solve columns by falling diagonal of H.
        static_groups: group scales come from the original weights; off: from the compensated weights when the first
            column of a group is reached.
        block_size: columns of one lazy batch.
    """

    damping: float = Field(default=0.01, ge=0.0)
    act_order: bool = False
    static_groups: bool = True
    block_size: int = Field(default=128, ge=1)

    @property
    def moves_scales(self) -> bool:
        return not self.static_groups

    @property
    def factorizes(self) -> bool:
        return True


def solve_gptq(
    weight_OI: Tensor, hessian_II: Tensor, grid: Grid, options: GptqOptions, support_OI: Tensor | None = None
) -> Solution:
    """GPTQ with lazy batches of columns.

    Args:
        weight_OI: float [O, I]; computed in float64 if it is float64, else in float32.
        hessian_II: [I, I], sum or mean of x x^T over the calibration tokens.
        grid: scales of the original weight.
        options: see ``GptqOptions``.
        support_OI: bool, weights that keep their (compensated) value, as outliers; None for none.

    Raises:
        NumericsError: NaN or Inf in the inputs, or a Hessian that no damping repairs.
    """
    check_finite(weight_OI, hessian_II)
    dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    order_I = column_order(hessian_II, options.act_order)
    if not options.static_groups:
        grid = regroup(grid, weight_OI, order_I)
    in_order_II = hessian_II[order_I][:, order_I] if options.act_order else hessian_II
    upper_II, damping = inverse_factor(in_order_II, options.damping)
    del in_order_II
    upper_II = upper_II.to(dtype)
    group_of_I = grid.group_of_I[order_I].tolist()
    refit = not options.static_groups and grid.scheme.group_size != -1
    slabs = []
    for rows in row_slabs(weight_OI.shape[0], rows_together(weight_OI.device)):
        part = grid.rows_slice(rows)
        weight_IO = weight_OI[rows].to(dtype)[:, order_I].T.contiguous()
        free_IO = None if support_OI is None else support_OI[rows][:, order_I].T.contiguous()
        codes_IO, addend_IO, part = _solve_slab(
            weight_IO, upper_II, part, group_of_I, options.block_size, refit, free_IO
        )
        codes_OI = torch.empty_like(weight_OI[rows], dtype=torch.int8)
        codes_OI[:, order_I] = codes_IO.T
        outliers = None
        if support_OI is not None and addend_IO is not None:
            addend_OI = torch.empty_like(addend_IO.T)
            addend_OI[:, order_I] = addend_IO.T
            outliers = single_outliers(addend_OI, support_OI[rows], part.scale_dtype)
        slabs.append(QuantizedWeight(codes_OI, part, outliers))
    notes = (f"damping raised from {options.damping:g} to {damping:g}",) if damping != options.damping else ()
    return Solution(assemble(grid, slabs), damping, notes)


def _solve_slab(
    weight_IO: Tensor,
    upper_II: Tensor,
    grid: Grid,
    group_of_I: list[int],
    block_size: int,
    refit: bool,
    free_IO: Tensor | None,
    on_chip: bool | None = None,
) -> tuple[Tensor, Tensor | None, Grid]:
    """Solve a slab in solving order; ``weight_IO`` is consumed. Returns int8 codes [I, O], what the entries marked in
    ``free_IO`` have beyond their codes [I, O] (else zero), and the grid. ``on_chip``: a batch is one kernel launch;
    None where it can be."""
    columns, rows = weight_IO.shape
    rounder = ColumnRounder(grid, weight_IO.dtype)
    scale_OG = grid.scale_OG.clone()
    zero_OG = None if grid.zero_OG is None else grid.zero_OG.clone()
    codes_IO = torch.empty(columns, rows, dtype=torch.int8, device=weight_IO.device)
    addend_IO = None if free_IO is None else torch.zeros_like(weight_IO)
    group_tensor_I = torch.tensor(group_of_I, device=weight_IO.device)
    if on_chip is None:
        on_chip = weight_IO.is_cuda and weight_IO.dtype == torch.float32 and has_triton()
    if on_chip and not refit and block_size <= LARGEST_BATCH:
        _batches_on_chip(weight_IO, codes_IO, addend_IO, upper_II, rounder, group_tensor_I, block_size, free_IO)
        return codes_IO, addend_IO, grid
    seen: set[int] = set()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        error_BO = torch.zeros(end - start, rows, dtype=weight_IO.dtype, device=weight_IO.device)
        value_O = weight_IO.new_empty(rows)
        point_O = weight_IO.new_empty(rows)
        with one_thread():
            for column in range(start, end):
                done, group = column - start, group_of_I[column]
                if refit and group not in seen:
                    seen.add(group)
                    members_I = (group_tensor_I == group).nonzero().squeeze(1)
                    pending_OI = error_BO[:done].T @ upper_II[start:column, members_I]
                    scale_O, zero_O = refit_group(grid, weight_IO[members_I].T - pending_OI)
                    rounder.set_group(group, scale_O, zero_O)
                    scale_OG[:, group] = scale_O
                    if zero_OG is not None and zero_O is not None:
                        zero_OG[:, group] = zero_O
                torch.addmv(weight_IO[column], error_BO[:done].T, upper_II[start:column, column], alpha=-1, out=value_O)
                relative_O = rounder.codes(value_O, group, point_O)
                codes_IO[column] = relative_O if rounder.zero_GO is None else relative_O + rounder.zero_GO[group]
                torch.sub(value_O, relative_O.mul_(rounder.scale_GO[group]), out=error_BO[done])
                if free_IO is not None and addend_IO is not None:
                    addend_IO[column] = error_BO[done] * free_IO[column]
                    error_BO[done].masked_fill_(free_IO[column], 0.0)
                error_BO[done].div_(upper_II[column, column])
        weight_IO[end:].addmm_(upper_II[start:end, end:].T, error_BO, alpha=-1)
    return codes_IO, addend_IO, replace(grid, scale_OG=scale_OG, zero_OG=zero_OG)


def _batches_on_chip(
    weight_IO: Tensor,
    codes_IO: Tensor,
    addend_IO: Tensor | None,
    upper_II: Tensor,
    rounder: ColumnRounder,
    group_of_I: Tensor,
    block_size: int,
    free_IO: Tensor | None,
) -> None:
    """All batches, each as one kernel launch; writes ``codes_IO`` and ``addend_IO`` and consumes ``weight_IO``."""
    from finescale.solvers.triton_sweep import gptq_batch

    columns = weight_IO.shape[0]
    error_BO = torch.empty_like(weight_IO[:block_size])
    relative_BO = torch.empty_like(error_BO)
    group_of_I = group_of_I.to(torch.int32)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        part, batch = slice(start, end), slice(0, end - start)
        gptq_batch(
            weight_IO[part], error_BO[batch], relative_BO[batch], None if addend_IO is None else addend_IO[part],
            upper_II[part, part].T.contiguous(), rounder.scale_GO, rounder.zero_GO, group_of_I[part],
            None if free_IO is None else free_IO[part], rounder.low, rounder.high,
        )  # fmt: skip
        if rounder.zero_GO is not None:
            relative_BO[batch] += rounder.zero_GO[group_of_I[part]]
        codes_IO[part] = relative_BO[batch]
        with tf32_products(False):
            weight_IO[end:].addmm_(upper_II[start:end, end:].T, error_BO[batch], alpha=-1)
