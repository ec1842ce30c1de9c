"""Which weights QuantEase keeps beside the grid (arXiv 2309.01885, Algorithm 3).

With outliers the layer computes (Q + H) x, Q on the grid and H zero outside of a support of fixed size. Written with
V = Q + H, an entry of the support is an entry of V that is not rounded: a sweep of coordinate descent over V solves for
Q and for the values of H at once. What remains is the support itself.

Shape legend: O outputs, I inputs, C columns of the support.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from finescale.grid import Grid, QuantizedWeight, dequantize, quantize_to_grid
from finescale.grid.narrow import NOT_NARROW, narrow_outliers
from finescale.grid.outliers import column_outliers, single_outliers
from finescale.solvers.columns import ColumnRounder


def outlier_count(outliers: float, shape_OI: tuple[int, int], structured: bool) -> int:
    """How many weights (or columns, when structured) a layer keeps: ``outliers`` below 1 is a share of them, from 1 on
    their number; never more than there are."""
    available = shape_OI[1] if structured else shape_OI[0] * shape_OI[1]
    wanted = outliers * available if outliers < 1 else outliers
    return min(round(wanted), available)


def largest(score_IO: Tensor, count: int, structured: bool) -> Tensor:
    """The ``count`` entries of largest score as a mask [I, O]; if structured whole inputs, by the sum of theirs."""
    if structured:
        chosen_I = torch.zeros(score_IO.shape[0], dtype=torch.bool, device=score_IO.device)
        chosen_I[score_IO.sum(1).topk(count).indices] = True
        return chosen_I[:, None].expand_as(score_IO).contiguous()
    chosen = torch.zeros(score_IO.numel(), dtype=torch.bool, device=score_IO.device)
    chosen[score_IO.flatten().topk(count, sorted=False).indices] = True
    return chosen.view_as(score_IO)


def first_support(weight_OI: Tensor, count: int, structured: bool) -> Tensor:
    """Where the published algorithm starts, bool [O, I]: the largest weights, or the columns of largest norm."""
    return largest(weight_OI.float().square().T, count, structured).T


class CoordinateSupport:
    """The support by exact coordinate costs: an entry that is rounded costs H_jj (beta - nearest(beta))^2 more than one
    that is not, beta being its best value; the entries of largest cost are free in the next sweep.

    Args:
        free_IO: the first support, in solving order.
        count: entries (columns if ``structured``) to keep.
        structured: whole columns only.
        diagonal_I: of H, in solving order.
        grid: rows of the slab; ``group_of_I`` in the original order.
        group_of_I: group of each column in solving order.
    """

    def __init__(
        self, free_IO: Tensor, count: int, structured: bool, diagonal_I: Tensor, grid: Grid, group_of_I: list[int]
    ) -> None:
        self.free_IO, self.count, self.structured, self.diagonal_I = free_IO, count, structured, diagonal_I
        self.in_order = replace(grid, group_of_I=torch.tensor(group_of_I, device=free_IO.device))

    def round(self, column: int, beta_O: Tensor, group: int, rounder: ColumnRounder, out_O: Tensor) -> Tensor:
        """The value of a column: its best values on the support, else the nearest grid points."""
        rounder.nearest(beta_O, group, out_O)
        return torch.where(self.free_IO[column], beta_O, out_O, out=out_O)

    def update(self, current_IO: Tensor, beta_IO: Tensor) -> bool:
        """Choose the support anew; returns whether ``current_IO`` was changed (never)."""
        rounded_OI = dequantize(quantize_to_grid(beta_IO.T, self.in_order), self.in_order)
        cost_IO = (beta_IO - rounded_OI.T.to(beta_IO.dtype)).square_().mul_(self.diagonal_I[:, None])
        self.free_IO.copy_(largest(cost_IO, self.count, self.structured))  # in its place: kernels know where it lies
        return False


class GradientSupport:
    """The published support: H <- the largest entries of H - grad / L, with grad = 2 (Q + H - W) Sigma and
    L = 2 lambda_max(Sigma); in each sweep H is fixed and Q is rounded to the grid.

    Args:
        free_IO: the first support, in solving order; H starts as the weight there.
        weight_IO: the original weight.
        count: entries (columns if ``structured``) to keep.
        structured: whole columns only.
        hessian_II: Sigma in solving order.
    """

    def __init__(self, free_IO: Tensor, weight_IO: Tensor, count: int, structured: bool, hessian_II: Tensor) -> None:
        self.free_IO, self.weight_IO, self.count, self.structured = free_IO, weight_IO, count, structured
        self.step_II = hessian_II / largest_eigenvalue(hessian_II)
        self.addend_IO = weight_IO * free_IO

    def round(self, column: int, beta_O: Tensor, group: int, rounder: ColumnRounder, out_O: Tensor) -> Tensor:
        """The value Q + H of a column."""
        torch.sub(beta_O, self.addend_IO[column], out=out_O)
        return rounder.nearest(out_O, group, out_O).add_(self.addend_IO[column])

    def update(self, current_IO: Tensor, beta_IO: Tensor) -> bool:
        """One step on H; ``current_IO`` = Q + H follows it. Returns that it was changed."""
        del beta_IO
        moved_IO = self.addend_IO + self.step_II @ (self.weight_IO - current_IO)
        self.free_IO = largest(moved_IO.square(), self.count, self.structured)
        moved_IO.mul_(self.free_IO)
        current_IO.add_(moved_IO - self.addend_IO)
        self.addend_IO = moved_IO
        return True


Support = CoordinateSupport | GradientSupport


def largest_eigenvalue(matrix_II: Tensor, steps: int = 100) -> Tensor:
    """Of a symmetric positive semidefinite matrix, by power iteration from a fixed start; at least its largest diagonal
    entry, and 1 for a matrix of zeros."""
    vector_I = matrix_II.diagonal() + matrix_II.diagonal().mean()
    for _ in range(steps):
        product_I = matrix_II @ vector_I
        vector_I = product_I / product_I.norm().clamp(min=torch.finfo(matrix_II.dtype).tiny)
    value = torch.maximum(vector_I @ (matrix_II @ vector_I), matrix_II.diagonal().max())
    return torch.where(value > 0, value, torch.ones_like(value))


def with_outliers(
    value_OI: Tensor, support_OI: Tensor, grid: Grid, structured: bool, bits: int = 16
) -> tuple[QuantizedWeight, tuple[str, ...]]:
    """Split V = Q + H: the nearest grid points, and on the support what is left, in 16 bits or in 8;
    and a note where these do not hold it."""
    codes_OI = quantize_to_grid(value_OI, grid)
    addend_OI = value_OI - dequantize(codes_OI, grid).to(value_OI.dtype)
    if structured:
        return QuantizedWeight(codes_OI, grid, column_outliers(addend_OI, support_OI[0], grid.scale_dtype)), ()
    wide = QuantizedWeight(codes_OI, grid, single_outliers(addend_OI, support_OI, grid.scale_dtype))
    if bits == 16:
        return wide, ()
    narrow = narrow_outliers(wide, value_OI, support_OI)
    return (wide, (NOT_NARROW,)) if narrow is None else (narrow, ())
