"""Weights beside the grid, in checkpoints: tensors next to the packed ones, known to finescale only.

    weight_outlier_values   [N] row after row, or [O, C] for whole columns; the type of the scales. uint8: the bits of
                            float8 (e4m3) numbers, in steps of the grid
    weight_outlier_gaps     uint8 or int16 [K]: steps from one single entry to the next (``grid.outliers.place_gaps``)
    weight_outlier_columns  int16 (int32 beyond 32768 inputs) [C] rising: whole columns

They are added to the dequantized weight.

Shape legend: O outputs, I inputs, N single outliers, K codes of their places, C outlier columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from finescale.errors import CheckpointError, InputError
from finescale.formats.checks import SCALE_DTYPES, expect_shape, require
from finescale.grid import Grid, Outliers, QuantizedWeight
from finescale.grid.narrow import value_bytes, values_of_bytes
from finescale.grid.outliers import GAP_DTYPES, column_dtype, place_gaps, places_from_gaps

VALUES, COLUMNS, GAPS = "weight_outlier_values", "weight_outlier_columns", "weight_outlier_gaps"
SUFFIXES = (VALUES, COLUMNS, GAPS)


def pack(outliers: Outliers | None, grid: Grid) -> dict[str, Tensor]:
    """The tensors by suffix; none for None."""
    if outliers is None:
        return {}
    tensors = {VALUES: value_bytes(outliers, grid) if outliers.narrow else outliers.value.contiguous()}
    if outliers.structured:
        return tensors | {COLUMNS: outliers.column.contiguous()}
    return tensors | {GAPS: place_gaps(outliers)}


def unpack(tensors: Mapping[str, Tensor], rows: int, columns: int, grid: Grid) -> Outliers | None:
    """The outliers of a layer [rows, columns] on ``grid``, None when it has none.

    Raises:
        CheckpointError: a tensor is missing, of the wrong type or shape, or an index is out of order.
    """
    if not any(suffix in tensors for suffix in SUFFIXES):
        return None
    if COLUMNS in tensors and GAPS in tensors:
        raise CheckpointError(f"{COLUMNS} and {GAPS} exclude each other; the file is damaged.")
    value, places = require(tensors, [VALUES, COLUMNS if COLUMNS in tensors else GAPS], "compressed-tensors")
    narrow = value.dtype == torch.uint8 and GAPS in tensors
    if not narrow and (value.dtype not in SCALE_DTYPES or not bool(torch.isfinite(value).all())):
        raise CheckpointError(f"{VALUES} are of a type that finescale does not write, or not finite; quantize again.")
    if COLUMNS in tensors:
        return _of_columns(value, places, rows, columns)
    found = _single(value, places, rows, columns)
    if not narrow:
        return found
    wide_N = values_of_bytes(value, found, grid)
    if not bool(torch.isfinite(wide_N).all()):
        raise CheckpointError(f"{VALUES} of outliers are not finite; the file is damaged.")
    return replace(found, value=wide_N, narrow=True)


def _of_columns(value: Tensor, column: Tensor, rows: int, columns: int) -> Outliers:
    expect_shape(column, (column.numel(),), COLUMNS)
    expect_shape(value, (rows, column.numel()), VALUES)
    if column.dtype != column_dtype(columns):
        raise CheckpointError(f"{COLUMNS} have a type that finescale does not write; quantize again.")
    in_range = column.numel() == 0 or (int(column.min()) >= 0 and int(column.max()) < columns)
    if not in_range or not bool((column.to(torch.int64).diff() > 0).all()):
        raise CheckpointError(f"{COLUMNS} are out of order; the file is damaged.")
    return Outliers(columns, value, column, None)


def _single(value: Tensor, gaps: Tensor, rows: int, columns: int) -> Outliers:
    expect_shape(gaps, (gaps.numel(),), GAPS)
    if gaps.dtype not in GAP_DTYPES:
        raise CheckpointError(f"{GAPS} have a type that finescale does not write; quantize again.")
    place_N = places_from_gaps(gaps)
    expect_shape(value, (place_N.numel(),), VALUES)
    ends = place_N.numel() == 0 or int(place_N[-1]) < rows * columns
    if not ends or (gaps.numel() > 0 and (int(gaps.min()) < 0 or int(gaps[-1]) == 0)):
        raise CheckpointError(f"{GAPS} of outliers lead out of the weight; the file is damaged.")
    row_start_R = torch.zeros(rows + 1, dtype=torch.int32, device=value.device)
    row_start_R[1:] = torch.bincount(place_N // columns, minlength=rows).cumsum(0)
    return Outliers(columns, value, (place_N % columns).to(column_dtype(columns)), row_start_R)


def no_outliers(format_name: str, weight: QuantizedWeight) -> None:
    """Raises InputError when a weight has outliers or quantized scales, for formats that have no place for them."""
    if weight.outliers is not None or weight.grid.bilevel is not None:
        raise InputError(f"{format_name} has no place for outliers; save with compressed-tensors or dense.")
