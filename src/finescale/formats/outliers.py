"""Weights beside the grid, in checkpoints: tensors next to the packed ones, known to finescale only.

    weight_outlier_values   [N] row after row, or [O, C] for whole columns; the type of the scales
    weight_outlier_columns  int16 (int32 beyond 32768 inputs) [N] rising in each row, or [C] rising
    weight_outlier_rows     int32 [O + 1] where each row begins among the N; absent for whole columns

They are added to the dequantized weight. Compressed sparse rows, so that a product reads them as they lie.

Shape legend: O outputs, I inputs, N single outliers, C outlier columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from finescale.errors import CheckpointError, InputError
from finescale.formats.checks import SCALE_DTYPES, expect_shape, require
from finescale.grid import Outliers, QuantizedWeight
from finescale.grid.outliers import column_dtype

VALUES, COLUMNS, ROWS = "weight_outlier_values", "weight_outlier_columns", "weight_outlier_rows"
SUFFIXES = (VALUES, COLUMNS, ROWS)


def pack(outliers: Outliers | None) -> dict[str, Tensor]:
    """The tensors by suffix; none for None."""
    if outliers is None:
        return {}
    tensors = {VALUES: outliers.value.contiguous(), COLUMNS: outliers.column.contiguous()}
    return tensors if outliers.row_start_R is None else tensors | {ROWS: outliers.row_start_R.contiguous()}


def unpack(tensors: Mapping[str, Tensor], rows: int, columns: int) -> Outliers | None:
    """The outliers of a layer [rows, columns], None when it has none.

    Raises:
        CheckpointError: a tensor is missing, of the wrong type or shape, or an index is out of order.
    """
    if not any(suffix in tensors for suffix in SUFFIXES):
        return None
    value, column = require(tensors, [VALUES, COLUMNS], "compressed-tensors")
    pointers_R = tensors.get(ROWS)
    count = column.shape[0]
    expect_shape(column, (count,), COLUMNS)
    expect_shape(value, (rows, count) if pointers_R is None else (count,), VALUES)
    if value.dtype not in SCALE_DTYPES or column.dtype != column_dtype(columns):
        raise CheckpointError(f"{VALUES} or {COLUMNS} have types that finescale does not write; quantize again.")
    rising = column.to(torch.int64).diff() > 0
    if pointers_R is not None:
        expect_shape(pointers_R, (rows + 1,), ROWS)
        steps = pointers_R.diff()
        if int(pointers_R[0]) != 0 or int(pointers_R[-1]) != count or bool((steps < 0).any()):
            raise CheckpointError(f"{ROWS} are no row pointers of {count} outliers; the file is damaged.")
        first = pointers_R[1:-1].to(torch.int64)
        rising[first[(first > 0) & (first < count)] - 1] = True  # a new row may begin anywhere
    in_range = count == 0 or (int(column.min()) >= 0 and int(column.max()) < columns)
    if not in_range or not bool(rising.all()) or not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{COLUMNS} are out of order or {VALUES} not finite; the file is damaged.")
    return Outliers(columns, value, column, pointers_R)


def no_outliers(format_name: str, weight: QuantizedWeight) -> None:
    """Raises InputError when a weight has outliers or quantized scales, for formats that have no place for them."""
    if weight.outliers is not None or weight.grid.bilevel is not None:
        raise InputError(f"{format_name} has no place for outliers; save with compressed-tensors or dense.")
