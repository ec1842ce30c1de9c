"""What GPTQ and QuantEase share: the order of the columns, slabs of rows, and rounding one column.

Both solvers work on transposed matrices [I, O], so that one input column is contiguous.
Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from finescale.errors import NumericsError
from finescale.finite import all_finite
from finescale.grid import Grid, QuantizedWeight, fit_grid, number_of_groups
from finescale.grid.fit import integerized
from finescale.grid.outliers import stack_outliers

ROW_SLAB = 8192
"""Rows solved together. Rows are independent; slabs bound the working memory at about five [I, slab] matrices."""
GPU_ROW_SLAB = 16384
"""The same on a GPU, where twice the rows hide more of what a column waits for."""


def row_slabs(rows: int, most: int = ROW_SLAB) -> Iterator[slice]:
    """Slices that cover ``rows`` in pieces of at most ``most`` and of nearly one size."""
    size = -(-rows // max(-(-rows // most), 1))
    for start in range(0, rows, max(size, 1)):
        yield slice(start, min(start + size, rows))


def rows_together(device: torch.device) -> int:
    """Rows that are solved together at most."""
    return GPU_ROW_SLAB if device.type == "cuda" else ROW_SLAB


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the work on single columns in one thread.

    Operations of a few microseconds lose more at the barrier between threads than they gain, and hundredfold when
    another process holds one of the cores. Matrix products outside keep all threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_finite_weight(weight_OI: Tensor) -> None:
    """Raises NumericsError when the weight holds NaN or Inf."""
    if not all_finite(weight_OI):
        raise NumericsError("the weight holds NaN or Inf; repair or re-download the checkpoint.")


def check_finite(weight_OI: Tensor, hessian_II: Tensor) -> None:
    """Raises NumericsError when weight or Hessian hold NaN or Inf, or their shapes do not fit."""
    if hessian_II.shape != (weight_OI.shape[1], weight_OI.shape[1]):
        raise NumericsError(
            f"the Hessian is {tuple(hessian_II.shape)} for a weight of {tuple(weight_OI.shape)}; it must be [I, I]."
        )
    check_finite_weight(weight_OI)
    if not all_finite(hessian_II):
        raise NumericsError(
            "the calibration statistics hold NaN or Inf; the model's activations overflow on this text."
        )


def column_order(hessian_II: Tensor, act_order: bool) -> Tensor:
    """Order in which columns are solved, int64 [I]: as they stand, or by falling diagonal of H (act-order)."""
    diagonal_I = hessian_II.diagonal()
    if not act_order:
        return torch.arange(diagonal_I.shape[0], device=diagonal_I.device)
    return torch.argsort(diagonal_I, descending=True, stable=True)


def regroup(grid: Grid, weight_OI: Tensor, order_I: Tensor) -> Grid:
    """Groups of consecutive columns *in solving order*, fitted to the original weights (static groups off)."""
    size = grid.scheme.group_size
    if size == -1:
        return grid
    position_I = torch.empty_like(order_I)
    position_I[order_I] = torch.arange(order_I.shape[0], device=order_I.device)
    if grid.folded:
        raise NumericsError("folded scales need groups of consecutive columns; set solver.static_groups true.")
    fitted = fit_grid(weight_OI, grid.scheme, grid.scale_dtype, group_of_I=position_I // size)
    assert number_of_groups(grid.columns, size) == grid.scale_OG.shape[1]
    return fitted if grid.amplifier is None else integerized(fitted, grid.amplifier)


class ColumnRounder:
    """Rounds one column of a slab to its grid, with no allocation in the loop.

    Args:
        grid: rows of the slab; columns in the original order.
        dtype: float type of the solver.
    """

    def __init__(self, grid: Grid, dtype: torch.dtype) -> None:
        self.low, self.high = float(grid.scheme.code_min), float(grid.scheme.code_max)
        self.scale_GO = grid.scale_OG.to(dtype).T.contiguous()
        self.zero_GO = None if grid.zero_OG is None else grid.zero_OG.to(dtype).T.contiguous()

    def set_group(self, group: int, scale_O: Tensor, zero_O: Tensor | None) -> None:
        self.scale_GO[group] = scale_O.to(self.scale_GO.dtype)
        if self.zero_GO is not None and zero_O is not None:
            self.zero_GO[group] = zero_O.to(self.zero_GO.dtype)

    def codes(self, value_O: Tensor, group: int, out_O: Tensor) -> Tensor:
        """Codes as floats, relative to the zero point: ``out * scale`` is the grid point nearest to ``value``."""
        torch.div(value_O, self.scale_GO[group], out=out_O)
        if self.zero_GO is None:
            return out_O.round_().clamp_(self.low, self.high)
        zero_O = self.zero_GO[group]
        return out_O.add_(zero_O).round_().clamp_(self.low, self.high).sub_(zero_O)

    def nearest(self, value_O: Tensor, group: int, out_O: Tensor) -> Tensor:
        """The grid point nearest to ``value``, written to ``out``."""
        return self.codes(value_O, group, out_O).mul_(self.scale_GO[group])


def assemble(grid: Grid, slabs: list[QuantizedWeight]) -> QuantizedWeight:
    """Stack the solved slabs back into one weight."""
    codes_OI = torch.cat([slab.codes_OI for slab in slabs])
    scale_OG = torch.cat([slab.grid.scale_OG for slab in slabs])
    zeros = [slab.grid.zero_OG for slab in slabs if slab.grid.zero_OG is not None]
    zero_OG = torch.cat(zeros) if zeros else None
    kept = [slab.outliers for slab in slabs if slab.outliers is not None]
    outliers = stack_outliers(kept) if kept else None
    return QuantizedWeight(codes_OI, replace(grid, scale_OG=scale_OG, zero_OG=zero_OG), outliers)
