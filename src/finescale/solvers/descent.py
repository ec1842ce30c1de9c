"""The sweeps of coordinate descent over one slab of rows: matrix products, and batches of columns in between.

The running targets beta are kept for all columns. Inside a batch of columns only the batch itself is corrected; all
other columns follow with one matrix product. On a GPU the batches of a wide block first correct their block, and the
block all other columns, so that the products are deep enough to be limited by arithmetic and not by memory; there a
batch is one kernel launch: of a CUDA kernel on Hopper, elsewhere where triton is installed.

Shape legend: O outputs, I inputs, B columns of one batch, C columns of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from finescale.grid import Grid
from finescale.solvers import cuda_sweep
from finescale.solvers.columns import ColumnRounder, one_thread
from finescale.solvers.outliers import CoordinateSupport, Support
from finescale.solvers.products import LARGEST_BATCH, LARGEST_FP16, HalfRangeError, Products, has_triton

REFRESH_EVERY = 15
"""Sweeps between exact recomputations of the running targets, against drift of float32."""
GPU_BLOCK = 1024
"""Columns of one block on a GPU; the fastest of 128 to 2048 on an H100, for 4096 and for 11008 inputs."""
REFRESH_BLOCK = 4096
"""Columns of one product when targets are computed from scratch."""
Kernel = Literal["loop", "triton", "cuda"]
Step = Callable[[bool], object]
"""``(relaxed)``: a part of a sweep, made again in each of them."""
SweepColumns = Callable[[int, int, Tensor], Step]
"""``(start, end, changes)``: a step that sweeps these columns, with their changes (old less new) written as
``Products.new_changes`` holds them."""


def descend(
    target_IO: Tensor,
    current_IO: Tensor,
    products: Products,
    grid: Grid,
    group_of_I: list[int],
    schedule: Sequence[bool],
    support: Support | None = None,
    kernel: Kernel | None = None,
    block: int | None = None,
) -> None:
    """All sweeps over one slab of rows, in solving order.

    Args:
        target_IO: the original weight.
        current_IO: the start; updated in place.
        products: with the normalized H; they know the columns of a batch.
        grid: rows of the slab.
        group_of_I: group of each column in solving order.
        schedule: for each sweep, whether it leaves the columns unrounded.
        support: which entries are outliers, None for none.
        kernel: what sweeps a batch; None: the fastest there is.
        block: columns of one block, whole batches; None: one batch, on a GPU several.

    Raises:
        HalfRangeError: with float16 parts, a value went beyond what these hold; ``current_IO`` is void then.
    """
    columns, batch = target_IO.shape[0], products.batch
    rounder = ColumnRounder(grid, target_IO.dtype)
    unit_O = products.unit_O(target_IO, rounder.scale_GO)
    if unit_O is not None:
        target_IO = target_IO * unit_O
        current_IO.mul_(unit_O)
        rounder.scale_GO = rounder.scale_GO * unit_O  # not in place: it may be the grid itself
    kernel = kernel or _fastest(target_IO, batch, support)
    if block is None:
        block = max(batch, GPU_BLOCK // batch * batch) if target_IO.is_cuda else batch
    changes = products.new_changes(min(block, columns), target_IO.shape[1])
    beta_IO = target_IO.clone()
    fits = torch.ones((), dtype=torch.bool, device=target_IO.device)
    make = {"loop": _loop_sweeper, "triton": _triton_sweeper, "cuda": _cuda_sweeper}[kernel]
    with torch.cuda.device(target_IO.device) if target_IO.is_cuda else nullcontext():
        sweep_columns = make(beta_IO, current_IO, products, rounder, group_of_I, support)
        steps = _steps(beta_IO, products, sweep_columns, changes, block)
        moved = not torch.equal(target_IO, current_IO)  # at the original weight itself the targets are the weight
        for sweep, relaxed in enumerate(schedule):
            if moved or (sweep and sweep % REFRESH_EVERY == 0):
                products.targets_(beta_IO, target_IO, current_IO, max(block, REFRESH_BLOCK // batch * batch))
            for step in steps:
                step(relaxed)
            moved = False
            if unit_O is not None and (relaxed or support is not None):  # else all values are grid points
                low, high = current_IO.aminmax()
                fits &= (low > -LARGEST_FP16 / 2) & (high < LARGEST_FP16 / 2)  # so that no change is beyond it
            if support is not None and not relaxed and sweep < len(schedule) - 1:
                moved = support.update(current_IO, beta_IO if unit_O is None else beta_IO / unit_O)
    if not bool(fits):
        raise HalfRangeError
    if unit_O is not None:
        current_IO.div_(unit_O)


def _steps(beta_IO: Tensor, products: Products, sweep_columns: SweepColumns, changes: Tensor, block: int) -> list[Step]:
    """All steps of a sweep. They are set up once: on a GPU setting up a launch takes longer than the launch."""

    def add(*of: Any) -> Step:
        adder = products.adder(beta_IO, *of)
        return lambda _: adder()

    steps: list[Step] = []
    columns = beta_IO.shape[0]
    for first in range(0, columns, block):
        last = min(first + block, columns)
        of_block = products.changes_of(changes, 0, last - first)
        for start, end in products.batches(first, last):
            of_batch = products.changes_of(changes, start - first, end - first)
            steps.append(sweep_columns(start, end, of_batch))
            if end - start < last - first:
                steps.append(add(of_batch, start, end, first, last))
        if last - first <= products.batch:
            steps.append(add(of_block, first, last, 0, columns))
        else:
            if first > 0:
                steps.append(add(of_block, first, last, 0, first))
            if last < columns:
                steps.append(add(of_block, first, last, last, columns))
    return steps


def _fastest(target_IO: Tensor, batch: int, support: Support | None) -> Kernel:
    """What sweeps a batch here; the published support is for the loop only."""
    published = support is not None and not isinstance(support, CoordinateSupport)
    if not target_IO.is_cuda or target_IO.dtype != torch.float32 or published or batch > LARGEST_BATCH:
        return "loop"
    if cuda_sweep.supported(target_IO.device):
        return "cuda"
    return "triton" if has_triton() else "loop"


def _loop_sweeper(
    beta_IO: Tensor,
    current_IO: Tensor,
    products: Products,
    rounder: ColumnRounder,
    group_of_I: list[int],
    support: Support | None,
) -> SweepColumns:
    """One column after the other with torch, on any device and in any type."""
    beta_O, point_O = beta_IO.new_empty(2, beta_IO.shape[1])
    float_BO = beta_IO.new_zeros(min(products.batch, products.columns), beta_IO.shape[1])

    def sweep_columns(start: int, end: int, changes: Tensor) -> Step:
        inner_BB, change_BO = products.inner(start, end), float_BO[: end - start]

        def step(relaxed: bool) -> None:
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
                    if products.half_changes:
                        change_BO[done] = products.rounded_change(change_BO[done])
                        value_O = current_IO[column] - change_BO[done]
                    current_IO[column] = value_O
            products.write_changes(changes, change_BO)

        return step

    return sweep_columns


def _triton_sweeper(
    beta_IO: Tensor,
    current_IO: Tensor,
    products: Products,
    rounder: ColumnRounder,
    group_of_I: list[int],
    support: Support | None,
) -> SweepColumns:
    """One kernel launch a batch."""
    from finescale.solvers.triton_sweep import quantease_batch

    group_I = torch.tensor(group_of_I, dtype=torch.int32, device=beta_IO.device)
    float_BO = beta_IO.new_zeros(min(products.batch, products.columns), beta_IO.shape[1])

    def sweep_columns(start: int, end: int, changes: Tensor) -> Step:
        inner_BB, change_BO = products.inner(start, end), float_BO[: end - start]
        free_BO = _free(support, start, end)

        def step(relaxed: bool) -> None:
            quantease_batch(
                beta_IO[start:end], current_IO[start:end], change_BO, inner_BB, rounder.scale_GO, rounder.zero_GO,
                group_I[start:end], free_BO, rounder.low, rounder.high, relaxed, products.half_changes,
            )  # fmt: skip
            products.write_changes(changes, change_BO)

        return step

    return sweep_columns


def _cuda_sweeper(
    beta_IO: Tensor,
    current_IO: Tensor,
    products: Products,
    rounder: ColumnRounder,
    group_of_I: list[int],
    support: Support | None,
) -> SweepColumns:
    """One kernel launch a batch, which also writes the parts of the changes."""
    group_I = torch.tensor(group_of_I, dtype=torch.int32, device=beta_IO.device)

    def sweep_columns(start: int, end: int, changes: Tensor) -> Step:
        rounded, relaxed = (
            cuda_sweep.quantease_batch(
                beta_IO[start:end], current_IO[start:end], changes, products.inner_IW[start:end], rounder.scale_GO,
                rounder.zero_GO, group_I[start:end], _free(support, start, end), rounder.low, rounder.high, is_relaxed,
            )
            for is_relaxed in (False, True)
        )  # fmt: skip
        return lambda is_relaxed: relaxed() if is_relaxed else rounded()

    return sweep_columns


def _free(support: Support | None, start: int, end: int) -> Tensor | None:
    return support.free_IO[start:end] if isinstance(support, CoordinateSupport) else None
