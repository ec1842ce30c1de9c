"""Matrix products of the solvers: full float32, or products of parts of it; never plain TF32 or float16.

Shape legend: O outputs, I inputs, B columns of one batch, C columns of one block, W columns of the kernel's matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from finescale.kernels.half import half_product_adder

Kind = Literal["float32", "3xtf32", "3xfp16", "2xfp16"]
DEPTH: dict[Kind, int] = {"float32": 1, "3xtf32": 1, "3xfp16": 3, "2xfp16": 2}
"""Rows that float16 parts make of one row of H and of the changes."""
LARGEST_BATCH = 128
"""Columns that one kernel launch sweeps at most."""
LARGEST_FP16 = 2.0**15
"""Of a normalized H, and of a change in units of a row, that float16 parts hold."""
TF32_MASK = -(1 << 13)
"""Bits of a float32 that TF32 keeps: sign, exponent and 10 bits of the fraction."""


class HalfRangeError(ArithmeticError):
    """Values that left the grid went so far that float16 parts do not hold their changes."""


@cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Matrix products of float32 on tensor cores with inputs cut to TF32, or in full float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def tf32_parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as an exact sum of a TF32 number and a rest below 2^-10 of it."""
    high = (matrix.view(torch.int32) & TF32_MASK).view(torch.float32)
    return high, matrix - high


def fp16_parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the sum of two float16 numbers, up to 2^-22 of it or 2^-25, the larger; below 65504."""
    high = matrix.half()
    return high, (matrix - high.float()).half()


def fp16_sum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``fp16_parts`` as float32."""
    high, low = fp16_parts(matrix)
    return high.float(), low.float()


class Products:
    """Products with the transposed normalized H, in float32 or as products of parts.

    With parts, a b is computed as a_high b_high + a_high b_low + a_low b_high on tensor cores, which sum in float32.
    What is left out is 2^-20 of the product, near the rounding of float32 itself; a plain TF32 or float16 product would
    lose 2^-10.

    float16 parts are the faster ones, but of few magnitudes: with them the solver counts in units near the step of the
    grid (``unit_O``), and a normalized H beyond ``LARGEST_FP16`` (one dead input in millions, undamped) gets TF32 parts
    instead. The float16 parts of a batch lie one below the other, three rows for each row of H (high, high, low), as
    those of the changes do (high, low, high): then three products are one of threefold depth, which reads and writes
    the targets once.

    ``2xfp16``: where a sweep makes changes that are float16 numbers (``rounded_change``), a_low is zero, and two
    products are as precise as three.

    Args:
        normalized_II: H_kj / H_jj with a zero diagonal, in solving order.
        kind: float32, or the parts (for float32 only; float64 makes the changes of ``2xfp16`` in full products).
        batch: columns of one batch.
    """

    def __init__(self, normalized_II: Tensor, kind: Kind = "float32", batch: int = LARGEST_BATCH) -> None:
        if DEPTH[kind] > 1 and max(map(abs, map(float, normalized_II.aminmax()))) > LARGEST_FP16:
            kind = "3xtf32"
        self.half_changes = kind == "2xfp16"
        self.kind: Kind = kind if normalized_II.dtype == torch.float32 else "float32"
        self.depth = DEPTH[self.kind]
        self.batch = batch
        self.columns = normalized_II.shape[0]
        width = max(batch, LARGEST_BATCH)
        # Row k of a batch's own part: H_kj / H_jj of its columns j, padded for the kernel.
        self.inner_IW = normalized_II.new_zeros(self.columns, width)
        for start, end in self.batches(0, self.columns):
            self.inner_IW[start:end, : end - start] = normalized_II[start:end, start:end]
        self.parts: tuple[Tensor, ...] = (normalized_II,)
        if self.kind == "3xtf32":
            self.parts = tf32_parts(normalized_II)
        elif self.depth > 1:
            stacked = normalized_II.new_empty(self.depth * self.columns, self.columns, dtype=torch.float16)
            for start, end in self.batches(0, self.columns):
                high, low = fp16_parts(normalized_II[start:end])
                rows = (high, high, low) if self.depth == 3 else (high, low)
                torch.cat(rows, out=stacked[self.depth * start : self.depth * end])
            self.parts = (stacked,)

    def unit_O(self, weight_IO: Tensor, scale_GO: Tensor) -> Tensor | None:
        """Powers of two by which the rows of a weight and its grid are multiplied to suit float16 parts; None without
        them. Every row is solved in its own unit: the largest step of the grid becomes about one."""
        if self.depth == 1 and not self.half_changes:
            return None
        largest_O = torch.maximum(scale_GO.abs().amax(0), weight_IO.abs().amax(0) * 2.0**-13)
        return torch.exp2(-torch.frexp(largest_O).exponent.to(largest_O.dtype).clamp(-100, 100))

    def batches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Start and end of each batch of the columns first:last."""
        for start in range(first, last, self.batch):
            yield start, min(start + self.batch, last)

    def inner(self, start: int, end: int) -> Tensor:
        """[B, B], contiguous: row j holds H_kj / H_jj of the columns k of a batch."""
        return self.inner_IW[start:end, : end - start].T.contiguous()

    def new_changes(self, columns: int, rows: int) -> Tensor:
        """Room for the changes of so many columns: [C, O], with float16 parts [3 * C, O] or [2 * C, O]."""
        dtype = torch.float16 if self.depth > 1 else self.parts[0].dtype
        return torch.zeros(self.depth * columns, rows, dtype=dtype, device=self.parts[0].device)

    def changes_of(self, changes: Tensor, start: int, end: int) -> Tensor:
        """The part of a block's changes that belongs to its columns start:end (whole batches)."""
        return changes[self.depth * start : self.depth * end]

    def rounded_change(self, change_O: Tensor) -> Tensor:
        """The change that a sweep should make for one that it wants, up to 2^-12 of it.

        The new value follows the change, so that targets and values agree; what is off the grid thereby is gone with
        the entry's next change.
        """
        return change_O.half().to(change_O.dtype) if self.half_changes else change_O

    def write_changes(self, changes: Tensor, change_BO: Tensor) -> None:
        """Float changes of one batch (for ``2xfp16`` float16 numbers) into their place among ``new_changes``."""
        if self.depth > 1:
            high, low = fp16_parts(change_BO)
            torch.cat((high, low, high) if self.depth == 3 else (high, high), out=changes)
        else:
            changes.copy_(change_BO)

    def add_(self, beta_IO: Tensor, changes: Tensor, start: int, end: int, first: int, last: int) -> None:
        """beta[first:last] += N[start:end, first:last]^T change, for the changes of the columns start:end, which are
        whole batches, as ``new_changes`` holds them."""
        self.adder(beta_IO, changes, start, end, first, last)()

    def adder(
        self, beta_IO: Tensor, changes: Tensor, start: int, end: int, first: int, last: int
    ) -> Callable[[], object]:
        """A function that does what ``add_`` does, with what ``changes`` then holds."""
        if first == last:
            return lambda: None
        sum_IO = beta_IO[first:last]
        if self.depth > 1:
            part_IK = self.parts[0][self.depth * start : self.depth * end, first:last].T
            return half_product_adder(sum_IO, part_IK, changes)
        factors = [part_II[start:end, first:last].T for part_II in self.parts]

        def add() -> None:
            if len(factors) == 1:
                with tf32_products(False):
                    sum_IO.addmm_(factors[0], changes)
                return
            high_CO, low_CO = tf32_parts(changes)
            with tf32_products(True):
                sum_IO.addmm_(factors[0], low_CO)
                sum_IO.addmm_(factors[1], high_CO)
                sum_IO.addmm_(factors[0], high_CO)

        return add

    def targets_(self, beta_IO: Tensor, target_IO: Tensor, current_IO: Tensor, block: int) -> None:
        """The running targets from scratch, into ``beta_IO``: W + N^T (W - Q), ``block`` columns of N at a time."""
        beta_IO.copy_(target_IO)
        for first in range(0, self.columns, block):
            last = min(first + block, self.columns)
            change_CO = target_IO[first:last] - current_IO[first:last]
            changes = self.new_changes(last - first, beta_IO.shape[1])
            for summand_CO in fp16_sum(change_CO) if self.kind == "2xfp16" else (change_CO,):
                for start, end in self.batches(first, last):
                    part = self.changes_of(changes, start - first, end - first)
                    self.write_changes(part, summand_CO[start - first : end - first])
                self.add_(beta_IO, changes, first, last, 0, self.columns)
