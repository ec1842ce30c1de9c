"""The sweeps of coordinate descent over one slab of rows: matrix products, and batches of columns in between.

The running targets beta are kept for all columns. Inside a batch of columns only the batch itself is corrected; all
other columns follow with one matrix product. On a GPU the batches of a wide block first correct their block, and the
block all other columns, so that the products are deep enough to be limited by arithmetic and not by memory; there a
batch is one kernel launch where triton is installed.

Shape legend: O outputs, I inputs, B columns of one batch, C columns of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from finescale.grid import Grid
from finescale.solvers.columns import ColumnRounder, one_thread
from finescale.solvers.outliers import CoordinateSupport, Support
from finescale.solvers.products import LARGEST_BATCH, Products, has_triton

REFRESH_EVERY = 10
"""Sweeps between exact recomputations of the running targets, against drift of float32."""
GPU_BLOCK = 1024
"""Columns of one block on a GPU; the fastest of 128 to 2048 on an H100, for 4096 and for 11008 inputs."""
SweepColumns = Callable[[int, int, Tensor, bool], None]
"""``(start, end, change_BO, relaxed)``: sweep these columns, with their changes (old less new) written."""


def descend(
    target_IO: Tensor,
    current_IO: Tensor,
    products: Products,
    grid: Grid,
    group_of_I: list[int],
    schedule: Sequence[bool],
    batch: int,
    support: Support | None = None,
    on_chip: bool | None = None,
    block: int | None = None,
) -> None:
    """All sweeps over one slab of rows, in solving order.

    Args:
        target_IO: the original weight.
        current_IO: the start; updated in place.
        products: with the normalized H.
        grid: rows of the slab.
        group_of_I: group of each column in solving order.
        schedule: for each sweep, whether it leaves the columns unrounded.
        batch: columns of one batch.
        support: which entries are outliers, None for none.
        on_chip: run a batch as one kernel launch; None: where it can be.
        block: columns of one block; None: one batch, on a GPU several.
    """
    columns = target_IO.shape[0]
    rounder = ColumnRounder(grid, target_IO.dtype)
    gradient = support is not None and not isinstance(support, CoordinateSupport)
    if on_chip is None:
        on_chip = target_IO.is_cuda and target_IO.dtype == torch.float32 and has_triton() and not gradient
    make = _kernel_sweeper if on_chip and batch <= LARGEST_BATCH else _loop_sweeper
    if block is None:
        block = max(batch, GPU_BLOCK // batch * batch) if target_IO.is_cuda else batch
    change_CO = target_IO.new_zeros(min(block, columns), target_IO.shape[1])
    moved = True
    for sweep, relaxed in enumerate(schedule):
        if moved or sweep % REFRESH_EVERY == 0:
            beta_IO = products.targets(target_IO, current_IO)
            sweep_columns = make(beta_IO, current_IO, products, rounder, group_of_I, batch, support)
        for first in range(0, columns, block):
            last = min(first + block, columns)
            for start in range(first, last, batch):
                end = min(start + batch, last)
                change_BO = change_CO[start - first : end - first]
                sweep_columns(start, end, change_BO, relaxed)
                if end - start < last - first:
                    products.add_(beta_IO, change_BO, start, end, first, last)
            if last - first <= batch:
                products.add_(beta_IO, change_CO[: last - first], first, last, 0, columns)
            else:
                products.add_(beta_IO, change_CO[: last - first], first, last, 0, first)
                products.add_(beta_IO, change_CO[: last - first], first, last, last, columns)
        moved = False
        if support is not None and not relaxed and sweep < len(schedule) - 1:
            moved = support.update(current_IO, beta_IO)


def _inner(products: Products, columns: int, batch: int) -> dict[int, Tensor]:
    """The matrix of each batch by its first column."""
    return {start: products.inner(start, min(start + batch, columns)) for start in range(0, columns, batch)}


def _loop_sweeper(
    beta_IO: Tensor,
    current_IO: Tensor,
    products: Products,
    rounder: ColumnRounder,
    group_of_I: list[int],
    batch: int,
    support: Support | None,
) -> SweepColumns:
    """One column after the other with torch, on any device and in any type."""
    beta_O, point_O = beta_IO.new_empty(2, beta_IO.shape[1])
    inner = _inner(products, beta_IO.shape[0], batch)

    def sweep_columns(start: int, end: int, change_BO: Tensor, relaxed: bool) -> None:
        inner_BB = inner[start]
        with one_thread():
            for column in range(start, end):
                done, group = column - start, group_of_I[column]
                torch.addmv(beta_IO[column], change_BO[:done].T, inner_BB[done, :done], out=beta_O)
                if relaxed:
                    value_O = beta_O
                elif support is None:
                    value_O = rounder.nearest(beta_O, group, beta_O)
                else:
                    value_O = support.round(column, beta_O, group, rounder, point_O)
                torch.sub(current_IO[column], value_O, out=change_BO[done])
                current_IO[column] = value_O

    return sweep_columns


def _kernel_sweeper(
    beta_IO: Tensor,
    current_IO: Tensor,
    products: Products,
    rounder: ColumnRounder,
    group_of_I: list[int],
    batch: int,
    support: Support | None,
) -> SweepColumns:
    """One kernel launch a batch."""
    from finescale.solvers.triton_sweep import quantease_batch

    inner = _inner(products, beta_IO.shape[0], batch)
    group_I = torch.tensor(group_of_I, dtype=torch.int32, device=beta_IO.device)

    def sweep_columns(start: int, end: int, change_BO: Tensor, relaxed: bool) -> None:
        free_BO = support.free_IO[start:end] if isinstance(support, CoordinateSupport) else None
        quantease_batch(
            beta_IO[start:end], current_IO[start:end], change_BO, inner[start], rounder.scale_GO, rounder.zero_GO,
            group_I[start:end], free_BO, rounder.low, rounder.high, relaxed,
        )  # fmt: skip

    return sweep_columns
