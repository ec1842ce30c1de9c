"""Weights kept beside the grid: few entries anywhere, or whole input columns.

Shape legend: O outputs, I inputs, N single outliers, C outlier columns, R = O + 1 row pointers, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finescale.errors import NumericsError

LARGEST_INT16 = 2**15
GAP_DTYPES = (torch.uint8, torch.int16)
"""Types of the steps between single entries."""


@dataclass(frozen=True)
class Outliers:
    """What is added to the dequantized weight of a layer (QuantEase, arXiv 2309.01885, section on outliers).

    Attributes:
        columns: inputs of the layer.
        value: the addends in the type of the file: [N] for single entries, row after row and in each row by rising
            column; [O, C] for whole columns.
        column: their columns, int16 (int32 beyond 32768 inputs): [N] or [C], rising.
        row_start_R: int32 [O + 1], where each row's entries begin in ``value``; None for whole columns.
        narrow: a file has a byte for each value, a float8 number of steps of the grid; ``value`` is float32 then.
    """

    columns: int
    value: Tensor
    column: Tensor
    row_start_R: Tensor | None
    narrow: bool = False

    @property
    def structured(self) -> bool:
        """Whether whole columns are kept."""
        return self.row_start_R is None

    @property
    def rows(self) -> int:
        return self.value.shape[0] if self.row_start_R is None else self.row_start_R.shape[0] - 1

    @property
    def count(self) -> int:
        """How many weights have an addend."""
        return self.value.numel()

    @property
    def stored_bits(self) -> int:
        """Bits of all tensors as a file holds them: places of single entries as gaps."""
        places = self.column if self.row_start_R is None else place_gaps(self)
        return 8 * ((1 if self.narrow else self.value.element_size()) * self.count + places.nbytes)

    def tensors(self) -> Iterator[Tensor]:
        yield self.value
        yield self.column
        if self.row_start_R is not None:
            yield self.row_start_R

    def dense(self) -> Tensor:
        """The addends as float32 [O, I], zero elsewhere."""
        out_OI = torch.zeros(self.rows, self.columns, device=self.value.device)
        column = self.column.to(torch.int64)
        if self.row_start_R is None:
            out_OI[:, column] = self.value.float()
        else:
            out_OI[self.row_of_N(), column] = self.value.float()
        return out_OI

    def mask(self) -> Tensor:
        """Where there is an addend, bool [O, I]."""
        out_OI = torch.zeros(self.rows, self.columns, dtype=torch.bool, device=self.value.device)
        column = self.column.to(torch.int64)
        if self.row_start_R is None:
            out_OI[:, column] = True
        else:
            out_OI[self.row_of_N(), column] = True
        return out_OI

    def linear(self, x_TI: Tensor) -> Tensor:
        """The part of the layer's output that is due to the addends: [..., I] -> [..., O], in the type of the input."""
        column = self.column.to(torch.int64)
        if self.row_start_R is None:
            return x_TI[..., column] @ self.value.to(x_TI.dtype).T
        out_TO = x_TI.new_zeros(*x_TI.shape[:-1], self.rows)
        return out_TO.index_add_(-1, self.row_of_N(), x_TI[..., column] * self.value.to(x_TI.dtype))

    def rows_slice(self, rows: slice) -> Outliers:
        """The addends of some consecutive rows."""
        if self.row_start_R is None:
            return replace(self, value=self.value[rows].contiguous())
        start, stop, _ = rows.indices(self.rows)
        first, last = int(self.row_start_R[start]), int(self.row_start_R[stop])
        pointers_R = self.row_start_R[start : stop + 1] - first
        return replace(self, value=self.value[first:last], column=self.column[first:last], row_start_R=pointers_R)

    def to(self, device: torch.device | str) -> Outliers:
        pointers_R = None if self.row_start_R is None else self.row_start_R.to(device)
        return replace(self, value=self.value.to(device), column=self.column.to(device), row_start_R=pointers_R)

    def row_of_N(self) -> Tensor:
        """The row of each single entry, int64 [N]."""
        assert self.row_start_R is not None
        counts_O = self.row_start_R.diff().to(torch.int64)
        return torch.repeat_interleave(torch.arange(self.rows, device=counts_O.device), counts_O)


def single_outliers(addend_OI: Tensor, chosen_OI: Tensor, dtype: torch.dtype) -> Outliers:
    """The addends at the entries marked in ``chosen_OI`` (bool [O, I]), stored as ``dtype``; raises NumericsError when
    one does not fit."""
    row_N, column_N = chosen_OI.nonzero(as_tuple=True)
    row_start_R = torch.zeros(chosen_OI.shape[0] + 1, dtype=torch.int32, device=chosen_OI.device)
    row_start_R[1:] = chosen_OI.sum(1).cumsum(0)
    columns = chosen_OI.shape[1]
    return Outliers(
        columns, _stored(addend_OI[row_N, column_N], dtype), column_N.to(column_dtype(columns)), row_start_R
    )


def column_outliers(addend_OI: Tensor, chosen_I: Tensor, dtype: torch.dtype) -> Outliers:
    """The addends of the columns marked in ``chosen_I`` (bool [I]), stored as ``dtype``; raises like
    ``single_outliers``."""
    column_C = chosen_I.nonzero().squeeze(1)
    columns = chosen_I.shape[0]
    return Outliers(
        columns, _stored(addend_OI[:, column_C], dtype).contiguous(), column_C.to(column_dtype(columns)), None
    )


def stack_outliers(parts: list[Outliers]) -> Outliers:
    """The addends of slabs of rows, one below the other; whole columns must be the same in all of them."""
    first = parts[0]
    value = torch.cat([part.value for part in parts])
    if first.row_start_R is None:
        return replace(first, value=value)
    pointers, base = [torch.zeros_like(first.row_start_R[:1])], 0
    for part in parts:
        assert part.row_start_R is not None
        pointers.append(part.row_start_R[1:] + base)
        base += part.count
    return replace(
        first, value=value, column=torch.cat([part.column for part in parts]), row_start_R=torch.cat(pointers)
    )


def place_gaps(outliers: Outliers) -> Tensor:
    """Where single entries lie, as a file holds it: steps from one entry to the next, row after row through the whole
    weight, the first from before the first weight.

    A code from 1 on is a step to an entry; 0 goes on as far as a code reaches, and no entry is there. uint8, or int16
    where that takes less: 1 % of the weights take about 9 bits each.
    """
    place_N = outliers.row_of_N() * outliers.columns + outliers.column.to(torch.int64)
    step_N = place_N.diff(prepend=place_N.new_full((1,), -1))
    return min(
        (_gap_codes(step_N, dtype) for dtype in GAP_DTYPES), key=lambda codes: codes.numel() * codes.element_size()
    )


def _gap_codes(step_N: Tensor, dtype: torch.dtype) -> Tensor:
    reach = torch.iinfo(dtype).max
    before_N = (step_N - 1) // reach  # codes without an entry
    code_K = step_N.new_zeros(step_N.numel() + int(before_N.sum()))
    code_K[torch.arange(step_N.numel(), device=step_N.device) + before_N.cumsum(0)] = step_N - before_N * reach
    return code_K.to(dtype)


def places_from_gaps(code_K: Tensor) -> Tensor:
    """The inverse of ``place_gaps``: int64 [N], entries as places in the flattened weight."""
    step_K = code_K.to(torch.int64)
    place_K = torch.where(step_K == 0, torch.iinfo(code_K.dtype).max, step_K).cumsum(0) - 1
    return place_K[step_K > 0]


def column_dtype(columns: int) -> torch.dtype:
    """The type in which column indices of a layer with so many inputs are stored."""
    return torch.int16 if columns <= LARGEST_INT16 else torch.int32


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    stored = value.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(f"an outlier does not fit {dtype}; give the model as bfloat16 or float32.")
    return stored
